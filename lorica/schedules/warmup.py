"""WarmupLR, WarmupDecayLR, WarmupCosineLR: rise to the full learning rate, then stay, fall linearly or by a cosine.

With k the iteration, W = max(2, warmup_num_steps) and T = total_num_steps:
    warm-up, k < W    log: ln(k + 1) / ln(W)      linear: k / W
    then              stay: 1      decay: max(0, (T - k) / max(1, T - W))
                      cosine: c + (1 - c) (1 + cos(pi min(1, (k - W + 1) / max(1, T - W)))) / 2,  c = cos_min_ratio
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from lorica.schedules.base import HasParamGroups, Schedule, per_group, require_count

WARMUP_TYPES = ("log", "linear")


def warmup_factor(iteration: int, num_steps: int, warmup_type: str) -> float:
    """How far the warm-up is, in [0, 1], at `iteration` < `num_steps`."""
    if warmup_type == "log":
        return math.log(iteration + 1) / math.log(num_steps)
    return iteration / num_steps


def decay_factor(iteration: int, num_warmup_steps: int, num_total_steps: int) -> float:
    """The linear fall from 1 at the end of the warm-up to 0 at `num_total_steps`."""
    return max(0.0, (num_total_steps - iteration) / max(1, num_total_steps - num_warmup_steps))


def cosine_factor(iteration: int, num_warmup_steps: int, num_total_steps: int, floor: float) -> float:
    """The fall from 1 along half a cosine to `floor`, where it stays."""
    progress = min(1.0, (iteration - num_warmup_steps + 1) / max(1, num_total_steps - num_warmup_steps))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


class WarmupLR(Schedule):
    """Rise from `warmup_min_lr` to `warmup_max_lr` within `warmup_num_steps` updates, then stay.

    Args:
        warmup_min_lr, warmup_max_lr: a number, or one per param group; a max of None is the first group's lr.
        warmup_num_steps: int > 0; 1 counts as 2.
        warmup_type: "log" or "linear".
    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        name = type(self).__name__
        top = optimizer.param_groups[0]["lr"] if warmup_max_lr is None else warmup_max_lr
        self.min_lrs = per_group(name, "warmup_min_lr", warmup_min_lr, optimizer)
        self.max_lrs = per_group(name, "warmup_max_lr", top, optimizer)
        self.warmup_num_steps = max(2, require_count(name, "warmup_num_steps", warmup_num_steps))
        self.warmup_type = _require_type(name, warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def factor_at(self, iteration: int) -> float:
        """The share of the way from min to max after update `iteration` >= 0."""
        if iteration < self.warmup_num_steps:
            return warmup_factor(iteration, self.warmup_num_steps, self.warmup_type)
        return self.factor_after_warmup(iteration)

    def factor_after_warmup(self, iteration: int) -> float:
        """The share after the warm-up: all of it."""
        return 1.0

    def lr_at(self, iteration: int) -> list[float]:
        """Before start: the minimum."""
        if iteration < 0:
            return list(self.min_lrs)
        factor = self.factor_at(iteration)
        return [low + (high - low) * factor for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then a linear fall to `warmup_min_lr` at `total_num_steps`.

    Args:
        total_num_steps: int > 0, updates of the whole training.
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = require_count("WarmupDecayLR", "total_num_steps", total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_if_no_decay("WarmupDecayLR", self.total_num_steps, self.warmup_num_steps)

    def factor_after_warmup(self, iteration: int) -> float:
        """The linear fall."""
        return decay_factor(iteration, self.warmup_num_steps, self.total_num_steps)


class WarmupCosineLR(Schedule):
    """Rise to the optimizer's own learning rate, then fall along a cosine to `cos_min_ratio` of it.

    Args:
        total_num_steps: int > 0, updates of the whole training.
        warmup_min_ratio, cos_min_ratio: shares of each group's lr where the warm-up starts and the cosine ends.
        warmup_num_steps: int > 0; 1 counts as 2.
        warmup_type: "log" or "linear".
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        name = "WarmupCosineLR"
        self.total_num_steps = require_count(name, "total_num_steps", total_num_steps)
        self.warmup_num_steps = max(2, require_count(name, "warmup_num_steps", warmup_num_steps))
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.warmup_type = _require_type(name, warmup_type)
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, last_batch_iteration)
        _warn_if_no_decay(name, self.total_num_steps, self.warmup_num_steps)

    def ratio_at(self, iteration: int) -> float:
        """The share of the optimizer's learning rate after update `iteration`; 0 before start."""
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            factor = warmup_factor(iteration, self.warmup_num_steps, self.warmup_type)
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * factor
        return cosine_factor(iteration, self.warmup_num_steps, self.total_num_steps, self.cos_min_ratio)

    def lr_at(self, iteration: int) -> list[float]:
        """Each group's own learning rate times the ratio."""
        ratio = self.ratio_at(iteration)
        return [lr * ratio for lr in self.org_lrs]


def _require_type(schedule: str, warmup_type: str) -> str:
    if warmup_type not in WARMUP_TYPES:
        raise ValueError(
            f"{schedule}: warmup_type must be one of {WARMUP_TYPES}, got {warmup_type!r}. Fix: set warmup_type."
        )
    return warmup_type


def _warn_if_no_decay(schedule: str, num_total_steps: int, num_warmup_steps: int) -> None:
    if num_total_steps < num_warmup_steps:
        warnings.warn(
            f"{schedule}: the warm-up ({num_warmup_steps} steps) is longer than the training (total_num_steps "
            f"{num_total_steps}), the full learning rate is never reached. Fix: lower warmup_num_steps.",
            stacklevel=3,
        )
