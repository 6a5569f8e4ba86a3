"""SGD with momentum on flat planes. Owns its formula; tiles.py owns the loop, fused.py torch's kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorica.kernels.hyper import sgd_hyper
from lorica.optim import fused
from lorica.optim.base import Segment, require_range
from lorica.optim.element import ElementOptimizer
from lorica.optim.tiles import Tile


def sgd_formula(
    master: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first_step: bool,
) -> None:
    """One SGD update in place; the first step fills the buffer with the gradient itself, undampened, as torch does.

    Source: Sutskever et al. 2013 (ICML), sec. 2, in torch.optim.SGD's form (momentum outside the learning rate).
    """
    if weight_decay:
        grad = grad.add(master, alpha=weight_decay)
    if momentum_buffer is not None:
        if first_step:
            momentum_buffer.copy_(grad)
        else:
            momentum_buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
        grad = grad.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    master.add_(grad, alpha=-lr)


class SGD(ElementOptimizer):
    """Stochastic gradient descent; keeps a momentum plane only if `momentum` is not zero.

    Raises:
        ValueError: for a hyper-parameter out of range, or nesterov without momentum or with dampening.
    """

    kernel = "sgd"

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"SGD: nesterov needs momentum > 0 and dampening 0, got momentum {momentum}, dampening {dampening}. "
                "Fix: set momentum, or leave nesterov out."
            )
        self.moments: tuple[str, ...] = ("momentum_buffer",) if momentum else ()
        self.defaults: dict[str, Any] = {
            "lr": require_range("SGD", "lr", lr, 0.0, float("inf")),
            "momentum": require_range("SGD", "momentum", momentum, 0.0, float("inf")),
            "dampening": require_range("SGD", "dampening", dampening, 0.0, float("inf")),
            "weight_decay": require_range("SGD", "weight_decay", weight_decay, 0.0, float("inf")),
            "nesterov": nesterov,
        }

    def update_tile(self, tile: Tile, *, step: int) -> None:
        """One update of a tile, by the fused kernel where the device has one."""
        group = tile.group
        momentum = float(group["momentum"])
        update = fused.sgd_ if fused.has_kernel("sgd", tile.master.device.type) else sgd_formula
        update(
            tile.master,
            tile.grad,
            _momentum_buffer(tile) if momentum else None,
            lr=float(group["lr"]),
            momentum=momentum,
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            first_step=step == 1,
        )

    def hyper(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """See `kernels.hyper.sgd_hyper`."""
        return sgd_hyper(
            step,
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
        )

    def moments_of(self, segment: Segment) -> tuple[Tensor | None, ...]:
        """The momentum buffer; None in a group without momentum."""
        return (_momentum_buffer(segment) if float(segment.group["momentum"]) else None,)


def _momentum_buffer(tile: Tile | Segment) -> Tensor:
    buffer = tile.state.get("momentum_buffer")
    if buffer is None:
        raise ValueError(
            "SGD: expected momentum 0 in every param group of an optimizer made without momentum (it keeps no plane "
            f"for it), got {tile.group['momentum']}. Fix: set momentum in the optimizer's own parameters."
        )
    return buffer
