"""From `scheduler.type` and `scheduler.params` to a schedule object: DeepSpeed's five, or torch's by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lorica.schedules.base import HasParamGroups
from lorica.schedules.one_cycle import OneCycle
from lorica.schedules.range_test import LRRangeTest
from lorica.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

SCHEDULES: dict[str, Callable[..., Any]] = {
    "LRRangeTest": LRRangeTest,
    "OneCycle": OneCycle,
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
}
VALID_LR_SCHEDULES = list(SCHEDULES)
TORCH_PREFIX = "torch.optim.lr_scheduler."


class LRSchedule(Protocol):
    """What the engine asks of a schedule, its own or a client's."""

    def step(self) -> None: ...
    def get_last_lr(self) -> list[float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def schedule_from_config(type: str, params: Mapping[str, Any], optimizer: HasParamGroups) -> LRSchedule:
    """Make the schedule that a configuration describes.

    Args:
        type: one of `VALID_LR_SCHEDULES`, or a class of torch.optim.lr_scheduler (with or without that prefix).
        params: its keyword arguments.
        optimizer: has `param_groups`; torch's schedules want a torch.optim.Optimizer.
    Raises:
        ValueError: for an unknown type or parameter.
        NotImplementedError: for ReduceLROnPlateau, which needs a metric at every step.
    """
    bare = type.removeprefix(TORCH_PREFIX)
    maker = SCHEDULES.get(type) or _torch_schedules().get(bare)
    if maker is None:
        raise ValueError(_unknown(bare))
    if bare == "ReduceLROnPlateau":
        raise NotImplementedError(
            "scheduler.type: ReduceLROnPlateau needs a metric at every step, which a configuration cannot give. "
            "Fix: make the object yourself and call its step(metric) in your loop."
        )
    _require_arguments(type, params, maker)
    schedule: LRSchedule = maker(optimizer, **params)
    return schedule


def _torch_schedules() -> dict[str, Callable[..., Any]]:
    import torch.optim.lr_scheduler as module

    kinds = {name: value for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")}
    return {name: kind for name, kind in kinds.items() if issubclass(kind, module.LRScheduler)}


def _require_arguments(type: str, params: Mapping[str, Any], maker: Callable[..., Any]) -> None:
    signature = inspect.signature(maker).parameters
    known = [name for name in signature if name != "optimizer"]
    missing = [name for name in known if signature[name].default is inspect.Parameter.empty and name not in params]
    unknown = sorted(set(params) - set(known))
    if missing or unknown:
        raise ValueError(
            f"scheduler.params: {type} takes {known}, got {sorted(params)} (missing: {missing}, unknown: {unknown}). "
            "Fix: add the missing ones and remove the unknown ones."
        )


def _unknown(name: str) -> str:
    known = [*VALID_LR_SCHEDULES, *_torch_schedules()]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"scheduler.type: expected one of {VALID_LR_SCHEDULES} or a class of torch.optim.lr_scheduler, got {name!r}."
        f"{hint} Fix: correct the name, or pass a schedule object to initialize()."
    )
