"""Adam on moments in few bytes and on parameters without a master: one call of a kernel, or the formula in plain torch.

Owns neither the codes and the dice (`precision/compact.py`) nor the choice between kernel and formula (`element.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.kernels import native
from lorica.optim.base import Segment
from lorica.optim.tiles import Published, coef_tensor
from lorica.precision import compact
from lorica.precision.rounding import join

TILE_NUMEL = 1 << 18
EXACT = (torch.float32, torch.float64)


class Moments(NamedTuple):
    """What is stored of the two moments of a segment; `scales`: of those in 8 bits."""

    m: Tensor
    v: Tensor
    scales: tuple[Tensor, ...]


def is_compact(segment: Segment) -> bool:
    """Whether a moment is stored in another format than fp32, or the segment has no master."""
    return segment.master.dtype is torch.bfloat16 or any(plane.dtype not in EXACT for plane in segment.state.values())


def moments_of(segment: Segment, names: Sequence[str]) -> Moments:
    """The stored moments; `names` of the first and of the second one."""
    m, v = (segment.state[name] for name in names)
    scales = tuple(segment.state[f"{name}.scale"] for name in names if f"{name}.scale" in segment.state)
    return Moments(m, v, scales)


def update_native(
    segment: Segment, moments: Moments, *, coef: float, step: int, hyper: Sequence[float],
    pool: native.Pool | None = None, into: native.Destination | None = None,
) -> bool:  # fmt: skip
    """One call of the CPU's kernel; arguments and result as in `ElementOptimizer.update_native`."""
    return native.adam_compact(
        segment.master, segment.out, segment.grad, moments.m, moments.v,
        scales=moments.scales, coef=coef, hyper=hyper, keys=_keys(segment, step), start=segment.start,
        pool=pool, into=into,
    )  # fmt: skip


def launch(segment: Segment, moments: Moments, *, coef: Tensor, apply: Tensor, hyper: Tensor) -> None:
    """One launch of the GPU's kernel; arguments as in `kernels.compact.adam_compact`."""
    from lorica.kernels.compact import adam_compact

    adam_compact(
        segment.master, segment.out, segment.grad, moments.m, moments.v,
        scales=moments.scales, coef=coef, apply=apply, hyper=hyper, salt=segment.salt, start=segment.start,
    )  # fmt: skip


def mark_padding(segment: Segment, names: Sequence[str]) -> None:
    """Where one second moment serves a block, say which elements belong to no parameter: they do not count."""
    if segment.state[names[0]].dtype is not torch.int8 or segment.state[names[1]].dtype is not torch.float32:
        return
    codes = segment.state[names[0]]
    codes.fill_(compact.PAD)
    for part in segment.slices:
        codes[part.start : part.stop] = 0


def _keys(segment: Segment, step: int) -> tuple[int, int]:
    return compact.key_of(step, segment.salt), compact.key_of(step, segment.salt, of_parameter=True)


# -- the formula -------------------------------------------------------------------------------------------------------


def update_by_formula(
    segment: Segment, moments: Moments, *, coef: Tensor | float, step: int, hyper: Sequence[float]
) -> None:
    """The update that the kernels make, in the order in which they make it (torch has no fused multiply-add)."""
    b1, rest1, b2, rest2, eps, l2, shrink, step_size, inverse2 = hyper[:9]
    keys, factor = _keys(segment, step), coef_tensor(coef, torch.empty(0, device=segment.grad.device))
    for here, at in _tiles(segment, moments):
        numel = here.grad.numel()
        master = _master(here)
        grad = here.grad.float() * factor + l2 * master
        bits = compact.dice(keys[0], at, numel, grad.device)
        if here.moments.v.numel() < numel:
            inside = here.moments.m != compact.PAD
            grad = torch.where(inside, grad, 0.0)
            v = b2 * here.moments.v + rest2 * compact.mean_square(grad, inside)
            denominator = (compact.root(v) * inverse2 + eps).repeat_interleave(compact.BLOCK)
        else:
            scale = here.moments.scales[1] if len(here.moments.scales) > 1 else None
            v = b2 * compact.decode(here.moments.v, scale, numel) + rest2 * (grad * grad)
            denominator = v.sqrt() * inverse2 + eps
        scale = here.moments.scales[0] if here.moments.scales else None
        m = b1 * compact.decode(here.moments.m, scale, numel) + rest1 * grad
        master = step_size * (m / denominator) + master * shrink
        _store_moments(here.moments, m, v, bits)
        _store_master(here, master, compact.dice(keys[1], at, numel, grad.device))


class _Part(NamedTuple):
    """Some whole blocks of a segment."""

    master: Tensor
    out: Tensor | None
    grad: Tensor
    moments: Moments


def _tiles(segment: Segment, moments: Moments) -> Iterator[tuple[_Part, int]]:
    """Each part, and the number of its first element in the plane."""
    numel = segment.master.numel()
    for low in range(0, numel, TILE_NUMEL):
        high = min(low + TILE_NUMEL, numel)

        def cut(plane: Tensor, low: int = low, high: int = high) -> Tensor:
            ratio = numel // plane.numel()
            return plane[low // ratio : high // ratio]

        here = Moments(cut(moments.m), cut(moments.v), tuple(map(cut, moments.scales)))
        out = None if segment.out is None else cut(segment.out)
        yield _Part(cut(segment.master), out, cut(segment.grad), here), segment.start + low


def _master(here: _Part) -> Tensor:
    if here.master.dtype is torch.int16:
        assert here.out is not None
        return join(here.out, here.master)
    return here.master.float()


def _store_master(here: _Part, master: Tensor, bits: Tensor) -> None:
    if here.master.dtype is torch.bfloat16:
        here.master.copy_(compact.round_stochastically(master, compact.low(bits)))
        return
    split = here.master.dtype is torch.int16
    if not split:
        here.master.copy_(master)
    if here.out is not None:
        Published(here.out, here.master if split else None).write(master)


def _store_moments(stored: Moments, m: Tensor, v: Tensor, bits: Tensor) -> None:
    low, high = compact.low(bits), compact.high(bits)
    if stored.m.dtype is torch.int8:
        coded = compact.encode_signed(m, low)
        stored.m.copy_(torch.where(stored.m == compact.PAD, stored.m, coded.codes))
        stored.scales[0].copy_(coded.scale)
    if stored.v.dtype is torch.uint8:
        coded = compact.encode_root(compact.root(v), high)
        stored.v.copy_(coded.codes)
        stored.scales[1].copy_(coded.scale)
    if stored.m.dtype is torch.bfloat16:
        stored.m.copy_(compact.round_stochastically(m, low))
        stored.v.copy_(compact.round_stochastically(v, high))
    if stored.m.dtype is torch.float32:
        stored.m.copy_(m)
    if stored.v.dtype is torch.float32:
        stored.v.copy_(v)
