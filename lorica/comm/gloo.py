"""CPU collectives over torch's gloo sockets, as sends and receives between all pairs. The sums are reduction.py's.

torch 2.13's own `all_gather` and `reduce_scatter` over gloo cost about three times the CPU time of the exchange they
have to make (docs/transports.md has the numbers), and their sums depend on how a plane is cut. Here every rank sends
each peer just what the peer needs, straight from the caller's tensors, and adds what it receives in rank order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.comm.base import (
    Handle,
    Traffic,
    parts,
    require_flat,
    require_gather,
    require_scatter,
    require_source,
)
from lorica.comm.reduction import cut_all_reduce, sum_into
from lorica.comm.slots import Slot, SlotPool


class _Op(IntEnum):
    """Kinds of collectives: part of the tag, so that mismatched calls do not exchange data."""

    ALL_GATHER = 0
    REDUCE_SCATTER = 1
    ALL_REDUCE = 2
    ALL_REDUCE_GATHER = 3
    BROADCAST = 4


class _Pending:
    """One collective under way: what to wait for, then what to compute."""

    def __init__(self, owner: Gloo, what: str, works: list[dist.Work], finish: Callable[[], None] | None) -> None:
        self._owner = owner
        self._what = what
        self._works = works
        self._finish = finish
        self.done = False

    def wait(self) -> None:
        """Complete this collective and all that were issued before it."""
        self._owner._complete(self)

    def run(self) -> None:
        """Wait for the bytes and do the arithmetic."""
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._what} over gloo failed: {error}. A rank died, made another call, or was late. "
                "Fix: look at the other ranks' output first; a longer timeout= in init_distributed if one was slow."
            ) from error
        self._works = []
        if self._finish is not None:
            self._finish()
        self._finish = None
        self.done = True


class Gloo:
    """Collectives on CPU tensors over a gloo process group, which it owns.

    Args:
        group: a process group with the gloo backend, made for this instance alone (tags are counted per instance).
    """

    name = "gloo"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = group.rank()
        self.world_size = group.size()
        self.traffic = Traffic()
        self._group: dist.ProcessGroup | None = group
        self._peers = [p for p in range(self.world_size) if p != self.rank]
        self._num_ops = 0
        self._pending: deque[_Pending] = deque()
        self._users: dict[Slot, _Pending] = {}
        self._slots = SlotPool(lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8), self._reclaim)
        self._inboxes = SlotPool(lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8), self._reclaim)

    def shared(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return ordinary zero-filled memory: peers get copies."""
        return torch.zeros(numel, dtype=dtype)

    def staging(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a recycled buffer."""
        return self._slots.take(numel, dtype)

    def all_gather(self, shard: Tensor, full: Tensor) -> Handle:
        """Send `shard` to all peers, receive theirs straight into `full`."""
        require_gather(shard, full, self.world_size)
        self.traffic.add("all_gather", len(self._peers) * shard.nbytes)
        places = parts(full, self.world_size)
        tag = self._next_tag(_Op.ALL_GATHER)
        works = [self._receive(places[p], p, tag) for p in self._peers]
        works += [self._send(shard, p, tag) for p in self._peers]
        if shard.data_ptr() != places[self.rank].data_ptr():
            places[self.rank].copy_(shard)
        return self._issue("all_gather", shard, works, None)

    def reduce_scatter(self, full: Tensor, out: Tensor, *, accumulate: bool) -> Handle:
        """Send each peer its part of `full`, receive P - 1 contributions to mine and add them in rank order."""
        require_scatter(full, out, self.world_size)
        mine = parts(full, self.world_size)
        self.traffic.add("reduce_scatter", len(self._peers) * mine[0].nbytes)
        slot = self._slots.launch(full)
        tag = self._next_tag(_Op.REDUCE_SCATTER)
        inbox, contributions = self._inbox(mine[self.rank])
        works = [self._receive(contributions[p], p, tag) for p in self._peers]
        works += [self._send(mine[p], p, tag) for p in self._peers]

        def finish() -> None:
            sum_into(contributions, out, accumulate=accumulate)
            self._inboxes.retire(inbox)
            if slot is not None:
                self._slots.retire(slot)

        return self._issue("reduce_scatter", full, works, finish, slot, inbox)

    def all_reduce(self, x: Tensor) -> Handle:
        """Sum in rank order: everything to everybody if small, else a reduce-scatter and an all-gather in place."""
        require_flat("all_reduce", x=x)
        cut = cut_all_reduce(x.numel(), x.itemsize, self.world_size)
        self.traffic.add("all_reduce", cut.sent_numel[self.rank] * x.itemsize)
        return self._sum_everywhere(x, cut.bounds)

    def _sum_everywhere(self, x: Tensor, bounds: Sequence[int]) -> Handle:
        tag = self._next_tag(_Op.ALL_REDUCE)
        pieces = [x[start:stop] for start, stop in pairwise(bounds)] or [x] * self.world_size
        inbox, contributions = self._inbox(pieces[self.rank])
        works = [self._receive(contributions[p], p, tag) for p in self._peers]
        works += [self._send(pieces[p], p, tag) for p in self._peers]
        gather_tag = self._next_tag(_Op.ALL_REDUCE_GATHER)

        def finish() -> None:
            sum_into(contributions, pieces[self.rank], accumulate=False)
            self._inboxes.retire(inbox)
            if bounds:
                second = [self._receive(pieces[p], p, gather_tag) for p in self._peers]
                second += [self._send(pieces[self.rank], p, gather_tag) for p in self._peers]
                _Pending(self, self._describe("all_reduce", x), second, None).run()

        return self._issue("all_reduce", x, works, finish, inbox)

    def broadcast(self, x: Tensor, src: int) -> Handle:
        """Send `x` from `src` to each peer."""
        require_flat("broadcast", x=x)
        require_source(src, self.world_size)
        self.traffic.add("broadcast", len(self._peers) * x.nbytes if self.rank == src else 0)
        tag = self._next_tag(_Op.BROADCAST)
        works = [self._send(x, p, tag) for p in self._peers] if self.rank == src else [self._receive(x, src, tag)]
        return self._issue("broadcast", x, works, None)

    def fence(self) -> None:
        """Complete what was issued: nobody reads this rank's memory after that."""
        self._drain()

    def barrier(self) -> None:
        """Return once all ranks of the group have come here."""
        self._sum_everywhere(torch.zeros(1), ()).wait()

    def close(self) -> None:
        """Give up the process group and the buffers."""
        group, self._group = self._group, None
        self._pending.clear()
        self._users.clear()
        self._slots.clear()
        self._inboxes.clear()
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    # -- in flight ---------------------------------------------------------------------------------------------------

    def _issue(
        self, op: str, x: Tensor, works: list[dist.Work], finish: Callable[[], None] | None, *slots: Slot | None
    ) -> Handle:
        pending = _Pending(self, self._describe(op, x), works, finish)
        self._pending.append(pending)
        for slot in slots:
            if slot is not None:
                self._users[slot] = pending
        return pending

    def _complete(self, last: _Pending) -> None:
        while not last.done:
            first = self._pending.popleft()
            first.run()
            self._users = {slot: user for slot, user in self._users.items() if user is not first}

    def _drain(self) -> None:
        if self._pending:
            self._complete(self._pending[-1])

    def _reclaim(self, slot: Slot) -> None:
        self._complete(self._users[slot])

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _inbox(self, mine: Tensor) -> tuple[Slot, list[Tensor]]:
        """Return room for the peers' contributions to my part, which lies at my rank in the list of contributions."""
        room = self._inboxes.take(len(self._peers) * mine.numel(), mine.dtype)
        slot = self._inboxes.launch(room)
        assert slot is not None
        contributions = list(parts(room, len(self._peers)))
        contributions.insert(self.rank, mine)
        return slot, contributions

    def _next_tag(self, op: _Op) -> int:
        self._num_ops += 1
        return (self._num_ops % (1 << 27)) * len(_Op) + op

    def _send(self, x: Tensor, peer: int, tag: int) -> dist.Work:
        return _started(dist.isend(x, group=self._live_group(), group_dst=peer, tag=tag))

    def _receive(self, x: Tensor, peer: int, tag: int) -> dist.Work:
        return _started(dist.irecv(x, group=self._live_group(), group_src=peer, tag=tag))

    def _live_group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise RuntimeError("gloo: this transport is closed. Fix: make a new one with make_collectives().")
        return self._group

    def _describe(self, op: str, x: Tensor) -> str:
        return f"{op} number {self._num_ops} ({x.numel()} x {x.dtype}) of rank {self.rank} of {self.world_size}"


def _started(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError(
            "gloo: this process is not in the group it sends to. Fix: call the collectives of its own group."
        )
    return work
