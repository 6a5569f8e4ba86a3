"""The contract of a memory tier. Owns no memory itself."""

from __future__ import annotations

import mmap
from typing import Any, Protocol

import torch

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""Bytes to whose multiples planes in host memory and in files begin: whole pages, and whole sectors of any disk."""


class TierFull(MemoryError):
    """A tier that was sized by the plan has less room left than a plane needs."""


def padded_bytes(num_bytes: int) -> int:
    """What a plane of `num_bytes` takes in an arena or in a swap file."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def gib(num_bytes: int) -> str:
    """`num_bytes` for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


class Tier(Protocol):
    """A kind of memory that planes can live in."""

    name: str
    device: torch.device

    def alloc(self, numel: int, dtype: torch.dtype) -> Any:
        """Zero-filled plane of `numel` elements: a tensor on `self.device`, or a `FilePlane`."""
        ...

    def close(self) -> None:
        """Give no more planes, and give back what is given back with the engine and not with the last plane."""
        ...
