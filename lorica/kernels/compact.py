"""Adam on moments of one or two bytes and on parameters without a master, in one pass. Owns no formula.

    bytes per element, bf16 gradient    bf16 moments                      int8    int8_block
    split master                        2 + 2 x (2 + 2 + 2 x 2) = 18      14.1    12.1
    no master                           2 + 2 x (2 + 2 x 2) = 14          10.1    8.1

The codes and the dice are those of precision/compact.py; the CPU's kernel (native/compact.h) has the same operations in
the same order and gives the same bits. A program works on ROWS blocks of 128 elements, so that the largest value of a
block is a reduction within a row.

Shape suffixes: N, the elements of a segment, a multiple of 128; B = N / 128.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorica.kernels.update import GRAD_DTYPES, _load_grad, _load_master, _out, _store_master
from lorica.layout import ALIGN

ROWS = 8
NUM_WARPS = 4
COLUMNS = tl.constexpr(ALIGN)
FLOOR_BITS = tl.constexpr(0x0D800000)  # 2^-100
INFINITY_BITS = tl.constexpr(0x7F800000)
LOWEST_EXPONENT = tl.constexpr(31)
SEED = tl.constexpr(0x5EED0CA5)
OF_PARAMETER = tl.constexpr(0x9E3779B9)

_FORMAT = {
    (torch.float32, torch.float32): "fp32",
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.int8, torch.uint8): "int8",
    (torch.int8, torch.float32): "int8_block",
}


# -- dice: see [Note: where the dice come from] in precision/compact.py ------------------------------------------------


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dice(element, key):
    x = (element ^ (element >> 16)) * 0x7FEB352D
    x = x ^ key
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


# -- codes: see [Note: the 8-bit code] there ---------------------------------------------------------------------------


@triton.jit
def _bits_of_size(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _encode(size, dice16, LEVELS: tl.constexpr):
    """Codes without a sign, and the scales of the rows."""
    top = tl.maximum(tl.max(_bits_of_size(size), axis=1), FLOOR_BITS).to(tl.float32, bitcast=True)
    SQUARE: tl.constexpr = 1.0 * LEVELS * LEVELS
    inverse = tl.div_rn(tl.full(top.shape, SQUARE, tl.float32), top)
    t = size * inverse[:, None]
    t = tl.where(t < SQUARE, t, SQUARE)
    q = tl.sqrt_rn(t).to(tl.int32)
    whole = q.to(tl.float32)
    uniform = (dice16 + dice16 + 1).to(tl.int32, bitcast=True).to(tl.float32) * 7.62939453125e-06  # 2^-17
    chance = (whole + whole + 1.0) * uniform
    q += (t - whole * whole > chance).to(tl.int32)
    SHARE: tl.constexpr = 1.0 / (LEVELS * LEVELS)
    return q, top * SHARE


@triton.jit
def _mean_square(square, padding):
    """See [Note: one second moment per block] there."""
    top = tl.max(_bits_of_size(square), axis=1)
    exponent = tl.maximum(top >> 23, LOWEST_EXPONENT)
    finite = top < INFINITY_BITS
    up = (tl.where(finite, 277 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    down = (tl.where(finite, exponent - 23, 1) << 23).to(tl.float32, bitcast=True)
    fixed = tl.where(finite[:, None], square * up[:, None], 0.0).to(tl.int32)
    count = tl.maximum(tl.sum(tl.where(padding, 0, 1), axis=1), 1).to(tl.float32)
    mean = tl.div_rn(tl.sum(fixed, axis=1).to(tl.float32) * down, count)
    return tl.where(finite, mean, top.to(tl.float32, bitcast=True))


@triton.jit
def _round_stochastically(x, dice16):
    up = (x.to(tl.uint32, bitcast=True) + dice16) >> 16
    return tl.where(x != x, 0x7FC0, up).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _load_bf16(ptr, at, inside):
    bits = tl.load(ptr + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load_codes(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0).to(tl.int32)


# -- the kernel --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start", "salt"])
def _adam_compact_kernel(
    master_ptr, hi_ptr, grad_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, coef_ptr, apply_ptr, hyper_ptr,
    num_blocks, start, salt,
    SPLIT: tl.constexpr, OUT: tl.constexpr, ROUNDED: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if tl.load(apply_ptr) == 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < num_blocks
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    inside = is_row[:, None]  # broadcast: whole rows
    step = tl.load(hyper_ptr + 9).to(tl.int32).to(tl.uint32, bitcast=True)
    key = _mix(step ^ SEED) ^ salt.to(tl.uint32, bitcast=True)
    element = at.to(tl.uint32) + start.to(tl.uint32, bitcast=True)

    if ROUNDED:  # noqa: SIM108 (a compile-time choice)
        master = _load_bf16(master_ptr, at, inside)
    else:
        master = _load_master(master_ptr, hi_ptr, at, inside, SPLIT)
    grad = tl.fma(tl.load(hyper_ptr + 5), master, _load_grad(grad_ptr, coef_ptr, at, inside))
    padding = column[None, :] + row[:, None] * 0 < 0  # nowhere, but where one moment serves a block
    if FORMAT == "int8" or FORMAT == "int8_block":
        code = _load_codes(m_ptr, at, inside)
        if FORMAT == "int8_block":
            padding = code == -128
            code = tl.where(padding, 0, code)
            grad = tl.where(padding, 0.0, grad)
        whole = code.to(tl.float32)
        m = whole * tl.abs(whole) * tl.load(m_scale_ptr + row, mask=is_row, other=0.0)[:, None]
    elif FORMAT == "bf16":
        m = _load_bf16(m_ptr, at, inside)
    else:
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
    m = tl.fma(tl.load(hyper_ptr + 0), m, tl.load(hyper_ptr + 1) * grad)

    if FORMAT == "int8_block":
        mean = _mean_square(grad * grad, padding)
        v = tl.load(v_ptr + row, mask=is_row, other=0.0)
        v = tl.fma(tl.load(hyper_ptr + 2), v, tl.load(hyper_ptr + 3) * mean)
        root = tl.sqrt_rn(v)
        denominator = tl.fma(root, tl.load(hyper_ptr + 8), tl.load(hyper_ptr + 4))[:, None] + tl.zeros_like(grad)
    else:
        if FORMAT == "int8":
            whole = _load_codes(v_ptr, at, inside).to(tl.float32)
            v = whole * whole * tl.load(v_scale_ptr + row, mask=is_row, other=0.0)[:, None]
            v = v * v
        elif FORMAT == "bf16":
            v = _load_bf16(v_ptr, at, inside)
        else:
            v = tl.load(v_ptr + at, mask=inside, other=0.0)
        v = tl.fma(tl.load(hyper_ptr + 2), v, tl.load(hyper_ptr + 3) * (grad * grad))
        root = tl.sqrt_rn(v)
        denominator = tl.fma(root, tl.load(hyper_ptr + 8), tl.load(hyper_ptr + 4))
    master = tl.fma(tl.load(hyper_ptr + 7), tl.div_rn(m, denominator), master * tl.load(hyper_ptr + 6))

    if ROUNDED:
        bits = _dice(element, _mix(key ^ OF_PARAMETER))
        tl.store(master_ptr + at, _round_stochastically(master, bits & 0xFFFF), mask=inside)
    else:
        _store_master(master, master_ptr, hi_ptr, at, inside, SPLIT, OUT)
    if FORMAT == "fp32":
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
    else:
        bits = _dice(element, _mix(key))
        low, high = bits & 0xFFFF, bits >> 16
        if FORMAT == "bf16":
            tl.store(m_ptr + at, _round_stochastically(m, low), mask=inside)
            tl.store(v_ptr + at, _round_stochastically(v, high), mask=inside)
        else:
            q, scale = _encode(tl.abs(m), low, 127)
            q = tl.where(m.to(tl.int32, bitcast=True) < 0, -q, q)
            tl.store(m_ptr + at, tl.where(padding, -128, q).to(tl.int8), mask=inside)
            tl.store(m_scale_ptr + row, scale, mask=is_row)
            if FORMAT == "int8":
                q, scale = _encode(root, high, 255)
                tl.store(v_ptr + at, tl.maximum(q, (root > 0).to(tl.int32)).to(tl.uint8), mask=inside)
                tl.store(v_scale_ptr + row, scale, mask=is_row)
            else:
                tl.store(v_ptr + row, v, mask=is_row)


# -- launching ---------------------------------------------------------------------------------------------------------


def fits(master_N: Tensor, grad_N: Tensor, out_N: Tensor | None) -> bool:
    """Whether the kernel takes planes of these dtypes: `update.fits`, or a bf16 parameter without a master."""
    from lorica.kernels import update

    rounded = master_N.dtype is torch.bfloat16 and out_N is None and grad_N.dtype in GRAD_DTYPES
    return rounded or update.fits(master_N, grad_N, out_N)


def adam_compact(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, m_N: Tensor, v_N: Tensor, *,
    scales: tuple[Tensor, ...], coef: Tensor, apply: Tensor, hyper: Tensor, salt: int, start: int,
) -> None:  # fmt: skip
    """One Adam or AdamW update in place.

    Args:
        master_N: as in `update.adam`; or bf16, the parameter itself, rounded stochastically (`out_N` is None then).
        m_N, v_N: fp32; bf16; or int8 and uint8; or int8 and fp32 [B].
        scales: [B] fp32 for each moment in 8 bits.
        out_N, grad_N, coef, apply, hyper: as in `update.adam`; `hyper` says the step.
        salt, start: 32 bits that are the plane's own, and the number of the first element in it.
    """
    if master_N.numel() == 0:
        return
    num_blocks = master_N.numel() // ALIGN
    m_scale, v_scale = (*scales, *[m_N] * (2 - len(scales)))
    kernel: Any = _adam_compact_kernel
    kernel[(triton.cdiv(num_blocks, ROWS),)](
        master_N, master_N if out_N is None else out_N, grad_N, m_N, v_N, m_scale, v_scale, coef, apply, hyper,
        num_blocks, _as_int32(start), _as_int32(salt),
        SPLIT=master_N.dtype is torch.int16, OUT=_out(out_N), ROUNDED=master_N.dtype is torch.bfloat16,
        FORMAT=_FORMAT[m_N.dtype, v_N.dtype], ROWS=ROWS, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _as_int32(x: int) -> int:
    """The lower 32 bits, as a signed number."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
