"""The one place where numbers of several ranks are added: in rank order, in fp32, rounded once. It moves no bytes.

Every CPU transport calls `sum_into`, so they give the same bits by construction. The work is done in tiles that stay in
the cache: each contribution is read from memory once and the result is written once, whatever the dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TILE_NUMEL = 1 << 17  # two tiles of 512 KiB of fp32 stay in a second-level cache; smaller ones drown in calls
SMALL_BYTES = 1 << 16  # below this an all-reduce sends everything to everybody: one exchange instead of two


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtypes` are summed: fp64 if one is fp64, fp32 for other floats."""
    if not all(dtype.is_floating_point for dtype in dtypes):
        return dtypes[0]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def sum_into(contributions: Sequence[Tensor], out: Tensor, *, accumulate: bool) -> None:
    """Set out = (out if accumulate else 0) + (contributions[0] + contributions[1] + ...), rounded once to out.dtype.

    Args:
        contributions: at least one tensor [n], in rank order, of one dtype; any of them may be `out` itself.
        out: [n], any float dtype (or, for integers, the dtype of the contributions).
    """
    sum_dtype = accumulation_dtype(contributions[0].dtype, out.dtype)
    exact = contributions[0].dtype == out.dtype == sum_dtype  # no conversion: some cases are one call without tiles
    if len(contributions) == 1 and (exact or not accumulate):
        out.add_(contributions[0]) if accumulate else out.copy_(contributions[0])
        return
    if len(contributions) == 2 and exact and not accumulate:
        torch.add(contributions[0], contributions[1], out=out)
        return
    in_out = (
        not accumulate and out.dtype == sum_dtype and all(part.data_ptr() != out.data_ptr() for part in contributions)
    )
    tile = _Tile(*(torch.empty(min(TILE_NUMEL, out.numel()), dtype=sum_dtype) for _ in range(2)))
    for start in range(0, out.numel(), TILE_NUMEL):
        stop = min(start + TILE_NUMEL, out.numel())
        target = out[start:stop]
        total = target if in_out else tile.total[: stop - start]
        _sum([part[start:stop] for part in contributions], total, tile)
        if accumulate:
            _add(target, total, tile)
        elif not in_out:
            target.copy_(total)


class _Tile(NamedTuple):
    """Room in the cache for one tile."""

    total: Tensor
    converted: Tensor


def _sum(contributions: Sequence[Tensor], total: Tensor, tile: _Tile) -> None:
    """Set `total` to the sum of `contributions` in their order."""
    if len(contributions) > 1 and contributions[0].dtype == total.dtype:
        torch.add(contributions[0], contributions[1], out=total)
        rest = contributions[2:]
    else:
        total.copy_(contributions[0])
        rest = contributions[1:]
    for part in rest:
        total.add_(_converted(part, total.dtype, tile))


def _add(out: Tensor, total: Tensor, tile: _Tile) -> None:
    """Set out = out + total, added in the dtype of `total` and rounded once. `total` is used up."""
    if out.dtype == total.dtype:
        out.add_(total)
    else:
        out.copy_(total.add_(_converted(out, total.dtype, tile)))


def _converted(x: Tensor, dtype: torch.dtype, tile: _Tile) -> Tensor:
    """Return `x` in `dtype`. A mixed `add_` would convert too, but into new memory each time."""
    return x if x.dtype == dtype else tile.converted[: x.numel()].copy_(x)


class AllReduceCut(NamedTuple):
    """How the CPU transports all-reduce `numel` elements over the ranks of a group."""

    bounds: tuple[int, ...]  # rank p sums the elements [bounds[p], bounds[p + 1]); empty: everybody sums everything
    sent_numel: tuple[int, ...]  # elements that rank p sends to others


def cut_all_reduce(numel: int, itemsize: int, world_size: int) -> AllReduceCut:
    """Choose between one exchange of everything (small) and a reduce-scatter followed by an all-gather."""
    if numel * itemsize <= SMALL_BYTES:
        return AllReduceCut((), (numel * (world_size - 1),) * world_size)
    bounds = tuple(numel * p // world_size for p in range(world_size + 1))
    own = [stop - start for start, stop in pairwise(bounds)]
    return AllReduceCut(bounds, tuple(numel - n + (world_size - 1) * n for n in own))
