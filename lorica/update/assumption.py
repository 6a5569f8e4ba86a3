"""Steps that the host takes for applied before the device has said so, and how to take one back.

On a device the update kernels skip by themselves when the gradient is not finite, so the host need not wait to launch
them. It goes on as if the step were good: counters, schedule, loss scale. Later, when the flag has arrived or somebody
asks, it looks. If a step was skipped, schedule, loss scale and param groups get the values that they would have had,
and the device has not used others meanwhile: see `optim/scalars.py`. Owns that memory of the past; decides nothing.

    steps      1        2        3              step 1 turns out to be skipped:
    state    s0  ->   s1  ->   s2  ->   s3      now s2, and the steps behind it began at s0, s1
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lorica.precision import LossScale

LIMIT = 4  # steps that may be open at a time; `optim/scalars.py` remembers more


class Arriving(Protocol):
    """A small tensor on its way to the host."""

    def query(self) -> bool:
        """Whether it is there."""
        ...

    def wait(self) -> Tensor:
        """Wait for it."""
        ...


def can_be_taken_back(scheduler: Any) -> bool:
    """Whether a learning-rate scheduler can forget a step."""
    return scheduler is None or (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"))


class State:
    """What an applied step changes on the host: loss scale, schedule, and what the schedule writes into the groups."""

    def __init__(self, loss_scale: LossScale, scheduler: Any, groups: Sequence[dict[str, Any]]) -> None:
        """Remember the present state."""
        self._loss_scale, self._scheduler = loss_scale, scheduler
        self._groups = groups if scheduler is not None else ()
        self._scale = loss_scale.state_dict()
        self._schedule = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None
        self._values = [self._written(group) for group in self._groups]

    def restore(self, instead_of: State) -> None:
        """Go back to this state; a value in a group that the user has set since `instead_of` stays."""
        self._loss_scale.load_state_dict(self._scale)
        pairs = zip(self._groups, instead_of._values, strict=True)
        users = [{key: group[key] for key, value in later.items() if group[key] != value} for group, later in pairs]
        if self._scheduler is not None:
            self._scheduler.load_state_dict(self._schedule)  # some write into the groups
        for group, values, of_user in zip(self._groups, self._values, users, strict=True):
            group.update(values | of_user)

    def _written(self, group: dict[str, Any]) -> dict[str, Any]:
        return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


class Outcome(NamedTuple):
    """What became of an open step."""

    number: int
    applied: bool


class _Open(NamedTuple):
    number: int
    finite: Arriving
    before: State


class Assumptions:
    """The steps whose outcome is not known yet, oldest first."""

    def __init__(self) -> None:
        self._open: deque[_Open] = deque()
        self._now: State | None = None

    def __len__(self) -> int:
        return len(self._open)

    def add(self, number: int, finite: Arriving, before: State, after: State) -> None:
        """Step `number` was launched, whose flag is `finite`; `before` and `after` it are states of the host."""
        self._open.append(_Open(number, finite, before))
        self._now = after

    def settle(self, *, wait: bool) -> list[Outcome]:
        """Look at the flags and take skipped steps back.

        Args:
            wait: for all of them; otherwise only for those above `LIMIT`.
        """
        outcomes = []
        while self._open and (wait or len(self._open) > LIMIT or self._open[0].finite.query()):
            step = self._open.popleft()
            outcomes.append(Outcome(step.number, bool(step.finite.wait().item())))
            if not outcomes[-1].applied:
                self._take_back(step.before)
        return outcomes

    def _take_back(self, before: State) -> None:
        """Forget one step: everything behind it began one state earlier than was thought."""
        states = [before, *(step.before for step in self._open)]
        self._open = deque(step._replace(before=state) for step, state in zip(self._open, states[:-1], strict=True))
        assert self._now is not None
        states[-1].restore(instead_of=self._now)
        self._now = states[-1]

    def clear(self) -> None:
        """Forget everything."""
        self._open.clear()
