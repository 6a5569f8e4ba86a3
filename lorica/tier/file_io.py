"""The system calls of the NVMe tier behind one seam, so that tests can let a disk fail. Owns no file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class FileIO(Protocol):
    """What a swap file asks of the system. Every call may raise OSError."""

    def preadv(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        """Fill `buffers` from `offset` on; the number of bytes that were read."""
        ...

    def pwritev(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        """Write `buffers` from `offset` on; the number of bytes that were written."""
        ...

    def fallocate(self, descriptor: int, num_bytes: int) -> None:
        """Give the file `num_bytes` bytes of disk that read as zeros."""
        ...

    def stat(self, path: Path) -> os.stat_result:
        """What is at `path` now."""
        ...


class SystemFileIO:
    """The operating system."""

    def preadv(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        """`preadv(2)`."""
        return os.preadv(descriptor, buffers, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        """`pwritev(2)`."""
        return os.pwritev(descriptor, buffers, offset)

    def fallocate(self, descriptor: int, num_bytes: int) -> None:
        """`posix_fallocate(3)`; where the system lacks it (macOS), the file gets its disk as it is written."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes)
        else:
            os.ftruncate(descriptor, num_bytes)

    def stat(self, path: Path) -> os.stat_result:
        """`stat(2)`."""
        return os.stat(path)
