"""When gradients are reduced: as soon as a unit is complete, in one order that is the same on all ranks.

[Note: one order of reductions] Collectives must be issued in the same order by every rank, but the order in which
gradients become complete may differ between ranks (experts without tokens, branches that depend on data). So units
are reduced along a fixed list, the reverse of the order in which they first ran on rank 0. A unit that is complete
early waits for its predecessors in the list; whatever is incomplete when backward ends is reduced then, and missing
gradients count as zero.

A gradient that arrives after its unit was reduced (a tied weight inside a reentrant checkpoint) is reduced at the end
of the same backward, and from then on that unit always waits for the end.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lorica.core.gradient import GradPlane
from lorica.core.unit import Unit

MAX_UNITS_IN_FLIGHT = 2


class Reducer:
    """Turns arriving gradients into reductions."""

    def __init__(
        self,
        units: Sequence[Unit],
        agree: Callable[[list[int]], list[int]],
        *,
        overlap: bool,
        require_all: bool = False,
    ) -> None:
        """Watch the trainable parameters of `units`.

        Args:
            agree: returns rank 0's list of integers on every rank (used once, for the order).
            overlap: leave reductions in flight while backward goes on.
            require_all: a parameter without a gradient is an error instead of a zero.
        """
        self._units, self._agree, self._overlap = list(units), agree, overlap
        self._require_all = require_all
        self._missing: list[str] = []
        self._received: dict[Unit, int] = {}
        self._sequence: list[Unit] = []
        self._launched = 0
        self._ready: set[Unit] = set()
        self._at_end: set[Unit] = set()
        self._in_flight: deque[GradPlane] = deque()
        self._reduce = True
        self._counts: Callable[[Unit], bool] = lambda _: True
        self._unreduced = False  # gradients of earlier backward passes wait on the ranks
        self.active = False
        self.planes: list[GradPlane] = [grad for unit in units for grad in unit.grads]
        self._handles: list[RemovableHandle] = []
        for unit in self._units:
            hook = _arrival(self, unit)
            for grad in unit.grads:
                self._handles += [p.register_post_accumulate_grad_hook(hook) for p in grad.flat.params]

    def begin(
        self,
        *,
        reduce: bool,
        ran: Callable[[], list[Unit]],
        expects: Callable[[Unit], bool],
        counts: Callable[[Unit], bool],
    ) -> None:
        """A backward pass begins.

        Args:
            reduce: False leaves this pass's gradients on this rank.
            ran: the units in the order in which they first ran on this rank.
            expects: whether a unit's gradients may come in this pass.
            counts: whether a unit is complete once each of its parameters has a gradient; asked when it is so.
        """
        self.active, self._reduce, self._counts = True, reduce, counts
        self._received = dict.fromkeys(self._units, 0)
        self._sequence = self._sequence or self._fixed_sequence(ran())
        self._launched = 0
        self._ready = {unit for unit in self._units if not expects(unit)} - self._at_end
        self._advance()

    def _fixed_sequence(self, ran: list[Unit]) -> list[Unit]:
        never_ran = [unit for unit in self._units if unit not in ran]
        sequence = sorted([*never_ran, *reversed(ran)], key=lambda unit: unit.is_root)
        by_index = {unit.index: unit for unit in self._units}
        return [by_index[i] for i in self._agree([unit.index for unit in sequence]) if by_index[i].grads]

    def arrived(self, unit: Unit) -> None:
        """Autograd has accumulated one gradient of `unit`."""
        if not self.active:
            return
        self._received[unit] += 1
        if self._received[unit] == unit.num_trainable and self._counts(unit):
            self.complete(unit)

    def complete(self, unit: Unit) -> None:
        """No more gradients of `unit` are expected in this backward."""
        if self.active and unit not in self._at_end:
            self._ready.add(unit)
            self._advance()

    def _advance(self) -> None:
        if not self._reduce:
            return
        while self._launched < len(self._sequence) and self._sequence[self._launched] in self._ready:
            self._launch(self._sequence[self._launched])
            self._launched += 1

    def _launch(self, unit: Unit) -> None:
        for grad in unit.grads:
            if self._require_all:
                self._missing += grad.missing()
            grad.launch()
            self._in_flight.append(grad)
        limit = MAX_UNITS_IN_FLIGHT if self._overlap else 0
        while len(self._in_flight) > limit:
            self._in_flight.popleft().wait()

    def finish(self) -> None:
        """Backward is over: reduce what is left, or keep it on this rank."""
        if not self.active:
            return
        self.active = False
        if self._reduce:
            self._launch_all(self._sequence[self._launched :])
            self._unreduced = False  # the packed gradients included what earlier passes had left
        else:
            self._unreduced = True
            for grad in self.planes:
                grad.stash()
        for unit in self._units:
            unit.visited = False
        self._refuse_missing()

    def _refuse_missing(self) -> None:
        missing, self._missing = self._missing, []
        if missing:
            raise RuntimeError(
                f"engine.backward: expected a gradient of every parameter, got none of {', '.join(missing)}. Fix: use "
                "them in the loss, freeze them, or set zero_optimization.ignore_unused_parameters to true."
            )

    def settle(self) -> None:
        """Before an optimizer step: reduce what backward passes left on this rank, and complete every plane.

        Collective: whether something was left follows from the calls that were made, which are the same on all ranks.

        Raises:
            RuntimeError: if there was no backward since the last step.
        """
        if self._unreduced:
            self._unreduced = False
            self._launch_all(self._sequence)
        for grad in self.planes:
            grad.complete()

    def forget(self) -> None:
        """The gradients were dropped."""
        self._unreduced = False

    def _launch_all(self, units: Sequence[Unit]) -> None:
        for unit in units:
            self._launch(unit)
        self._reduce_late()
        self._drain()

    def _reduce_late(self) -> None:
        late = [unit for unit in self._sequence if any(grad.has_local for grad in unit.grads)]
        if late:
            self._drain()
        for unit in late:
            self._at_end.add(unit)
            self._launch(unit)

    def _drain(self) -> None:
        while self._in_flight:
            self._in_flight.popleft().wait()

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.planes.clear()


def _arrival(reducer: Reducer, unit: Unit) -> Callable[[Tensor], None]:
    """The hook of `unit`'s parameters. It holds nothing: hooks live in C++, where no garbage collector sees a cycle."""
    weak_reducer, weak_unit = weakref.ref(reducer), weakref.ref(unit)

    def hook(_: Tensor) -> None:
        reducer, unit = weak_reducer(), weak_unit()
        if reducer is not None and unit is not None:
            reducer.arrived(unit)

    return hook
