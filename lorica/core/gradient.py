"""The gradient plane of one unit: packing, reducing over the ranks, accumulating. Does not decide when.

Autograd keeps its own gradients while a unit's backward runs; when the unit is complete they are packed once, with a
multi-tensor cast-copy, into a staging buffer of the transport, reduced over the ranks, and accumulated in `reduced`.

    stage 2, 3   every micro-step:  p.grad -> staging -> reduce_scatter -> reduced [shard]
    stage 1      at the boundary:   the same; earlier micro-steps leave their sum in p.grad
    stage 0      at the boundary:   the same into this rank's part of `reduced` [plane], then all_gather

`reduce_bucket_size` bounds the staging memory: a larger unit is packed and reduced in pieces, each of which takes the
same columns of every rank's shard. Reduction is element-wise in rank order, so the cut changes no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorica.core.flat import Flat, dtype_of
from lorica.core.lifecycle import GRAD_MOVES, GradState, Lifecycle
from lorica.core.norm import sum_of_squares
from lorica.kernels import runtime
from lorica.layout import ALIGN

if TYPE_CHECKING:
    from lorica.comm.base import Handle
    from lorica.kernels.pack import ChunkMap

MAX_PIECES_IN_FLIGHT = 2


class GradPlane:
    """Gradients of one `Flat`, summed over ranks and micro-steps."""

    def __init__(self, flat: Flat, *, bucket_numel: int, predivide: float, keep: bool) -> None:
        """Describe the plane; memory comes with the first gradient.

        Args:
            bucket_numel: elements of staging memory that one reduction may use.
            predivide: gradients are divided by it before they are summed (fp16: keeps the sum finite).
            keep: keep the memory between steps.
        """
        self.flat = flat
        self.dtype = dtype_of(flat.plan.grad.dtype)
        self.comm_dtype = dtype_of(flat.plan.comm_dtype)
        self.reduced: Tensor | None = None
        self.state = Lifecycle(f"gradient of {flat.name}", GRAD_MOVES, GradState.IDLE)
        self._local: Tensor | None = None
        self._squares: Tensor | None = None  # of `reduced`, in parts, where the pack has summed them
        self._chunks: ChunkMap | None = None
        self._keep, self._predivide = keep, predivide
        self.factor: Callable[[], float] = lambda: 1.0  # from the reduced sum to the user's gradient; set by the engine
        self.on_complete: Callable[[GradPlane], None] | None = None  # called when a backward's reduction has ended
        self.version = 0  # counts changes of `reduced`
        flat.grad_plane = self
        self._handles: deque[Handle] = deque()
        shard_numel, num_shards = flat.layout.shard_numel, flat.layout.num_shards
        width = max(ALIGN, bucket_numel // num_shards // ALIGN * ALIGN)
        self._pieces = [(a, min(a + width, shard_numel)) for a in range(0, shard_numel, width)]

    # -- what autograd left --------------------------------------------------------------------------------------------

    @property
    def has_local(self) -> bool:
        """Whether gradients wait on this rank that no reduction has taken yet."""
        return self._local is not None or any(p.grad is not None for p in self.flat.params)

    def stash(self) -> None:
        """Keep this micro-step's gradients on this rank: nothing to do unless they accumulate in another dtype."""
        grads = [p.grad for p in self.flat.params if p.grad is not None]
        if all(g.dtype == self.dtype for g in grads):
            return
        if self._local is None:
            self._local = torch.zeros(self.flat.layout.numel, dtype=self.dtype, device=self.flat.site.device)
        self._add_into(self._local)
        self.drop_local(keep_plane=True)

    def drop_local(self, *, keep_plane: bool = False) -> None:
        """Forget gradients that were not reduced."""
        for param in self.flat.params:
            param.grad = None
        if not keep_plane:
            self._local = None

    def _add_into(self, plane: Tensor) -> None:
        for slot, param in zip(self.flat.layout.slots, self.flat.params, strict=True):
            if param.grad is not None:
                plane[slot.start : slot.stop].view(slot.shape).add_(_dense(param.grad))

    def missing(self) -> list[str]:
        """Names of parameters for which this rank has no gradient."""
        if self._local is not None:
            return []
        slots = self.flat.layout.slots
        return [slot.name for slot, p in zip(slots, self.flat.params, strict=True) if p.grad is None and slot.numel]

    @property
    def staging_bytes(self) -> int:
        """The most that this plane's reductions take of the transport's staging memory at a time."""
        if self.flat.comm.world_size == 1:
            return 0
        widest = max(end - begin for begin, end in self._pieces)
        pieces = min(MAX_PIECES_IN_FLIGHT, len(self._pieces))
        return pieces * widest * self.flat.comm.world_size * self.comm_dtype.itemsize

    # -- reduction -----------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Pack this rank's gradients (missing ones count as zero) and start reducing them into `reduced`."""
        self.flat.settle()  # an update under way reads the plane
        accumulate = self.state.state is not GradState.IDLE
        self.state.to(GradState.REDUCING)
        self.version += 1
        out = self._own_part()
        if self.flat.comm.world_size == 1:
            self._take_all(out, accumulate)
        else:
            for begin, end in self._pieces:
                self._launch_piece(out, begin, end, accumulate)
        self.drop_local()

    def _launch_piece(self, out: Tensor, begin: int, end: int, accumulate: bool) -> None:
        comm = self.flat.comm
        while len(self._handles) >= MAX_PIECES_IN_FLIGHT:
            self._handles.popleft().wait()
        staging = comm.staging(comm.world_size * (end - begin), self.comm_dtype)
        self._pack(staging, begin, end)
        self._handles.append(comm.reduce_scatter(staging, out[begin:end], accumulate=accumulate))

    def _take_all(self, out: Tensor, accumulate: bool) -> None:
        """The only rank of its group: its gradients are the sum, and no wire dtype rounds them."""
        self._squares = self._pack_and_sum(out, accumulate)
        if self._squares is not None:
            return
        shard_numel = self.flat.layout.shard_numel
        if not accumulate:
            self._pack(out, 0, shard_numel)
        elif self._predivide == 1:
            self._add_into(out)
            if self._local is not None:
                out.add_(self._local)
        else:
            staging = torch.empty_like(out)
            self._pack(staging, 0, shard_numel)
            out.add_(staging)

    def _pack_and_sum(self, out: Tensor, accumulate: bool) -> Tensor | None:
        """Pack by the kernel that also sums the squares; None where it does not take these gradients."""
        if self._local is not None or not runtime.runs_on(out.device):
            return None
        from lorica.kernels import pack

        grads = [p.grad for p in self.flat.params]
        if not pack.fits(grads, out):
            return None
        if self._chunks is None:
            self._chunks = pack.chunk_map(self.flat.layout, out.device)
        squares = torch.empty(self._chunks.num_chunks, dtype=torch.float32, device=out.device)
        pack.pack(grads, self._chunks, out, squares, accumulate=accumulate, scale=1.0 / self._predivide)
        return squares

    def square_sum(self) -> Tensor:
        """Sum of squares of this rank's part of the reduced gradient: a float64 scalar on its device."""
        assert self.reduced is not None
        if self._squares is not None:
            return torch.sum(self._squares, dtype=torch.float64)
        return sum_of_squares(self.own_part(self.reduced))

    def _pack(self, staging: Tensor, begin: int, end: int) -> None:
        """Lay columns [begin, end) of every rank's shard one after the other into `staging`, cast."""
        layout, params = self.flat.layout, self.flat.params
        whole = begin == 0 and end == layout.shard_numel
        ranges = [(0, layout.numel)] if whole else [
            (rank * layout.shard_numel + begin, rank * layout.shard_numel + end) for rank in range(layout.num_shards)
        ]  # fmt: skip
        width = len(staging) // len(ranges)
        targets, sources, zeros = [], [], []
        for row, (start, stop) in enumerate(ranges):
            base, position = row * width, start
            for part in layout.overlaps(start, stop):
                low = base + part.offset
                length = part.end - part.begin
                if start + part.offset > position:
                    zeros.append(staging[base + position - start : low])
                position = start + part.offset + length
                grad = params[part.slot].grad
                if grad is None:
                    zeros.append(staging[low : low + length])
                elif length == grad.numel():
                    targets.append(staging[low : low + length].view(grad.shape))
                    sources.append(_dense(grad))
                else:
                    targets.append(staging[low : low + length])
                    sources.append(_dense(grad).reshape(-1)[part.begin : part.end])
            if position < stop:
                zeros.append(staging[base + position - start : base + width])
        if zeros:
            torch._foreach_zero_(zeros)
        if targets:
            torch._foreach_copy_(targets, sources)
        self._add_local(staging, ranges, width)
        if self._predivide != 1:
            staging.mul_(1.0 / self._predivide)

    def _add_local(self, staging: Tensor, ranges: list[tuple[int, int]], width: int) -> None:
        if self._local is not None:
            for row, (start, stop) in enumerate(ranges):
                staging[row * width : (row + 1) * width].add_(self._local[start:stop])

    def _own_part(self) -> Tensor:
        if self.reduced is None:
            numel = self.flat.layout.numel if self._replicated else self.flat.layout.shard_numel
            self.reduced = torch.empty(numel, dtype=self.dtype, device=self.flat.site.device)  # the pack writes it all
        return self.own_part(self.reduced)

    @property
    def _is_ready(self) -> bool:
        return self.state.state is GradState.READY

    @property
    def _replicated(self) -> bool:
        """Stage 0 needs the whole reduced gradient, because every rank updates every parameter."""
        return not self.flat.plan.master.sharded

    def own_part(self, reduced: Tensor) -> Tensor:
        """This rank's shard of a reduced gradient plane."""
        return reduced[self.flat.start : self.flat.stop] if self._replicated else reduced

    def wait(self) -> None:
        """Finish the reductions that `launch` started."""
        while self._handles:
            self._handles.popleft().wait()
        if self.state.state is GradState.REDUCING:
            self.state.to(GradState.ACCUMULATING)
            if self.on_complete is not None:
                self.on_complete(self)

    def complete(self) -> None:
        """Before the optimizer reads it: sum over the replicate axis, and at stage 0 give every rank the whole plane.

        Raises:
            RuntimeError: if nothing was reduced since the last step.
        """
        if self._is_ready:
            return
        if self.reduced is None or self.state.state is GradState.IDLE:
            raise RuntimeError(
                f"engine.step: expected a backward since the last step, got none ({self.flat.name}). "
                "Fix: call engine.backward(loss) before engine.step()."
            )
        own, site = self.own_part(self.reduced), self.flat.site
        if site.replicate is not None:
            site.replicate.all_reduce(own).wait()
            self._squares = None
        if self._replicated and site.shard.world_size > 1:
            site.shard.all_gather(own, self.reduced).wait()
        self.state.to(GradState.READY)

    def collect(self, index: int) -> Tensor | None:
        """The gradient of one parameter as the user understands it: whole, fp32, averaged, unscaled. Collective.

        Returns:
            None if there is none on any rank.
        """
        slot = self.flat.layout.slots[index]
        grad = self.flat.params[index].grad
        local = torch.zeros(slot.numel, dtype=torch.float32, device=self.flat.site.device)
        if self._local is not None:
            local += self._local[slot.start : slot.stop]
        if grad is not None:
            local += _dense(grad).reshape(-1)
        if self._predivide != 1:
            local /= self._predivide
        if self.reduced is not None and self.state.state is not GradState.IDLE:
            self.flat.add_part(local, self.own_part(self.reduced), self.flat.start, index)
        present = torch.tensor([float(self.state.state is not GradState.IDLE or self.has_local)], device=local.device)
        site = self.flat.site
        unsummed = [site.shard] if site.replicate is None or self._is_ready else [site.shard, site.replicate]
        for comm in unsummed:
            comm.all_reduce(present).wait()
            if slot.numel:
                comm.all_reduce(local).wait()
        if not present.item():
            return None
        return local.mul_(self.factor()).view(slot.shape)

    def assign(self, index: int, value: Tensor) -> None:
        """Replace the reduced gradient of one parameter by `value` (averaged, unscaled, the same on all ranks)."""
        assert self.reduced is not None
        self.flat.params[index].grad = None
        raw = value.to(self.reduced.device, torch.float32) / self.factor()
        site = self.flat.site
        if site.replicate is not None and not self._is_ready:
            raw = raw / site.replicate.world_size  # each replica holds its share of the sum
        start = 0 if self._replicated else self.flat.start
        self.flat.fill_plane(self.reduced, start, index, raw)
        self._squares = None
        self.version += 1

    def reset(self) -> None:
        """After the optimizer step, or to drop what was accumulated."""
        self.wait()
        if self.state.state is not GradState.IDLE:
            self.state.to(GradState.IDLE)
        self._squares = None
        if not self._keep:
            self.reduced = None

    def held_bytes(self) -> int:
        """Bytes of gradients on this rank now: the reduced plane and what autograd still holds."""
        planes = [t for t in (self.reduced, self._local) if t is not None]
        grads = [p.grad for p in self.flat.params if p.grad is not None]
        return sum(t.numel() * t.element_size() for t in (*planes, *grads))


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad
