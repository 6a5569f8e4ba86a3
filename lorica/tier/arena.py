"""One big piece of host memory, cut into planes once. Owns the mapping, its pages and their page locks; no policy.

PyTorch's page-locking allocator rounds each tensor up to a power of two and locks one tensor after another. Here all
planes lie end to end in one anonymous mapping with huge pages, and its pages come into being in one parallel go:

    arena = Arena(num_bytes, page_lock=PageLock(register, unregister))
    planes = [arena.alloc(numel, dtype) for ...]     # addresses only, no memory yet
    log(arena.commit())                              # pages and page locks, in many threads

[Note: registration borders] CUDA refuses some copies whose host side spans two registrations, so a registration must
not end inside a plane. The planes are known when `commit` registers, and its pieces end where planes end. A plane that
is allocated after `commit` gets its pages and its own registration at once.

[Note: lifetime] Planes keep the mapping alive, the mapping keeps its registrations. When the last plane and the arena
are gone, the registrations are undone and the memory goes back to the system. At the interpreter's exit the system does
that.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorica.tier.base import TierFull, gib, padded_bytes

_HUGE_PAGE = 2 << 20
_PREFAULT_BYTES = 256 << 20  # what one thread brings into being at a time
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap module does not name it
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class PageLock(NamedTuple):
    """How host memory is page-locked for an accelerator, and unlocked again.

    Both are called from several threads. With CUDA they must choose their device themselves
    (`with torch.cuda.device(device)`): a new thread stands on device 0, and would make a context there.
    """

    register: Callable[[int, int], None]
    """(address, num_bytes), both multiples of the page size; raises if it cannot."""
    unregister: Callable[[int], None]
    """(address) that was registered."""


class Commit(NamedTuple):
    """What `Arena.commit` did, for the log."""

    num_bytes: int
    prefault_s: float
    """Seconds until every page was there."""
    seconds: float
    """Seconds until every page was locked as well (locking starts before the last page is there)."""


class Arena:
    """Host memory of a fixed size from which planes are cut; nothing is freed before all is.

    Args:
        num_bytes: room for planes; see `padded_bytes` for what each takes. Only what is allocated uses memory.
        page_lock: how to page-lock; None leaves the memory pageable.
        threads: how many bring pages into being, and how many register, at the same time; default: one per core.
        piece_bytes: smallest registration (but for the last).
    Raises:
        TierFull: if the system has no addresses or commit charge left for it.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        page_lock: PageLock | None = None,
        threads: int | None = None,
        piece_bytes: int = 1 << 30,
    ) -> None:
        self.num_bytes = padded_bytes(num_bytes)
        self._mapping: _Mapping | None = _Mapping(self.num_bytes, page_lock)
        self._threads = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else (0,))
        self._piece_bytes = piece_bytes
        self._used = 0
        self._pending: list[tuple[int, int]] = []  # planes without committed pages: [start, stop)
        self._committed = False
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Room that is left."""
        return self.num_bytes - self._used

    def alloc(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A zero-filled plane: [numel] on the CPU, contiguous, beginning at a page, its storage exactly as long.

        Raises:
            TierFull: if the arena has not that much room left.
            RuntimeError: if the arena is closed.
        """
        num_bytes = numel * dtype.itemsize
        with self._lock:
            mapping = self._open_mapping()
            start = self._used
            if padded_bytes(num_bytes) > self.free_bytes:
                raise TierFull(
                    f"The host arena is full: expected room for {num_bytes} bytes ({numel} x {dtype}), got "
                    f"{self.free_bytes} of {self.num_bytes} bytes free. Fix: make the arena as large as the planes of "
                    "the plan, each padded to a page."
                )
            self._used += padded_bytes(num_bytes)
            if num_bytes:
                self._pending.append((start, self._used))
        if self._committed:
            self.commit()
        return torch.from_numpy(np.asarray(_Span(mapping, start, num_bytes))).view(dtype)

    def commit(self) -> Commit:
        """Bring the pages of all planes so far into being and lock them; what planes contain stays as it is.

        Raises:
            TierFull: if the system has not that much memory.
            RuntimeError: if the arena is closed, or from `page_lock.register`.
        """
        with self._lock:
            mapping, planes = self._open_mapping(), self._pending
            self._pending, self._committed = [], True
            begin = time.perf_counter()
            with ThreadPoolExecutor(self._threads) as prefault, ThreadPoolExecutor(self._threads) as register:
                pages: list[Future[float]] = []
                locks: list[Future[None]] = []
                for start, stop in _pieces(planes, self._piece_bytes):
                    touched = [prefault.submit(mapping.prefault, *part) for part in _parts(start, stop)]
                    locks.append(register.submit(mapping.register, start, stop, touched))
                    pages += touched
            for lock in locks:
                lock.result()
            now = time.perf_counter()
            there = max((page.result() for page in pages), default=now)
            return Commit(sum(stop - start for start, stop in planes), there - begin, now - begin)

    def close(self) -> None:
        """Give no more planes. The memory goes back to the system with the last plane: now, if there is none."""
        with self._lock:
            self._mapping = None
            self._pending = []

    def _open_mapping(self) -> _Mapping:
        if self._mapping is None:
            raise RuntimeError("The host arena is closed: expected an open one. Fix: allocate before `close()`.")
        return self._mapping


class _Mapping:
    """Anonymous memory at a huge-page border, its registrations, and their end."""

    def __init__(self, num_bytes: int, page_lock: PageLock | None) -> None:
        try:
            memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise TierFull(
                f"No host arena: expected {gib(num_bytes)} of address space, got {error.strerror}. Fix: lower the host "
                "budget, or raise the limits (`ulimit -v`, vm.overcommit_memory)."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _advise(memory, mmap.MADV_HUGEPAGE)
        if page_lock is not None and hasattr(mmap, "MADV_DONTFORK"):
            # A forked child (a data loader's worker) would make the kernel copy every locked page.
            _advise(memory, mmap.MADV_DONTFORK)
        begin = np.frombuffer(memory, np.uint8).ctypes.data
        self.address = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
        self._page_lock = page_lock
        self._registered: list[int] = []
        # The finalizer holds `memory`: Python unmaps it after the finalizer ran, never before.
        end = weakref.finalize(self, _unregister, memory, page_lock, self._registered)
        end.atexit = False

    def prefault(self, start: int, stop: int) -> float:
        """Bring the pages of [start, stop) into being, contents untouched; the time when they were there."""
        if not _populate(self.address + start, stop - start):
            pages = np.asarray(_Span(self, start, stop - start))[:: mmap.PAGESIZE]
            np.bitwise_or(pages, 0, out=pages)
        return time.perf_counter()

    def register(self, start: int, stop: int, touched: list[Future[float]]) -> None:
        """Page-lock [start, stop) once its pages are there."""
        for pages in touched:
            pages.result()
        if self._page_lock is not None:
            self._page_lock.register(self.address + start, stop - start)
            self._registered.append(self.address + start)


class _Span:
    """Bytes of a mapping, in the form that NumPy makes arrays of; such an array keeps this object and the mapping."""

    def __init__(self, mapping: _Mapping, start: int, num_bytes: int) -> None:
        self._mapping = mapping
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "data": (mapping.address + start, False),
        }


def _unregister(memory: mmap.mmap, page_lock: PageLock | None, registered: list[int]) -> None:
    """The end of a mapping; `memory` is unmapped when the caller drops it."""
    if page_lock is not None:
        for address in registered:
            page_lock.unregister(address)


def _advise(memory: mmap.mmap, advice: int) -> None:
    """Give the kernel advice that it may not know (EINVAL where it was built without huge pages)."""
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _populate(address: int, num_bytes: int) -> bool:
    """Let the kernel bring pages into being, without the GIL; False if this kernel cannot.

    Raises:
        TierFull: if it has not that much memory.
    """
    if sys.platform != "linux":
        return False
    if not _libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE):
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise TierFull(
        f"Not enough host memory: expected {gib(num_bytes)} more, got {os.strerror(code)}. Fix: lower the host budget."
    )


def _pieces(planes: Iterable[tuple[int, int]], piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Neighbouring planes together, as few as make `piece_bytes`; see [Note: registration borders]."""
    begin: int | None = None
    stop = 0
    for start, stop in planes:
        begin = start if begin is None else begin
        if stop - begin >= piece_bytes:
            yield begin, stop
            begin = None
    if begin is not None:
        yield begin, stop


def _parts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in parts for one thread each."""
    for begin in range(start, stop, _PREFAULT_BYTES):
        yield begin, min(begin + _PREFAULT_BYTES, stop)
