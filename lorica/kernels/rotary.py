"""Rotary position embedding of queries and keys in one launch: formula, kernel, gradient. Owns no table of angles.

A pair (a, b) of elements of a head is turned by the angle of its position:

    halves        a = x[i], b = x[i + D/2]      Hugging Face's rotate_half
    interleaved   a = x[2i], b = x[2i + 1]      GPT-J, and the paper

    forward   a' = a * cos_a - b * sin_a        backward  da = da' * cos_a + db' * sin_b
              b' = b * cos_b + a * sin_b                  db = db' * cos_b - da' * sin_a

which is the rotation by -angle where both elements have the same cos and sin, and the exact gradient where not. A
program holds cos and sin of some positions and goes through heads, so that they are read once, not once per head.

Shape suffixes: B batch, H heads (of q; k may have fewer), T positions, D elements of a head; L positions of a tile,
E pairs of a head. `q_BHTD` may have any strides but the last, which is 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.kernels.launch import ceil_div, check_dtype, on_device_of, power_of_two

TILE = 1024  # pairs that a program turns at a time
NUM_WARPS = 4
MAX_SHARES = 4  # programs that share the heads of one tile of positions


# -- formula -----------------------------------------------------------------------------------------------------------


def rotary_formula(
    q_BHTD: Tensor, k_BHTD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """What `apply_rotary` computes, in plain torch, in float64 for float64 tensors, else in float32.

    Source: Su et al. 2021 (arXiv:2104.09864), eq. 34.
    """
    cos, sin = (_wide(table).unsqueeze(-3) for table in (cos, sin))  # [(B,) 1, T, D]
    turned = []
    for x in (q_BHTD, k_BHTD):
        wide = _wide(x)
        if interleaved:
            partner = torch.stack((-wide[..., 1::2], wide[..., 0::2]), dim=-1).flatten(-2)
        else:
            first, second = wide.chunk(2, dim=-1)
            partner = torch.cat((-second, first), dim=-1)
        turned.append((wide * cos + partner * sin).to(x.dtype))
    return turned[0], turned[1]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, num_heads, x_head, y_head, x_a_LE, x_b_LE, y_a_LE, y_b_LE, live_LE,
    cos_a_LE, cos_b_LE, sin_a_LE, sin_b_LE, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Turn the heads that fall to this program: every num_programs(2)-th. 64 bits: a head may lie 2^31 elements off."""
    for head in tl.range(tl.program_id(2).to(tl.int64), num_heads, tl.num_programs(2)):
        a_LE = tl.load(x_ptr + head * x_head + x_a_LE, mask=live_LE, other=0.0).to(tl.float32)
        b_LE = tl.load(x_ptr + head * x_head + x_b_LE, mask=live_LE, other=0.0).to(tl.float32)
        if BACKWARD:
            turned_a_LE = a_LE * cos_a_LE + b_LE * sin_b_LE
            turned_b_LE = b_LE * cos_b_LE - a_LE * sin_a_LE
        else:
            turned_a_LE = a_LE * cos_a_LE - b_LE * sin_a_LE
            turned_b_LE = b_LE * cos_b_LE + a_LE * sin_b_LE
        tl.store(y_ptr + head * y_head + y_a_LE, turned_a_LE, mask=live_LE)
        tl.store(y_ptr + head * y_head + y_b_LE, turned_b_LE, mask=live_LE)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, T, num_pairs, num_q_heads, num_k_heads,
    q_b, q_h, q_t, k_b, k_h, k_t, q_out_b, q_out_h, q_out_t, k_out_b, k_out_h, k_out_t, cos_b, cos_t,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, LENGTH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One tile of positions of one sequence; arguments like q_h are strides in elements."""
    t_L = (tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)).to(tl.int64)[:, None]
    pair_E = tl.arange(0, PAIRS)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    live_LE = (t_L < T) & (pair_E < num_pairs)
    if INTERLEAVED:
        a_E = 2 * pair_E
        b_E = 2 * pair_E + 1
    else:
        a_E = pair_E
        b_E = pair_E + num_pairs
    table_L = batch * cos_b + t_L * cos_t
    cos_a_LE = tl.load(cos_ptr + table_L + a_E, mask=live_LE, other=0.0).to(tl.float32)
    cos_b_LE = tl.load(cos_ptr + table_L + b_E, mask=live_LE, other=0.0).to(tl.float32)
    sin_a_LE = tl.load(sin_ptr + table_L + a_E, mask=live_LE, other=0.0).to(tl.float32)
    sin_b_LE = tl.load(sin_ptr + table_L + b_E, mask=live_LE, other=0.0).to(tl.float32)
    q_L = batch * q_b + t_L * q_t
    k_L = batch * k_b + t_L * k_t
    q_out_L = batch * q_out_b + t_L * q_out_t
    k_out_L = batch * k_out_b + t_L * k_out_t
    _turn_heads(
        q_ptr, q_out_ptr, num_q_heads, q_h, q_out_h, q_L + a_E, q_L + b_E, q_out_L + a_E, q_out_L + b_E, live_LE,
        cos_a_LE, cos_b_LE, sin_a_LE, sin_b_LE, BACKWARD,
    )  # fmt: skip
    _turn_heads(
        k_ptr, k_out_ptr, num_k_heads, k_h, k_out_h, k_L + a_E, k_L + b_E, k_out_L + a_E, k_out_L + b_E, live_LE,
        cos_a_LE, cos_b_LE, sin_a_LE, sin_b_LE, BACKWARD,
    )  # fmt: skip


# -- launching ---------------------------------------------------------------------------------------------------------


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """An empty tensor whose dims lie in memory as those of `x` do: what a product with `x` gives in torch."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _turn(
    q_BHTD: Tensor, k_BHTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, backward: bool
) -> tuple[Tensor, Tensor]:
    q_BHTD, k_BHTD = _last_dense(q_BHTD), _last_dense(k_BHTD)
    q_out, k_out = _like(q_BHTD), _like(k_BHTD)
    batch, num_q_heads, length, size = q_BHTD.shape
    num_k_heads = k_BHTD.shape[1]
    num_pairs = size // 2
    if batch * length * num_pairs * (num_q_heads + num_k_heads) > 0:
        pairs = power_of_two(num_pairs)
        tile = max(1, min(TILE // pairs, power_of_two(length)))
        shares = min(MAX_SHARES, max(num_q_heads, num_k_heads))
        cos_b = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
        _rotary_kernel[(ceil_div(length, tile), batch, shares)](
            q_BHTD, k_BHTD, q_out, k_out, cos, sin, length, num_pairs, num_q_heads, num_k_heads,
            *q_BHTD.stride()[:3], *k_BHTD.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            cos_b, cos.stride(-2),
            INTERLEAVED=interleaved, BACKWARD=backward, LENGTH=tile, PAIRS=pairs, num_warps=NUM_WARPS,
        )  # fmt: skip
    return q_out, k_out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        cos, sin = _last_dense(cos), _last_dense(sin)
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(q_BHTD, k_BHTD, cos, sin, interleaved, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BHTD: Tensor, dk_BHTD: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *_turn(dq_BHTD, dk_BHTD, cos, sin, ctx.interleaved, backward=True), None, None, None


# -- public ------------------------------------------------------------------------------------------------------------


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by the angles of their positions, in float32.

    Args:
        q: [B, H, T, D], float32, bfloat16 or float16; any strides (a last stride other than 1 costs a copy).
        k: [B, Hk, T, D], same dtype.
        cos, sin: [T, D], [1, T, D] or [B, T, D], any of these dtypes: one value per element, not per pair, in the order
            of the elements. No gradient.
        interleaved: pairs are neighbours (2i, 2i + 1) instead of (i, i + D/2).
    Returns: new tensors like q and k, in their dtype, with their order of dims in memory; differentiable once.
    Raises:
        ValueError: for a shape or dtype that does not fit, or a table that wants a gradient.
    """
    _check(q, k, cos, sin)
    with on_device_of(q):
        return _Rotary.apply(q, k, cos, sin, interleaved)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    where = "apply_rotary"
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_dtype(name, tensor, where)
    if q.dim() != 4 or q.shape[-1] % 2:
        raise ValueError(
            f"q has the wrong shape: expected [B, H, T, D] with an even D, got {tuple(q.shape)} ({where}). "
            "Fix: turn only an even number of elements of each head."
        )
    batch, _, length, size = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, length, size) or k.dtype != q.dtype:
        raise ValueError(
            f"k does not fit q: expected [{batch}, Hk, {length}, {size}] {q.dtype}, got {tuple(k.shape)} {k.dtype} "
            f"({where}). Fix: pass q and k of the same layer and positions."
        )
    fits = ((length, size), (1, length, size), (batch, length, size))
    if tuple(cos.shape) not in fits or sin.shape != cos.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"cos and sin do not fit q: expected {fits[0]} or {fits[2]}, one dtype, got {tuple(cos.shape)} {cos.dtype} "
            f"and {tuple(sin.shape)} {sin.dtype} ({where}). Fix: one value per position and element of a head."
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(
            f"cos and sin get no gradient: expected tables without requires_grad ({where}). "
            "Fix: detach them, or use rotary_formula, which differentiates them."
        )
