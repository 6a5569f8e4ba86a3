"""The contract of a memory tier. Owns no memory itself."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Tier(Protocol):
    """A kind of memory that planes can live in, and how their bytes reach the compute device."""

    name: str
    device: torch.device

    def alloc(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zero-filled plane of `numel` elements that arithmetic on `self.device` can use in place."""
        ...

    def read(self, stored: Tensor) -> Tensor:
        """`stored` as a tensor on the compute device, ordered before later work on the current stream."""
        ...
