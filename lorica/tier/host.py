"""Host memory, page-locked where the compute device is an accelerator. Optimizer arithmetic runs on the CPU here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.tier.arena import Arena, Commit, PageLock
from lorica.tier.base import padded_bytes


class HostTier:
    """The CPU tier of ZeRO-Offload.

    Args:
        compute_device: where planes are brought from here.
        pin_memory: page-lock planes, if the compute device is an accelerator.
        arena: where planes are cut from; without one, each plane is memory of its own.
        page_lock: locks planes that come from no arena. Without it PyTorch's page-locked allocator makes them, which
            rounds each up to a power of two.
    Source: Ren et al. 2021 (arXiv:2101.06840), sec. 4.
    """

    name = "host"

    def __init__(
        self,
        compute_device: torch.device,
        *,
        pin_memory: bool,
        arena: Arena | None = None,
        page_lock: PageLock | None = None,
    ) -> None:
        self.device = torch.device("cpu")
        self._pin = pin_memory and compute_device.type == "cuda"
        self._arena = arena
        self._page_lock = page_lock
        self._prepared: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def prepare(self, planes: Sequence[tuple[int, torch.dtype]]) -> Commit:
        """Cut planes of these (elements, dtypes) from the arena, which `alloc` gives out later, and commit them all.

        Raises:
            TierFull: if the arena has no room for them.
            RuntimeError: without an arena.
        """
        if self._arena is None:
            raise RuntimeError("HostTier.prepare: expected an arena, got none. Fix: pass arena=Arena(num_bytes).")
        for numel, dtype in planes:
            self._prepared.setdefault((numel, dtype), []).append(self._arena.alloc(numel, dtype))
        return self._arena.commit()

    def alloc(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zero-filled plane in host memory.

        A plane for which the arena has no room is memory of its own.
        """
        if prepared := self._prepared.get((numel, dtype)):
            return prepared.pop()
        if self._arena is not None and padded_bytes(numel * dtype.itemsize) <= self._arena.free_bytes:
            return self._arena.alloc(numel, dtype)
        if self._pin and self._page_lock is not None:
            own = Arena(padded_bytes(numel * dtype.itemsize), page_lock=self._page_lock)
            plane = own.alloc(numel, dtype)
            own.commit()
            return plane
        return torch.zeros(numel, dtype=dtype, pin_memory=self._pin)

    def close(self) -> None:
        """Close the arena, if there is one; its memory is freed with the last plane."""
        self._prepared.clear()
        if self._arena is not None:
            self._arena.close()
            self._arena = None
