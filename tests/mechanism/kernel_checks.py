"""How a kernel is compared with its formula: the formula in float64 on the same values, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# fp32: a few roundings of 6e-8 in a sum. 16 bits: inputs are exact and the arithmetic is fp32, so what is left is the
# rounding of the result, by 2^-9 (bf16) or 2^-12 (fp16) of it, twice where the formula rounds twice. Triton's
# interpreter does not round to bf16, it truncates (3.7: _convert_float): by 2^-8.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7,
    torch.float16: 2.0**-11,
}


def exact(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values that every dtype holds exactly, and so do their sums of two: multiples of 1/16 between -4 and 4."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-64, 65, shape, generator=generator) / 16).to(DEVICE, dtype)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Assert that the error is small in the norm; where the result cancels to nothing, against 0.2 per element."""
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).norm().item()
    allowed = tolerance * max(wanted.double().norm().item(), 0.2 * wanted.numel() ** 0.5)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def _leaf(value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)


def check(
    kernel: Callable[..., Any], formula: Callable[..., Any], inputs: Sequence[Any], tolerance: float | None = None
) -> None:
    """Compare results and all gradients; tensors in `inputs` with requires_grad get one, None stands for no tensor."""
    narrow = [_leaf(value, None) for value in inputs]
    wide = [_leaf(value, torch.float64) for value in inputs]
    got, wanted = kernel(*narrow), formula(*wide)
    got, wanted = ((out,) if isinstance(out, Tensor) else out for out in (got, wanted))
    grads = [exact(*out.shape, dtype=out.dtype, seed=7 + index) for index, out in enumerate(got)]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(wanted, [grad.double() for grad in grads])
    pairs = list(zip(got, wanted, strict=True))
    leaves = [(a.grad, b.grad) for a, b in zip(narrow, wide, strict=True) if isinstance(a, Tensor) and a.requires_grad]
    assert len(pairs + leaves) > len(pairs)
    for result, reference in pairs + leaves:
        assert result is not None and reference is not None
        close(result.detach(), reference.detach(), tolerance or TOLERANCE[result.dtype])
    for leaf in narrow:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad is not None and leaf.grad.dtype is leaf.dtype
