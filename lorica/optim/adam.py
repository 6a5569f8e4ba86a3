"""Adam and AdamW on flat planes. Owns their formula; tiles.py owns the loop, fused.py torch's kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorica.kernels.hyper import adam_hyper
from lorica.optim import fused
from lorica.optim.base import Segment, require_betas, require_range
from lorica.optim.compact import mark_padding
from lorica.optim.element import ElementOptimizer
from lorica.optim.tiles import Tile

# The kernels divide by 1 - beta ** step: a step at which every beta ** step is 0 turns that correction off exactly.
NO_CORRECTION_STEP = 1e30


def adam_formula(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """One Adam update in place; the reference for the fused kernel.

    Source: Kingma & Ba 2014 (arXiv:1412.6980), algorithm 1; Loshchilov & Hutter 2017 (arXiv:1711.05101), algorithm 2.
    """
    if decoupled:
        master.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad.add(master, alpha=weight_decay)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    correction1 = 1 - betas[0] ** step
    correction2 = 1 - betas[1] ** step
    denominator = exp_avg_sq.sqrt().div_(correction2**0.5).add_(eps)
    master.addcdiv_(exp_avg, denominator, value=-lr / correction1)


class Adam(ElementOptimizer):
    """Adam; with `adam_w_mode` (the default, as in DeepSpeed) weight decay is decoupled, which makes it AdamW.

    Args:
        bias_correction: divide the moments by 1 - beta ** step.
        adam_w_mode: decoupled weight decay; False adds weight_decay * parameter to the gradient.
        amsgrad: only False.
    Raises:
        ValueError: for a hyper-parameter out of range.
        NotImplementedError: for amsgrad=True.
    """

    kernel = "adam"
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        amsgrad: bool = False,
    ) -> None:
        name = type(self).__name__
        if amsgrad:
            raise NotImplementedError(
                f"{name}: expected amsgrad false, got {amsgrad!r}: the fused update keeps no third moment. "
                'Fix: set "torch_adam": true, or pass a torch.optim.AdamW(..., amsgrad=True) object.'
            )
        self.adam_w_mode = adam_w_mode
        self.defaults: dict[str, Any] = {
            "lr": require_range(name, "lr", lr, 0.0, float("inf")),
            "bias_correction": bias_correction,
            "betas": require_betas(name, betas),
            "eps": require_range(name, "eps", eps, 0.0, float("inf")),
            "weight_decay": require_range(name, "weight_decay", weight_decay, 0.0, float("inf")),
        }

    @property
    def takes_compact(self) -> bool:
        """It does, by `optim/compact.py`."""
        return True

    def init_state(self, segment: Segment) -> None:
        """Moments start at zero; padding is marked where a format asks for it."""
        mark_padding(segment, self.moments)

    def update_tile(self, tile: Tile, *, step: int) -> None:
        """One update of a tile, by the fused kernel where the device has one."""
        adam_tile(tile, step=step, decoupled=self.adam_w_mode)

    def hyper(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """See `kernels.hyper.adam_hyper`."""
        return adam_hyper(
            step,
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=self.adam_w_mode,
            bias_correction=bool(group.get("bias_correction", True)),
        )


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(
            lr, betas, eps, weight_decay, bias_correction=bias_correction, adam_w_mode=True, amsgrad=amsgrad
        )


def adam_tile(tile: Tile, *, step: int, decoupled: bool) -> None:
    """Update a tile with the hyper-parameters of its group; also the AdamW part of Muon."""
    group = tile.group
    kernel_name = "adamw" if decoupled else "adam"
    update = fused.adam_ if fused.has_kernel(kernel_name, tile.master.device.type) else adam_formula
    update(
        tile.master,
        tile.grad,
        tile.state["exp_avg"],
        tile.state["exp_avg_sq"],
        step=step if group.get("bias_correction", True) else NO_CORRECTION_STEP,
        lr=float(group["lr"]),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=decoupled,
    )
