"""Layer normalisation and RMS normalisation of rows, with or without a residual sum: formulas, kernels, gradients.

Owns no parameter and no module. A row that fits into the registers of one program is read once; a wider one twice, by
a kernel for what the whole row says (statistics, or the two means of its gradient) and one for its tiles:

    forward     [_statistics_kernel]   _forward_kernel      one tile of rows a program
    backward    [_means_kernel]        _backward_kernel     a program walks down many tiles: few partial sums of weights

Gradients of weight and bias are partial sums, one row per program, added by one torch sum: no atomics, the same bits in
every run on the same kind of device.

Shape suffixes: M rows, N columns of a row; R rows, C columns of a tile; P programs; K gradients of parameters (weight,
bias). `x_MN` may have any stride between rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.kernels.launch import ceil_div, check_dtype, num_processors, on_device_of, power_of_two, rows

# Sizes. A thread holds 16 elements of a tile, until 32 warps are not enough.
TILE = 2048  # narrow rows are put together up to so many elements
WIDEST_FORWARD = 32768  # columns of the widest row that one program holds in registers
WIDEST_BACKWARD = 8192  # the same where x, dy and two gradients of parameters are held
CHUNK = 4096  # columns of a tile of a wider row
ELEMENTS_PER_WARP = 512
WARPS_PER_PROCESSOR = 16  # of backward programs that run at the same time
PREFETCH_BYTES = 16384  # a tile up to this size is loaded while the one before it is computed


# -- formulas ----------------------------------------------------------------------------------------------------------


def layer_norm_formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """What `layer_norm` computes, in plain torch, in float64 for float64 tensors, else in float32.

    Source: Ba et al. 2016 (arXiv:1607.06450), eq. 4.
    """
    total = x if residual is None else x + residual
    wide = _wide(total)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * _wide(weight)
    y = (y if bias is None else y + _wide(bias)).to(total.dtype)
    return y if residual is None else (y, total)


def rms_norm_formula(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, *,
    offset: float = 0.0, cast_before_weight: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """What `rms_norm` computes, in plain torch, in float64 for float64 tensors, else in float32.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    total = x if residual is None else x + residual
    wide = _wide(total)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = _wide(y.to(total.dtype)) if cast_before_weight else y
        y = y * (_wide(weight) + offset)
    y = y.to(_rms_dtype(total.dtype, weight, cast_before_weight))
    return y if residual is None else (y, total)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _rms_dtype(dtype: torch.dtype, weight: Tensor | None, cast_before_weight: bool) -> torch.dtype:
    """The product of a rounded row and a weight has the dtype that torch gives a product."""
    return dtype if weight is None or not cast_before_weight else torch.promote_types(dtype, weight.dtype)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_total(x_ptr, residual_ptr, total_ptr, x_at, residual_at, live):
    """x, or x + residual rounded to the dtype of the sum that is handed out; in fp32, zero where not `live`."""
    x = tl.load(x_ptr + x_at, mask=live, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + residual_at, mask=live, other=0.0).to(tl.float32)
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _statistics_kernel(
    x_ptr, residual_ptr, total_ptr, mean_ptr, rstd_ptr, N, x_stride, residual_stride, eps, COLS: tl.constexpr,
):  # fmt: skip
    """Mean (unless `mean_ptr` is None: RMS) and reciprocal deviation of one wide row; writes x + residual."""
    row = tl.program_id(0).to(tl.int64)
    x_at = row * x_stride
    residual_at = row * residual_stride
    mean = 0.0
    if mean_ptr is not None:
        sum_C = tl.zeros([COLS], tl.float32)
        for start in tl.range(0, N, COLS):
            col_C = start + tl.arange(0, COLS)
            sum_C += _load_total(x_ptr, residual_ptr, total_ptr, x_at + col_C, residual_at + col_C, col_C < N)
        mean = tl.sum(sum_C, axis=0) / N
        tl.store(mean_ptr + row, mean)
    square_C = tl.zeros([COLS], tl.float32)
    for start in tl.range(0, N, COLS):
        col_C = start + tl.arange(0, COLS)
        x_C = _load_total(x_ptr, residual_ptr, total_ptr, x_at + col_C, residual_at + col_C, col_C < N)
        if total_ptr is not None:
            tl.store(total_ptr + row * N + col_C, x_C, mask=col_C < N)
        x_C = tl.where(col_C < N, x_C - mean, 0.0)
        square_C += x_C * x_C
    tl.store(rstd_ptr + row, tl.rsqrt(tl.sum(square_C, axis=0) / N + eps))


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    M, N, x_stride, residual_stride, eps, offset,
    KNOWN: tl.constexpr, CAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Normalise one tile of rows. KNOWN: the statistics are there already, for `mean_ptr` None see above."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col_C = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live_R = row_R < M
    inside_C = col_C < N
    live_RC = live_R[:, None] & inside_C[None, :]
    start_R = row_R.to(tl.int64)
    at_RC = start_R[:, None] * N + col_C[None, :]
    x_at_RC = start_R[:, None] * x_stride + col_C[None, :]
    residual_at_RC = start_R[:, None] * residual_stride + col_C[None, :]
    x_RC = _load_total(x_ptr, residual_ptr, total_ptr, x_at_RC, residual_at_RC, live_RC)
    if total_ptr is not None:
        tl.store(total_ptr + at_RC, x_RC, mask=live_RC)
    if KNOWN:
        rstd_R = tl.load(rstd_ptr + row_R, mask=live_R, other=0.0)
        if mean_ptr is not None:
            x_RC -= tl.load(mean_ptr + row_R, mask=live_R, other=0.0)[:, None]
    else:
        if mean_ptr is not None:
            mean_R = tl.sum(x_RC, axis=1) / N
            tl.store(mean_ptr + row_R, mean_R, mask=live_R)
            x_RC = tl.where(live_RC, x_RC - mean_R[:, None], 0.0)
        rstd_R = tl.rsqrt(tl.sum(x_RC * x_RC, axis=1) / N + eps)
        tl.store(rstd_ptr + row_R, rstd_R, mask=live_R)
    y_RC = x_RC * rstd_R[:, None]
    if CAST:
        if total_ptr is not None:
            y_RC = y_RC.to(total_ptr.dtype.element_ty).to(tl.float32)
        else:
            y_RC = y_RC.to(x_ptr.dtype.element_ty).to(tl.float32)
    if weight_ptr is not None:
        weight_C = tl.load(weight_ptr + col_C, mask=inside_C, other=0.0).to(tl.float32) + offset
        y_RC *= weight_C[None, :]
    if bias_ptr is not None:
        y_RC += tl.load(bias_ptr + col_C, mask=inside_C, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at_RC, y_RC, mask=live_RC)


# With xhat = (x - mean) * rstd and g = dy * weight, the gradient of a row is
#
#     dx = rstd * (g - mean(g) - xhat * mean(g * xhat))          RMS: xhat = x * rstd, and no mean(g)
#     dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy
#
# Rounding (of x + residual, of xhat before the weight) has the derivative 1.


@triton.jit
def _means_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, along_ptr, level_ptr, N, dy_stride, x_stride, offset,
    COLS: tl.constexpr,
):  # fmt: skip
    """Of one wide row: along = mean(g * xhat), and level = mean(g) unless `mean_ptr` is None (RMS)."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    along_C = tl.zeros([COLS], tl.float32)
    level_C = tl.zeros([COLS], tl.float32)
    for start in tl.range(0, N, COLS):
        col_C = start + tl.arange(0, COLS)
        g_C = tl.load(dy_ptr + row * dy_stride + col_C, mask=col_C < N, other=0.0).to(tl.float32)
        x_C = tl.load(x_ptr + row * x_stride + col_C, mask=col_C < N, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g_C *= tl.load(weight_ptr + col_C, mask=col_C < N, other=0.0).to(tl.float32) + offset
        along_C += g_C * ((x_C - mean) * rstd)
        level_C += g_C
    tl.store(along_ptr + row, tl.sum(along_C, axis=0) / N)
    if mean_ptr is not None:
        tl.store(level_ptr + row, tl.sum(level_C, axis=0) / N)


@triton.jit
def _backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, along_ptr, level_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    M, N, dy_stride, dtotal_stride, x_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of every P-th tile of rows, and their sums for weight and bias. The means are known where `along_ptr` is."""
    col_C = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside_C = col_C < N
    if weight_ptr is not None:
        weight_C = tl.load(weight_ptr + col_C, mask=inside_C, other=0.0).to(tl.float32) + offset
    dweight_RC = tl.zeros([ROWS, COLS], tl.float32)
    dbias_RC = tl.zeros([ROWS, COLS], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        row_R = tile * ROWS + tl.arange(0, ROWS)
        live_R = row_R < M
        live_RC = live_R[:, None] & inside_C[None, :]
        start_R = row_R.to(tl.int64)
        x_RC = tl.load(x_ptr + (start_R[:, None] * x_stride + col_C[None, :]), mask=live_RC, other=0.0)
        dy_RC = tl.load(dy_ptr + (start_R[:, None] * dy_stride + col_C[None, :]), mask=live_RC, other=0.0)
        xhat_RC = x_RC.to(tl.float32)
        dy_RC = dy_RC.to(tl.float32)
        rstd_R = tl.load(rstd_ptr + row_R, mask=live_R, other=0.0)
        if mean_ptr is not None:
            xhat_RC -= tl.load(mean_ptr + row_R, mask=live_R, other=0.0)[:, None]
        xhat_RC *= rstd_R[:, None]
        g_RC = dy_RC
        if weight_ptr is not None:
            g_RC = dy_RC * weight_C[None, :]
        if along_ptr is not None:
            along_R = tl.load(along_ptr + row_R, mask=live_R, other=0.0)
        else:
            along_R = tl.sum(g_RC * xhat_RC, axis=1) / N
        dx_RC = g_RC - xhat_RC * along_R[:, None]
        if mean_ptr is not None:
            if along_ptr is not None:
                level_R = tl.load(level_ptr + row_R, mask=live_R, other=0.0)
            else:
                level_R = tl.sum(g_RC, axis=1) / N
            dx_RC -= level_R[:, None]
        dx_RC *= rstd_R[:, None]
        if dtotal_ptr is not None:
            dtotal_at_RC = start_R[:, None] * dtotal_stride + col_C[None, :]
            dx_RC += tl.load(dtotal_ptr + dtotal_at_RC, mask=live_RC, other=0.0).to(tl.float32)
        tl.store(dx_ptr + (start_R[:, None] * N + col_C[None, :]), dx_RC, mask=live_RC)
        if dweight_ptr is not None:
            dweight_RC += dy_RC * xhat_RC
        if dbias_ptr is not None:
            dbias_RC += dy_RC
    partial_at_C = tl.program_id(0).to(tl.int64) * N + col_C
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial_at_C, tl.sum(dweight_RC, axis=0), mask=inside_C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial_at_C, tl.sum(dbias_RC, axis=0), mask=inside_C)


# -- launching ---------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    num_rows: int
    num_cols: int
    num_chunks: int  # tiles side by side that cover a row
    num_warps: int


@cache
def _tile(num_cols: int, widest: int, chunk: int) -> _Tile:
    """How rows of `num_cols` are cut, if a program holds at most `widest` columns."""
    held = power_of_two(num_cols if num_cols <= widest else chunk)
    num_rows = max(1, TILE // held)
    num_warps = min(32, max(1, num_rows * held // ELEMENTS_PER_WARP))
    return _Tile(num_rows, held, ceil_div(num_cols, held), num_warps)


class _Norm(NamedTuple):
    """Which normalisation: everything that is not a tensor."""

    eps: float
    centre: bool  # layer norm; else RMS norm
    offset: float
    cast_before_weight: bool
    out_dtype: torch.dtype


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _forward(
    x_MN: Tensor, residual_MN: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    y: Tensor, total: Tensor | None, mean_M: Tensor | None, rstd_M: Tensor, norm: _Norm,
) -> None:  # fmt: skip
    num_rows, num_cols = x_MN.shape
    weight, bias = _contiguous(weight), _contiguous(bias)
    tile = _tile(num_cols, WIDEST_FORWARD, CHUNK)
    wide = tile.num_chunks > 1
    residual_stride = 0 if residual_MN is None else residual_MN.stride(0)
    if wide:
        _statistics_kernel[(num_rows,)](
            x_MN, residual_MN, total, mean_M, rstd_M, num_cols, x_MN.stride(0), residual_stride, norm.eps,
            COLS=tile.num_cols, num_warps=tile.num_warps,
        )  # fmt: skip
        x_MN = x_MN if total is None else rows(total)
        residual_MN = total = None
    _forward_kernel[(ceil_div(num_rows, tile.num_rows), tile.num_chunks)](
        x_MN, residual_MN, weight, bias, y, total, mean_M, rstd_M,
        num_rows, num_cols, x_MN.stride(0), residual_stride, norm.eps, norm.offset,
        KNOWN=wide, CAST=norm.cast_before_weight, ROWS=tile.num_rows, COLS=tile.num_cols, num_warps=tile.num_warps,
    )  # fmt: skip


def _backward(
    dy_MN: Tensor, dtotal_MN: Tensor | None, x_MN: Tensor, weight: Tensor | None, mean_M: Tensor | None,
    rstd_M: Tensor, dx: Tensor, wanted: tuple[bool, bool], norm: _Norm,
) -> list[Tensor | None]:  # fmt: skip
    """Fill `dx`; return the gradients of weight and bias, fp32, where `wanted`."""
    num_rows, num_cols = x_MN.shape
    weight = _contiguous(weight)
    tile = _tile(num_cols, WIDEST_BACKWARD, CHUNK)
    num_tiles = ceil_div(num_rows, tile.num_rows)
    resident = num_processors(x_MN.device) * max(1, WARPS_PER_PROCESSOR // tile.num_warps)
    num_programs = min(num_tiles, max(1, resident // max(1, tile.num_chunks)))
    partial_KPN = torch.empty(sum(wanted), num_programs, num_cols, dtype=torch.float32, device=x_MN.device)
    parts = iter(partial_KPN.unbind(0))
    dweight_PN, dbias_PN = (next(parts) if want else None for want in wanted)
    if dx.numel() > 0:
        along_M = level_M = None
        if tile.num_chunks > 1:
            along_M, level_M = torch.empty(2, num_rows, dtype=torch.float32, device=x_MN.device).unbind(0)
            _means_kernel[(num_rows,)](
                dy_MN, x_MN, weight, mean_M, rstd_M, along_M, level_M,
                num_cols, dy_MN.stride(0), x_MN.stride(0), norm.offset, COLS=tile.num_cols, num_warps=tile.num_warps,
            )  # fmt: skip
        tile_bytes = tile.num_rows * tile.num_cols * x_MN.element_size()
        _backward_kernel[(num_programs, tile.num_chunks)](
            dy_MN, dtotal_MN, x_MN, weight, mean_M, rstd_M, along_M, level_M, dx, dweight_PN, dbias_PN,
            num_rows, num_cols, dy_MN.stride(0), 0 if dtotal_MN is None else dtotal_MN.stride(0), x_MN.stride(0),
            norm.offset, ROWS=tile.num_rows, COLS=tile.num_cols, STAGES=2 if tile_bytes <= PREFETCH_BYTES else 1,
            num_warps=tile.num_warps,
        )  # fmt: skip
    sums = iter(partial_KPN.sum(1).unbind(0))
    return [next(sums) if want else None for want in wanted]


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: _Norm
    ) -> Any:
        ctx.set_materialize_grads(False)
        x_MN = rows(x)
        y = torch.empty(x.shape, dtype=norm.out_dtype, device=x.device)
        total = None
        if residual is not None:
            total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
        rstd_M = torch.empty(x_MN.shape[0], dtype=torch.float32, device=x.device)
        mean_M = torch.empty_like(rstd_M) if norm.centre else None
        if x.numel() > 0:
            _forward(x_MN, None if residual is None else rows(residual), weight, bias, y, total, mean_M, rstd_M, norm)
        ctx.save_for_backward(x_MN if total is None else total, weight, mean_M, rstd_M)
        ctx.norm, ctx.shape = norm, x.shape
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, residual, weight, bias)]
        return y if total is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> Any:
        if dy is None:
            grads: list[Tensor | None] = [dtotal, dtotal, None, None]
        else:
            x, weight, mean_M, rstd_M = ctx.saved_tensors
            dx = torch.empty(ctx.shape, dtype=x.dtype, device=x.device)
            dtotal_MN = None if dtotal is None else rows(dtotal)
            wanted = ctx.needs_input_grad[2:4]
            grads = [dx, dx, *_backward(rows(dy), dtotal_MN, rows(x), weight, mean_M, rstd_M, dx, wanted, ctx.norm)]
        pairs = zip(grads, ctx.dtypes, strict=True)
        return *(None if grad is None or dtype is None else grad.to(dtype) for grad, dtype in pairs), None


# -- public ------------------------------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None, *,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Layer normalisation over the last dim; statistics in float32.

    Args:
        x: [..., N], float32, bfloat16 or float16, any strides.
        weight, bias: [N], or None.
        residual: like `x`; then x + residual is normalised.
        out_dtype: of the result; that of x (or x + residual) if None.
    Returns: [..., N], contiguous; with `residual` the pair (normalised, x + residual), both differentiable, once.
    Raises:
        ValueError: for a shape or dtype that does not fit.
    """
    dtype = _check("layer_norm", x, residual, weight, bias)
    norm = _Norm(eps, True, 0.0, False, out_dtype or dtype)
    with on_device_of(x):
        return _NormFunction.apply(x, residual, weight, bias, norm)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, *,
    offset: float = 0.0, cast_before_weight: bool = True, out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """RMS normalisation over the last dim; statistics in float32.

    Args:
        x, weight, residual, out_dtype: as in `layer_norm`.
        offset: is added to the weight: 1.0 for Gemma's (1 + weight). No effect without a weight.
        cast_before_weight: round the normalised row to the dtype of x, then multiply; the result has the dtype of that
            product (Hugging Face's Llama). Otherwise all is float32 up to the result, in the dtype of x (torch, Gemma).
    Returns, raises: as `layer_norm`.
    """
    dtype = _check("rms_norm", x, residual, weight, None)
    cast = cast_before_weight and weight is not None
    norm = _Norm(eps, False, offset, cast, out_dtype or _rms_dtype(dtype, weight, cast))
    with on_device_of(x):
        return _NormFunction.apply(x, residual, weight, None, norm)


def _check(where: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The dtype of what is normalised, if all arguments fit together."""
    check_dtype("x", x, where)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_dtype(name, vector, where)
            if vector.shape != x.shape[-1:]:
                raise ValueError(
                    f"{name} has the wrong shape: expected {tuple(x.shape[-1:])}, the last dim of x, got "
                    f"{tuple(vector.shape)} ({where}). Fix: flatten the normalised dims into the last one."
                )
    if residual is None:
        return x.dtype
    check_dtype("residual", residual, where)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual has the wrong shape: expected that of x, {tuple(x.shape)}, got {tuple(residual.shape)} "
            f"({where}). Fix: expand it first."
        )
    return torch.promote_types(x.dtype, residual.dtype)
