"""The scalars of one optimizer step, for the one-pass kernels of every processor. Owns no kernel; needs no Triton.

Computed in double precision on the host, rounded to fp32 once; a kernel reads them by their place in the tuple.
"""

from __future__ import annotations

NUM_HYPER = 12
STEPS = 1 << 24  # the number of a step is exact in fp32 below it


def adam_hyper(
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias_correction: bool,
) -> tuple[float, ...]:
    """The scalars of one Adam step: b1, 1-b1, b2, 1-b2, eps, L2 decay, 1 - lr*decay, -lr/correction1, 1/correction2,
    and the number of the step (modulo 2^24), for the dice of compact states.
    """
    correction1 = 1 - betas[0] ** step if bias_correction else 1.0
    correction2 = (1 - betas[1] ** step) ** 0.5 if bias_correction else 1.0
    l2, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    return (
        betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, l2, shrink, -lr / correction1, 1 / correction2,
        float(step % STEPS),
    )  # fmt: skip


def lion_hyper(*, lr: float, betas: tuple[float, float], weight_decay: float) -> tuple[float, ...]:
    """The scalars of one Lion step: b1, 1-b1, b2, 1-b2, 1 - lr*decay, -lr."""
    return betas[0], 1 - betas[0], betas[1], 1 - betas[1], 1 - lr * weight_decay, -lr


def sgd_hyper(
    step: int, *, lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool
) -> tuple[float, ...]:
    """The scalars of one SGD step: momentum, 1 - dampening, decay, share of the gradient in the direction, -lr,
    share of the buffer in the direction.

    The first step fills the buffer with the gradient itself, undampened, as torch does.
    """
    keep, take = (0.0, 1.0) if step == 1 else (momentum, 1 - dampening)
    ahead = momentum if nesterov else 1.0
    return keep, take, weight_decay, float(nesterov), -lr, ahead


def adagrad_hyper(step: int, *, lr: float, lr_decay: float, weight_decay: float, eps: float) -> tuple[float, ...]:
    """The scalars of one Adagrad step: decay, eps, -lr / (1 + (step - 1) * lr_decay)."""
    return weight_decay, eps, -lr / (1 + (step - 1) * lr_decay)
