"""Gather units before they are needed. Owns the recorded order of units and the budget; does not decide when to free.

No trace: the order of the last pass is only a guess about the next one. A unit that is used out of order is gathered
when it is used, and a unit that was gathered in vain is freed at the end of the pass.
"""

from __future__ import annotations

from lorica.core.unit import Unit


class Prefetcher:
    """Looks ahead along the order in which units ran last time."""

    def __init__(self, *, ahead_numel: int, max_live_numel: int | None) -> None:
        """Set the budget.

        Args:
            ahead_numel: elements to gather ahead of use (at least one unit if positive, none if 0).
            max_live_numel: elements of sharded parameters that may be whole at a time (None: no other bound).
        """
        self._ahead, self._max_live = ahead_numel, max_live_numel
        self._next: dict[Unit, Unit] = {}
        self._previous: dict[Unit, Unit] = {}
        self._order: dict[Unit, None] = {}
        self._last: Unit | None = None
        self._live: set[Unit] = set()

    # -- recording -----------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> tuple[int, int | None]:
        """Elements to gather ahead, and elements that may be whole at a time (None: no bound)."""
        return self._ahead, self._max_live

    def start_pass(self) -> None:
        """A forward pass of the whole model begins."""
        self._last = None

    def record(self, unit: Unit) -> None:
        """`unit` runs now, in the forward direction."""
        if self._last is not None and self._last is not unit:
            self._next[self._last] = unit
            self._previous[unit] = self._last
        self._order.setdefault(unit)
        self._last = unit

    @property
    def order(self) -> list[Unit]:
        """Units in the order in which they first ran."""
        return list(self._order)

    def remaining_numel(self, unit: Unit) -> int:
        """Elements of the units that run after `unit` in the forward direction (0 for the last one)."""
        total, seen = 0, {unit}
        while (following := self._next.get(unit)) is not None and following not in seen:
            seen.add(following)
            total += following.sharded_numel
            unit = following
        return total

    # -- gathering -----------------------------------------------------------------------------------------------------

    def use(self, unit: Unit, *, backward: bool) -> None:
        """Make `unit` and its externals usable now and start gathering those that follow in this direction."""
        needed = [unit, *unit.externals]
        for each in needed:
            each.unshard()
            self._live.add(each)
        for each in needed:
            each.wait()
        self._look_ahead(unit, self._previous if backward else self._next)

    def _look_ahead(self, unit: Unit, following: dict[Unit, Unit]) -> None:
        budget, seen = self._ahead, {unit}
        while budget > 0 and (upcoming := following.get(unit)) is not None and upcoming not in seen:
            budget -= upcoming.sharded_numel
            if not upcoming.is_full:
                if upcoming.holds_up and upcoming.is_alone:
                    return  # the unit in use can be launched before
                if self._max_live is not None and self.live_numel + upcoming.sharded_numel > self._max_live:
                    return
                upcoming.unshard()
                self._live.add(upcoming)
            seen.add(upcoming)
            unit = upcoming

    def release(self, unit: Unit) -> None:
        """Free `unit`'s gathered parameters."""
        unit.reshard()
        self._live.discard(unit)

    def release_all(self, *, keep: set[Unit] | None = None) -> None:
        """Free everything that is whole, except `keep`."""
        for unit in self._live - (keep or set()):
            self.release(unit)

    @property
    def live_numel(self) -> int:
        """Elements of sharded parameters that are whole or being gathered."""
        return sum(unit.sharded_numel for unit in self._live)
