"""Lorica: ZeRO, offload and parallelism for an unmodified `nn.Module`. Owns the public names, nothing else.

Names are imported on first use, so that `lorica check` and `import lorica` stay cheap (no torch).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "initialize": "lorica.construct",
    "add_config_arguments": "lorica.arguments",
    "init_distributed": "lorica.comm",
    "Engine": "lorica.engine",
    "Config": "lorica.config",
    "ConfigError": "lorica.config",
}
_SUBMODULES = ("zero", "comm", "config", "ops", "optim", "schedules")

__all__ = [
    "Config",
    "ConfigError",
    "Engine",
    "__version__",
    "add_config_arguments",
    "comm",
    "config",
    "init_distributed",
    "initialize",
    "ops",
    "optim",
    "schedules",
    "zero",
]

if TYPE_CHECKING:
    from lorica import comm, config, ops, optim, schedules, zero
    from lorica.arguments import add_config_arguments
    from lorica.comm import init_distributed
    from lorica.config import Config, ConfigError
    from lorica.construct import initialize
    from lorica.engine import Engine


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"lorica.{name}")
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lorica' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
