"""torch's fused element-wise kernels; the only file that names them, so that a rename in torch is mended here.

They are private (`torch._fused_*_`) but what `torch.optim.*(fused=True)` calls, with the same signatures in torch 2.11
and 2.13. `has_kernel` asks the dispatcher whether a device has one; where it has none, the reference formula runs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_DISPATCH_KEY = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}


@cache
def has_kernel(name: str, device_type: str) -> bool:
    """Whether torch has a fused kernel `name` ("adam", "adamw", "sgd", "adagrad") for a device type."""
    key = _DISPATCH_KEY.get(device_type)
    if key is None or not hasattr(torch, f"_fused_{name}_"):
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::_fused_{name}_", key))


def step_tensor(step: float, like: Tensor) -> Tensor:
    """The step number as the kernels want it: fp32, on their device."""
    return torch.full((), step, dtype=torch.float32, device=like.device)


def adam_(
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
    """One Adam (L2 decay) or AdamW (decoupled decay) update in place; all tensors of one dtype."""
    adam_many_(
        [master],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [step_tensor(step, master)],
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
    )


def adam_many_(
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """`adam_` on many tensors of one dtype and device by one multi-tensor call; `steps` as `step_tensor` makes them."""
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        masters,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def sgd_(
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
    """One SGD update in place; `momentum_buffer` is None without momentum."""
    torch._fused_sgd_(
        [master],
        [grad],
        [] if momentum_buffer is None else [momentum_buffer],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=False,
        is_first_step=first_step,
    )


def adagrad_(
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
    """One Adagrad update in place."""
    torch._fused_adagrad_(
        [master],
        [grad],
        [square_sum],
        [step_tensor(step, master)],
        lr=lr,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
