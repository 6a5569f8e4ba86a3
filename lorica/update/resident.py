"""The synchronous update: all units, one after the other, inside `engine.step()`. Owns no formula and no decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorica.core.flat import Flat, Site
from lorica.core.gradient import GradPlane
from lorica.layout import GroupRange
from lorica.optim.base import FlatOptimizer, Segment, Slice

if TYPE_CHECKING:
    from lorica.tier import Tier


class SyncUpdate:
    """Applies one optimizer to all gradient planes."""

    def __init__(
        self, optimizer: FlatOptimizer, planes: Sequence[GradPlane], groups: Sequence[dict[str, Any]], site: Site
    ) -> None:
        """Allocate the moments.

        Args:
            groups: live param groups; a plane's slots name them by index.
        """
        self._optimizer, self._planes, self._groups, self._site = optimizer, list(planes), groups, site
        for plane in self._planes:
            plane.flat.alloc_moments(optimizer.moments)
            for segment in self._segments(plane.flat, None, None):
                optimizer.init_state(segment)
        self.runs_on_device = all(self._runs_on_device(plane) for plane in self._planes)

    def _runs_on_device(self, plane: GradPlane) -> bool:
        """Whether the plane's update reads `coef` and `apply` on the compute device, without waiting for them."""
        flat = plane.flat
        tier = self._site.tiers[flat.plan.master.tier]
        grad = torch.empty(0, dtype=plane.dtype, device=tier.device)
        segments = self._segments(flat, grad, self._output(flat, flat.owned, tier))
        return all(self._optimizer.runs_on_device(segment) for segment in segments)

    def __call__(self, coef: Tensor | float, step: int, apply: Tensor | None = None) -> None:
        """Update every unit from its reduced gradient and give all ranks the new parameters. Collective.

        Args:
            coef: multiplies the gradient: mean over ranks, loss scale, clipping; a float, or [1] on the compute device.
            step: 1 for the first update.
            apply: [1] int32, 0: change nothing. Only if `runs_on_device`.
        """
        self._site.shard.fence()
        self._optimizer.prepare(self._groups, step, self._site.device)
        for plane in self._planes:
            self._update(plane, coef, step, apply)
            plane.flat.publish()
        if apply is not None:
            self._optimizer.note_launched(apply)
        for plane in self._planes:
            plane.flat.wait()

    def know_skipped(self, num_skipped: int) -> None:
        """The caller has learnt that the device skipped steps, and counts without them from now on."""
        self._optimizer.know_skipped(num_skipped)

    def _update(self, plane: GradPlane, coef: Tensor | float, step: int, apply: Tensor | None) -> None:
        flat, tier = plane.flat, self._site.tiers[plane.flat.plan.master.tier]
        assert plane.reduced is not None
        grad = self._read(plane.reduced, tier)
        target = flat.owned
        out = self._output(flat, target, tier)
        segments = self._segments(flat, grad, out)
        self._optimizer.update(segments, coef=coef, step=step, apply=apply, comm=self._comm(flat), layout=flat.layout)
        self._write(flat, out, target)

    def _read(self, grad: Tensor, tier: Tier) -> Tensor:
        """The gradient where the arithmetic is."""
        return grad if grad.device == tier.device else grad.to(tier.device)

    def _output(self, flat: Flat, target: Tensor, tier: Tier) -> Tensor | None:
        """Where the optimizer writes the rounded parameter: nowhere if the master is the parameter."""
        if flat.plan.master_is_param:
            return None
        return target if target.device == tier.device else torch.empty_like(target, device=tier.device)

    def _write(self, flat: Flat, out: Tensor | None, target: Tensor) -> None:
        if out is not None and out is not target:
            target.copy_(out)

    def _comm(self, flat: Flat) -> Any:
        from lorica.comm.solo import Solo

        return self._site.shard if flat.plan.master.sharded else Solo(self._site.device)

    def _segments(self, flat: Flat, grad: Tensor | None, out: Tensor | None) -> list[Segment]:
        """The plane part that this rank updates, cut at the borders of param groups."""
        assert flat.master is not None
        start = flat.master_start
        stop = start + flat.master.numel()
        return [
            self._segment(flat, part, part.start - start, part.stop - start, grad, out)
            for part in flat.layout.group_parts(start, stop)
        ]

    def _segment(
        self, flat: Flat, part: GroupRange, low: int, high: int, grad: Tensor | None, out: Tensor | None
    ) -> Segment:
        assert flat.master is not None
        master = flat.master[low:high]
        slots = flat.layout.slots
        return Segment(
            master=master,
            grad=master if grad is None else grad[low:high],
            out=None if out is None else out[low:high],
            state={name: plane[low:high] for name, plane in flat.moments.items()},
            group=self._groups[part.group],
            slices=tuple(
                Slice(slots[o.slot].name, slots[o.slot].shape, o.offset, o.offset + o.end - o.begin, o.begin)
                for o in flat.layout.overlaps(part.start, part.stop)
            ),
        )
