"""OneCycle: the learning rate up and down once while the momentum goes down and up, then an optional decay of both.

With j = k + 1 for iteration k, first and second the lengths of the two halves and T = first + second:
    k < T     x = j mod T; s = x / first up to x = first, then (T - x) / second; in n stairs: floor(s n) / n
              lr = min + (max - min) s            momentum = max - (max - min) s
    k >= T    d = (k - T + 1) / decay_step_size   lr = min / (1 + decay_lr_rate d)
                                                  momentum = max (1 + decay_mom_rate d)
Source: Smith 2018 (arXiv:1803.09820).
"""

from __future__ import annotations

import warnings
from typing import Any

from lorica.schedules.base import HasParamGroups, Schedule, require_count

BETA2 = 0.99  # what DeepSpeed's OneCycle writes into betas[1]


class OneCycle(Schedule):
    """One cycle of learning rate and momentum, then decay.

    Args:
        cycle_min_lr, cycle_max_lr: learning rates at the ends and in the middle of the cycle.
        decay_lr_rate, decay_mom_rate, decay_step_size: decay per `decay_step_size` updates after the cycle; 0: none.
        cycle_first_step_size, cycle_second_step_size: updates in each half; None: as the first.
        cycle_first_stair_count, cycle_second_stair_count: stairs in each half; 0: a slope, None: as the first.
        cycle_momentum: move betas[0] of every group that has betas against the learning rate (betas[1] becomes 0.99).
        cycle_min_mom, cycle_max_mom: momentum in the middle and at the ends of the cycle.
    Raises:
        ValueError: if a half has no steps.
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        cycle_min_lr: float,
        cycle_max_lr: float,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        self.first_step_size = require_count("OneCycle", "cycle_first_step_size", cycle_first_step_size)
        self.second_step_size = require_count("OneCycle", "cycle_second_step_size", second)
        self.total_size = self.first_step_size + self.second_step_size
        self.first_stair_count = cycle_first_stair_count
        self.second_stair_count = (
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        )
        self.min_lr, self.max_lr, self.decay_lr_rate = float(cycle_min_lr), float(cycle_max_lr), decay_lr_rate
        self.min_mom, self.max_mom, self.decay_mom_rate = cycle_min_mom, cycle_max_mom, decay_mom_rate
        self.decay_step_size = decay_step_size
        self.cycle_momentum = cycle_momentum and _has_betas(optimizer)
        super().__init__(optimizer, last_batch_iteration)

    def scale_at(self, iteration: int) -> float:
        """The share of the way from min to max within the cycle, in [0, 1]."""
        position = (iteration + 1) % self.total_size
        if position <= self.first_step_size:
            part, size, num_stairs = position, self.first_step_size, self.first_stair_count
        else:
            part, size, num_stairs = self.total_size - position, self.second_step_size, self.second_stair_count
        return part * num_stairs // size / num_stairs if num_stairs else part / size

    def lr_at(self, iteration: int) -> list[float]:
        """The same learning rate for every group."""
        if iteration < self.total_size:
            lr = self.min_lr + (self.max_lr - self.min_lr) * self.scale_at(iteration)
        else:
            lr = self.min_lr / (1 + self.decay_lr_rate * self._decay_interval(iteration))
        return [lr] * len(self.optimizer.param_groups)

    def momentum_at(self, iteration: int) -> float:
        """betas[0]; before start it is the minimum, where DeepSpeed starts as well."""
        if iteration < 0:
            return self.min_mom
        if iteration < self.total_size:
            return self.max_mom - (self.max_mom - self.min_mom) * self.scale_at(iteration)
        return self.max_mom * (1 + self.decay_mom_rate * self._decay_interval(iteration))

    def _decay_interval(self, iteration: int) -> float:
        return (iteration - self.total_size + 1) / self.decay_step_size if self.decay_step_size else 0.0

    def _publish(self) -> None:
        super()._publish()
        if self.cycle_momentum:
            betas = (self.momentum_at(self.last_batch_iteration), BETA2)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = betas


def _has_betas(optimizer: HasParamGroups) -> bool:
    groups: list[dict[str, Any]] = optimizer.param_groups
    found = any("betas" in group for group in groups)
    if not found:
        warnings.warn(
            "OneCycle: cycle_momentum has no effect, expected a param group with betas, got none. "
            "Fix: set cycle_momentum to false, or use an optimizer of the Adam family.",
            stacklevel=3,
        )
    return found
