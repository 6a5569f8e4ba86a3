"""CUDA collectives over a CPU transport, for ranks that share one GPU, which NCCL refuses. Owns the host's buffers.

One worker thread takes the collectives in the order in which they were issued and cuts each into pieces that fit a
block of page-locked host memory. While one piece travels between ranks, the next one is on its way to the host and the
last one on its way back:

    d2h stream    load 0 | load 1 | load 2
    worker                 travel 0 | travel 1 | travel 2
    h2d stream                        store 0  | store 1 | store 2

Sums are made on the host in rank order, as by every CPU transport, and rounded once on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.comm.base import (
    Collectives,
    Event,
    Handle,
    Streams,
    Traffic,
    parts,
    require_flat,
    require_gather,
    require_scatter,
    require_source,
)
from lorica.comm.reduction import accumulation_dtype, cut_all_reduce

BLOCK_BYTES = 16 << 20
NUM_BLOCKS = 2


class _Piece(NamedTuple):
    """The elements [start, stop) of a collective and the host memory [block] that they pass through."""

    start: int
    stop: int
    block: Tensor  # uint8

    def host(self, dtype: torch.dtype, rows: int = 1, offset_bytes: int = 0) -> Tensor:
        """Return the block's first rows * (stop - start) elements of `dtype`."""
        num_bytes = rows * (self.stop - self.start) * dtype.itemsize
        return self.block[offset_bytes : offset_bytes + num_bytes].view(dtype)


class _Collective(NamedTuple):
    """One collective in three steps, each called with every piece."""

    numel: int
    bytes_per_element: int  # of a block
    load: Callable[[_Piece], None]  # device to host, on the d2h stream
    travel: Callable[[_Piece], None]  # between ranks, on the host
    store: Callable[[_Piece], None]  # host to device, on the h2d stream


class _Submitted:
    """A collective in the worker's queue."""

    def __init__(self, future: Future[Event]) -> None:
        self._future = future

    def wait(self) -> None:
        """Block the host until the last copy is queued, then make the current stream wait for it."""
        self._future.result().wait()


class HostStaged:
    """Collectives on CUDA tensors by way of host memory.

    Args:
        inner: the CPU transport of the same ranks, used by this instance alone and closed with it.
        device: of the tensors.
        streams: makes the side streams and events.
        block_bytes: size of one of the two page-locked host buffers.
    """

    name = "host-staged"

    def __init__(
        self, inner: Collectives, device: torch.device, streams: Streams, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.traffic = Traffic()
        self._inner = inner
        self._device = device
        self._streams = streams
        self._block_bytes = block_bytes
        self._blocks: list[Tensor] = []
        self._stored: list[Event | None] = [None] * NUM_BLOCKS
        self._num_pieces = 0
        self._failure: BaseException | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorica-host-staged")

    def shared(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return zero-filled device memory: peers get copies."""
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def staging(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised device buffer; the caching allocator recycles it."""
        return torch.empty(numel, dtype=dtype, device=self._device)

    # -- collectives -------------------------------------------------------------------------------------------------

    def all_gather(self, shard: Tensor, full: Tensor) -> Handle:
        """Gather through the host; this rank's own part stays on the device."""
        require_gather(shard, full, self.world_size)
        self.traffic.add("all_gather", (self.world_size - 1) * shard.nbytes)
        places = parts(full, self.world_size)
        in_place = shard.data_ptr() == places[self.rank].data_ptr()

        def mine(piece: _Piece) -> Tensor:
            return parts(piece.host(shard.dtype, self.world_size), self.world_size)[self.rank]

        def load(piece: _Piece) -> None:
            mine(piece).copy_(shard[piece.start : piece.stop], non_blocking=True)

        def travel(piece: _Piece) -> None:
            self._inner.all_gather(mine(piece), piece.host(shard.dtype, self.world_size)).wait()

        def store(piece: _Piece) -> None:
            arrived = parts(piece.host(shard.dtype, self.world_size), self.world_size)
            for peer, place in enumerate(places):
                target = place[piece.start : piece.stop]
                if peer != self.rank:
                    target.copy_(arrived[peer], non_blocking=True)
                elif not in_place:
                    target.copy_(shard[piece.start : piece.stop])

        return self._submit(_Collective(shard.numel(), self.world_size * shard.itemsize, load, travel, store))

    def reduce_scatter(self, full: Tensor, out: Tensor, *, accumulate: bool) -> Handle:
        """Sum on the host, unrounded; add to `out` and round on the device."""
        require_scatter(full, out, self.world_size)
        contributions = parts(full, self.world_size)
        self.traffic.add("reduce_scatter", (self.world_size - 1) * contributions[0].nbytes)
        sum_dtype = accumulation_dtype(full.dtype, out.dtype)
        sum_bytes = sum_dtype.itemsize

        def travelling(piece: _Piece) -> Tensor:
            return piece.host(full.dtype, self.world_size, (piece.stop - piece.start) * sum_bytes)

        def load(piece: _Piece) -> None:
            for row, part in zip(parts(travelling(piece), self.world_size), contributions, strict=True):
                row.copy_(part[piece.start : piece.stop], non_blocking=True)

        def travel(piece: _Piece) -> None:
            self._inner.reduce_scatter(travelling(piece), piece.host(sum_dtype), accumulate=False).wait()

        def store(piece: _Piece) -> None:
            target = out[piece.start : piece.stop]
            total = piece.host(sum_dtype).to(self._device, non_blocking=True)
            if accumulate:
                torch.add(target, total, out=target)
            else:
                target.copy_(total)

        bytes_per_element = sum_bytes + self.world_size * full.itemsize
        return self._submit(_Collective(out.numel(), bytes_per_element, load, travel, store))

    def all_reduce(self, x: Tensor) -> Handle:
        """Sum on the host in place."""
        require_flat("all_reduce", x=x)
        cut = cut_all_reduce(x.numel(), x.itemsize, self.world_size)
        self.traffic.add("all_reduce", cut.sent_numel[self.rank] * x.itemsize)

        def travel(piece: _Piece) -> None:
            self._inner.all_reduce(piece.host(x.dtype)).wait()

        return self._submit(self._in_place(x, travel, loads=True, stores=True))

    def broadcast(self, x: Tensor, src: int) -> Handle:
        """Copy from `src` through the host."""
        require_flat("broadcast", x=x)
        require_source(src, self.world_size)
        self.traffic.add("broadcast", (self.world_size - 1) * x.nbytes if self.rank == src else 0)

        def travel(piece: _Piece) -> None:
            self._inner.broadcast(piece.host(x.dtype), src).wait()

        return self._submit(self._in_place(x, travel, loads=self.rank == src, stores=self.rank != src))

    def fence(self) -> None:
        """Return once the worker has read what earlier collectives send."""
        self._worker.submit(self._check).result()

    def barrier(self) -> None:
        """Block the host until all ranks of the group have come here."""
        self._worker.submit(self._barrier).result()

    def close(self) -> None:
        """Stop the worker, release the host memory, close the inner transport."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        blocks, self._blocks = self._blocks, []
        for stored in self._stored:
            if stored is not None:
                stored.synchronize()
        self._stored = [None] * NUM_BLOCKS
        for block in blocks:
            self._streams.unpin(block)
        self._inner.close()

    # -- the worker --------------------------------------------------------------------------------------------------

    def _submit(self, collective: _Collective) -> Handle:
        return _Submitted(self._worker.submit(self._run, collective, self._streams.record()))

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"host-staged: an earlier collective failed: {self._failure}") from self._failure

    def _barrier(self) -> None:
        self._check()
        self._inner.barrier()

    def _run(self, collective: _Collective, issued: Event) -> Event:
        """Do one collective; `issued` is where its tensors are ready on the caller's stream."""
        self._check()
        try:
            for name in ("d2h", "h2d"):
                with self._streams.stream(name):
                    issued.wait()
            return self._pass_through(collective)
        except BaseException as error:
            self._failure = error  # the ranks' orders may differ from here on: refuse all that follows
            raise

    def _pass_through(self, collective: _Collective) -> Event:
        stored: Event | None = None
        ahead: tuple[_Piece, Event] | None = None
        for piece in self._pieces(collective):
            loading = (piece, self._load(collective, piece))
            if ahead is not None:
                self._travel_and_store(collective, *ahead)
            ahead = loading
        assert ahead is not None
        stored = self._travel_and_store(collective, *ahead)
        return stored

    def _load(self, collective: _Collective, piece: _Piece) -> Event:
        with self._streams.stream("d2h"):
            collective.load(piece)
            return self._streams.record()

    def _travel_and_store(self, collective: _Collective, piece: _Piece, loaded: Event) -> Event:
        loaded.synchronize()
        collective.travel(piece)
        with self._streams.stream("h2d"):
            collective.store(piece)
            stored = self._streams.record()
        index = next(i for i, block in enumerate(self._blocks) if block is piece.block)
        self._stored[index] = stored
        return stored

    def _pieces(self, collective: _Collective) -> Iterator[_Piece]:
        """Cut a collective into pieces, each with the block whose turn it is, once nobody uses that any more."""
        step = max(self._block_bytes // collective.bytes_per_element // 8 * 8, 1)  # 8: keeps sums aligned in a block
        for start in range(0, collective.numel, step):
            index = self._num_pieces % NUM_BLOCKS
            self._num_pieces += 1
            if len(self._blocks) < NUM_BLOCKS:
                self._make_block()
            stored = self._stored[index]
            if stored is not None:
                stored.synchronize()
                self._inner.fence()  # peers read this rank's part of the block directly
            yield _Piece(start, min(start + step, collective.numel), self._blocks[index])

    def _make_block(self) -> None:
        block = self._inner.shared(self._block_bytes, torch.uint8)
        self._streams.pin(block)
        self._blocks.append(block)

    def _in_place(self, x: Tensor, travel: Callable[[_Piece], None], *, loads: bool, stores: bool) -> _Collective:
        """A collective on `x` alone: all ranks pass the same ranges, some only one way."""

        def load(piece: _Piece) -> None:
            if loads:
                piece.host(x.dtype).copy_(x[piece.start : piece.stop], non_blocking=True)

        def store(piece: _Piece) -> None:
            if stores:
                x[piece.start : piece.stop].copy_(piece.host(x.dtype), non_blocking=True)

        return _Collective(x.numel(), x.itemsize, load, travel, store)
