"""Runs an element-wise update over a segment tile by tile: gradient -> unscaled scratch -> update -> rounded copy.

Owns the cut and the scratch memory; owns no formula. A tile is a multiple of 128 elements, the alignment of a plane, so
that vectorised kernels treat every element alike wherever a segment is cut [Note: tiles and bits].

[Note: tiles and bits]
torch's fused CPU Adam and SGD round differently (1 ulp) in the scalar loop over the last (numel mod vector width)
elements of a call than in their vector body: the one uses fused multiply-add where the other does not. A call on a
multiple of 128 elements has no such tail, and threads are given whole cache lines. Only a segment whose own length is
no multiple of 128 has a tail, and then the same elements are in it however it is cut at multiples of 128.
`test_the_tile_size_changes_no_bit` would fail otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.optim.base import Segment
from lorica.precision.rounding import join, round_into, split_into

# CPU: a tile's gradient and master stay in the cache between unscale, update and rounding. Fused AdamW, one thread,
# 512 KiB of L2, CPU ns per element with fp32 gradient / with bf16 in and out:
# 16 Ki 4.3 / 5.9, 64 Ki 2.6 / 3.1, 256 Ki 2.3 / 2.8, 1 Mi 2.5 / 3.2.
# Accelerators: no cache to win; the tile only bounds the scratch memory (256 MiB).
TILE_NUMEL = {"cpu": 1 << 18}
ACCELERATOR_TILE_NUMEL = 1 << 26


class Tile(NamedTuple):
    """What one element-wise update works on, all views of `numel` elements in master dtype.

    `grad` is unscaled; the update must not write it unless it asked for a gradient of its own.
    """

    master: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]


def default_tile_numel(device: torch.device) -> int:
    """The tile size for `device`, in elements: on the CPU, one tile of the cache for each thread."""
    if device.type in TILE_NUMEL:
        return TILE_NUMEL[device.type] * torch.get_num_threads()
    return ACCELERATOR_TILE_NUMEL


def run_in_tiles(
    segment: Segment,
    coef: Tensor | float,
    update_tile: Callable[[Tile], None],
    *,
    tile_numel: int | None = None,
    own_grad: bool = False,
) -> None:
    """Call `update_tile` on every tile of `segment`, then round the new master into `segment.out`.

    Args:
        coef: multiplies the gradient; 1.0 (a float) costs nothing.
        tile_numel: multiple of 128; None takes the default of the device.
        own_grad: give the update a gradient that it may write.
    """
    for tile, out in tiles(segment, coef, tile_numel=tile_numel, own_grad=own_grad):
        update_tile(tile)
        if out is not None:
            out.write(tile.master)


class Published(NamedTuple):
    """Where a tile's new master goes besides its own plane: the parameter, and the remainder if the master is split."""

    parameter: Tensor
    remainder: Tensor | None

    def write(self, master: Tensor) -> None:
        """Round `master` into the parameter."""
        if self.remainder is None:
            round_into(master, self.parameter)
        else:
            split_into(master, self.parameter, self.remainder)


def tiles(
    segment: Segment, coef: Tensor | float, *, tile_numel: int | None = None, own_grad: bool = False
) -> Iterator[tuple[Tile, Published | None]]:
    """Yield each tile and where to publish it; one scratch serves all tiles, so take them one after another."""
    stored, numel = segment.master, segment.master.numel()
    split = stored.dtype is torch.int16
    dtype = torch.float32 if split else stored.dtype
    size = min(tile_numel or default_tile_numel(stored.device), numel)
    unscaled = isinstance(coef, float) and coef == 1.0 and segment.grad.dtype == dtype and not own_grad
    scratch = None if unscaled or not numel else torch.empty(size, dtype=dtype, device=stored.device)
    joined = torch.empty(size, dtype=dtype, device=stored.device) if split else None
    factor = None if scratch is None else coef_tensor(coef, scratch)
    for start in range(0, numel, size or 1):
        stop = min(start + size, numel)
        master, out = stored[start:stop], None
        if segment.out is not None:
            out = Published(segment.out[start:stop], master if split else None)
        if joined is not None and out is not None:
            master = join(out.parameter, master, joined[: stop - start])
        grad = segment.grad[start:stop]
        if scratch is not None and factor is not None:
            grad = unscale(grad, factor, scratch[: stop - start])
        state = {name: plane[start:stop] for name, plane in segment.state.items()}
        yield Tile(master, grad, state, segment.group), out


def coef_tensor(coef: Tensor | float, like: Tensor) -> Tensor:
    """`coef` as a [1] tensor in the dtype and on the device of `like`."""
    if isinstance(coef, Tensor):
        return coef.detach().reshape(1).to(device=like.device, dtype=like.dtype)
    return torch.full((1,), float(coef), dtype=like.dtype, device=like.device)


def unscale(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Write grad * factor into `out`, multiplied in the dtype of `out`, and return it.

    One pass where a kernel converts while it reads; on a CPU a mixed-dtype multiply makes a temporary, and copying
    first is 10 % faster. Both give the same bits: the conversion to a wider type is exact.
    """
    if grad.dtype == out.dtype or grad.device.type != "cpu":
        return torch.mul(grad, factor, out=out)
    return out.copy_(grad).mul_(factor)
