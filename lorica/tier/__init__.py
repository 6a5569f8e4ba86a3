"""Where planes live: device memory, host memory, files on NVMe. One file per tier."""

import torch

from lorica.tier.arena import Arena, Commit, PageLock
from lorica.tier.bandwidth import Bandwidth, measure
from lorica.tier.base import ALIGNMENT, Tier, TierFull, padded_bytes
from lorica.tier.budget import device_available_bytes, disk_available_bytes, host_available_bytes
from lorica.tier.device import DeviceTier
from lorica.tier.host import HostTier
from lorica.tier.nvme import FilePlane, NvmeTier
from lorica.tier.swap import SwapError, SwapFile, Transfer

__all__ = [
    "ALIGNMENT",
    "Arena",
    "Bandwidth",
    "Commit",
    "DeviceTier",
    "FilePlane",
    "HostTier",
    "NvmeTier",
    "PageLock",
    "SwapError",
    "SwapFile",
    "Tier",
    "TierFull",
    "Transfer",
    "device_available_bytes",
    "disk_available_bytes",
    "host_available_bytes",
    "make_tiers",
    "measure",
    "padded_bytes",
]


def make_tiers(
    device: torch.device, *, pin_memory: bool, arena: Arena | None = None, page_lock: PageLock | None = None
) -> dict[str, Tier]:
    """The tiers of one rank whose planes are tensors, by name: "device" and "host" (see `HostTier`)."""
    host = HostTier(device, pin_memory=pin_memory, arena=arena, page_lock=page_lock)
    return {"device": DeviceTier(device), "host": host}
