"""Learning-rate schedules: the public names."""

from lorica.schedules.base import Schedule
from lorica.schedules.one_cycle import OneCycle
from lorica.schedules.range_test import LRRangeTest
from lorica.schedules.registry import VALID_LR_SCHEDULES, LRSchedule, schedule_from_config
from lorica.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "VALID_LR_SCHEDULES",
    "LRRangeTest",
    "LRSchedule",
    "OneCycle",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "schedule_from_config",
]
