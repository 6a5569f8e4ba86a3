"""LRRangeTest: raise the learning rate step by step, to see where training diverges.

After update k: lr = min (1 + step_rate r), r = (k + 1) / step_size, rounded down in staircase form.
Source: Smith 2018 (arXiv:1803.09820), sec. 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorica.schedules.base import HasParamGroups, Schedule, per_group, require_count


class LRRangeTest(Schedule):
    """Learning-rate range test.

    Args:
        lr_range_test_min_lr: where it starts, a number or one per param group.
        lr_range_test_step_size: int > 0, updates per rise of `lr_range_test_step_rate` times the minimum.
        lr_range_test_staircase: rise in stairs instead of a slope.
    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lr = per_group("LRRangeTest", "lr_range_test_min_lr", lr_range_test_min_lr, optimizer)
        self.step_size = require_count("LRRangeTest", "lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def lr_at(self, iteration: int) -> list[float]:
        """Before start: the minimum."""
        rises = (iteration + 1) / self.step_size
        factor = 1 + self.step_rate * (math.floor(rises) if self.staircase else rises)
        return [lr * factor for lr in self.min_lr]
