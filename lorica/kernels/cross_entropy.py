"""Loss, log-sum-exp and gradient of rows of logits in one kernel, the gradient in the place of the logits.

Owns that kernel. Its reference formula, `cross_entropy_formula_`, has the same arguments and is in a file of its own,
because it runs where Triton cannot be imported. Neither knows where the logits come from.

One program takes one row: a first pass keeps a running maximum and a running sum (Milakov and Gimelshein 2018,
arXiv:1805.02867), a second one reads the row again, mostly from the cache, and overwrites it.

Shape suffixes: N rows, V classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorica.kernels.cross_entropy_formula import LossOptions, RowLosses, cross_entropy_formula_

__all__ = ["LossOptions", "RowLosses", "cross_entropy_", "cross_entropy_formula_"]

MAX_BLOCK = 8192
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cross_entropy_(logits_NV: Tensor, target_N: Tensor, options: LossOptions, scale: Tensor | None = None) -> RowLosses:
    """The loss of each row; with a `scale`, `logits_NV` holds the gradient afterwards.

    A target that is neither a class nor `options.ignore_index` makes its row's loss and gradient NaN: nothing on the
    device can raise.

    Args:
        logits_NV: bf16, fp16 or fp32; classes contiguous, rows with any stride.
        target_N: int64, classes or `options.ignore_index`.
        scale: [], [1] or [N] on the same device, multiplies the gradient; None: no gradient is wanted.
    Raises:
        ValueError: for logits of another dtype, or whose classes are not contiguous.
    """
    num_rows, num_classes = logits_NV.shape
    if logits_NV.dtype not in DTYPES:
        raise ValueError(
            f"cross_entropy_: expected logits in bf16, fp16 or fp32, got {logits_NV.dtype}. Fix: use "
            "cross_entropy_formula_, which takes every float dtype."
        )
    if num_classes > 1 and logits_NV.stride(1) != 1:
        raise ValueError(
            f"cross_entropy_: expected classes that lie side by side, got strides {logits_NV.stride()}. Fix: pass "
            "logits.contiguous(), and read the gradient from that tensor."
        )
    loss_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    lse_N = torch.empty_like(loss_N)
    if num_rows == 0:
        return RowLosses(loss_N, lse_N)
    scale_S = loss_N if scale is None else scale.reshape(-1).float()
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(num_classes)))
    with torch.cuda.device_of(logits_NV):
        _rows_kernel[(num_rows,)](
            logits_NV,
            target_N.contiguous(),
            scale_S,
            loss_N,
            lse_N,
            logits_NV.stride(0),
            scale_S.stride(0) if scale_S.numel() > 1 else 0,
            num_classes,
            options.ignore_index,
            float(options.label_smoothing),
            float(options.z_loss),
            float(options.softcap or 1.0),
            SMOOTHING=options.label_smoothing > 0.0,
            SOFTCAP=options.softcap is not None,
            GRADIENT=scale is not None,
            BLOCK=block,
            num_warps=min(16, max(4, block // 512)),
        )
    return RowLosses(loss_N, lse_N)


@triton.jit
def _rows_kernel(
    logits_ptr, target_ptr, scale_ptr, loss_ptr, lse_ptr,
    row_stride, scale_stride, num_classes, ignore_index, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, num_classes, BLOCK):
                tl.store(row_ptr + start + columns, 0.0, mask=start + columns < num_classes)
    else:
        known = (target >= 0) & (target < num_classes)
        # Read before the first pass, whose reductions are barriers: no warp overwrites it before all have read it.
        picked = tl.load(row_ptr + target, mask=known, other=0.0).to(tl.float32)
        if SOFTCAP:
            picked = _capped(picked, softcap)

        top = float("-inf")
        total = 0.0
        mass = 0.0
        for start in range(0, num_classes, BLOCK):
            inside = start + columns < num_classes
            z = tl.load(row_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            if SOFTCAP:
                z = tl.where(inside, _capped(z, softcap), float("-inf"))
            if SMOOTHING:
                mass += tl.sum(tl.where(inside, z, 0.0), axis=0)
            higher = tl.maximum(top, tl.max(z, axis=0))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN in a block of -inf
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), axis=0)
            top = higher

        log_total = tl.log(total)
        lse = top + log_total
        loss = log_total + (1.0 - label_smoothing) * (top - picked) + z_loss * lse * lse
        if SMOOTHING:
            loss += label_smoothing * (top - mass / num_classes)
        tl.store(loss_ptr + row, tl.where(known, loss, float("nan")))
        tl.store(lse_ptr + row, lse)

        if GRADIENT:
            scale = tl.where(known, tl.load(scale_ptr + row * scale_stride), float("nan"))
            factor = (1.0 + 2.0 * z_loss * lse) / total
            for start in range(0, num_classes, BLOCK):
                offsets = start + columns
                inside = offsets < num_classes
                z = tl.load(row_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
                if SOFTCAP:
                    z = _capped(z, softcap)
                grad = tl.exp(z - top) * factor
                if SMOOTHING:
                    grad -= label_smoothing / num_classes
                grad = tl.where(offsets == target, grad - (1.0 - label_smoothing), grad)
                if SOFTCAP:
                    grad *= 1.0 - (z / softcap) * (z / softcap)
                tl.store(row_ptr + offsets, grad * scale, mask=inside)


@triton.jit
def _capped(x, softcap):
    # softcap * tanh(x / softcap): by an exponential that cannot overflow, and near 0, where that cancels, by its series
    u = tl.abs(x) / softcap
    decay = tl.exp(-2.0 * u)
    square = u * u
    series = u * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    size = softcap * tl.where(u < 0.2, series, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0.0, -size, size)
