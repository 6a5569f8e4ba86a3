"""Where planes live: device memory, host memory. One file per tier, one protocol."""

from lorica.tier.base import Tier
from lorica.tier.device import DeviceTier
from lorica.tier.host import HostTier

__all__ = ["DeviceTier", "HostTier", "Tier", "make_tiers"]


def make_tiers(device: object, *, pin_memory: bool) -> dict[str, Tier]:
    """The tiers of one rank by name: "device" and "host"."""
    import torch

    place = torch.device(str(device))
    return {"device": DeviceTier(place), "host": HostTier(place, pin_memory=pin_memory)}
