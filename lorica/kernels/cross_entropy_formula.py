"""The cross-entropy of rows of logits and its gradient in plain torch. Owns the formula and its options, no kernel.

It is the reference of the kernel in `cross_entropy.py`, and what runs where Triton does not. For one row of logits z,
its target t, V classes and smoothing e:

    z'      = softcap * tanh(z / softcap), or z without a softcap
    lse     = log(sum_j exp z'_j)
    loss    = lse - (1 - e) z'_t - e mean_j z'_j + z_loss lse^2
    d z'_j  = (1 + 2 z_loss lse) softmax(z')_j - (1 - e) [j = t] - e / V
    d z_j   = d z'_j (1 - (z'_j / softcap)^2)

Sources: label smoothing, Szegedy et al. 2015 (arXiv:1512.00567), sec. 7; z-loss, Chowdhery et al. 2022
(arXiv:2204.02311), sec. 5; softcap, Gemma Team 2024 (arXiv:2408.00118), sec. 2.

Shape suffixes: N rows, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossOptions:
    """What the loss of a row is, besides its logits and its target.

    Attributes:
        ignore_index: rows with this target have no loss and no gradient.
        label_smoothing: the share of the target's probability that is spread over all classes, 0 to 1.
        z_loss: the factor of lse^2.
        softcap: bounds the logits to (-softcap, softcap); None: no bound.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: for a smoothing outside 0 to 1, or a softcap that is not positive.
        """
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(
                f"label_smoothing: expected a number from 0 to 1, got {self.label_smoothing}. Fix: 0 does not smooth."
            )
        if self.softcap is not None and self.softcap <= 0.0:
            raise ValueError(f"softcap: expected a positive bound, got {self.softcap}. Fix: None does not bound.")


class RowLosses(NamedTuple):
    """Loss and log-sum-exp of each row, [N], fp32 (fp64 for fp64 logits); both are 0 in ignored rows."""

    loss_N: Tensor
    lse_N: Tensor


def cross_entropy_formula_(
    logits_NV: Tensor, target_N: Tensor, options: LossOptions, scale: Tensor | None = None
) -> RowLosses:
    """The loss of each row; `logits_NV` is used up: it holds the gradient afterwards, or nothing of use.

    Args:
        logits_NV: any float dtype; the arithmetic is in fp32, or in fp64 for fp64 logits.
        target_N: int64, classes or `options.ignore_index`.
        scale: [], [1] or [N], multiplies the gradient; None: no gradient is wanted.
    """
    work_NV = logits_NV if logits_NV.dtype in (torch.float32, torch.float64) else logits_NV.float()
    smoothing = options.label_smoothing
    ignored_N = target_N == options.ignore_index
    target_N1 = target_N.masked_fill(ignored_N, 0).unsqueeze(1)
    slope_NV = _cap_(work_NV, options.softcap)

    top_N1 = work_NV.amax(1, keepdim=True)
    work_NV.sub_(top_N1)
    picked_N1 = work_NV.gather(1, target_N1)
    mean_N1 = work_NV.mean(1, keepdim=True) if smoothing else torch.zeros_like(top_N1)
    work_NV.exp_()
    total_N1 = work_NV.sum(1, keepdim=True)
    lse_N1 = top_N1 + total_N1.log()
    loss_N1 = total_N1.log() - (1 - smoothing) * picked_N1 - smoothing * mean_N1 + options.z_loss * lse_N1.square()

    if scale is not None:
        work_NV.mul_((1 + 2 * options.z_loss * lse_N1) / total_N1)
        if smoothing:
            work_NV.sub_(smoothing / logits_NV.shape[1])
        work_NV.scatter_add_(1, target_N1, torch.full_like(top_N1, smoothing - 1))
        if slope_NV is not None:
            work_NV.mul_(slope_NV)
        work_NV.mul_(scale.reshape(-1, 1)).masked_fill_(ignored_N.unsqueeze(1), 0.0)
        if work_NV is not logits_NV:
            logits_NV.copy_(work_NV)
    return RowLosses(loss_N1.squeeze(1).masked_fill(ignored_N, 0.0), lse_N1.squeeze(1).masked_fill(ignored_N, 0.0))


def _cap_(work_NV: Tensor, softcap: float | None) -> Tensor | None:
    """Bound the logits in place; returns the derivative of the bound."""
    if softcap is None:
        return None
    work_NV.div_(softcap).tanh_()
    slope_NV = 1 - work_NV.square()
    work_NV.mul_(softcap)
    return slope_NV
