"""Updates begun in backward, on the guess that the gradient will be neither clipped nor refused. Owns spare records.

A guess reads the record and writes the new one beside it, in spare memory. When the verdict is known, it is either
right for every bit (the same gradient, factor, step and hyper-parameters) and the two records change places, or it is
dropped and the record, which nobody has touched, is updated as if nothing had been begun. After a wrong guess none is
made until a step would have confirmed one: in the first steps of a training clipping strikes every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lorica.core.flat import Flat, dtype_of
from lorica.core.gradient import GradPlane
from lorica.optim.base import FlatOptimizer
from lorica.optim.element import ElementOptimizer
from lorica.update.pieces import Record, copy_record, record_of, segments, update_record


class Assumed(NamedTuple):
    """Everything that a guess depends on besides the record.

    Attributes:
        coef, step: as in `Work`.
        groups: the param groups, without their parameters.
        version: of the plane's gradient and record; see `GradPlane.version`.
    """

    coef: float
    step: int
    groups: list[dict[str, Any]]
    version: int


class Guesses:
    """The spare records of some planes, and which of them hold a finished guess."""

    def __init__(self, planes: Sequence[GradPlane]) -> None:
        """Allocate a spare record for each of `planes`, in host memory."""
        self._spare = {plane.flat: _spare(plane.flat) for plane in planes}
        self._made: dict[Flat, Assumed] = {}
        self.worth_while = True

    @property
    def any(self) -> bool:
        """Whether there is spare memory at all."""
        return bool(self._spare)

    def has_room(self, plane: GradPlane) -> bool:
        """Whether a guess of the plane may be made."""
        return plane.flat in self._spare

    def spare(self, flat: Flat) -> Record:
        """Where a guess writes."""
        self._made.pop(flat, None)
        return self._spare[flat]

    def made(self, flat: Flat, assumed: Assumed) -> None:
        """The spare record holds the finished guess."""
        self._made[flat] = assumed

    def take(self, flat: Flat, actual: Assumed) -> Tensor | None:
        """Let a right guess become the record; returns the new parameters, None if there is no right guess."""
        assumed = self._made.pop(flat, None)
        if assumed != actual:
            return None
        new, old = self._spare[flat], record_of(flat)
        flat.master, flat.moments = new.master, dict(new.state)
        self._spare[flat] = Record(old.master, new.out, old.state)
        out: Tensor = new.out
        return out

    def drop(self) -> None:
        """Forget all guesses."""
        self._made.clear()

    def learn(self, *, right: bool) -> None:
        """What the verdict of a step was, whether guesses were made or not."""
        self.worth_while = right


def _spare(flat: Flat) -> Record:
    home = record_of(flat)
    alloc: Callable[..., Tensor] = flat.site.tiers["host"].alloc
    out = alloc(flat.owned.numel(), dtype_of(flat.plan.param.dtype))
    state = {name: alloc(plane.numel(), plane.dtype) for name, plane in home.state.items()}
    return Record(alloc(home.master.numel(), home.master.dtype), out, state)


def can_guess(plane: GradPlane) -> bool:
    """Whether a plane's record can be written beside itself: it is in host memory, apart from the parameters."""
    record = record_of(plane.flat)
    stored = [record.master, *record.state.values()]
    in_memory = all(isinstance(each, Tensor) and each.device.type == "cpu" for each in stored)
    return in_memory and record.out is not None and plane.flat.site.replicate is None


def update_beside(
    optimizer: FlatOptimizer, flat: Flat, old: Record, new: Record, grad: Tensor, assumed: Assumed, low: int, high: int
) -> None:
    """Write the update of `old` to `new`: in one pass, where the optimizer has a kernel for it.

    Args:
        old, new, grad: of the elements [low, high) of what this rank owns of the plane, in host memory.
    """
    sources = segments(flat, old, grad, assumed.groups, low, high)
    if isinstance(optimizer, ElementOptimizer) and all(map(optimizer.runs_native, sources)):
        for source, target in zip(sources, segments(flat, new, grad, assumed.groups, low, high), strict=True):
            into = optimizer.destination(target)
            optimizer.update_native(source, coef=assumed.coef, step=assumed.step, into=into)
        return
    copy_record(old, new)
    update_record(optimizer, flat, new, grad, assumed.groups, low, high, coef=assumed.coef, step=assumed.step)
