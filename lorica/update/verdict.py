"""What a step makes of the gradient's norm: apply it or not, and multiplied by what. Computed where the norm is.

Nothing here waits for the device: the verdict is a few scalars that the update kernels read. The host learns of it when
it needs to (`engine.get_global_grad_norm`, the loss scale of the next backward).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it


class Verdict(NamedTuple):
    """Scalars on the compute device.

    Attributes:
        norm: [] float64, L2 norm of the gradient of the user's loss, before clipping.
        coef: [1] float64, what the reduced gradient is to be multiplied by.
        finite: [1] int32, 0 if the norm is inf or nan.
    """

    norm: Tensor
    coef: Tensor
    finite: Tensor


def decide(square_sum: Tensor, *, factor: float, clip: float) -> Verdict:
    """The verdict on a gradient.

    Args:
        square_sum: [] float64, of the reduced planes.
        factor: from the reduced sum to the gradient of the user's loss (mean over ranks, loss scale).
        clip: the largest norm; 0: no clipping.
    """
    norm = square_sum.sqrt() * factor
    coef = torch.full_like(norm, factor)
    if clip > 0:
        coef = coef * torch.fmin(clip / (norm + CLIP_EPS), torch.ones_like(norm))  # fmin: a NaN norm does not clip
    return Verdict(norm, coef.reshape(1), torch.isfinite(norm).to(torch.int32).reshape(1))
