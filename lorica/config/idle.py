"""Which keys mean nothing in a configuration because another key is off, as a table. Says nothing to anybody itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lorica.config.schema import Config

_OPTIMIZER = "zero_optimization.offload_optimizer"


class Idle(NamedTuple):
    """Keys that begin like this mean nothing while `off` holds; `needs` completes "only means something ..."."""

    start: str
    off: Callable[[Config], bool]
    needs: str


def _optimizer_device(config: Config) -> str:
    return config.zero_optimization.offload_optimizer.device


def _uses_files(config: Config) -> bool:
    offload = config.zero_optimization.offload_optimizer
    return offload.device == "nvme" or (offload.device == "auto" and offload.nvme_path is not None)


def _offloads(config: Config) -> bool:
    return _optimizer_device(config) != "none" or config.zero_optimization.offload_param.device != "none"


_FILES = 'with offload_optimizer.device "nvme", or "auto" and an nvme_path'

IDLE: tuple[Idle, ...] = (
    Idle("zero_optimization.stage3_", lambda c: c.zero_optimization.stage < 3, "at stage 3"),
    Idle("kernels.library", lambda c: not c.kernels.inject, "with kernels.inject"),
    Idle(f"{_OPTIMIZER}.ratio", lambda c: _optimizer_device(c) == "none", "with offload_optimizer.device"),
    Idle(f"{_OPTIMIZER}.super_offload", lambda c: _optimizer_device(c) == "none", "with offload_optimizer.device"),
    Idle(
        f"{_OPTIMIZER}.cpuadam_cores_perc",
        lambda c: not c.zero_optimization.offload_optimizer.super_offload or c.lorica.offload.threads is not None,
        "with super_offload and without lorica.offload.threads",
    ),
    Idle(f"{_OPTIMIZER}.nvme_path", lambda c: not _uses_files(c), _FILES),
    Idle(f"{_OPTIMIZER}.buffer_count", lambda c: _optimizer_device(c) == "none", "with offload_optimizer.device"),
    Idle("aio.", lambda c: not _uses_files(c), _FILES),
    Idle("lorica.offload.disk_space", lambda c: not _uses_files(c), _FILES),
    *(Idle(f"lorica.offload.{key}", lambda c: False, "") for key in ("moments", "master", "activations")),
    Idle("lorica.offload.", lambda c: not _offloads(c), "with offload_optimizer or offload_param"),
)


def idle(config: Config, dotted: str) -> str:
    """Why a key means nothing in `config`; empty if it means something."""
    row = next((row for row in IDLE if dotted.startswith(row.start)), None)
    return f"only means something {row.needs}" if row is not None and row.off(config) else ""
