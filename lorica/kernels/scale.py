"""Multiply a tensor in place by a number that only the device knows. Owns that kernel and its formula.

A factor of 1 (the gradient that `loss.backward()` starts with) costs one read per block of the grid: nothing of the
tensor is touched, and the host never asks. Shape suffix: N elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def scale_formula_(tensor: Tensor, factor: Tensor) -> Tensor:
    """What the kernel computes: the product in fp32, rounded once (torch rounds a 0-dim factor to bf16 first)."""
    return tensor.copy_(tensor.float() * factor.float())


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor *= factor`.

    Args:
        tensor: bf16, fp16 or fp32, contiguous.
        factor: one element, fp32, on the same device.
    Returns:
        `tensor`.
    Raises:
        ValueError: if `tensor` is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"scale_: expected a contiguous tensor, got strides {tensor.stride()}. Fix: pass tensor.contiguous()."
        )
    numel = tensor.numel()
    if numel:
        with torch.cuda.device_of(tensor):
            _scale_kernel[(triton.cdiv(numel, BLOCK),)](tensor, factor.float(), numel, BLOCK=BLOCK, num_warps=8)
    return tensor


@triton.jit
def _scale_kernel(tensor_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x_N = tl.load(tensor_ptr + at_N, mask=at_N < numel)
        tl.store(tensor_ptr + at_N, x_N.to(tl.float32) * factor, mask=at_N < numel)
