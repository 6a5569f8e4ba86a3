"""Forms that older DeepSpeed versions, its documentation or configurations in the wild use, and what they mean today.

Renamed keys are declared beside the key they became (`aliases`, `deprecated` in keys.py); here are names without a key
of their own and blocks that stand in another place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorica.config.errors import Problem, show
from lorica.config.jsonc import Path
from lorica.config.source import plain

_FILLED_BY_TRAINER = "only the program that wrote it reads it"
_NO_SCALING = "bf16 needs no loss scale"

IGNORED: dict[Path, str] = {
    ("low_cpu_mem_usage",): _FILLED_BY_TRAINER,
    ("cuda_visible_devices",): "give devices to the launcher: lorica --include",
    ("msamp",): "8-bit training by MS-AMP is a program of its own",
    ("zero_optimization", "grad_hooks"): "DeepSpeed documents it, but has no such key",
    ("zero_optimization", "cpu_offload_use_pin_memory"): "use offload_optimizer.pin_memory",
    ("bf16", "loss_scale"): _NO_SCALING,
    ("bf16", "initial_scale_power"): _NO_SCALING,
    ("bf16", "loss_scale_window"): _NO_SCALING,
    ("bf16", "hysteresis"): _NO_SCALING,
    ("bf16", "consecutive_hysteresis"): _NO_SCALING,
    ("bf16", "min_loss_scale"): _NO_SCALING,
    ("bf16", "auto_cast"): "it is a key of fp16",
}
"""Names that are accepted, do nothing and warn, by path -> why."""

ELSEWHERE: dict[Path, str] = {("optimizer", "params", "max_grad_norm"): "gradient_clipping"}
"""Names that other programs know and whose meaning is another key here -> that key."""

COMMENT_PREFIXES = ("//", "#", "_comment", "$schema")
"""Keys that begin like this are comments."""


@dataclass
class Rewritten:
    """A raw configuration in today's form: what moved (new path -> written path), what to say about it."""

    root: dict[str, Any]
    moved: dict[Path, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def written(self, path: Path) -> Path:
        """The path as the user wrote it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.moved:
                return self.moved[path[:end]] + path[end:]
        return path


def rewrite(raw: dict[str, Any]) -> Rewritten:
    """Bring blocks in old places to where they are today. `raw` is not modified."""
    result = Rewritten(plain(raw))
    for move in (_boolean_zero, _top_level_allgather, _cpu_offload, _aio_inside_zero):
        move(result)
    return result


def _boolean_zero(result: Rewritten) -> None:
    value = result.root.get("zero_optimization")
    if isinstance(value, bool):
        result.root["zero_optimization"] = {"stage": 1} if value else {}
        result.moved[("zero_optimization", "stage")] = ("zero_optimization",)
        meaning = '{"stage": 1}' if value else '{"stage": 0}'
        result.warnings.append(f"zero_optimization = {show(value)} is deprecated, read as {meaning}")


def _top_level_allgather(result: Rewritten) -> None:
    _move(result, ("allgather_size",), ("zero_optimization", "allgather_bucket_size"), lambda value: value)


def _cpu_offload(result: Rewritten) -> None:
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        _move(result, ("zero_optimization", old), ("zero_optimization", new), _device_block)


def _device_block(value: Any) -> Any:
    """{"device": ...} for a boolean; anything else is left for the schema to refuse."""
    return {"device": "cpu" if value else "none"} if isinstance(value, bool) else value


def _aio_inside_zero(result: Rewritten) -> None:
    _move(result, ("zero_optimization", "aio"), ("aio",), lambda value: value)


def _move(result: Rewritten, old: Path, new: Path, convert: Callable[[Any], Any]) -> None:
    """Move the value at `old` to `new`; both given is a problem."""
    source = _block(result.root, old[:-1])
    if source is None or old[-1] not in source:
        return
    if len(new) > 1 and new[0] not in result.root:
        result.root[new[0]] = {}
    target = _block(result.root, new[:-1])
    if target is None:  # something else stands where the block should be: the schema will say so
        return
    value = source.pop(old[-1])
    name, today = ".".join(old), ".".join(new)
    if new[-1] in target:
        message = f"is the old place of {today}, which is given too"
        result.problems.append(Problem(name, value, message, f"remove {name}"))
        return
    target[new[-1]] = convert(value)
    result.moved[new] = old
    result.warnings.append(f"{name} is deprecated, read as {today} = {show(target[new[-1]])}")


def _block(root: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The block at `path`; None if there is none."""
    block: Any = root
    for name in path:
        block = block.get(name) if isinstance(block, dict) else None
    return block if isinstance(block, dict) else None
