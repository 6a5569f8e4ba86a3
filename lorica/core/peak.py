"""The most memory that model states take on a rank's device, known before the first step. Counts no activation.

between steps     parameters, master, moments
in backward       + gradients so far, + those that autograd has just left of one unit, + staging of reductions
at stage 3        + the units that are whole: the root unit, the one in use, those gathered ahead
offloaded         + the ring through which optimizer states stream
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lorica.plan import StateBytes

if TYPE_CHECKING:
    from lorica.core.unit import Unit


class Peak(NamedTuple):
    """Bytes on one rank.

    Attributes:
        states: model states in all tiers, with all gradients.
        device: the part of them on the compute device.
        passing: what is on the device besides, at the worst moment: gradients before they are packed, staging, gathered
            parameters, states that stream through.
    """

    states: StateBytes
    device: int
    passing: int

    def line(self) -> str:
        """For people."""
        kinds = ", ".join(f"{kind} {_size(count)}" for kind, count in self.states._asdict().items() if count)
        return (
            f"model states on each rank: {_size(self.states.total)} ({kinds}); at most "
            f"{_size(self.device + self.passing)} on the device at a time, activations not counted"
        )


def peak(
    units: Sequence[Unit], num_moments: int, *, ahead_numel: int, max_live_numel: int | None, ring_bytes: int = 0
) -> Peak:
    """The peak of an engine with these units.

    Args:
        num_moments: moment planes of the optimizer.
        ahead_numel, max_live_numel: the budgets of the prefetcher, in elements.
        ring_bytes: device memory of the ring through which optimizer states stream.
    """
    states, device = StateBytes(), 0
    for unit in units:
        for flat in unit.flats:
            planned = flat.planned_bytes(num_moments)
            states += planned
            placements = (flat.plan.param, flat.plan.grad, flat.plan.master, flat.plan.moments)
            device += sum(b for b, where in zip(planned, placements, strict=True) if where.tier == "device")
    passing = max((_unpacked(unit) for unit in units), default=0)
    return Peak(states, device, passing + ring_bytes + _whole(units, ahead_numel, max_live_numel))


def _unpacked(unit: Unit) -> int:
    """Bytes of a unit's gradients outside their planes while they are packed and reduced."""
    total = 0
    for grad in unit.grads:
        if not grad.flat.plan.grad.sharded and grad.flat.plan.master.sharded:
            continue  # autograd's own gradients are the plan's
        numel = sum(slot.numel for slot in grad.flat.layout.slots)
        total += numel * grad.flat.full.element_size() + grad.staging_bytes
    return total


def _whole(units: Sequence[Unit], ahead_numel: int, max_live_numel: int | None) -> int:
    """Bytes of gathered parameters: the root unit, and the worst run of neighbours within the budget."""
    sharded = [unit for unit in units if unit.sharded_numel]
    if not sharded:
        return 0
    itemsize = max(flat.full.element_size() for unit in sharded for flat in unit.flats)
    root = sum(unit.sharded_numel for unit in sharded if unit.is_root)
    blocks = [unit.sharded_numel for unit in sharded if not unit.is_root]
    worst = max((_run(blocks[start:], ahead_numel) for start in range(len(blocks))), default=0)
    if max_live_numel is not None:
        worst = min(worst, max(max_live_numel, max(blocks, default=0)))
    return (root + worst) * itemsize


def _run(numels: Sequence[int], ahead_numel: int) -> int:
    """Elements of the first unit and of those that a look-ahead of `ahead_numel` gathers behind it."""
    total, budget = numels[0], ahead_numel
    for numel in numels[1:]:
        if budget <= 0:
            break
        total, budget = total + numel, budget - numel
    return total


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
