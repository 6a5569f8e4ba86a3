"""One-pass optimizer kernels on flat planes: each state is read once and written once. Owns no hyper-parameter.

    per element: gradient (bf16, fp16 or fp32), master, moments in; master, moments, rounded parameter out
    AdamW with a bf16 parameter: 2 + 3 x 4 in, 3 x 4 + 2 out = 28 bytes;  with a split master: 26 bytes

Scalars come from the device, so that a launch waits for nothing and can be part of a CUDA graph: `coef` [1] multiplies
the gradient (unscale, mean over ranks, clipping), `apply` [1] says whether to do anything at all (0: the gradient was
not finite), `hyper` [12] holds what hyper.py computes on the host in double precision.

All operations are IEEE operations, correctly rounded, in the order written here, without contraction: the kernels
for CPUs (native.py) keep the order and give the same bits. The formulas beside the kernels use the same order; torch
has no fused multiply-add, so they agree within rounding.

Shape suffix: N, the elements of one segment of a plane.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorica.kernels.hyper import adagrad_hyper as adagrad_hyper
from lorica.kernels.hyper import adam_hyper as adam_hyper
from lorica.kernels.hyper import lion_hyper as lion_hyper
from lorica.kernels.hyper import sgd_hyper as sgd_hyper

BLOCK = 1024
NUM_WARPS = 2


# -- device functions --------------------------------------------------------------------------------------------------


@triton.jit
def _load_master(master_ptr, hi_ptr, at, inside, SPLIT: tl.constexpr):
    """The fp32 master; see [Note: split master] in precision/rounding.py."""
    if SPLIT:
        hi = tl.load(hi_ptr + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        lo = tl.load(master_ptr + at, mask=inside, other=0).to(tl.int32)
        lo = tl.where(((hi & 0x7FFF) == 0) & (lo < 0), 0, lo)
        master = ((hi << 16) + lo).to(tl.float32, bitcast=True)
    else:
        master = tl.load(master_ptr + at, mask=inside, other=0.0)
    return master


@triton.jit
def _store_master(master, master_ptr, hi_ptr, at, inside, SPLIT: tl.constexpr, OUT: tl.constexpr):
    """The master, and the parameter rounded from it (to bf16 with ties away from zero; a NaN stays one)."""
    bits = master.to(tl.int32, bitcast=True)
    if SPLIT:
        tl.store(master_ptr + at, bits.to(tl.int16), mask=inside)
    else:
        tl.store(master_ptr + at, master, mask=inside)
    if OUT == "bf16":
        hi = tl.where(master != master, 0x7FC0, (bits + 0x8000) >> 16).to(tl.int16)
        tl.store(hi_ptr + at, hi.to(tl.bfloat16, bitcast=True), mask=inside)
    if OUT == "fp16":
        tl.store(hi_ptr + at, master.to(tl.float16), mask=inside)


@triton.jit
def _load_grad(grad_ptr, coef_ptr, at, inside):
    coef = tl.load(coef_ptr).to(tl.float32)
    return tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * coef


# -- Adam, AdamW -------------------------------------------------------------------------------------------------------


def adam_formula(master_N: Tensor, grad_N: Tensor, m_N: Tensor, v_N: Tensor, hyper: tuple[float, ...]) -> None:
    """The update that the kernel makes, in place, in the order in which it makes it; `grad_N` is unscaled.

    Source: Kingma & Ba 2014 (arXiv:1412.6980), algorithm 1; Loshchilov & Hutter 2017 (arXiv:1711.05101), algorithm 2.
    """
    b1, rest1, b2, rest2, eps, l2, shrink, step_size, inverse2 = hyper[:9]
    grad_N = grad_N + l2 * master_N
    m_N.copy_(b1 * m_N + rest1 * grad_N)
    v_N.copy_(b2 * v_N + rest2 * (grad_N * grad_N))
    denominator = v_N.sqrt() * inverse2 + eps
    master_N.copy_(step_size * (m_N / denominator) + master_N * shrink)


@triton.jit
def _adam_kernel(
    master_ptr, hi_ptr, grad_ptr, m_ptr, v_ptr, coef_ptr, apply_ptr, hyper_ptr, N,
    SPLIT: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(apply_ptr) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    master = _load_master(master_ptr, hi_ptr, at, inside, SPLIT)
    grad = _load_grad(grad_ptr, coef_ptr, at, inside)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    grad = tl.fma(tl.load(hyper_ptr + 5), master, grad)
    m = tl.fma(tl.load(hyper_ptr + 0), m, tl.load(hyper_ptr + 1) * grad)
    v = tl.fma(tl.load(hyper_ptr + 2), v, tl.load(hyper_ptr + 3) * (grad * grad))
    denominator = tl.fma(tl.sqrt_rn(v), tl.load(hyper_ptr + 8), tl.load(hyper_ptr + 4))
    master = tl.fma(tl.load(hyper_ptr + 7), tl.div_rn(m, denominator), master * tl.load(hyper_ptr + 6))
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    _store_master(master, master_ptr, hi_ptr, at, inside, SPLIT, OUT)


# -- Lion --------------------------------------------------------------------------------------------------------------


def lion_formula(master_N: Tensor, grad_N: Tensor, m_N: Tensor, hyper: tuple[float, ...]) -> None:
    """The update that the kernel makes. Source: Chen et al. 2023 (arXiv:2302.06675), algorithm 2."""
    b1, rest1, b2, rest2, shrink, step_size = hyper[:6]
    direction = (b1 * m_N + rest1 * grad_N).sign()
    master_N.copy_(step_size * direction + master_N * shrink)
    m_N.copy_(b2 * m_N + rest2 * grad_N)


@triton.jit
def _lion_kernel(
    master_ptr, hi_ptr, grad_ptr, m_ptr, coef_ptr, apply_ptr, hyper_ptr, N,
    SPLIT: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(apply_ptr) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    master = _load_master(master_ptr, hi_ptr, at, inside, SPLIT)
    grad = _load_grad(grad_ptr, coef_ptr, at, inside)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    mixed = tl.fma(tl.load(hyper_ptr + 0), m, tl.load(hyper_ptr + 1) * grad)
    direction = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # 0 stays 0, NaN stays NaN
    master = tl.fma(tl.load(hyper_ptr + 5), direction, master * tl.load(hyper_ptr + 4))
    m = tl.fma(tl.load(hyper_ptr + 2), m, tl.load(hyper_ptr + 3) * grad)
    tl.store(m_ptr + at, m, mask=inside)
    _store_master(master, master_ptr, hi_ptr, at, inside, SPLIT, OUT)


# -- SGD ---------------------------------------------------------------------------------------------------------------


def sgd_formula(master_N: Tensor, grad_N: Tensor, buffer_N: Tensor | None, hyper: tuple[float, ...]) -> None:
    """The update that the kernel makes; without a buffer the direction is the gradient.

    Source: Sutskever et al. 2013 (ICML), sec. 2, in torch.optim.SGD's form (momentum outside the learning rate).
    """
    keep, take, decay, with_grad, step_size, ahead = hyper[:6]
    grad_N = decay * master_N + grad_N
    if buffer_N is not None:
        buffer_N.copy_(keep * buffer_N + take * grad_N)
        grad_N = ahead * buffer_N + with_grad * grad_N
    master_N.add_(step_size * grad_N)


@triton.jit
def _sgd_kernel(
    master_ptr, hi_ptr, grad_ptr, buffer_ptr, coef_ptr, apply_ptr, hyper_ptr, N,
    HAS_BUFFER: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(apply_ptr) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    master = _load_master(master_ptr, hi_ptr, at, inside, SPLIT)
    grad = _load_grad(grad_ptr, coef_ptr, at, inside)
    grad = tl.fma(tl.load(hyper_ptr + 2), master, grad)
    if HAS_BUFFER:
        buffer = tl.load(buffer_ptr + at, mask=inside, other=0.0)
        buffer = tl.fma(tl.load(hyper_ptr + 0), buffer, tl.load(hyper_ptr + 1) * grad)
        tl.store(buffer_ptr + at, buffer, mask=inside)
        grad = tl.fma(tl.load(hyper_ptr + 5), buffer, tl.load(hyper_ptr + 3) * grad)
    master = tl.fma(tl.load(hyper_ptr + 4), grad, master)
    _store_master(master, master_ptr, hi_ptr, at, inside, SPLIT, OUT)


# -- Adagrad -----------------------------------------------------------------------------------------------------------


def adagrad_formula(master_N: Tensor, grad_N: Tensor, sum_N: Tensor, hyper: tuple[float, ...]) -> None:
    """The update that the kernel makes.

    Source: Duchi et al. 2011 (JMLR 12), with torch.optim.Adagrad's learning-rate decay.
    """
    decay, eps, step_size = hyper[:3]
    grad_N = decay * master_N + grad_N
    sum_N.copy_(grad_N * grad_N + sum_N)
    master_N.add_(step_size * (grad_N / (sum_N.sqrt() + eps)))


@triton.jit
def _adagrad_kernel(
    master_ptr, hi_ptr, grad_ptr, sum_ptr, coef_ptr, apply_ptr, hyper_ptr, N,
    SPLIT: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(apply_ptr) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    master = _load_master(master_ptr, hi_ptr, at, inside, SPLIT)
    grad = _load_grad(grad_ptr, coef_ptr, at, inside)
    grad = tl.fma(tl.load(hyper_ptr + 0), master, grad)
    total = tl.fma(grad, grad, tl.load(sum_ptr + at, mask=inside, other=0.0))
    step = tl.div_rn(grad, tl.sqrt_rn(total) + tl.load(hyper_ptr + 1))
    master = tl.fma(tl.load(hyper_ptr + 2), step, master)
    tl.store(sum_ptr + at, total, mask=inside)
    _store_master(master, master_ptr, hi_ptr, at, inside, SPLIT, OUT)


# -- launching ---------------------------------------------------------------------------------------------------------

_OUT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
GRAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fits(master_N: Tensor, grad_N: Tensor, out_N: Tensor | None) -> bool:
    """Whether the kernels take planes of these dtypes: an fp32 or split master, and no fp64 or 8-bit parameter."""
    split = master_N.dtype is torch.int16
    masters = split or master_N.dtype is torch.float32
    outs = out_N is None or out_N.dtype in _OUT
    return masters and outs and grad_N.dtype in GRAD_DTYPES and not (split and _out(out_N) != "bf16")


def adam(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, m_N: Tensor, v_N: Tensor, *,
    coef: Tensor, apply: Tensor, hyper: Tensor,
) -> None:  # fmt: skip
    """One Adam or AdamW update in place.

    Args:
        master_N: fp32, or int16: the remainders of a split master whose upper halves are `out_N`.
        out_N: bf16 or fp16, receives the rounded master; None if the master is the parameter itself.
        grad_N: bf16, fp16 or fp32, raw. m_N, v_N: fp32.
        coef: [1] fp32 or fp64. apply: [1] int32. hyper: [12] fp32, as `adam_hyper` says. All on the device.
    """
    _launch(_adam_kernel, master_N, out_N, (grad_N, m_N, v_N), coef, apply, hyper)


def lion(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, m_N: Tensor, *, coef: Tensor, apply: Tensor, hyper: Tensor
) -> None:
    """One Lion update in place; arguments as in `adam`."""
    _launch(_lion_kernel, master_N, out_N, (grad_N, m_N), coef, apply, hyper)


def sgd(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, buffer_N: Tensor | None, *,
    coef: Tensor, apply: Tensor, hyper: Tensor,
) -> None:  # fmt: skip
    """One SGD update in place; `buffer_N` is None without momentum; other arguments as in `adam`."""
    buffer = grad_N if buffer_N is None else buffer_N
    _launch(
        _sgd_kernel, master_N, out_N, (grad_N, buffer), coef, apply, hyper, HAS_BUFFER=buffer_N is not None
    )  # fmt: skip


def adagrad(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, sum_N: Tensor, *, coef: Tensor, apply: Tensor, hyper: Tensor
) -> None:
    """One Adagrad update in place; arguments as in `adam`."""
    _launch(_adagrad_kernel, master_N, out_N, (grad_N, sum_N), coef, apply, hyper)


def _out(out_N: Tensor | None) -> str:
    return "" if out_N is None else _OUT[out_N.dtype]


def _launch(
    kernel: Any, master_N: Tensor, out_N: Tensor | None, planes: tuple[Tensor, ...],
    coef: Tensor, apply: Tensor, hyper: Tensor, **flags: bool,
) -> None:  # fmt: skip
    numel = master_N.numel()
    if numel == 0:
        return
    kernel[(triton.cdiv(numel, BLOCK),)](
        master_N, master_N if out_N is None else out_N, *planes, coef, apply, hyper, numel,
        **flags, SPLIT=master_N.dtype is torch.int16, OUT=_out(out_N), BLOCK=BLOCK,
        num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
