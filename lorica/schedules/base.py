"""What all schedules share: a pure formula of the step number, published into the param groups of an optimizer.

Timing. `last_batch_iteration` is -1 at construction, when the groups get the value "before start"; the step() that
follows optimizer update k (counted from 0) sets it to k. So update k runs with the value of iteration k - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class HasParamGroups(Protocol):
    """An optimizer, as far as a schedule looks at it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Schedule:
    """A learning-rate schedule; subclasses give the formula `lr_at`.

    Args:
        optimizer: anything with `param_groups`; their "lr" is written at once and at every step.
        last_batch_iteration: -1 starts anew, k >= 0 goes on after update k.
    """

    def __init__(self, optimizer: HasParamGroups, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] = []
        self._publish()

    def lr_at(self, iteration: int) -> list[float]:
        """The learning rate of each param group after update number `iteration`; -1: before the first."""
        raise NotImplementedError

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Publish the learning rates for the next update; call it once after each one that was not skipped."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = following if last_batch_iteration is None else last_batch_iteration
        self._publish()

    def get_lr(self) -> list[float]:
        """The learning rates by formula, one per param group."""
        return self.lr_at(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """The learning rates published last; valid before the first step too."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """All that a schedule must remember: {"last_batch_iteration": k}."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the groups get its learning rates at once."""
        self.last_batch_iteration = int(state_dict["last_batch_iteration"])
        self._publish()

    def _publish(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


def per_group(schedule: str, key: str, value: float | Sequence[float], optimizer: HasParamGroups) -> list[float]:
    """One number per param group, from a number or a list of as many.

    Raises:
        ValueError: if a list has another length.
    """
    num_groups = len(optimizer.param_groups)
    if not isinstance(value, Sequence):
        return [float(value)] * num_groups
    if len(value) != num_groups:
        raise ValueError(
            f"{schedule}: {key} must be a number or a list of {num_groups} (one per param group), got {len(value)} "
            f"values. Fix: correct {key}."
        )
    return [float(item) for item in value]


def require_count(schedule: str, key: str, value: Any) -> int:
    """Return `value`; raise ValueError unless it is a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{schedule}: {key} must be an int > 0, got {value!r}. Fix: set {key}, e.g. to 1.")
    return value
