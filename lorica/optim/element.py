"""The loop that all built-in element-wise optimizers share; each adds its formula as `update_tile`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lorica.optim.base import FlatOptimizerBase, Granularity, PlaneCollectives, PlaneLayout, Segment
from lorica.optim.tiles import Tile, run_in_tiles


class ElementOptimizer(FlatOptimizerBase):
    """Element granularity: every element is updated from its own gradient and moments alone."""

    granularity: Granularity = "element"
    tile_numel: int | None = None  # None: the default of the device

    @torch.no_grad()
    def update(
        self,
        segments: Sequence[Segment],
        *,
        coef: Tensor | float,
        step: int,
        comm: PlaneCollectives | None = None,
        layout: PlaneLayout | None = None,
    ) -> None:
        """See `FlatOptimizer.update`; `comm` and `layout` are unused."""
        for segment in segments:
            run_in_tiles(segment, coef, partial(self.update_tile, step=step), tile_numel=self.tile_numel)

    def update_tile(self, tile: Tile, *, step: int) -> None:
        """Update `tile.master` and `tile.state` in place from `tile.grad`, which must not be written."""
        raise NotImplementedError
