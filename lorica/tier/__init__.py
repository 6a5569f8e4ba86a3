"""Where planes live: device memory, host memory. One file per tier, one protocol."""

import torch

from lorica.tier.base import Tier
from lorica.tier.device import DeviceTier
from lorica.tier.host import HostTier

__all__ = ["DeviceTier", "HostTier", "Tier", "make_tiers"]


def make_tiers(device: torch.device, *, pin_memory: bool) -> dict[str, Tier]:
    """The tiers of one rank by name: "device" and "host"."""
    return {"device": DeviceTier(device), "host": HostTier(device, pin_memory=pin_memory)}
