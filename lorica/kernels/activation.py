"""Activations between two linear layers: bias + GELU, SwiGLU, GEGLU: formulas, kernels, gradients. Owns no module.

Only inputs are saved; the backward computes the activation again, which costs no memory traffic. All is float32 between
the load and the store. The gradient of a bias is partial sums, one row per program, added by one torch sum: no atomics.

Shape suffixes: M rows, N columns; R rows, C columns of a tile; P programs down the rows.
Activations are named by a word: "silu", "tanh" and "none": GELU by its tanh approximation, and exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.kernels.launch import ceil_div, check_dtype, num_processors, on_device_of, power_of_two, rows

TILE = 4096  # elements of a program's tile
NUM_WARPS = 8
PROGRAMS_PER_PROCESSOR = 4  # of bias-GELU's backward, whose programs walk down the rows
GELUS = ("tanh", "none")


# -- formulas ----------------------------------------------------------------------------------------------------------


def bias_gelu_formula(x: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
    """What `bias_gelu` computes, in plain torch, in float64 for float64 tensors, else in float32."""
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    total = _wide(x) if bias is None else _wide(x) + _wide(bias)
    return _gelu(total, approximate).to(dtype)


def swiglu_formula(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes. Source: Shazeer 2020 (arXiv:2002.05202), eq. 6, with Swish_1 = silu."""
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide) * _wide(up)).to(gate.dtype)


def geglu_formula(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """What `geglu` computes. Source: Shazeer 2020 (arXiv:2002.05202), eq. 6."""
    return (_gelu(_wide(gate), approximate) * _wide(up)).to(gate.dtype)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    """Source: Hendrycks & Gimpel 2016 (arXiv:1606.08415), sec. 2: x * Phi(x), and its tanh approximation."""
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


# -- device functions --------------------------------------------------------------------------------------------------
#
# (1 + tanh(u)) / 2 = sigmoid(2u), so all but the exact GELU are x times a sigmoid, which loses no digits where it is
# small. Constants: 1.59577 = 2 * sqrt(2 / pi), 0.707107 = sqrt(1 / 2), 0.398942 = 1 / sqrt(2 * pi).


@triton.jit
def _share(x, ACT: tl.constexpr):
    """act(x) / x: which share of x passes."""
    if ACT == "silu":
        share = tl.sigmoid(x)
    elif ACT == "tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return share


@triton.jit
def _slope(x, share, ACT: tl.constexpr):
    """The derivative of act at x."""
    if ACT == "silu":
        slope = share * (1.0 + x * (1.0 - share))
    elif ACT == "tanh":
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = share * (1.0 + x * (1.0 - share) * inner)
    else:
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return slope


# -- bias + GELU -------------------------------------------------------------------------------------------------------


@triton.jit
def _bias_gelu_kernel(
    x_ptr, bias_ptr, y_ptr, M, N, x_stride, num_across, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile; tiles are numbered across the columns first."""
    row_R = (tl.program_id(0) // num_across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col_C = (tl.program_id(0) % num_across).to(tl.int64) * COLS + tl.arange(0, COLS)
    live_RC = (row_R < M)[:, None] & (col_C < N)[None, :]
    x_RC = tl.load(x_ptr + (row_R[:, None] * x_stride + col_C[None, :]), mask=live_RC, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x_RC += tl.load(bias_ptr + col_C, mask=col_C < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + (row_R[:, None] * N + col_C[None, :]), x_RC * _share(x_RC, ACT), mask=live_RC)


@triton.jit
def _bias_gelu_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, M, N, dy_stride, x_stride, num_across, num_down,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx of every num_down-th tile of one stripe of columns, and the stripe's partial sum for the bias."""
    down = tl.program_id(0) // num_across
    col_C = (tl.program_id(0) % num_across).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside_C = col_C < N
    if bias_ptr is not None:
        bias_C = tl.load(bias_ptr + col_C, mask=inside_C, other=0.0).to(tl.float32)
    dbias_RC = tl.zeros([ROWS, COLS], tl.float32)
    for tile in tl.range(down, tl.cdiv(M, ROWS), num_down):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        live_RC = (row_R < M)[:, None] & inside_C[None, :]
        start_R = row_R.to(tl.int64)
        x_RC = tl.load(x_ptr + (start_R[:, None] * x_stride + col_C[None, :]), mask=live_RC, other=0.0).to(tl.float32)
        dy_RC = tl.load(dy_ptr + (start_R[:, None] * dy_stride + col_C[None, :]), mask=live_RC, other=0.0)
        if bias_ptr is not None:
            x_RC += bias_C[None, :]
        dx_RC = dy_RC.to(tl.float32) * _slope(x_RC, _share(x_RC, ACT), ACT)
        tl.store(dx_ptr + (start_R[:, None] * N + col_C[None, :]), dx_RC, mask=live_RC)
        if dbias_ptr is not None:
            dbias_RC += dx_RC
    if dbias_ptr is not None:
        tl.store(dbias_ptr + (down.to(tl.int64) * N + col_C), tl.sum(dbias_RC, axis=0), mask=inside_C)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        x_MN = rows(x) if bias is not None else _rows_or_flat(x)[0]
        dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        if x.numel() > 0:
            tiles = _tiles(x_MN)
            _bias_gelu_kernel[(tiles.num_down * tiles.num_across,)](
                x_MN, None if bias is None else bias.contiguous(), y, *x_MN.shape, x_MN.stride(0), tiles.num_across,
                ACT=approximate, ROWS=tiles.num_rows, COLS=tiles.num_cols, num_warps=NUM_WARPS,
            )  # fmt: skip
        ctx.save_for_backward(x_MN, bias)
        ctx.approximate, ctx.shape = approximate, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x_MN, bias = ctx.saved_tensors
        dx = torch.empty(ctx.shape, dtype=x_MN.dtype, device=x_MN.device)
        dy_MN = rows(dy) if bias is not None else dy.contiguous().view(x_MN.shape)
        num_cols = x_MN.shape[1]
        tiles = _tiles(x_MN)
        num_down, partial_PN = tiles.num_down, None
        if ctx.needs_input_grad[1]:
            resident = PROGRAMS_PER_PROCESSOR * num_processors(x_MN.device)
            num_down = min(num_down, max(1, resident // max(1, tiles.num_across)))
            partial_PN = torch.empty(num_down, num_cols, dtype=torch.float32, device=x_MN.device)
        if dx.numel() > 0:
            _bias_gelu_backward_kernel[(num_down * tiles.num_across,)](
                dy_MN, x_MN, None if bias is None else bias.contiguous(), dx, partial_PN, *x_MN.shape,
                dy_MN.stride(0), x_MN.stride(0), tiles.num_across, num_down,
                ACT=ctx.approximate, ROWS=tiles.num_rows, COLS=tiles.num_cols, num_warps=NUM_WARPS,
            )  # fmt: skip
        return dx, None if partial_PN is None else partial_PN.sum(0).to(bias.dtype), None


# -- gated units -------------------------------------------------------------------------------------------------------


@triton.jit
def _gated_kernel(
    gate_ptr, up_ptr, y_ptr, M, N, gate_stride, up_stride, num_across,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y = act(gate) * up, one tile; tiles are numbered across the columns first."""
    row_R = (tl.program_id(0) // num_across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col_C = (tl.program_id(0) % num_across).to(tl.int64) * COLS + tl.arange(0, COLS)
    live_RC = (row_R < M)[:, None] & (col_C < N)[None, :]
    gate_RC = tl.load(gate_ptr + (row_R[:, None] * gate_stride + col_C[None, :]), mask=live_RC, other=0.0)
    up_RC = tl.load(up_ptr + (row_R[:, None] * up_stride + col_C[None, :]), mask=live_RC, other=0.0)
    gate_RC = gate_RC.to(tl.float32)
    y_RC = gate_RC * _share(gate_RC, ACT) * up_RC.to(tl.float32)
    tl.store(y_ptr + (row_R[:, None] * N + col_C[None, :]), y_RC, mask=live_RC)


@triton.jit
def _gated_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, M, N, dy_stride, gate_stride, up_stride, num_across,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dgate = dy * up * act'(gate) and dup = dy * act(gate), one tile."""
    row_R = (tl.program_id(0) // num_across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col_C = (tl.program_id(0) % num_across).to(tl.int64) * COLS + tl.arange(0, COLS)
    live_RC = (row_R < M)[:, None] & (col_C < N)[None, :]
    dy_RC = tl.load(dy_ptr + (row_R[:, None] * dy_stride + col_C[None, :]), mask=live_RC, other=0.0)
    gate_RC = tl.load(gate_ptr + (row_R[:, None] * gate_stride + col_C[None, :]), mask=live_RC, other=0.0)
    up_RC = tl.load(up_ptr + (row_R[:, None] * up_stride + col_C[None, :]), mask=live_RC, other=0.0)
    dy_RC = dy_RC.to(tl.float32)
    gate_RC = gate_RC.to(tl.float32)
    share_RC = _share(gate_RC, ACT)
    at_RC = row_R[:, None] * N + col_C[None, :]
    tl.store(dup_ptr + at_RC, dy_RC * gate_RC * share_RC, mask=live_RC)
    tl.store(dgate_ptr + at_RC, dy_RC * up_RC.to(tl.float32) * _slope(gate_RC, share_RC, ACT), mask=live_RC)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        gate_MN, up_MN = _rows_or_flat(gate, up)
        if gate.numel() > 0:
            tiles = _tiles(gate_MN)
            _gated_kernel[(tiles.num_down * tiles.num_across,)](
                gate_MN, up_MN, y, *gate_MN.shape, gate_MN.stride(0), up_MN.stride(0), tiles.num_across,
                ACT=act, ROWS=tiles.num_rows, COLS=tiles.num_cols, num_warps=NUM_WARPS,
            )  # fmt: skip
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty_like(dgate)
        dy_MN, gate_MN, up_MN = _rows_or_flat(dy, gate, up)
        if gate.numel() > 0:
            tiles = _tiles(gate_MN)
            _gated_backward_kernel[(tiles.num_down * tiles.num_across,)](
                dy_MN, gate_MN, up_MN, dgate, dup, *gate_MN.shape,
                dy_MN.stride(0), gate_MN.stride(0), up_MN.stride(0), tiles.num_across,
                ACT=ctx.act, ROWS=tiles.num_rows, COLS=tiles.num_cols, num_warps=NUM_WARPS,
            )  # fmt: skip
        return dgate, dup, None


# -- launching ---------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    num_rows: int
    num_cols: int
    num_down: int
    num_across: int


def _tiles(x_MN: Tensor) -> _Tiles:
    """How many elements a tile holds, and how many tiles cover the tensor."""
    num_cols = min(TILE, power_of_two(x_MN.shape[1]))
    num_rows = TILE // num_cols
    return _Tiles(num_rows, num_cols, ceil_div(x_MN.shape[0], num_rows), ceil_div(x_MN.shape[1], num_cols))


def _rows_or_flat(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as [1, numel] if all are contiguous, so that no tile has a ragged edge; else as rows."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [rows(tensor) for tensor in tensors]


# -- public ------------------------------------------------------------------------------------------------------------


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias).

    Args:
        x: [..., N], float32, bfloat16 or float16, any strides.
        bias: [N], or None.
        approximate: "tanh" or "none" (exact), as torch names them.
    Returns: [..., N], contiguous, in the dtype that x + bias has in torch; differentiable once.
    Raises:
        ValueError: for a shape, dtype or approximation that does not fit.
    """
    check_dtype("x", x, "bias_gelu")
    _check_gelu(approximate, "bias_gelu")
    if bias is not None:
        check_dtype("bias", bias, "bias_gelu")
        if bias.shape != x.shape[-1:]:
            raise ValueError(
                f"bias has the wrong shape: expected {tuple(x.shape[-1:])}, the last dim of x, got "
                f"{tuple(bias.shape)} (bias_gelu). Fix: pass the bias of the layer before."
            )
    with on_device_of(x):
        return _BiasGelu.apply(x, bias, approximate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: [..., N], one shape and dtype; float32, bfloat16 or float16; may be two halves of one tensor.
    Returns: [..., N], contiguous; differentiable once.
    Raises:
        ValueError: for a shape or dtype that does not fit.
    """
    return _gated(gate, up, "silu", "swiglu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up; arguments as in `swiglu` and `bias_gelu`."""
    _check_gelu(approximate, "geglu")
    return _gated(gate, up, approximate, "geglu")


def _gated(gate: Tensor, up: Tensor, act: str, where: str) -> Tensor:
    check_dtype("gate", gate, where)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"up does not fit gate: expected {tuple(gate.shape)} {gate.dtype}, got {tuple(up.shape)} {up.dtype} "
            f"({where}). Fix: cast or expand one of them first."
        )
    with on_device_of(gate):
        return _Gated.apply(gate, up, act)


def _check_gelu(approximate: str, where: str) -> None:
    if approximate not in GELUS:
        raise ValueError(
            f"approximate is unknown: expected 'tanh' or 'none', got {approximate!r} ({where}). Fix: choose one."
        )
