"""How many steps fit into the minutes, and the learning rate over them; not how a step is run.

A first guess is made after `WARMUP_STEPS`, and mended at every validation. Process 0 decides, the others are told: all
processes stop after the same step, which costs one small broadcast per plan and nothing per step.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

WARMUP_STEPS = 20
UNSTEADY_STEPS = 3  # the first steps allocate, compile and warm up: they say little about the others
DECAY_SHARE = 0.5  # of all steps: the learning rate falls over the last half, to FINAL_FACTOR
FINAL_FACTOR = 0.05


class Budget:
    """The number of steps of a run: given, or found out on the way from a number of minutes."""

    def __init__(self, *, steps: int | None, minutes: float) -> None:
        self.total_steps = steps
        self._is_given = steps is not None
        self._deadline = time.monotonic() + 60 * minutes
        self._steady_since: float | None = None

    def watch(self, step: int) -> None:
        """Note that `step` steps are done (for the clock of process 0)."""
        if step == UNSTEADY_STEPS:
            self._steady_since = time.monotonic()

    def plan(self, step: int, device: torch.device) -> None:
        """Agree on the number of steps. A collective; `step` (> UNSTEADY_STEPS) are done.

        Args:
            device: where the process group's tensors live.
        """
        if self._is_given:
            return
        if self._steady_since is None:
            raise RuntimeError(
                f"Nothing is measured yet: expected a plan after step {UNSTEADY_STEPS}, got one at {step}."
            )
        now = time.monotonic()
        seconds_per_step = (now - self._steady_since) / (step - UNSTEADY_STEPS)  # validation included: it comes again
        left = max(0, int((self._deadline - now) / seconds_per_step))
        agreed = torch.tensor([step + left], device=device)
        dist.broadcast(agreed, src=0)
        self.total_steps = int(agreed.item())

    def is_over(self, step: int) -> bool:
        """Whether `step` steps are all there will be. The same answer on every process."""
        return self.total_steps is not None and step >= self.total_steps

    def steps_between(self, times: int) -> int:
        """How far apart to do something that is done `times` times in a run. Known once there is a plan."""
        if self.total_steps is None:
            raise RuntimeError("The number of steps is not known yet: expected a plan before. Fix: call plan() first.")
        return max(1, self.total_steps // times)

    def factor(self, step: int) -> float:
        """The learning rate of step `step` (from 0), as a share of its peak: up, level, and down over the last half."""
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        if self.total_steps is None:
            return warmup
        left = max(0.0, (self.total_steps - step) / (DECAY_SHARE * self.total_steps))
        return warmup * max(FINAL_FACTOR, min(1.0, left))


def width_factor(width: int, *, reference: int = 128) -> float:
    """What to multiply a learning rate with that was found at width `reference`: wider models want a smaller one.

    Source: Yang et al. 2022 (arXiv:2203.03466), table 3: in proportion to 1 / width for the matrices under Adam.
    """
    return reference / width
