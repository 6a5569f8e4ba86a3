"""Anonymous memory that several processes map: made by memfd, passed by file descriptor, gone with its last mapping.

No file in /dev/shm and no name: a rank that is killed leaves nothing behind. A segment lives as long as a tensor on it
does. The mapping is torch's: Python's own `mmap` keeps a file descriptor open for each, and a model has hundreds.
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_right
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a tensor begins: in which of its owner's segments, how many bytes in."""

    segment: int
    offset_bytes: int


class OwnSegments:
    """The segments that this rank made, by address."""

    def __init__(self) -> None:
        self._num_made = 0
        self._starts: list[int] = []  # addresses, ascending
        self._extents: dict[int, tuple[int, int]] = {}  # address -> (segment, bytes)
        self._released: deque[tuple[int, int]] = deque()  # (address, segment) of those whose last tensor has died
        self._gone: list[int] = []  # of those, the ones not yet told to the peers

    def make(self, num_bytes: int) -> tuple[int, int, Tensor]:
        """Map new zero-filled memory; return its number, its file descriptor (close it) and the uint8 tensor on it."""
        fd = os.memfd_create("lorica", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        memory = _map(fd, num_bytes)
        self._strike_out()  # the address may have belonged to a segment that is gone
        segment = self._num_made
        self._num_made += 1
        address = memory.data_ptr()
        if address not in self._extents:
            self._starts.insert(bisect_right(self._starts, address), address)
        self._extents[address] = (segment, num_bytes)
        # A view keeps the storage alive, and with it torch keeps its Python object: the finaliser runs at the very end.
        weakref.finalize(memory.untyped_storage(), self._released.append, (address, segment)).atexit = False
        return segment, fd, memory

    def locate(self, x: Tensor) -> Place | None:
        """Return where `x` lies in a segment; None if it lies in other memory."""
        self._strike_out()
        address = x.data_ptr()
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        start = self._starts[index]
        segment, num_bytes = self._extents[start]
        return Place(segment, address - start) if address < start + num_bytes else None

    def take_released(self) -> list[int]:
        """Return the numbers of the segments that no tensor uses any more, once: the peers should unmap them."""
        self._strike_out()
        gone, self._gone = self._gone, []
        return gone

    def _strike_out(self) -> None:
        while self._released:
            address, segment = self._released.popleft()
            self._gone.append(segment)
            if self._extents[address][0] == segment:  # else the address has a new owner already
                self._starts.remove(address)
                del self._extents[address]


def attach(fd: int, num_bytes: int) -> Tensor:
    """Map a peer's segment, close its file descriptor, and return the uint8 tensor on it."""
    try:
        return _map(fd, num_bytes)
    finally:
        os.close(fd)


def view_at(memory: Tensor, offset_bytes: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Return [numel] of `dtype` that begins `offset_bytes` into `memory`."""
    return memory[offset_bytes : offset_bytes + numel * dtype.itemsize].view(dtype)


def _map(fd: int, num_bytes: int) -> Tensor:
    return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=num_bytes, dtype=torch.uint8)
