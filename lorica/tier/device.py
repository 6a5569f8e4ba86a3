"""Memory of the compute device itself."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceTier:
    """The tier in which a plane is where the arithmetic is."""

    name = "device"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def alloc(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zero-filled plane on the device."""
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def close(self) -> None:
        """Memory is freed with its planes."""
