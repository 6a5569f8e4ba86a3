"""Pieces of planes for an optimizer: which elements, in which tensors, of which param group. Moves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lorica.core.flat import Flat, Stored
from lorica.core.gradient import GradPlane
from lorica.layout import chunk_size
from lorica.optim.base import FlatOptimizer, Segment, Slice


class Work(NamedTuple):
    """What one step asks of every executor.

    Attributes:
        coef: multiplies the gradient: mean over ranks, loss scale, clipping; a float, or [1] on the compute device.
        step: 1 for the first update.
        apply: [1] int32 on the compute device, 0: change nothing; None: apply.
        unclipped: what `coef` is if nothing is clipped.
    """

    coef: Tensor | float
    step: int
    apply: Tensor | None
    unclipped: float


class Waitable(Protocol):
    """A transfer under way."""

    def wait(self) -> Any:
        """Return once it is done; raise what went wrong."""
        ...


class Record(NamedTuple):
    """The tensors of some elements of a plane, where an optimizer works on them.

    Attributes:
        master: [n], see `Segment.master`.
        out: [n] the parameters; None if the master is the parameter.
        state: what is stored of the moments by name, [n] each, or [n / 128]: see `UnitPlan.moment_planes`.
    A record as it is stored may have files in place of tensors.
    """

    master: Stored
    out: Stored
    state: dict[str, Stored]

    def part(self, low: int, high: int) -> Record:
        """The elements [low, high)."""
        out = None if self.out is None else self.out[low:high]
        state = {name: plane[slice(*self.range_of(plane, low, high))] for name, plane in self.state.items()}
        return Record(self.master[low:high], out, state)

    def range_of(self, plane: Stored, low: int, high: int) -> tuple[int, int]:
        """The elements of a stored plane that belong to the elements [low, high) of the record."""
        ratio = max(1, self.master.numel() // max(1, plane.numel()))
        return low // ratio, high // ratio


class Chunk(NamedTuple):
    """The elements [low, high) of what this rank owns of a plane; `is_last` of it."""

    plane: GradPlane
    low: int
    high: int
    is_last: bool

    @property
    def numel(self) -> int:
        """Elements."""
        return self.high - self.low


def chunks_of(planes: Sequence[GradPlane], numel: int) -> list[Chunk]:
    """Cut planes, in order, into chunks of at most `numel` elements; see `layout.chunk_size`."""
    found = []
    for plane in planes:
        owned = plane.flat.owned.numel()
        size = chunk_size(owned, numel)
        found += [Chunk(plane, a, min(a + size, owned), a + size >= owned) for a in range(0, owned, size)]
    return found


def record_of(flat: Flat) -> Record:
    """All that this rank owns of a plane, where it lives."""
    return Record(flat.master, None if flat.plan.master_is_param else flat.owned, dict(flat.moments))


def segments(
    flat: Flat, record: Record, grad: Tensor, groups: Sequence[dict[str, Any]], low: int, high: int
) -> list[Segment]:
    """The elements [low, high) of what this rank owns of a plane, cut at the borders of param groups.

    Args:
        record: the tensors of these elements. grad: [high - low], raw.
        groups: param groups; a plane's slots name them by index.
    """
    base, found = flat.master_start + low, []
    for part in flat.layout.group_parts(base, flat.master_start + high):
        a, b = part.start - base, part.stop - base
        here = record.part(a, b)
        slices = _slices(flat, part.start, part.stop)
        found.append(
            Segment(here.master, grad[a:b], here.out, here.state, groups[part.group], slices, part.start, flat.salt)
        )
    return found


def update_record(
    optimizer: FlatOptimizer, flat: Flat, record: Record, grad: Tensor, groups: Sequence[dict[str, Any]], low: int,
    high: int, *, coef: Tensor | float, step: int, apply: Tensor | None = None, comm: Any = None,
) -> None:  # fmt: skip
    """Update the elements [low, high) of what this rank owns of a plane, where `record` and `grad` are.

    Args:
        record, grad, groups, low, high: as in `segments`.
        coef, step, apply, comm: as in `FlatOptimizer.update`.
    """
    copied = record.out is not None and record.out.dtype == record.master.dtype  # nothing to round
    taken = record._replace(out=None) if copied else record
    pieces = segments(flat, taken, grad, groups, low, high)
    optimizer.update(pieces, coef=coef, step=step, apply=apply, comm=comm, layout=flat.layout)
    if copied:
        record.out.copy_(record.master)


def copy_record(source: Record, target: Record) -> None:
    """Start copying one record over another; what both have in the same place stays."""
    pairs = [(source.master, target.master), *((plane, target.state[name]) for name, plane in source.state.items())]
    if source.out is not None and target.out is not None:
        pairs.append((source.out, target.out))
    for old, new in pairs:
        if old.data_ptr() != new.data_ptr():
            new.copy_(old, non_blocking=True)


def _slices(flat: Flat, start: int, stop: int) -> tuple[Slice, ...]:
    slots = flat.layout.slots
    return tuple(
        Slice(slots[o.slot].name, slots[o.slot].shape, o.offset, o.offset + o.end - o.begin, o.begin)
        for o in flat.layout.overlaps(start, stop)
    )


def own_gradient(plane: GradPlane) -> Tensor:
    """The reduced gradient of what this rank owns of a plane.

    Raises:
        RuntimeError: if there is none.
    """
    if plane.reduced is None:
        raise RuntimeError(
            f"update of {plane.flat.name}: expected a reduced gradient, got none. Fix: call engine.backward(loss) "
            "before engine.step()."
        )
    return plane.reduced


def master_travels(flat: Flat) -> bool:
    """Whether an update on the device has to bring the master there."""
    return flat.plan.master.tier != "device"


def is_on_host(plane: Stored) -> bool:
    """Whether the CPU can compute on it in place."""
    return isinstance(plane, Tensor) and plane.device.type == "cpu"
