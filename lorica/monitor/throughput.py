"""Samples per second, and the progress line of `steps_per_print`. Prints nothing and never waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Throughput:
    """Samples per second of wall time between two questions.

    The host may run a few steps ahead of the device, no more: over many steps its clock is as good as the device's. The
    first step, which allocates and compiles, only starts the clock.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start counting at the first step.

        Args:
            clock: returns seconds.
        """
        self._clock = clock
        self._since: float | None = None
        self._samples = 0

    def add(self, samples: int) -> None:
        """An optimizer step over `samples` samples (of all ranks) is done."""
        if self._since is None:
            self._since = self._clock()
        else:
            self._samples += samples

    def take(self) -> float | None:
        """Samples per second since the last call; None while there is nothing to divide."""
        if self._since is None or self._samples == 0:
            return None
        now = self._clock()
        rate = self._samples / max(now - self._since, 1e-9)
        self._since, self._samples = now, 0
        return rate


def progress_line(
    step: int,
    loss: float | None,
    lr: float | Sequence[float],
    loss_scale: float | None = None,
    samples_per_second: float | None = None,
    grad_norm: float | None = None,
) -> str:
    """What one printed step says; a value that is None is left out.

    Args:
        lr: one learning rate, or one per param group (equal ones are shown once).
    """
    rates = [lr] if isinstance(lr, (int, float)) else list(dict.fromkeys(lr))
    parts = [
        f"step {step}",
        None if loss is None else f"loss {loss:.4f}",
        "lr " + ", ".join(f"{rate:.3e}" for rate in rates),
        None if grad_norm is None else f"grad norm {grad_norm:.3f}",
        None if loss_scale is None else f"loss scale {loss_scale:g}",
        None if samples_per_second is None else f"{samples_per_second:.1f} samples/s",
    ]
    return " | ".join(part for part in parts if part is not None)
