"""How fast a folder's disk is, for the plan at start-up. Owns no memory and keeps no file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lorica.tier.arena import Arena
from lorica.tier.swap import SwapFile, Transfer


class Bandwidth(NamedTuple):
    """Bytes per second of a disk."""

    read: float
    write: float
    direct: bool
    """Whether past the page cache; if not, the figures may be those of memory."""


def measure(
    folder: str | Path,
    *,
    num_bytes: int = 256 << 20,
    seconds: float = 0.3,
    threads: int = 8,
    block_bytes: int = 8 << 20,
) -> Bandwidth:
    """Write a file and read it again, each for at most about `seconds`, one after the other.

    A burst of that length may be faster than what a disk sustains once its write cache is full.

    Raises:
        SwapError: if the file cannot be made, written or read.
    """
    file = SwapFile(folder, num_bytes, threads=threads, block_bytes=block_bytes, reserve_bytes=0)
    try:
        memory = Arena(block_bytes, threads=1).alloc(block_bytes, torch.uint8).fill_(0x5A)
        written, write_s = _run(file.write, memory, num_bytes, threads, seconds)
        read, read_s = _run(file.read, memory, written, threads, seconds)
        return Bandwidth(read / read_s, written / write_s, file.direct)
    finally:
        file.close()


def _run(
    start: Callable[[int, torch.Tensor], Transfer], memory: torch.Tensor, num_bytes: int, threads: int, seconds: float
) -> tuple[int, float]:
    """Move blocks in order, twice as many in flight as there are threads; (bytes moved, seconds it took)."""
    flying: deque[Transfer] = deque()
    begin = time.perf_counter()
    moved = 0
    while moved + memory.numel() <= num_bytes and time.perf_counter() - begin < seconds:
        flying.append(start(moved, memory))
        moved += memory.numel()
        if len(flying) > 2 * threads:
            flying.popleft().wait()
    for transfer in flying:
        transfer.wait()
    return moved, time.perf_counter() - begin
