"""One rank's swap file: bytes on a disk, moved by a pool of threads past the page cache. Owns the file and the threads.

[Note: alignment] O_DIRECT moves whole sectors between sectors of the file and sectors of memory. A transfer is cut at
block borders; what is aligned in the file and in memory goes straight to the disk. A block whose memory is not aligned
goes through a buffer of its thread, and a part of a sector at either end of a transfer through read, change and write
of that sector, one at a time. Results are the same, speed is not: keep to multiples of `ALIGNMENT` where it matters.

[Note: what can go wrong] A file can be deleted, replaced or cut off while its descriptor goes on working, so each
transfer first compares the path with the descriptor. A header with a random number tells the file from another one; it
is read at the first read and by `verify`. There are no checksums of contents: the file lives no longer than its
process, disks check their own sectors, and a CRC would cost a pass over memory for each pass over the disk.

[Note: leftovers] A process that is killed leaves its file. While it lives it holds a `flock` on it, so files of this
host without a lock are leftovers: the next swap file in the folder removes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import mmap
import os
import secrets
import shutil
import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorica.log import logger
from lorica.tier.base import ALIGNMENT, gib, padded_bytes
from lorica.tier.file_io import FileIO, SystemFileIO

HEADER_BYTES = ALIGNMENT
_MAGIC = b"lorica swap file 1\n"
_O_DIRECT = getattr(os, "O_DIRECT", 0)

Bytes: TypeAlias = NDArray[np.uint8]
Buffer: TypeAlias = Tensor | memoryview | bytearray | bytes


class SwapError(OSError):
    """A swap file that cannot be made, read or written; `errno` is set, the text says where and what."""


class Transfer:
    """Blocks on their way between memory and a file."""

    def __init__(self, blocks: list[Future[None]]) -> None:
        self._blocks = blocks  # each keeps its memory until it is through

    def done(self) -> bool:
        """Whether no block is on its way any more."""
        return all(block.done() for block in self._blocks)

    def wait(self) -> None:
        """Wait until no thread uses the memory any more. May be called again.

        Raises:
            SwapError: of the first block (in file order) that failed.
        """
        wait(self._blocks)
        for block in self._blocks:
            block.result()


class SwapFile:
    """`num_bytes` bytes in a file of its own, zero at first, removed at `close`, when collected, and at exit.

    Args:
        folder: where; made if it is not there.
        num_bytes: size of the contents; the disk must have it, and `reserve_bytes` more, before a byte is written.
        rank: goes into the name.
        threads: transfers in flight at the disk.
        block_bytes: largest single transfer; a multiple of `ALIGNMENT`.
        direct: past the page cache (O_DIRECT). None: if the file system can, else the log says that it cannot.
        reserve_bytes: what to leave free on the disk.
        io: the system calls.
    Raises:
        SwapError: no space, no such folder, or `direct=True` where the file system cannot.
    """

    def __init__(
        self,
        folder: str | Path,
        num_bytes: int,
        *,
        rank: int = 0,
        threads: int = 8,
        block_bytes: int = 8 << 20,
        direct: bool | None = None,
        reserve_bytes: int = 1 << 30,
        io: FileIO | None = None,
    ) -> None:
        if block_bytes <= 0 or block_bytes % ALIGNMENT:
            raise ValueError(f"block_bytes: expected a multiple of {ALIGNMENT}, got {block_bytes}. Fix: {8 << 20}.")
        self.num_bytes = num_bytes
        self.block_bytes = block_bytes
        self._io: FileIO = io or SystemFileIO()
        self._file_bytes = HEADER_BYTES + padded_bytes(num_bytes)
        folder = Path(folder).absolute()
        _make_folder(folder)
        _remove_leftovers(folder)
        _require_space(folder, self._file_bytes, reserve_bytes)
        name = f"lorica-swap-{socket.gethostname()}-{os.getpid()}-rank{rank}-{secrets.token_hex(4)}.bin"
        self.path = folder / name
        self._header = _padded(_MAGIC + secrets.token_bytes(16) + num_bytes.to_bytes(8, "little"))
        self._bounce = threading.local()
        self._sector = threading.Lock()
        self._known = False
        self._create(direct)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"lorica-swap-rank{rank}")
        self._end = weakref.finalize(self, _end, self._pool, self._descriptor, self.path, self._identity, os.getpid())

    # Transfers --------------------------------------------------------------------------------------------------------

    def read(self, offset: int, buffer: Buffer) -> Transfer:
        """Start filling `buffer` with the contents from `offset` on.

        Args:
            offset: in bytes, any.
            buffer: writable and contiguous, on the CPU, any size; not to be touched before `wait()`.
        Raises:
            ValueError: if the contents end before the buffer does.
            RuntimeError: if the file is closed.
        """
        return self._start(False, offset, buffer)

    def write(self, offset: int, buffer: Buffer) -> Transfer:
        """Start writing `buffer` to `offset`; arguments and errors as in `read`.

        The order of two transfers of the same bytes is open unless the first one's `wait()` came before the second. Who
        drops a transfer without `wait()` does not learn that it failed.
        """
        return self._start(True, offset, buffer)

    def verify(self) -> None:
        """Check that the path still leads to this file, in full size, and that its header is ours.

        Raises:
            SwapError: if not.
        """
        self._check_path()
        sector = self._bounce_buffer()[:HEADER_BYTES]
        self._move(False, 0, sector)
        if sector.tobytes() != self._header:
            raise self._error(errno.EBADMSG, "expected the header of this session, got another one", 0)
        self._known = True

    def close(self) -> None:
        """Let transfers end, end the threads, remove the file. May be called again."""
        self._pool.shutdown(wait=True)
        self._end()

    # Blocks -----------------------------------------------------------------------------------------------------------

    def _start(self, writing: bool, offset: int, buffer: Buffer) -> Transfer:
        memory = _bytes_of(buffer)
        if offset < 0 or offset + memory.size > self.num_bytes:
            raise ValueError(
                f"{self.path}: expected a range within {self.num_bytes} bytes, got [{offset}, {offset + memory.size})."
            )
        if not self._end.alive:
            raise RuntimeError(
                f"{self.path} is closed: expected an open swap file. Fix: read and write before `close()`."
            )
        begin = HEADER_BYTES + offset
        blocks = [
            self._pool.submit(self._run, writing, start, memory[start - begin : stop - begin], start == begin)
            for start, stop in cut(begin, begin + memory.size, self.block_bytes)
        ]
        return Transfer(blocks)

    def _run(self, writing: bool, offset: int, memory: Bytes, is_first: bool) -> None:
        """Move one block; `offset` counts from the start of the file."""
        if not writing and not self._known:
            self.verify()
        elif is_first:
            self._check_path()
        if not self.direct:
            self._move(writing, offset, memory)
            self._drop_cache(offset, memory.size)
        elif offset % ALIGNMENT or memory.size % ALIGNMENT:
            with self._sector:
                self._move_part(writing, offset, memory)
        elif memory.ctypes.data % ALIGNMENT:
            self._move_bounced(writing, offset, memory)
        else:
            self._move(writing, offset, memory)

    def _move_bounced(self, writing: bool, offset: int, memory: Bytes) -> None:
        """An aligned block of the file from or to memory that is not aligned."""
        bounce = self._bounce_buffer()[: memory.size]
        if writing:
            _copy(memory, bounce)
        self._move(writing, offset, bounce)
        if not writing:
            _copy(bounce, memory)

    def _move_part(self, writing: bool, offset: int, memory: Bytes) -> None:
        """A part of one sector."""
        sector = self._bounce_buffer()[:ALIGNMENT]
        start = offset // ALIGNMENT * ALIGNMENT
        part = sector[offset - start : offset - start + memory.size]
        self._move(False, start, sector)
        if writing:
            _copy(memory, part)
            self._move(True, start, sector)
        else:
            _copy(part, memory)

    def _move(self, writing: bool, offset: int, memory: Bytes) -> None:
        """Move all of `memory` in as many calls as it takes; no progress is an error."""
        call, verb = (self._io.pwritev, "write") if writing else (self._io.preadv, "read")
        moved = 0
        while moved < memory.size:
            here, left = offset + moved, memory.size - moved
            try:
                count = call(self._descriptor, [memory[moved:]], here)
            except OSError as error:
                code = error.errno or errno.EIO
                raise self._error(code, f"expected to {verb} {left} bytes, got {os.strerror(code)}", here) from error
            if count <= 0 or (self.direct and count % ALIGNMENT):
                raise self._error(errno.EIO, f"expected to {verb} {left} bytes, got {count}", here)
            moved += count

    def _drop_cache(self, offset: int, num_bytes: int) -> None:
        """Keep a buffered file out of the page cache: it starts writing dirty pages and forgets clean ones."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def _bounce_buffer(self) -> Bytes:
        """One block of aligned memory of the calling thread."""
        found: Bytes | None = getattr(self._bounce, "buffer", None)
        if found is None:
            found = np.frombuffer(mmap.mmap(-1, self.block_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
            self._bounce.buffer = found
        return found

    # The file itself --------------------------------------------------------------------------------------------------

    def _create(self, direct: bool | None) -> None:
        """Make the file; nothing is left of it if that fails."""
        self.direct = direct is None or direct
        try:
            self._open()
        except OSError as error:
            code = error.errno or errno.EIO
            if direct is None and code in (errno.EINVAL, errno.EOPNOTSUPP):
                logger.warning(
                    "%s: no O_DIRECT there, so the NVMe tier goes through the page cache, which is slower. "
                    "Fix: set nvme_path to a folder on a local Linux disk (ext4, xfs).",
                    self.path.parent,
                )
                return self._create(False)
            if isinstance(error, SwapError):
                raise
            how = " with O_DIRECT" if self.direct else ""
            what = f"expected a file of {gib(self._file_bytes)}{how}, got {os.strerror(code)}"
            raise self._error(code, what, 0) from error

    def _open(self) -> None:
        """Create, lock, name and size the file and write its header: the first thing that O_DIRECT may refuse."""
        new = self.path.with_suffix(".new")  # not taken for a leftover before it is locked
        if self.direct and not _O_DIRECT:
            raise OSError(errno.EINVAL, "this system has no O_DIRECT")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | (_O_DIRECT if self.direct else 0)
        try:
            self._descriptor = os.open(new, flags, 0o600)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        try:
            _lock(self._descriptor)
            os.rename(new, self.path)
            status = os.fstat(self._descriptor)
            self._identity = (status.st_dev, status.st_ino)
            self._io.fallocate(self._descriptor, self._file_bytes)
            header = self._bounce_buffer()[:HEADER_BYTES]
            header[:] = np.frombuffer(self._header, np.uint8)
            self._move(True, 0, header)
        except BaseException:
            os.close(self._descriptor)
            new.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            raise

    def _check_path(self) -> None:
        """See [Note: what can go wrong]."""
        try:
            status = self._io.stat(self.path)
        except OSError as error:
            code = error.errno or errno.EIO
            raise self._error(code, f"expected the file to be there, got {os.strerror(code)}", 0) from error
        if (status.st_dev, status.st_ino) != self._identity:
            raise self._error(errno.ESTALE, "expected the file of this session, got another one in its place", 0)
        if status.st_size < self._file_bytes:
            raise self._error(
                errno.EIO, f"expected {self._file_bytes} bytes, got a file of {status.st_size}", status.st_size
            )

    def _error(self, code: int, what: str, offset: int) -> SwapError:
        fix = _FIXES.get(code, _FIX)
        return SwapError(code, f"Swap file {self.path} at offset {offset}: {what}. Fix: {fix}")


_FIX = "keep other programs out of the folder, look for disk errors (dmesg), and resume from the last checkpoint."
_FIXES = {
    errno.ENOSPC: "free space on this disk, or set nvme_path to a folder on a larger one.",
    errno.EDQUOT: "ask for more quota on this disk, or set nvme_path to a folder on another one.",
    errno.EINVAL: "set nvme_path to a folder on a local disk (ext4, xfs): this file system refuses O_DIRECT.",
    errno.EACCES: "set nvme_path to a folder that you may write to.",
    errno.EROFS: "set nvme_path to a folder that you may write to.",
}


class Range(NamedTuple):
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


def cut(start: int, stop: int, block_bytes: int) -> Iterator[Range]:
    """Cut [start, stop) at multiples of `block_bytes`, and parts of a sector off its ends.

    Returns:
        Neighbouring ranges in order; each lies within one block, and is whole sectors or lies within one sector.
    """
    first_sector = min(-(-start // ALIGNMENT) * ALIGNMENT, stop)
    last_sector = max(stop // ALIGNMENT * ALIGNMENT, first_sector)
    next_block = (first_sector // block_bytes + 1) * block_bytes
    borders = [start, first_sector, *range(next_block, last_sector, block_bytes), last_sector, stop]
    for begin, end in pairwise(borders):
        if begin < end:
            yield Range(begin, end)


def _bytes_of(buffer: Buffer) -> Bytes:
    """The memory of a contiguous tensor or buffer, without a copy."""
    if isinstance(buffer, Tensor):
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise ValueError(
                f"Expected a contiguous tensor on the CPU, got one of shape {tuple(buffer.shape)} and stride "
                f"{buffer.stride()} on {buffer.device}. Fix: copy it to contiguous host memory first."
            )
        flat: Any = buffer.detach().view(-1).view(torch.uint8).numpy()
        return flat  # type: ignore[no-any-return]
    return np.frombuffer(buffer, np.uint8)


def _copy(source: Bytes, target: Bytes) -> None:
    """Copy without the GIL."""
    ctypes.memmove(target.ctypes.data, source.ctypes.data, source.size)


def _padded(content: bytes) -> bytes:
    return content.ljust(HEADER_BYTES, b"\0")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        code = error.errno or errno.EIO
        raise SwapError(
            code, f"No folder for a swap file: expected to make {folder}, got {os.strerror(code)}. Fix: set nvme_path."
        ) from error


def _require_space(folder: Path, num_bytes: int, reserve_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes + reserve_bytes > free:
        raise SwapError(
            errno.ENOSPC,
            f"No space for a swap file: expected {gib(num_bytes)} and {gib(reserve_bytes)} in reserve, got {gib(free)} "
            f"free in {folder}. Fix: {_FIXES[errno.ENOSPC]}",
        )


def _lock(descriptor: int) -> bool:
    """Lock a file for as long as its descriptor lives; False if another has it, or the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_leftovers(folder: Path) -> None:
    """Remove the swap files of processes of this host that are gone; see [Note: leftovers]."""
    for path in folder.glob(f"lorica-swap-{glob.escape(socket.gethostname())}-*.bin"):
        with contextlib.suppress(OSError):  # another rank was faster, or it is another user's
            descriptor = os.open(path, os.O_RDWR)
            try:
                if _lock(descriptor):
                    num_bytes = os.fstat(descriptor).st_size
                    path.unlink()
                    logger.warning("Removed %s (%s), which a process that is gone has left.", path, gib(num_bytes))
            finally:
                os.close(descriptor)


def _end(pool: ThreadPoolExecutor, descriptor: int, path: Path, identity: tuple[int, int], owner: int) -> None:
    """The end of a swap file; in a forked child only the descriptor is its own to close."""
    if os.getpid() == owner:
        pool.shutdown(wait=False)  # no block is on its way: it would hold the swap file
        with contextlib.suppress(OSError):  # it is gone already
            status = os.stat(path)
            if (status.st_dev, status.st_ino) == identity:
                path.unlink()
    os.close(descriptor)
