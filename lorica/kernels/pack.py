"""Gradients of many parameters into one flat plane, in one launch: cast, accumulate, and the plane's sum of squares.

Owns the map from chunks of the plane to parameters. Reads every gradient once and writes the plane once; what the norm
and the overflow check need falls out on the way, one partial sum per chunk, always added in the same order.

    plane   | slot 0 . . . . |pad| slot 1 . |pad| slot 2 . . . . . . . |pad|
    chunks  |   0   |   1  |  2  |    3     |    4    |    5    |   6      |     (a chunk never crosses a slot's start)

Shape suffixes: N elements of the plane, C chunks, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorica.layout import Layout

CHUNK = 4096
VECTOR_BYTES = 16
NUM_WARPS = 8

_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class ChunkMap(NamedTuple):
    """Where each chunk of a plane comes from, on the device.

    Attributes:
        slot_C: int32, the slot that a chunk belongs to. begin_C: int64, the chunk's first element in that slot.
        at_C: int64, its first element in the plane. numel_C: int32, elements that the parameter has there.
        stop_C: int32, elements of the plane that it covers; behind `numel_C` there is padding.
        num_chunks: C.
    """

    slot_C: Tensor
    begin_C: Tensor
    at_C: Tensor
    numel_C: Tensor
    stop_C: Tensor
    num_chunks: int


def chunk_map(layout: Layout, device: torch.device) -> ChunkMap:
    """The chunks of a plane of `layout`: every element of it is in exactly one."""
    rows = []
    starts = [slot.start for slot in layout.slots] + [layout.numel]
    for index, slot in enumerate(layout.slots):
        for begin in range(0, starts[index + 1] - slot.start, CHUNK):
            covered = min(CHUNK, starts[index + 1] - slot.start - begin)
            rows.append((index, begin, slot.start + begin, max(0, min(covered, slot.numel - begin)), covered))
    columns = list(zip(*rows, strict=True)) if rows else [()] * 5
    wide = [torch.tensor(column, dtype=torch.int64) for column in columns]
    slot_C, begin_C, at_C, numel_C, stop_C = (column.to(device) for column in wide)
    return ChunkMap(slot_C.int(), begin_C, at_C, numel_C.int(), stop_C.int(), len(rows))


def pack_formula(
    grads: Sequence[Tensor | None], layout: Layout, plane_N: Tensor, *, accumulate: bool, scale: float
) -> Tensor:
    """What the kernel does, in plain torch: fill (or add to) `plane_N`, return its sum of squares, fp64 []."""
    for slot, grad in zip(layout.slots, grads, strict=True):
        part = plane_N[slot.start : slot.stop]
        value = torch.zeros_like(part) if grad is None else (grad.reshape(-1).float() * scale)
        part.copy_(part.float() + value if accumulate else value)
    for start, stop in layout.gaps:
        plane_N[start:stop] = 0
    return plane_N.double().square().sum()


@triton.jit
def _pack_kernel(
    source_ptr, plane_ptr, square_ptr, slot_ptr, begin_ptr, at_ptr, numel_ptr, stop_ptr, scale,
    SOURCE: tl.constexpr, ACCUMULATE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    address = tl.load(source_ptr + tl.load(slot_ptr + chunk))
    source = tl.multiple_of(address.to(tl.pointer_type(SOURCE)), 16) + tl.multiple_of(tl.load(begin_ptr + chunk), CHUNK)
    target = plane_ptr + tl.multiple_of(tl.load(at_ptr + chunk), 128)
    inner = tl.arange(0, CHUNK)
    numel = tl.where(address == 0, 0, tl.load(numel_ptr + chunk))
    inside = inner < tl.multiple_of(tl.load(stop_ptr + chunk), 128)
    if numel == CHUNK:  # no mask: a ragged one would forbid wide loads
        value = tl.load(source + inner).to(tl.float32) * scale
    else:
        value = tl.load(source + inner, mask=inner < numel, other=0.0).to(tl.float32) * scale
    if ACCUMULATE:
        value += tl.load(target + inner, mask=inside, other=0.0).to(tl.float32)
    value = value.to(plane_ptr.dtype.element_ty)
    tl.store(target + inner, value, mask=inside)
    wide = value.to(tl.float32)
    tl.store(square_ptr + chunk, tl.sum(tl.where(inside, wide * wide, 0.0)))


def fits(grads: Sequence[Tensor | None], plane_N: Tensor) -> bool:
    """Whether the kernel takes these gradients: one dtype, contiguous, 16-byte aligned, on the plane's device."""
    present = [grad for grad in grads if grad is not None]
    return (
        bool(present)
        and plane_N.dtype in _DTYPE
        and present[0].dtype in _DTYPE
        and all(
            grad.dtype is present[0].dtype
            and grad.device == plane_N.device
            and grad.layout is torch.strided
            and grad.is_contiguous()
            and grad.data_ptr() % VECTOR_BYTES == 0
            for grad in present
        )
    )


def pack(
    grads: Sequence[Tensor | None], chunks: ChunkMap, plane_N: Tensor, square_C: Tensor, *,
    accumulate: bool, scale: float,
) -> None:  # fmt: skip
    """Fill a plane from the gradients of its parameters; the caller has asked `fits`.

    Args:
        grads: one per slot; None counts as zero.
        plane_N: receives grads * scale (padding: 0), or has them added.
        square_C: [C] fp32, receives each chunk's sum of squares of what the plane then holds.
    """
    dtype = next(grad.dtype for grad in grads if grad is not None)
    addresses = [0 if grad is None or grad.numel() == 0 else grad.data_ptr() for grad in grads]
    on_device = plane_N.device.type == "cuda"
    source_S = torch.tensor(addresses, dtype=torch.int64, pin_memory=on_device).to(plane_N.device, non_blocking=True)
    _pack_kernel[(chunks.num_chunks,)](
        source_S, plane_N, square_C, *chunks[:5], scale,
        SOURCE=_DTYPE[dtype], ACCUMULATE=accumulate, CHUNK=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip
