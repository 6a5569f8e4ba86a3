"""The legal states of a plane and the legal moves between them. Owns no data; every change of state is checked here."""

from __future__ import annotations

from enum import Enum, auto
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)


class ParamState(Enum):
    """Life of a sharded parameter plane."""

    SHARDED = auto()  # only this rank's shard exists
    UNSHARDING = auto()  # the all_gather is on its way
    FULL = auto()  # the parameters can be used


class GradState(Enum):
    """Life of a gradient plane between two optimizer steps."""

    IDLE = auto()  # nothing accumulated since the last step
    ACCUMULATING = auto()  # holds the sum of earlier micro-steps
    REDUCING = auto()  # a reduce_scatter into it is on its way
    READY = auto()  # reduced over all axes: the optimizer may read it


PARAM_MOVES = {
    ParamState.SHARDED: {ParamState.UNSHARDING},
    ParamState.UNSHARDING: {ParamState.FULL},
    ParamState.FULL: {ParamState.SHARDED},
}
GRAD_MOVES = {
    GradState.IDLE: {GradState.REDUCING},
    GradState.ACCUMULATING: {GradState.REDUCING, GradState.IDLE, GradState.READY},
    GradState.REDUCING: {GradState.ACCUMULATING},
    GradState.READY: {GradState.IDLE, GradState.REDUCING},
}


class Lifecycle(Generic[S]):
    """A state that moves only along the edges of a table."""

    def __init__(self, owner: str, moves: dict[S, set[S]], start: S) -> None:
        self._owner, self._moves, self.state = owner, moves, start

    def to(self, state: S) -> None:
        """Move to `state`.

        Raises:
            RuntimeError: if the table has no such edge (a wrong order of calls, never the user's data).
        """
        if state not in self._moves[self.state]:
            allowed = ", ".join(s.name for s in self._moves[self.state])
            raise RuntimeError(
                f"{self._owner}: expected a move from {self.state.name} to {allowed}, got {state.name}. "
                "Fix: this is an error in Lorica's own order of calls; please report it with the traceback."
            )
        self.state = state
