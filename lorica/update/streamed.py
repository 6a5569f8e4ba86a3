"""Updates on the compute device of records in host memory, which stream through a ring of slots in device memory.

    up      record i+2 -> slot      before the verdict too, as far as there are slots: nothing changes by coming near
    update  record i in its slot, parameters in place                           behind the verdict
    down    slot -> record i-1      the slot is free again behind it

Three streams, ordered by events; the host only launches and never waits. A plane may be used again behind its last
`update`: the way down goes on beside forward and backward, and the ring is full again before the next verdict. Owns the
ring and the order of transfers; no formula and no decision.

[Note: coming near is not speculation] What limits an exact update is that nothing may change before the gradient's norm
is known, which leaves the next forward for all transfers. A ring of R bytes takes R bytes out of that window: records
in it were brought up during backward, unchanged. Source: measured in docs/benchmarks-offload.md.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.core.flat import Flat, Site, Stored
from lorica.core.gradient import GradPlane
from lorica.core.streams import Streams
from lorica.optim.base import FlatOptimizer
from lorica.update.executor import Executor
from lorica.update.pieces import (
    Chunk,
    Record,
    Work,
    chunks_of,
    copy_record,
    master_travels,
    own_gradient,
    record_of,
    update_record,
)

UP, UPDATE, DOWN = "records up", "update", "records down"


class Slot:
    """Device memory for one chunk of a record of a given kind, and the event behind which it is free."""

    def __init__(self, kind: Record, numel: int, device: torch.device, *, master_travels: bool) -> None:
        """Allocate for `numel` elements like those of `kind`. Args: master_travels: False: it is on the device."""

        def room(like: Tensor) -> Tensor:
            return torch.empty(kind.range_of(like, 0, numel)[1], dtype=like.dtype, device=device)

        self._master = room(kind.master) if master_travels else None
        self._out = None if kind.out is None or kind.out.device == device else room(kind.out)
        self._state = {name: room(plane) for name, plane in kind.state.items()}
        self.free: Any = None

    @property
    def num_bytes(self) -> int:
        """Device memory of the slot."""
        rooms = [room for room in (self._master, self._out, *self._state.values()) if room is not None]
        return sum(room.numel() * room.element_size() for room in rooms)

    def record(self, chunk: Chunk) -> Record:
        """The part of the slot that the chunk takes; what is on the device is used where it is."""
        there = record_of(chunk.plane.flat)

        def here(stored: Stored, room: Tensor | None) -> Tensor:
            low, high = there.range_of(stored, chunk.low, chunk.high)
            part: Tensor = stored[low:high] if room is None else room[: high - low]
            return part

        state = {name: here(plane, self._state[name]) for name, plane in there.state.items()}
        out = None if there.out is None else here(there.out, self._out)
        return Record(here(there.master, self._master), out, state)


class _Staged(NamedTuple):
    chunk: Chunk
    slot: Slot
    arrived: Any


class Streamed(Executor):
    """The executor that brings records to the device, a ring of chunks at a time."""

    def __init__(
        self,
        optimizer: FlatOptimizer,
        planes: Sequence[GradPlane],
        groups: Sequence[dict[str, Any]],
        site: Site,
        streams: Streams,
        *,
        chunk_numel: int,
        num_slots: int,
    ) -> None:
        """Allocate the ring.

        Args:
            planes: in the order of their use, with records of one kind (dtypes, places) in host memory.
            chunk_numel: elements that one slot holds, a multiple of 4096.
            num_slots: slots of the ring, at least 1; three keep all streams busy, more come near before the verdict.
        """
        self.planes = list(planes)
        self._optimizer, self._groups, self._streams = optimizer, groups, streams
        self._chunks = chunks_of(self.planes, chunk_numel)
        self._written: list[Any] = [None] * len(self._chunks)  # events behind which a chunk's record is home
        self._updated: dict[Flat, Any] = {}
        self._held: dict[Flat, list[Tensor]] = {}
        kind = record_of(self.planes[0].flat)
        home_of_params = kind.master if kind.out is None else kind.out
        self._params_travel = home_of_params.device != site.device
        size = max(chunk.numel for chunk in self._chunks)
        travels = master_travels(self.planes[0].flat)
        num_slots = min(num_slots, len(self._chunks))
        self._free = deque(Slot(kind, size, site.device, master_travels=travels) for _ in range(num_slots))
        self.ring_bytes = sum(slot.num_bytes for slot in self._free)
        ready = streams.record()
        for slot in self._free:
            slot.free = ready  # its memory may be what the current stream has just given back
        self._under_way: dict[str, Any] = {}  # the last event of each side stream
        weakref.finalize(self, _wait_for, streams, self._under_way).atexit = False  # copies outlive no memory of theirs
        self._staged: deque[_Staged] = deque()
        self._next = 0  # the chunk that comes up next
        self._come_near()

    # -- the pipeline --------------------------------------------------------------------------------------------------

    def start(self, work: Work) -> None:
        """Launch the updates of all planes; returns at once."""
        verdict = self._streams.record()
        with self._streams.stream(UPDATE):
            self._streams.wait(verdict)
        for index, chunk in enumerate(self._chunks):
            self._come_near()
            staged = self._staged.popleft()
            updated = self._update(staged, work)
            self._go_home(index, staged, updated)
            if chunk.is_last:
                self._updated[chunk.plane.flat] = staged.slot.free if self._params_travel else updated
        self._next = 0
        self._come_near()

    def _come_near(self) -> None:
        """Bring up the records that come next, as far as there are slots."""
        while self._free and self._next < len(self._chunks):
            chunk, slot = self._chunks[self._next], self._free.popleft()
            with self._streams.stream(UP):
                for event in {id(e): e for e in (slot.free, self._written[self._next])}.values():
                    self._streams.wait(event)
                copy_record(home(chunk), slot.record(chunk))
                self._under_way[UP] = self._streams.record()
                self._staged.append(_Staged(chunk, slot, self._under_way[UP]))
            self._next += 1

    def _update(self, staged: _Staged, work: Work) -> Any:
        chunk, flat = staged.chunk, staged.chunk.plane.flat
        grad = own_gradient(chunk.plane)
        self._held[flat] = [t for t in (grad, work.coef, work.apply) if isinstance(t, Tensor)]
        with self._streams.stream(UPDATE):
            self._streams.wait(staged.arrived)
            record, own = staged.slot.record(chunk), grad[chunk.low : chunk.high]
            update_record(
                self._optimizer, flat, record, own, self._groups, chunk.low, chunk.high,
                coef=work.coef, step=work.step, apply=work.apply,
            )  # fmt: skip
            return self._streams.record()

    def _go_home(self, index: int, staged: _Staged, updated: Any) -> None:
        with self._streams.stream(DOWN):
            self._streams.wait(updated)
            copy_record(staged.slot.record(staged.chunk), home(staged.chunk))
            self._written[index] = staged.slot.free = self._under_way[DOWN] = self._streams.record()
        self._free.append(staged.slot)

    def finish(self, plane: GradPlane) -> None:
        """Let the current stream wait for the plane's update, so that its parameters may be used."""
        self._streams.wait(self._updated.pop(plane.flat, None))
        self._held.pop(plane.flat, None)  # freed on the stream that made it, behind its last use

    def open(self, plane: GradPlane, *, write: bool) -> None:
        """Let the host wait until the plane's record is at home.

        Args:
            write: it will be written there, so what has come near of any record is let go.
        """
        for chunk, event in zip(self._chunks, self._written, strict=True):
            if chunk.plane is plane:
                self._streams.synchronize(event)
        if write:
            while self._staged:
                staged = self._staged.popleft()
                self._streams.synchronize(staged.arrived)
                self._free.append(staged.slot)
            self._next = 0

    def close(self) -> None:
        """Wait for what is under way and free the ring."""
        _wait_for(self._streams, self._under_way)
        self._staged.clear()
        self._free.clear()
        self._held.clear()


def _wait_for(streams: Streams, under_way: dict[str, Any]) -> None:
    """Let the host wait for the last event of every stream, and so for all before it."""
    for event in under_way.values():
        streams.synchronize(event)


def home(chunk: Chunk) -> Record:
    """The chunk's record where it lives."""
    return record_of(chunk.plane.flat).part(chunk.low, chunk.high)
