"""Who updates planes, and where: what the schedule asks of every executor, and how most of them answer."""

from __future__ import annotations

from lorica.core.gradient import GradPlane
from lorica.update.pieces import Work


class Executor:
    """Updates some planes.

    Attributes:
        planes: those that it updates.
        runs_on_device: whether `start` need not know the verdict: it is read where it is.
        learns_late: whether the host knows of a skipped step only when the next one has been taken.
        guesses: whether `guess` does anything.
        ring_bytes: device memory through which records stream.
        problem: what went wrong behind the caller's back; nothing is updated any more.
    """

    planes: list[GradPlane]
    runs_on_device = True
    learns_late = False
    guesses = False
    ring_bytes = 0
    problem: BaseException | None = None

    def start(self, work: Work) -> None:
        """Begin updating all planes."""
        raise NotImplementedError

    def guess(self, plane: GradPlane, coef: float, step: int) -> None:
        """The plane's gradient is complete; `start` will be told `coef` and `step`, if nothing is clipped."""

    def finish(self, plane: GradPlane) -> None:
        """Make the plane's parameters usable on the current stream."""

    def is_done(self, plane: GradPlane) -> bool:
        """Whether `finish` would return at once."""
        return True

    def open(self, plane: GradPlane, *, write: bool) -> None:
        """Have the plane's record where it lives, for the host to read or write."""

    def close(self) -> None:
        """Finish and free everything."""
