"""The sum of squares of all gradients over all ranks, computed in one order whatever the stage. Does not clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorica.layout import ALIGN

if TYPE_CHECKING:
    from lorica.core.flat import Site
    from lorica.core.gradient import GradPlane


def sum_of_squares(flat: Tensor) -> Tensor:
    """Sum of squares of a 1-D tensor whose length is a multiple of `ALIGN`, as a float64 scalar on its device.

    Blocks of `ALIGN` are summed in float32, the blocks in float64: no error grows with the length.
    """
    blocks = torch.linalg.vector_norm(flat.view(-1, ALIGN), dim=1, dtype=torch.float32)
    total: Tensor = blocks.double().square().sum()
    return total


def global_square_sum(planes: Sequence[GradPlane], site: Site) -> Tensor:
    """Squares of the reduced gradients (sums over ranks, still loss-scaled): a float64 scalar, equal on all ranks.

    Every stage sums the same shards in the same order, so stages agree to the bit. Collective.
    """
    total = torch.zeros(1, dtype=torch.float64, device=site.device)
    for plane in planes:
        if plane.reduced is not None:
            total += plane.square_sum()
    if site.shard.world_size > 1:
        site.shard.all_reduce(total).wait()
    return total[0]
