"""CUDA collectives by NCCL through torch.distributed. The only file that knows which names torch renamed.

Reductions are NCCL's own: in full.dtype, in the order of its rings or trees. Everything runs on NCCL's stream beside
the current one; `wait()` makes the stream that is current then wait for it, and blocks no host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.comm.base import Handle, Traffic, require_flat, require_gather, require_scatter, require_source

# torch 2.13 renamed the two collectives on flat tensors and warns at every call by the old name; 2.11 has the old only.
_all_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., dist.Work] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Running:
    """One collective on NCCL's stream; keeps its tensors alive until the current stream waits for it."""

    def __init__(self, work: dist.Work, tensors: tuple[Tensor, ...], finish: Callable[[], None] | None = None) -> None:
        self._work: dist.Work | None = work
        self._tensors = tensors
        self._finish = finish
        self._stream = torch.cuda.current_stream(tensors[0].device)

    def wait(self) -> None:
        """Make the current stream wait for the result."""
        if self._work is None:
            return
        self._work.wait()
        stream = torch.cuda.current_stream(self._tensors[0].device)
        if stream != self._stream:
            for tensor in self._tensors:  # freed below, used by this stream: the allocator has to know
                tensor.record_stream(stream)
        if self._finish is not None:
            self._finish()
        self._work, self._tensors, self._finish = None, (), None


class Nccl:
    """Collectives on CUDA tensors over an NCCL process group, which it owns."""

    name = "nccl"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank = group.rank()
        self.world_size = group.size()
        self.traffic = Traffic()
        self._group: dist.ProcessGroup | None = group
        self._device = device

    def shared(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return zero-filled device memory: peers get copies."""
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def staging(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised device buffer; the caching allocator recycles it."""
        return torch.empty(numel, dtype=dtype, device=self._device)

    def all_gather(self, shard: Tensor, full: Tensor) -> Handle:
        """Gather natively, in place where `shard` is this rank's part of `full`."""
        require_gather(shard, full, self.world_size)
        self.traffic.add("all_gather", (self.world_size - 1) * shard.nbytes)
        return _Running(_all_gather(full, shard, group=self._live_group(), async_op=True), (full, shard))

    def reduce_scatter(self, full: Tensor, out: Tensor, *, accumulate: bool) -> Handle:
        """Reduce natively in full.dtype, then add to `out` where that is asked for or the dtypes differ."""
        require_scatter(full, out, self.world_size)
        self.traffic.add("reduce_scatter", (self.world_size - 1) * full.nbytes // self.world_size)
        direct = not accumulate and out.dtype == full.dtype
        target = out if direct else torch.empty_like(out, dtype=full.dtype)
        work = _reduce_scatter(target, full, group=self._live_group(), async_op=True)
        if direct:
            return _Running(work, (full, out))
        finish = (lambda: _add(out, target)) if accumulate else (lambda: _copy(out, target))
        return _Running(work, (full, target), finish)

    def all_reduce(self, x: Tensor) -> Handle:
        """Sum natively in x.dtype."""
        require_flat("all_reduce", x=x)
        self.traffic.add("all_reduce", 2 * (self.world_size - 1) * x.nbytes // self.world_size)
        return _Running(dist.all_reduce(x, group=self._live_group(), async_op=True), (x,))

    def broadcast(self, x: Tensor, src: int) -> Handle:
        """Copy along NCCL's ring: every rank but the last one sends `x` once."""
        require_flat("broadcast", x=x)
        require_source(src, self.world_size)
        last = (src - 1) % self.world_size
        self.traffic.add("broadcast", 0 if self.rank == last else x.nbytes)
        work = dist.broadcast(x, group=self._live_group(), group_src=src, async_op=True)
        return _Running(work, (x,))

    def fence(self) -> None:
        """Return at once: streams order what follows a waited handle."""

    def barrier(self) -> None:
        """Block the host until all ranks of the group have come here."""
        dist.barrier(self._live_group(), device_ids=[self._device.index or torch.cuda.current_device()])

    def close(self) -> None:
        """Give up the process group."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def _live_group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise RuntimeError("nccl: this transport is closed. Fix: make a new one with make_collectives().")
        return self._group


def _add(out: Tensor, total: Tensor) -> None:
    out.add_(total)


def _copy(out: Tensor, total: Tensor) -> None:
    out.copy_(total)
