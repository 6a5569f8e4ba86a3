"""CPU collectives of ranks on one Linux host ("shm"): peers read each other's memory. The sums are reduction.py's.

Issuing a collective only signals where this rank's data lies. The bytes move in `wait()`, once, from the peer's memory
to where they are needed: an all-gather copies P - 1 shards into `full`, a reduce-scatter adds P slices into `out`.

[Note: lifetime of shared data] A rank may overwrite its data once every peer is done reading it. Peers say so by
acknowledging exchange numbers ("done with everything up to number s"). For staging buffers that happens after each
reduce-scatter, and `staging()` waits for it before a buffer is handed out again. For memory from `shared()` it happens
in `fence()`, once for all collectives before it.

[Note: order] Exchanges are numbered. All ranks complete them in the order of the numbers, whatever handle is waited
for, so one acknowledged number covers all before it. Tensors outside of shared memory go through two small bounce
buffers, round by round; such a collective is complete when it returns.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.comm.base import (
    Done,
    Handle,
    Traffic,
    parts,
    require_flat,
    require_gather,
    require_scatter,
    require_source,
)
from lorica.comm.links import Kind, Links, Listener, Message
from lorica.comm.reduction import cut_all_reduce, sum_into
from lorica.comm.segments import OwnSegments, Place, view_at
from lorica.comm.slots import Slot, SlotPool

BOUNCE_BYTES = 4 << 20

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


class _Exchange(NamedTuple):
    """What all ranks must agree on at one exchange number."""

    kind: Kind
    seq: int
    numel: int
    dtype: torch.dtype
    direct: bool

    def __str__(self) -> str:
        where = "shared memory" if self.direct else "other memory"
        return f"{self.kind} number {self.seq} ({self.numel} x {self.dtype} in {where})"


class _Pending:
    """A collective whose data was signalled; `wait` moves it."""

    def __init__(self, owner: SharedMemory, seq: int, run: Callable[[], None]) -> None:
        self._owner = owner
        self.seq = seq
        self.run = run
        self.done = False

    def wait(self) -> None:
        """Complete this collective and all that were issued before it."""
        self._owner._complete(self)


class SharedMemory:
    """Collectives on CPU tensors between processes of one host.

    Args:
        rank: of this process in the group.
        addresses: of all ranks' listeners, in rank order.
        listener: of this rank; the caller closes it.
        timeout_s: how long to wait for a peer.
    """

    name = "shm"

    def __init__(self, rank: int, addresses: Sequence[str], listener: Listener, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = len(addresses)
        self.traffic = Traffic()
        self._links = Links(rank, addresses, listener, timeout_s)
        self._own = OwnSegments()
        self._slots = SlotPool(self._make_segment, self._reclaim)
        self._users: dict[Slot, _Pending] = {}
        self._pending: deque[_Pending] = deque()
        self._lock = threading.RLock()
        self._seq = 0  # of the last exchange begun
        self._acked_seq = 0  # of the last one that the peers were told this rank is done with
        self._bounce: Tensor | None = None
        self._bounce_seq = [0, 0]  # the exchange that last used each half
        self._num_rounds = 0

    # -- memory ------------------------------------------------------------------------------------------------------

    def shared(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return zero-filled memory that peers can read; it is freed with the last tensor on it."""
        with self._lock:
            return self._make_segment(numel * dtype.itemsize).view(dtype)

    def staging(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a recycled buffer that peers can read, waiting until they are done with what was in it before."""
        with self._lock:
            for slot, user in list(self._users.items()):
                if user.done and self._links.acked(user.seq):
                    self._retire(slot)
            return self._slots.take(numel, dtype)

    def _make_segment(self, num_bytes: int) -> Tensor:
        segment, fd, memory = self._own.make(num_bytes)
        try:
            self._links.send_segment(segment, num_bytes, fd)
        finally:
            os.close(fd)
        return memory

    def _reclaim(self, slot: Slot) -> None:
        user = self._users[slot]
        self._complete(user)
        self._links.wait_acked(user.seq, f"staging: the buffer of exchange number {user.seq} is still being read")
        self._retire(slot)

    def _retire(self, slot: Slot) -> None:
        del self._users[slot]
        self._slots.retire(slot)

    # -- collectives -------------------------------------------------------------------------------------------------

    def all_gather(self, shard: Tensor, full: Tensor) -> Handle:
        """Copy the peers' shards straight from their memory into `full`."""
        require_gather(shard, full, self.world_size)
        self.traffic.add("all_gather", (self.world_size - 1) * shard.nbytes)
        places = parts(full, self.world_size)
        with self._lock:
            direct = self._begin(Kind.ALL_GATHER, shard)
            if direct is not None:
                return self._issue(direct, lambda: self._gather(self._views(direct, shard), places))
            for start, stop, views in self._rounds(Kind.ALL_GATHER, shard, shard.numel()):
                self._gather(views, [place[start:stop] for place in places])
            return Done()

    def reduce_scatter(self, full: Tensor, out: Tensor, *, accumulate: bool) -> Handle:
        """Add this rank's slices of all ranks' buffers straight from their memory into `out`."""
        require_scatter(full, out, self.world_size)
        mine = parts(full, self.world_size)
        self.traffic.add("reduce_scatter", (self.world_size - 1) * mine[0].nbytes)
        with self._lock:
            slot = self._slots.launch(full)
            direct = self._begin(Kind.REDUCE_SCATTER, full)
            if direct is None:
                for start, stop, views in self._rounds(Kind.REDUCE_SCATTER, full, out.numel()):
                    slices = [parts(view, self.world_size)[self.rank] for view in views]
                    sum_into(slices, out[start:stop], accumulate=accumulate)
                return Done()

            def run() -> None:
                slices = [parts(view, self.world_size)[self.rank] for view in self._views(direct, full)]
                sum_into(slices, out, accumulate=accumulate)
                if slot is not None:
                    self._acknowledge(direct.seq)

            pending = self._issue(direct, run)
            if slot is not None:
                self._users[slot] = pending
            return pending

    def all_reduce(self, x: Tensor) -> Handle:
        """Sum in rank order: each rank sums its part, then all copy each other's parts (small: all sum everything)."""
        require_flat("all_reduce", x=x)
        cut = cut_all_reduce(x.numel(), x.itemsize, self.world_size)
        self.traffic.add("all_reduce", cut.sent_numel[self.rank] * x.itemsize)
        with self._lock:
            direct = self._begin(Kind.ALL_REDUCE, x)
            if direct is not None:
                second = self._next(Kind.ALL_REDUCE_SUM, x.numel(), x.dtype, direct=True)
                return self._issue(second, lambda: self._reduce_in_place(direct, second, x))
            for start, stop, views in self._rounds(Kind.ALL_REDUCE, x, x.numel()):
                if cut.bounds:
                    self._sum_in_parts(self._next(Kind.ALL_REDUCE_SUM, stop - start, x.dtype, direct=False), views)
                    x[start:stop].copy_(views[self.rank])
                else:
                    sum_into(views, x, accumulate=False)
            return Done()

    def broadcast(self, x: Tensor, src: int) -> Handle:
        """Copy `x` of `src` through its bounce buffers: the source may overwrite `x` at once."""
        require_flat("broadcast", x=x)
        require_source(src, self.world_size)
        self.traffic.add("broadcast", (self.world_size - 1) * x.nbytes if self.rank == src else 0)
        with self._lock:
            for start, stop, views in self._rounds(Kind.BROADCAST, x, x.numel(), src):
                if self.rank != src:
                    x[start:stop].copy_(views[src])
            return Done()

    def fence(self) -> None:
        """Return once all peers are done with all collectives issued so far."""
        with self._lock:
            self._drain()
            self._acknowledge(self._seq)
            self._links.wait_acked(self._seq, f"fence after exchange number {self._seq}")

    def barrier(self) -> None:
        """Return once all ranks of the group have come here."""
        with self._lock:
            self._drain()
            here = self._next(Kind.BARRIER, 0, torch.uint8, direct=True)
            self._signal(here, Place(0, 0))
            for peer in self._links.peers:
                self._receive(peer, here)

    def close(self) -> None:
        """Close the sockets and drop the buffers; tensors from `shared()` stay valid as long as they are held."""
        with self._lock:
            self._links.close()
            self._pending.clear()
            self._users.clear()
            self._slots.clear()
            self._bounce = None

    # -- exchanges ---------------------------------------------------------------------------------------------------

    def _next(self, kind: Kind, numel: int, dtype: torch.dtype, *, direct: bool) -> _Exchange:
        self._seq += 1
        return _Exchange(kind, self._seq, numel, dtype, direct)

    def _begin(self, kind: Kind, x: Tensor) -> _Exchange | None:
        """Signal where `x` lies; None if peers cannot read it there."""
        place = self._own.locate(x)
        for segment in self._own.take_released():
            self._links.send(Message(Kind.DROP, seq=self._seq, segment=segment))
        if place is None:
            return None
        exchange = self._next(kind, x.numel(), x.dtype, direct=True)
        self._signal(exchange, place)
        return exchange

    def _signal(self, exchange: _Exchange, place: Place) -> None:
        code = _CODES.get(exchange.dtype)
        if code is None:
            raise self._links.fail(
                f"shm: {exchange} has a dtype that is not sent. Fix: view the tensor as torch.uint8."
            )
        head = Message(exchange.kind, code, int(exchange.direct), exchange.seq, exchange.numel)
        self._links.send(head._replace(segment=place.segment, offset_bytes=place.offset_bytes))

    def _receive(self, peer: int, mine: _Exchange) -> Place:
        """Return where the data of `peer` lies, once it has come to the same exchange."""
        message = self._links.receive(peer, mine.seq, f"rank {self.rank} waits in {mine}")
        theirs = _Exchange(
            message.kind, message.seq, message.numel, _DTYPES[message.dtype], direct=bool(message.direct)
        )
        if theirs != mine:
            raise self._links.fail(
                f"The ranks' collectives do not match: rank {self.rank} called {mine}, rank {peer} called {theirs}. "
                "Fix: all ranks of a group must make the same calls with the same sizes in the same order."
            )
        return Place(message.segment, message.offset_bytes)

    def _views(self, exchange: _Exchange, mine: Tensor, src: int | None = None) -> list[Tensor]:
        """Return the data of all ranks (with `src`: of that one) at this exchange, in rank order, once it is there."""
        views = [mine] * self.world_size
        for peer in self._links.peers:
            if src is None or src == peer:
                place = self._receive(peer, exchange)
                memory = self._links.memory(peer, place.segment)
                views[peer] = view_at(memory, place.offset_bytes, exchange.numel, exchange.dtype)
        return views

    def _acknowledge(self, seq: int) -> None:
        if seq > self._acked_seq:
            self._acked_seq = seq
            self._links.send(Message(Kind.ACK, seq=seq))

    def _issue(self, last: _Exchange, run: Callable[[], None]) -> _Pending:
        pending = _Pending(self, last.seq, run)
        self._pending.append(pending)
        return pending

    def _complete(self, last: _Pending) -> None:
        with self._lock:
            while not last.done:
                if not self._pending:
                    raise RuntimeError("shm: this transport was closed before the collective was waited for.")
                first = self._pending.popleft()
                first.run()
                first.run = _nothing  # it holds tensors
                first.done = True
                self._links.completed(first.seq)

    def _drain(self) -> None:
        if self._pending:
            self._complete(self._pending[-1])

    # -- moving data -------------------------------------------------------------------------------------------------

    def _gather(self, views: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        for view, place in zip(views, places, strict=True):
            if view.data_ptr() != place.data_ptr():
                place.copy_(view)

    def _reduce_in_place(self, first: _Exchange, second: _Exchange, x: Tensor) -> None:
        self._sum_in_parts(second, self._views(first, x))
        self._acknowledge(second.seq)
        self._links.wait_acked(second.seq, f"rank {self.rank} waits for the end of {first}")

    def _sum_in_parts(self, second: _Exchange, views: Sequence[Tensor]) -> None:
        """Sum my part of all views into my view, signal, and copy the peers' parts into my view.

        Only rank p reads part p of the views before the signal, and only part p is read from rank p's after it.
        """
        bounds = [second.numel * p // self.world_size for p in range(self.world_size + 1)]
        cuts = [slice(start, stop) for start, stop in pairwise(bounds)]
        mine = views[self.rank]
        sum_into([view[cuts[self.rank]] for view in views], mine[cuts[self.rank]], accumulate=False)
        self._signal(second, Place(0, 0))
        for peer in self._links.peers:
            self._receive(peer, second)
            mine[cuts[peer]].copy_(views[peer][cuts[peer]])

    def _rounds(
        self, kind: Kind, x: Tensor, numel: int, src: int | None = None
    ) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Pass `x` through the bounce buffers: yield (start, stop, all ranks' data of that range) until `numel`.

        `x` is k rows of `numel`; the data of a round is the range [start, stop) of each row, one after the other. With
        `src`, that rank alone gives data and the others' views are empty.
        """
        self._drain()
        rows = x.view(-1, numel)
        step = max(BOUNCE_BYTES // (rows.shape[0] * x.itemsize), 1)
        for start in range(0, numel, step):
            stop = min(start + step, numel)
            exchange = self._next(kind, rows.shape[0] * (stop - start), x.dtype, direct=False)
            half = self._num_rounds % 2
            self._num_rounds += 1
            mine = x[:0]
            if src is None or src == self.rank:
                mine = self._fill(half, rows[:, start:stop], exchange)
            yield start, stop, self._views(exchange, mine, src)
            self._bounce_seq[half] = self._seq
            self._acknowledge(self._seq)
            self._links.completed(self._seq)

    def _fill(self, half: int, rows: Tensor, exchange: _Exchange) -> Tensor:
        """Copy `rows` [k, m] into one half of the bounce buffer, once the peers are done with it, and signal."""
        if self._bounce is None:
            self._bounce = self._make_segment(2 * BOUNCE_BYTES)
        self._links.wait_acked(self._bounce_seq[half], f"rank {self.rank} waits to begin {exchange}")
        mine = view_at(self._bounce, half * BOUNCE_BYTES, exchange.numel, exchange.dtype)
        mine.view(rows.shape).copy_(rows)
        place = self._own.locate(mine)
        assert place is not None
        self._signal(exchange, place)
        return mine


def _nothing() -> None:
    return None
