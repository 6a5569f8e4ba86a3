"""The loop that all built-in element-wise optimizers share; each adds its formula, and perhaps a kernel.

Where a device has a one-pass kernel for the optimizer, a segment is one call of it: on a GPU a launch that reads its
scalars on the device (`kernels/update.py`), on a CPU a call of the native library (`kernels/native.py`), with the same
bits. Elsewhere a segment runs tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lorica.kernels import native, runtime
from lorica.log import logger
from lorica.optim import compact
from lorica.optim.base import FlatOptimizerBase, Granularity, PlaneCollectives, PlaneLayout, Segment
from lorica.optim.compact import is_compact
from lorica.optim.scalars import DeviceScalars
from lorica.optim.tiles import Tile, run_in_tiles


class ElementOptimizer(FlatOptimizerBase):
    """Element granularity: every element is updated from its own gradient and moments alone."""

    granularity: Granularity = "element"
    tile_numel: int | None = None  # of the tiles, where no one-pass kernel runs; None: the default of the device
    kernel: str | None = None  # the name of the one-pass kernel in kernels/update.py and kernels/native.py

    @property
    def runs_in_chunks(self) -> bool:
        """No element knows of another, and nothing is kept besides the moments."""
        return True

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
            elif apply is None or bool(apply):
                self._update_here(segment, coef, step)

    def _update_here(self, segment: Segment, coef: Tensor | float, step: int) -> None:
        if self.runs_native(segment):
            self.update_native(segment, coef=float(coef), step=step)
        elif is_compact(segment):
            hyper = self.hyper(segment.group, step)
            compact.update_by_formula(segment, self._compact(segment), coef=coef, step=step, hyper=hyper)
        else:
            run_in_tiles(segment, coef, partial(self.update_tile, step=step), tile_numel=self.tile_numel)

    def runs_native(self, segment: Segment) -> bool:
        """Whether `update` of such a segment is one call of the native library; warns once if that is missing."""
        fits = native.fits_compact if is_compact(segment) else native.fits
        if self.kernel is None or not fits(segment.master, segment.grad, segment.out):
            return False
        if not native.available():
            _warn_once(f"{native.why_not()}. Until then CPU updates take torch's kernels, in several passes.")
        return native.available()

    def update_native(
        self,
        segment: Segment,
        *,
        coef: float,
        step: int,
        pool: native.Pool | None = None,
        into: native.Destination | None = None,
    ) -> bool:
        """Update a segment for which `runs_native`; returns whether an element of its gradient was inf or nan.

        Args:
            pool, into: as in `kernels.native.adam`; see `destination`.
        """
        if is_compact(segment):
            hyper = self.hyper(segment.group, step)
            stored = self._compact(segment)
            return compact.update_native(segment, stored, coef=coef, step=step, hyper=hyper, pool=pool, into=into)
        update = getattr(native, self.kernel or "")
        planes = (segment.master, segment.out, segment.grad, *self.moments_of(segment))
        return bool(update(*planes, coef=coef, hyper=self.hyper(segment.group, step), pool=pool, into=into))

    def destination(self, target: Segment) -> native.Destination:
        """The planes of `target`, for an update that is written there."""
        if is_compact(target):
            stored = self._compact(target)
            return native.Destination(target.master, target.out, (stored.m, stored.v), stored.scales)
        return native.Destination(target.master, target.out, tuple(target.state[name] for name in self.moments))

    def _compact(self, segment: Segment) -> compact.Moments:
        if not self.takes_compact:
            raise ValueError(
                f"{type(self).__name__}: expected moments in fp32 and a master, got {segment.master.dtype} with "
                f"{[plane.dtype for plane in segment.state.values()]}. Fix: use AdamW or Adam."
            )
        return compact.moments_of(segment, self.moments)

    def runs_on_device(self, segment: Segment) -> bool:
        """Whether this optimizer has a one-pass kernel that takes the segment."""
        if self.kernel is None or not runtime.runs_on(segment.master.device):
            return False
        if is_compact(segment):
            from lorica.kernels.compact import fits as fits_compact

            return fits_compact(segment.master, segment.grad, segment.out)
        from lorica.kernels.update import fits

        return fits(segment.master, segment.grad, segment.out)

    def prepare(self, groups: Sequence[dict[str, Any]], step: int, device: torch.device) -> None:
        """See `FlatOptimizer.prepare`."""
        if self.kernel is not None and runtime.runs_on(device):
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
        from lorica.kernels import update

        hyper = self.scalars.row(segment.group, step, device)
        if is_compact(segment):
            compact.launch(segment, self._compact(segment), coef=coef, apply=apply, hyper=hyper)
            return
        planes = (segment.master, segment.out, segment.grad, *self.moments_of(segment))
        getattr(update, self.kernel or "")(*planes, coef=coef, apply=apply, hyper=hyper)

    def hyper(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The scalars of one param group at a step, as `kernels/hyper.py` computes them for `kernel`."""
        raise NotImplementedError

    def moments_of(self, segment: Segment) -> tuple[Tensor | None, ...]:
        """The moments of a segment, in the order in which `kernel` takes them."""
        return tuple(segment.state[name] for name in self.moments)

    def update_tile(self, tile: Tile, *, step: int) -> None:
        """Update `tile.master` and `tile.state` in place from `tile.grad`, which must not be written."""
        raise NotImplementedError


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)
