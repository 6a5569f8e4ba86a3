"""The transport of a group of one rank, on any device: collectives are copies. It talks to nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.comm.base import Done, Handle, Traffic, require_flat, require_gather, require_scatter, require_source
from lorica.comm.reduction import sum_into


class Solo:
    """Collectives of a group that has one rank."""

    name = "solo"

    def __init__(self, device: torch.device) -> None:
        self.rank = 0
        self.world_size = 1
        self.traffic = Traffic()
        self._device = device

    def shared(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return zero-filled memory on the device."""
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def staging(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer on the device."""
        return torch.empty(numel, dtype=dtype, device=self._device)

    def all_gather(self, shard: Tensor, full: Tensor) -> Handle:
        """Copy `shard` to `full`, unless it is `full`."""
        require_gather(shard, full, 1)
        if shard.data_ptr() != full.data_ptr():
            full.copy_(shard)
        return Done()

    def reduce_scatter(self, full: Tensor, out: Tensor, *, accumulate: bool) -> Handle:
        """Copy or add `full` to `out`, rounding once."""
        require_scatter(full, out, 1)
        if accumulate and out.device.type != "cpu":
            out.add_(full)  # one kernel: adds in fp32 and rounds once, whatever the dtypes
        else:
            sum_into([full], out, accumulate=accumulate)
        return Done()

    def all_reduce(self, x: Tensor) -> Handle:
        """Leave `x` as it is."""
        require_flat("all_reduce", x=x)
        return Done()

    def broadcast(self, x: Tensor, src: int) -> Handle:
        """Leave `x` as it is."""
        require_flat("broadcast", x=x)
        require_source(src, 1)
        return Done()

    def fence(self) -> None:
        """Return at once: there are no peers."""

    def barrier(self) -> None:
        """Return at once: there are no peers."""

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
