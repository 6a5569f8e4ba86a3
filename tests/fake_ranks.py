"""A transport of many ranks in one process, and the log of what it was asked for. Knows no engine.

`FakeRanks(64, ...)` is rank 0 of 64 ranks that all have the same values: a gather repeats this rank's shard, a
reduction multiplies by 64. Results appear when the handle is waited for and are NaN until then, so that an engine which
uses one too early trains NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lorica.comm.base import Done, Handle, Traffic, parts, require_flat, require_gather, require_scatter

Kind = Literal["launch", "wait", "begin", "end"]


class Event(NamedTuple):
    """Something that happened: a collective launched or waited for, or a piece of computation that begins or ends."""

    kind: Kind
    what: str  # the collective, or the phase
    where: int  # the storage of the result, or the number of a block
    measured: int  # whatever `Log.measure` said at that time


@dataclass
class Log:
    """Events in the order in which they happened, and a number that is measured at each."""

    events: list[Event] = field(default_factory=list)
    measure: Callable[[], int] = lambda: 0

    def note(self, kind: Kind, what: str, where: int = -1) -> None:
        """It happens now."""
        self.events.append(Event(kind, what, where, self.measure()))


class Pending:
    """A collective whose result is written when it is waited for."""

    def __init__(self, log: Log, what: str, result: Tensor, finish: Callable[[], object]) -> None:
        self._log, self._what, self._where = log, what, storage_of(result)
        self._finish: Callable[[], object] | None = finish
        log.note("launch", what, self._where)
        result.fill_(math.nan)

    def wait(self) -> None:
        """Write the result, the first time."""
        finish, self._finish = self._finish, None
        if finish is not None:
            self._log.note("wait", self._what, self._where)
            finish()


def storage_of(tensor: Tensor) -> int:
    """A number for the memory behind a tensor, whether it is there or freed."""
    return int(tensor.untyped_storage()._cdata)


class FakeRanks:
    """The collectives of rank 0 of `world_size` equal ranks."""

    name = "fake"
    rank = 0

    def __init__(self, world_size: int, device: torch.device, log: Log) -> None:
        self.world_size = world_size
        self.traffic = Traffic()
        self._device, self._log = device, log

    def shared(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zero-filled memory."""
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def staging(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory full of NaN."""
        return torch.full((numel,), math.nan, dtype=dtype, device=self._device)

    def all_gather(self, shard: Tensor, full: Tensor) -> Handle:
        """Every rank's shard is this one's."""
        require_gather(shard, full, self.world_size)
        self.traffic.add("all_gather", (self.world_size - 1) * shard.nbytes)
        values, rows = shard.clone(), full.view(self.world_size, -1)
        return Pending(self._log, "all_gather", full, lambda: rows.copy_(values))

    def reduce_scatter(self, full: Tensor, out: Tensor, *, accumulate: bool) -> Handle:
        """Every rank's contribution is this one's."""
        require_scatter(full, out, self.world_size)
        own = parts(full, self.world_size)[self.rank]
        self.traffic.add("reduce_scatter", (self.world_size - 1) * own.nbytes)
        total = own.to(out.dtype) * self.world_size + (out if accumulate else 0)
        return Pending(self._log, "reduce_scatter", out, lambda: out.copy_(total))

    def all_reduce(self, x: Tensor) -> Handle:
        """Every rank's tensor is this one's."""
        require_flat("all_reduce", x=x)
        self.traffic.add("all_reduce", 2 * x.nbytes)
        total = x * self.world_size
        return Pending(self._log, "all_reduce", x, lambda: x.copy_(total)) if x.is_floating_point() else Done()

    def broadcast(self, x: Tensor, src: int) -> Handle:
        """All ranks have the same values already."""
        require_flat("broadcast", x=x)
        assert src == self.rank
        return Done()

    def fence(self) -> None:
        """Nobody reads this rank's memory."""

    def barrier(self) -> None:
        """Nobody is waited for."""

    def close(self) -> None:
        """There is nothing to close."""
