"""LAMB on flat planes: Adam's direction, scaled per parameter by a trust ratio. One all_reduce per plane.

A parameter may be cut across ranks; each rank adds up the squares of its own part, and one all_reduce of two numbers
per parameter of the plane gives every rank the whole norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.optim.base import (
    FlatOptimizerBase,
    Granularity,
    PlaneCollectives,
    PlaneLayout,
    Segment,
    require_betas,
    require_layout,
    require_range,
)
from lorica.optim.tiles import Tile, tiles
from lorica.precision.rounding import round_into


def lamb_direction(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
) -> Tensor:
    """Update the moments in place and return the direction before the trust ratio.

    Source: You et al. 2019 (arXiv:1904.00962), algorithm 2.
    """
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    correction1 = 1 - betas[0] ** step if bias_correction else 1.0
    correction2 = 1 - betas[1] ** step if bias_correction else 1.0
    denominator = exp_avg_sq.sqrt().div_(correction2**0.5).add_(eps)
    return torch.div(exp_avg, denominator).div_(correction1).add_(master, alpha=weight_decay)


def trust_ratio(square_norms: Tensor, *, min_coeff: float, max_coeff: float) -> Tensor:
    """|parameter| / |direction|, clamped; 1 where either norm is zero.

    Args:
        square_norms: [2, n] squared norms of parameters and directions.
    """
    ratio = (square_norms[0] / square_norms[1]).sqrt().clamp(min_coeff, max_coeff)
    return torch.where((square_norms > 0).all(dim=0), ratio, torch.ones_like(ratio))


class Lamb(FlatOptimizerBase):
    """LAMB: layer-wise adaptive large-batch training.

    Args:
        max_coeff, min_coeff: bounds of the trust ratio.
    Raises:
        ValueError: for a hyper-parameter out of range.
    """

    granularity: Granularity = "tensor"
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        inf = float("inf")
        self.defaults: dict[str, Any] = {
            "lr": require_range("Lamb", "lr", lr, 0.0, inf),
            "bias_correction": bias_correction,
            "betas": require_betas("Lamb", betas),
            "eps": require_range("Lamb", "eps", eps, 0.0, inf),
            "weight_decay": require_range("Lamb", "weight_decay", weight_decay, 0.0, inf),
            "max_coeff": require_range("Lamb", "max_coeff", max_coeff, 0.0, inf),
            "min_coeff": require_range("Lamb", "min_coeff", min_coeff, 0.0, max_coeff),
        }

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
        """See `FlatOptimizer.update`; collective over `comm`."""
        layout = require_layout("Lamb", segments, layout)
        index = {slot.name: position for position, slot in enumerate(layout.slots)}
        square_norms = torch.zeros(2, len(index), dtype=torch.float32, device=segments[0].master.device)
        directions = [_direction(segment, coef, step) for segment in segments]
        for segment, direction in zip(segments, directions, strict=True):
            _add_square_norms(segment, direction, index, square_norms)
        if comm is not None and index:
            comm.all_reduce(square_norms.view(-1)).wait()
        for segment, direction in zip(segments, directions, strict=True):
            _apply(segment, direction, index, square_norms)


def _direction(segment: Segment, coef: Tensor | float, step: int) -> Tensor:
    """The whole segment's direction; the moments are updated on the way."""
    direction, position = torch.empty_like(segment.master), 0
    for tile, _ in tiles(segment, coef):
        numel = tile.master.numel()
        direction[position : position + numel].copy_(_tile_direction(tile, step))
        position += numel
    return direction


def _tile_direction(tile: Tile, step: int) -> Tensor:
    group = tile.group
    return lamb_direction(
        tile.master,
        tile.grad,
        tile.state["exp_avg"],
        tile.state["exp_avg_sq"],
        step=step,
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        bias_correction=bool(group["bias_correction"]),
    )


def _add_square_norms(segment: Segment, direction: Tensor, index: dict[str, int], square_norms: Tensor) -> None:
    for part in segment.slices:
        for row, vector in enumerate((segment.master, direction)):
            square_norms[row, index[part.name]] += torch.linalg.vector_norm(vector[part.start : part.stop]).square()


def _apply(segment: Segment, direction: Tensor, index: dict[str, int], square_norms: Tensor) -> None:
    group = segment.group
    ratio = trust_ratio(square_norms, min_coeff=float(group["min_coeff"]), max_coeff=float(group["max_coeff"]))
    for part in segment.slices:
        direction[part.start : part.stop].mul_(ratio[index[part.name]])
    segment.master.add_(direction, alpha=-float(group["lr"]))
    if segment.out is not None:
        round_into(segment.master, segment.out)
