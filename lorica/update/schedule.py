"""When planes are updated: all inside `engine.step()`, or each just in time for its next use. Owns no executor's work.

`sync`           every plane is finished when the call returns
`just_in_time`   the call returns when everything is launched; a plane is finished by whoever uses it next

A plane that every rank must be given (stages 1 and 2 on several ranks) is always finished here: its all-gather takes
all ranks, and a rank that evaluates alone must not wait for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lorica.core.flat import Site
from lorica.core.gradient import GradPlane
from lorica.optim.base import FlatOptimizer
from lorica.update.agreement import raise_together
from lorica.update.executor import Executor
from lorica.update.pieces import Work


class Update:
    """Applies one optimizer to all gradient planes.

    Attributes:
        expected: while gradients arrive: the factor and the number of the step that follows for certain, if nothing is
            clipped; None: nobody knows. Set by the engine.
    """

    def __init__(
        self,
        optimizer: FlatOptimizer,
        executors: Sequence[Executor],
        groups: Sequence[dict[str, Any]],
        site: Site,
    ) -> None:
        """Connect the executors with the planes."""
        self.expected: Callable[[], tuple[float, int] | None] = lambda: None
        self._optimizer, self._executors, self._groups, self._site = optimizer, list(executors), groups, site
        self.planes = [plane for executor in self._executors for plane in executor.planes]
        self.runs_on_device = all(executor.runs_on_device for executor in self._executors)
        self.learns_late = any(executor.learns_late for executor in self._executors)
        for executor in self._executors:
            for plane in executor.planes:
                plane.flat.opener = partial(executor.open, plane)
                if executor.guesses:
                    plane.on_complete = partial(self._guess, executor)

    def __call__(self, work: Work) -> None:
        """Update every plane from its reduced gradient; `work.apply` only if `runs_on_device`. Collective.

        Raises:
            what went wrong in the last update; on ranks where nothing did: RuntimeError.
        """
        self._finish()
        self._agree()
        self._site.shard.fence()
        self._optimizer.prepare(self._groups, work.step, self._site.device)
        for executor in self._executors:
            executor.start(work)
        if work.apply is not None:
            self._optimizer.note_launched(work.apply)
        now = []
        for executor in self._executors:
            for plane in executor.planes:
                if plane.flat.plan.update == "just_in_time":
                    plane.flat.defer(partial(executor.finish, plane), partial(executor.is_done, plane))
                else:
                    now.append((executor, plane))
        for executor, plane in now:
            executor.finish(plane)
            plane.flat.publish()
        for _, plane in now:
            plane.flat.wait()
        if any(plane.flat.publishes for plane in self.planes):
            self._site.shard.fence()  # peers have read this rank's part: whoever writes parameters now disturbs nobody

    def _guess(self, executor: Executor, plane: GradPlane) -> None:
        """The plane's gradient is complete."""
        if (expected := self.expected()) is not None:
            executor.guess(plane, *expected)

    def settle(self) -> None:
        """Finish every plane, for somebody who looks at the parameters.

        Raises:
            what went wrong on this rank: what was not updated must not be taken for what was.
        """
        self._finish()
        if (problem := self._problem()) is not None:
            raise problem

    def _finish(self) -> None:
        for plane in self.planes:
            plane.flat.settle()

    def _problem(self) -> BaseException | None:
        return next((e.problem for e in self._executors if e.problem is not None), None)

    def _agree(self) -> None:
        """See `raise_together`."""
        if self.learns_late:
            raise_together(self._problem(), self._site, "engine.step: the update of optimizer states")

    @property
    def ring_bytes(self) -> int:
        """Device memory through which records stream."""
        return sum(executor.ring_bytes for executor in self._executors)

    def know_skipped(self, num_skipped: int) -> None:
        """The caller has learnt that the device skipped steps, and counts without them from now on."""
        self._optimizer.know_skipped(num_skipped)

    def close(self) -> None:
        """Finish and free everything."""
        for executor in self._executors:
            for plane in executor.planes:
                plane.on_complete = None
            executor.close()
