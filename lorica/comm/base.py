"""The seam between Lorica and its transports: collectives on contiguous 1-D tensors; no transport lives here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Handle(Protocol):
    """A collective that was issued and may still be under way."""

    def wait(self) -> None:
        """Return once the result is valid for what this thread does next (CUDA: for work on the current stream)."""


class Done:
    """The handle of a collective that was complete when it was issued."""

    def wait(self) -> None:
        """Return at once."""


class Traffic:
    """Bytes that this rank sent to other ranks, by kind of collective.

    Bytes are logical: what has to leave this rank for the algorithm in use, counted alike for a socket and for memory
    that a peer reads directly.
    """

    def __init__(self) -> None:
        self.bytes_by_op: Counter[str] = Counter()
        self.num_calls: Counter[str] = Counter()

    def add(self, op: str, num_bytes: int) -> None:
        """Count one call of `op` that sends `num_bytes` to other ranks."""
        self.bytes_by_op[op] += num_bytes
        self.num_calls[op] += 1

    @property
    def total_bytes(self) -> int:
        """Bytes over all kinds of collectives since the last reset."""
        return sum(self.bytes_by_op.values())

    def reset(self) -> None:
        """Start again from zero."""
        self.bytes_by_op.clear()
        self.num_calls.clear()


class Collectives(Protocol):
    """The collectives of one group of ranks. All ranks of the group make the same calls in the same order.

    Every tensor is contiguous and 1-D. `n` is the length of one rank's shard, `P` the world size of the group.
    Tensors handed to a collective must not be touched until its handle was waited for; handles may be waited for in
    any order, and waiting for one completes the ones issued before it on transports that work in the calling thread.
    """

    rank: int
    world_size: int
    name: str
    traffic: Traffic

    def shared(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return zero-filled memory that peers read directly where the transport can (it cannot be resized).

        Collective. Before overwriting what a peer may still be reading, call `fence()`.
        """
        ...

    def staging(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer [numel] to pack gradients into, meant for one `reduce_scatter`.

        The transport takes it back when that reduce_scatter was waited for; it must not be used afterwards.
        """
        ...

    def all_gather(self, shard: Tensor, full: Tensor) -> Handle:
        """Concatenate the shards [n] of all ranks in `full` [P * n]; `shard` may be this rank's part of `full`."""
        ...

    def reduce_scatter(self, full: Tensor, out: Tensor, *, accumulate: bool) -> Handle:
        """Sum `full` [P * n] over ranks and keep (or, with `accumulate`, add) this rank's part in `out` [n].

        CPU transports sum in rank order in fp32 (fp64 where a tensor is fp64) and round once to out.dtype, so that
        neither the transport nor the way a plane is cut into calls changes a bit. NCCL reduces in full.dtype.
        """
        ...

    def all_reduce(self, x: Tensor) -> Handle:
        """Sum `x` over ranks in place; all ranks get the same bits."""
        ...

    def broadcast(self, x: Tensor, src: int) -> Handle:
        """Copy `x` of rank `src` (its rank inside this group) to all ranks."""
        ...

    def fence(self) -> None:
        """Return once no peer reads memory that this rank got from `shared()`. Collective; a no-op where peers copy."""

    def barrier(self) -> None:
        """Return once all ranks of the group have come here."""

    def close(self) -> None:
        """Free sockets, threads and process groups of this transport. Not collective; safe to call twice."""


class Event(Protocol):
    """A point in the work of one stream."""

    def wait(self) -> None:
        """Make the current stream wait for the event; the host goes on."""

    def synchronize(self) -> None:
        """Block the host until the event has happened."""


class Streams(Protocol):
    """What a transport that copies between device and host needs of the one owner of streams (core/streams.py).

    The methods are called from a worker thread too, so `stream` has to select the device as well.
    """

    def stream(self, name: str) -> AbstractContextManager[object]:
        """Run the body's device work on the side stream `name` ("d2h" or "h2d"), made at its first use."""
        ...

    def record(self) -> Event:
        """Record an event on the current stream."""
        ...

    def pin(self, host: Tensor) -> None:
        """Page-lock the memory of `host` for asynchronous copies."""

    def unpin(self, host: Tensor) -> None:
        """Undo `pin`."""


def require_flat(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor is contiguous, 1-D and not empty."""
    for role, tensor in tensors.items():
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() == 0:
            raise ValueError(
                f"{op}: {role} must be a contiguous, non-empty 1-D tensor, got shape {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}. Fix: pass {role}.contiguous().view(-1), and skip empty planes."
            )


def require_gather(shard: Tensor, full: Tensor, world_size: int) -> None:
    """Raise ValueError unless `shard` [n] and `full` [world_size * n] fit together."""
    require_flat("all_gather", shard=shard, full=full)
    if shard.dtype != full.dtype:
        raise ValueError(
            f"all_gather: shard and full must have the same dtype, got {shard.dtype} and {full.dtype}. "
            "Fix: cast the shard before gathering it."
        )
    _require_multiple("all_gather", "shard", shard, full, world_size)


def require_scatter(full: Tensor, out: Tensor, world_size: int) -> None:
    """Raise ValueError unless `full` [world_size * n] and `out` [n] fit together and can be summed."""
    require_flat("reduce_scatter", full=full, out=out)
    for role, tensor in (("full", full), ("out", out)):
        if not tensor.is_floating_point():
            raise ValueError(
                f"reduce_scatter: {role} must have a floating-point dtype, got {tensor.dtype}. "
                "Fix: use all_reduce for integers."
            )
    _require_multiple("reduce_scatter", "out", out, full, world_size)


def require_source(src: int, world_size: int) -> None:
    """Raise ValueError unless `src` is a rank of the group."""
    if not 0 <= src < world_size:
        raise ValueError(
            f"broadcast: src must be a rank inside the group, 0 to {world_size - 1}, got {src}. "
            "Fix: pass the rank's position in the group, not its global rank."
        )


def _require_multiple(op: str, role: str, part: Tensor, full: Tensor, world_size: int) -> None:
    if full.numel() != world_size * part.numel():
        raise ValueError(
            f"{op}: full must have world_size * {role} = {world_size} * {part.numel()} = "
            f"{world_size * part.numel()} elements, got {full.numel()}. Fix: pad the plane to a multiple of the ranks."
        )


def parts(full: Tensor, world_size: int) -> Sequence[Tensor]:
    """Cut `full` [P * n] into its P shards [n], views in rank order."""
    return full.view(world_size, -1).unbind(0)
