"""The loop that all built-in element-wise optimizers share; each adds its formula, and perhaps a kernel.

Where a device has a one-pass kernel for the optimizer (`kernels/update.py`), a segment is one launch that reads its
scalars on the device; elsewhere it runs tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lorica.kernels import runtime
from lorica.optim.base import FlatOptimizerBase, Granularity, PlaneCollectives, PlaneLayout, Segment
from lorica.optim.scalars import DeviceScalars
from lorica.optim.tiles import Tile, run_in_tiles


class ElementOptimizer(FlatOptimizerBase):
    """Element granularity: every element is updated from its own gradient and moments alone."""

    granularity: Granularity = "element"
    tile_numel: int | None = None  # None: the default of the device

    @cached_property
    def scalars(self) -> DeviceScalars:
        """What the kernels read of the hyper-parameters."""
        return DeviceScalars(self.hyper)

    @torch.no_grad()
    def update(
        self,
        segments: Sequence[Segment],
        *,
        coef: Tensor | float,
        step: int,
        apply: Tensor | None = None,
        comm: PlaneCollectives | None = None,
        layout: PlaneLayout | None = None,
    ) -> None:
        """See `FlatOptimizer.update`; `comm` and `layout` are unused."""
        for segment in segments:
            if self.runs_on_device(segment):
                self._launch(segment, coef, apply, step)
            else:
                run_in_tiles(segment, coef, partial(self.update_tile, step=step), tile_numel=self.tile_numel)

    def runs_on_device(self, segment: Segment) -> bool:
        """Whether this optimizer has a one-pass kernel that takes the segment."""
        if not self.has_kernel or not runtime.runs_on(segment.master.device):
            return False
        from lorica.kernels.update import fits

        return fits(segment.master, segment.grad, segment.out)

    def prepare(self, groups: Sequence[dict[str, Any]], step: int, device: torch.device) -> None:
        """See `FlatOptimizer.prepare`."""
        if self.has_kernel and runtime.runs_on(device):
            self.scalars.write(groups, step, device)

    def note_launched(self, apply: Tensor) -> None:
        """See `FlatOptimizer.note_launched`."""
        self.scalars.note(apply)

    def know_skipped(self, num_skipped: int) -> None:
        """See `FlatOptimizer.know_skipped`."""
        self.scalars.know(num_skipped)

    def _launch(self, segment: Segment, coef: Tensor | float, apply: Tensor | None, step: int) -> None:
        device = segment.master.device
        if isinstance(coef, float):
            coef = torch.full((1,), coef, dtype=torch.float32, device=device)
        if apply is None:
            apply = torch.ones(1, dtype=torch.int32, device=device)
        self.launch(segment, coef=coef, apply=apply, hyper=self.scalars.row(segment.group, step, device))

    @property
    def has_kernel(self) -> bool:
        """Whether `hyper` and `launch` are there."""
        return type(self).launch is not ElementOptimizer.launch

    def hyper(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The scalars of `kernels/update.py` for one param group."""
        raise NotImplementedError

    def launch(self, segment: Segment, *, coef: Tensor, apply: Tensor, hyper: Tensor) -> None:
        """Update a segment by the one-pass kernel; all three are on the segment's device."""
        raise NotImplementedError

    def update_tile(self, tile: Tile, *, step: int) -> None:
        """Update `tile.master` and `tile.state` in place from `tile.grad`, which must not be written."""
        raise NotImplementedError
