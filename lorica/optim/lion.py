"""Lion on flat planes. Owns its formula (torch has no kernel for it); tiles.py owns the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorica.kernels.hyper import lion_hyper
from lorica.optim.base import require_betas, require_range
from lorica.optim.element import ElementOptimizer
from lorica.optim.tiles import Tile


def lion_formula(
    master: Tensor, grad: Tensor, exp_avg: Tensor, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    """One Lion update in place.

    Source: Chen et al. 2023 (arXiv:2302.06675), algorithm 2.
    """
    direction = torch.lerp(exp_avg, grad, 1 - betas[0]).sign_()
    master.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)
    exp_avg.lerp_(grad, 1 - betas[1])


class Lion(ElementOptimizer):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay; one moment.

    Raises:
        ValueError: for a hyper-parameter out of range.
    """

    kernel = "lion"
    moments: tuple[str, ...] = ("exp_avg",)

    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        self.defaults: dict[str, Any] = {
            "lr": require_range("Lion", "lr", lr, 0.0, float("inf")),
            "betas": require_betas("Lion", betas),
            "weight_decay": require_range("Lion", "weight_decay", weight_decay, 0.0, float("inf")),
        }

    def update_tile(self, tile: Tile, *, step: int) -> None:
        """One update of a tile."""
        group = tile.group
        lion_formula(
            tile.master,
            tile.grad,
            tile.state["exp_avg"],
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            weight_decay=float(group["weight_decay"]),
        )

    def hyper(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """See `kernels.hyper.lion_hyper`."""
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        return lion_hyper(lr=float(group["lr"]), betas=betas, weight_decay=float(group["weight_decay"]))
