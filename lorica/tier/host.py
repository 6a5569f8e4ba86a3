"""Host memory, page-locked where the compute device is an accelerator. Optimizer arithmetic runs on the CPU here."""

from __future__ import annotations

import torch
from torch import Tensor


class HostTier:
    """The CPU tier of ZeRO-Offload.

    Source: Ren et al. 2021 (arXiv:2101.06840), sec. 4.
    """

    name = "host"

    def __init__(self, compute_device: torch.device, *, pin_memory: bool) -> None:
        self.device = torch.device("cpu")
        self._compute_device = compute_device
        self._pin = pin_memory and compute_device.type == "cuda"

    def alloc(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zero-filled plane in host memory."""
        return torch.zeros(numel, dtype=dtype, pin_memory=self._pin)

    def read(self, stored: Tensor) -> Tensor:
        """A copy on the compute device (the plane itself if that is the CPU)."""
        return stored.to(self._compute_device, non_blocking=self._pin)
