"""Adagrad on flat planes. Owns its formula; tiles.py owns the loop, fused.py torch's kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorica.kernels.hyper import adagrad_hyper
from lorica.optim import fused
from lorica.optim.base import Segment, require_range
from lorica.optim.element import ElementOptimizer
from lorica.optim.tiles import Tile


def adagrad_formula(
    master: Tensor,
    grad: Tensor,
    square_sum: Tensor,
    *,
    step: float,
    lr: float,
    lr_decay: float,
    weight_decay: float,
    eps: float,
) -> None:
    """One Adagrad update in place; the reference for the fused kernel.

    Source: Duchi et al. 2011 (JMLR 12), with torch.optim.Adagrad's learning-rate decay.
    """
    if weight_decay:
        grad = grad.add(master, alpha=weight_decay)
    square_sum.addcmul_(grad, grad)
    master.addcdiv_(grad, square_sum.sqrt().add_(eps), value=-lr / (1 + (step - 1) * lr_decay))


class Adagrad(ElementOptimizer):
    """Adagrad; the sum of squares starts at `initial_accumulator_value`.

    Raises:
        ValueError: for a hyper-parameter out of range.
    """

    kernel = "adagrad"
    moments: tuple[str, ...] = ("sum",)

    def __init__(
        self,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
    ) -> None:
        inf = float("inf")
        self.defaults: dict[str, Any] = {
            "lr": require_range("Adagrad", "lr", lr, 0.0, inf),
            "lr_decay": require_range("Adagrad", "lr_decay", lr_decay, 0.0, inf),
            "eps": require_range("Adagrad", "eps", eps, 0.0, inf),
            "weight_decay": require_range("Adagrad", "weight_decay", weight_decay, 0.0, inf),
            "initial_accumulator_value": require_range(
                "Adagrad", "initial_accumulator_value", initial_accumulator_value, 0.0, inf
            ),
        }

    def init_state(self, segment: Segment) -> None:
        """Start the sum of squares at the group's initial value."""
        segment.state["sum"].fill_(float(segment.group["initial_accumulator_value"]))

    def update_tile(self, tile: Tile, *, step: int) -> None:
        """One update of a tile, by the fused kernel where the device has one."""
        group = tile.group
        update = fused.adagrad_ if fused.has_kernel("adagrad", tile.master.device.type) else adagrad_formula
        update(
            tile.master,
            tile.grad,
            tile.state["sum"],
            step=step,
            lr=float(group["lr"]),
            lr_decay=float(group["lr_decay"]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
        )

    def hyper(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """See `kernels.hyper.adagrad_hyper`."""
        return adagrad_hyper(
            step,
            lr=float(group["lr"]),
            lr_decay=float(group["lr_decay"]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
        )
