"""A step that the host takes for applied before the device has said so, and how to take it back.

On a device the update kernels skip by themselves when the gradient is not finite, so the host need not wait to launch
them. It goes on as if the step were good: counters, schedule, loss scale. Before anything is computed from those again
(the next backward, or a question of the user's) it looks at the flag, which has arrived long ago as a rule. If the step
was skipped, the schedule, the loss scale and the param groups get back the values that they had. Owns that memory of
the past; decides nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lorica.precision import LossScale


def can_be_taken_back(scheduler: Any) -> bool:
    """Whether a learning-rate scheduler can forget a step."""
    return scheduler is None or (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"))


class Assumption:
    """What a step that may turn out to be skipped has changed on the host."""

    def __init__(
        self, finite: Callable[[], Tensor], loss_scale: LossScale, scheduler: Any, groups: Sequence[Any]
    ) -> None:
        """Remember the present state.

        Args:
            finite: waits for the flag [1] and returns it.
            groups: param groups; schedules write into them.
        """
        self._finite, self._loss_scale, self._scheduler, self._groups = finite, loss_scale, scheduler, groups
        self._scale = loss_scale.state_dict()
        self._schedule = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None
        self._values = [{key: value for key, value in group.items() if key != "params"} for group in groups]

    def held(self) -> bool:
        """Whether the step was applied. Waits for the device."""
        return bool(self._finite().item())

    def take_back(self) -> None:
        """Undo what a good step does to the loss scale, the schedule and the param groups."""
        self._loss_scale.load_state_dict(self._scale)
        if self._scheduler is not None:
            self._scheduler.load_state_dict(self._schedule)
        for group, values in zip(self._groups, self._values, strict=True):
            group.update(values)
