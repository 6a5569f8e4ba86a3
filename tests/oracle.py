"""The oracle: what training means, in plain single-process PyTorch. It owns the reference numbers and knows no engine.

P ranks with A accumulation steps see P*A micro-batches per optimizer step; the oracle runs them one after the other,
adds their gradients in fp32 and takes the mean. Mixed precision is the textbook recipe: the model computes in bf16 or
fp16, autograd's gradients have that dtype, and an fp32 master of each weight (made from the model's own values, before
they are rounded) is what the optimizer updates; the model gets the master, rounded. fp16 multiplies the loss by a
scale. An unused parameter has a zero gradient: weight decay and moments go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

Batch = tuple[Tensor, ...]


@dataclass
class LossScale:
    """A static factor, or a dynamic one: it halves after `hysteresis` overflows and grows after good steps in a row.

    As in DeepSpeed the first good step after an overflow (or the start) does not count for `window`.
    """

    value: float = 1.0
    dynamic: bool = False
    window: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    step: int = 0
    last_overflow: int = -1

    def __post_init__(self) -> None:
        self.tolerance = self.hysteresis

    def update(self, finite: bool) -> None:
        """Count one optimizer step, applied or skipped."""
        if self.dynamic and not finite:
            self.last_overflow = self.step
            if self.tolerance > 1:
                self.tolerance -= 1
            else:
                self.value = max(self.value / 2, self.minimum)
        elif self.dynamic and (num_good := self.step - self.last_overflow - 1) > 0 and num_good % self.window == 0:
            self.tolerance = self.hysteresis
            self.value *= 2
        self.step += 1


@dataclass
class Run:
    """What training produced; `losses` and `norms` have one entry per optimizer step (nan where a step was skipped)."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)  # fp32 masters at the end


def train(
    model: nn.Module,
    steps: Sequence[Sequence[Batch]],
    *,
    optimizer: Callable[[dict[str, Tensor]], torch.optim.Optimizer],
    accumulation: int = 1,
    dtype: torch.dtype | None = None,
    scale: LossScale | None = None,
    clip: float = 0.0,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Run:
    """Train `model` and report every step.

    Args:
        model: returns a scalar loss for `model(*batch)`.
        steps: for each optimizer step its P * A micro-batches, rank-major within a micro-step.
        optimizer: makes the optimizer of the named fp32 masters.
        accumulation: A; the loss is divided by it before backward, as `engine.backward` does.
        dtype: of computation and gradients; None leaves the dtypes of the model.
        clip: largest L2 norm of the mean gradient, by torch's formula; 0 is no clipping.
        schedule: makes a learning-rate scheduler, stepped after every applied update.
    """
    masters = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
    weights = dict(model.to(dtype).named_parameters()) if dtype is not None else dict(model.named_parameters())
    inner, scale, run = optimizer(masters), scale or LossScale(), Run()
    scheduler = schedule(inner) if schedule is not None else None
    for micro_batches in steps:
        total = {n: torch.zeros_like(master) for n, master in masters.items()}
        losses = []
        for batch in micro_batches:
            loss = model(*batch)
            (loss / accumulation * scale.value).backward()
            losses.append(loss.item())
            for n in masters:
                if (grad := weights[n].grad) is not None:
                    total[n] += grad
                    weights[n].grad = None
        mean = 1 / (scale.value * (len(micro_batches) // accumulation))
        norm = mean * math.sqrt(sum(g.double().square().sum().item() for g in total.values()))
        run.losses.append(sum(losses) / len(losses))
        run.norms.append(norm if math.isfinite(norm) else math.nan)
        run.scales.append(scale.value)
        if math.isfinite(norm):
            coef = mean * (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0)
            for n, master in masters.items():
                master.grad = total[n] * coef
            inner.step()
            if scheduler is not None:
                scheduler.step()
            for n, master in masters.items():
                weights[n].data.copy_(master)
        scale.update(finite=math.isfinite(norm))
    run.parameters = masters
    return run
