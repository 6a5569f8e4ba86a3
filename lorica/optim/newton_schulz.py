"""Orthogonalisation of matrices by a quintic Newton-Schulz iteration, in two forms. Knows nothing of optimizers.

Shapes: X [..., M, N], batch dims first. The result keeps the singular vectors and moves all singular values near 1
(between about 0.7 and 1.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

# p(s) = A s + B s^3 + C s^5 is steepest at 0, so small singular values grow fast. Source: Jordan et al. 2024, "Muon".
A, B, C = 3.4445, -4.7750, 2.0315
NUM_STEPS = 5
RESTART_AFTER = 2  # gram: recompute the Gram matrix from X here, before rounding errors of half precision grow
EPS = 1e-7

METHODS = ("gram", "standard")


def compute_dtype(method: str, device: torch.device) -> torch.dtype:
    """The precision of the iteration: half on accelerators (fp16 for gram, bf16 for standard), fp32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if method == "gram" else torch.bfloat16


def orthogonalize(x: Tensor, method: str = "gram", *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the orthogonalised `x` [..., M, N] as fp32.

    Args:
        x: any float dtype; scaled to Frobenius norm 1 in fp32 first, so that small gradients survive fp16.
        method: "standard" iterates on X; "gram" on the small Gram matrix (the same polynomial, fewer FLOPs if M != N).
        dtype: precision of the iteration.
    """
    wide = x.float()
    tall = wide.shape[-2] > wide.shape[-1]
    wide = wide.mT if tall else wide
    wide = (wide / (torch.linalg.matrix_norm(wide, keepdim=True) + EPS)).to(dtype)
    square = wide.shape[-2] == wide.shape[-1]
    result = (_standard(wide) if method == "standard" or square else _gram(wide)).float()
    return result.mT if tall else result


def _standard(x: Tensor) -> Tensor:
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return x


def _gram(x: Tensor) -> Tensor:
    for num_steps in (RESTART_AFTER, NUM_STEPS - RESTART_AFTER):
        x = _product_of_steps(x @ x.mT, num_steps) @ x
    return x


def _product_of_steps(gram: Tensor, num_steps: int) -> Tensor:
    """The matrix Q [..., M, M] with X_after = Q X_before: each step multiplies by A I + B R + C R^2, and R by it twice.

    The identity is never added to a half-precision matrix except once: the sum would round the small terms away.
    """
    product: Tensor | None = None
    for step in range(num_steps):
        polynomial = B * gram + C * (gram @ gram)
        if product is None:
            product = polynomial + A * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        else:
            product = A * product + polynomial @ product
        if step + 1 < num_steps:
            half = A * gram + polynomial @ gram
            gram = A * half + polynomial @ half
    assert product is not None, "at least one step"
    return product
