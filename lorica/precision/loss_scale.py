"""The factor on the loss that keeps small fp16 gradients from vanishing: static, or found while training.

Owns the number and when it changes; the engine multiplies the loss, detects overflow and skips the step.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, Protocol

AtMinimum = Literal["raise", "warn"]

FACTOR = 2.0


class LossScale(Protocol):
    """A loss scale as the engine uses it."""

    @property
    def scale(self) -> float: ...
    @property
    def dynamic(self) -> bool: ...
    def update(self, overflow: bool) -> None:
        """Take note of one optimizer step; `overflow`: its gradient held inf or nan and it was skipped."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StaticScale:
    """A fixed loss scale; 1 where nothing needs scaling (fp32, bf16)."""

    dynamic = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _positive("loss_scale", scale)

    def update(self, overflow: bool) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """The scale, for the record."""
        return {"cur_scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the configured scale: a static scale is a setting, no state."""


class DynamicScale:
    """Halve the scale after overflows, double it after `window` good steps in a row.

    Args:
        initial_scale: where to start.
        window: the scale doubles at every `window`-th good step behind the first one after an overflow (or the start).
        hysteresis: the scale is halved at the `hysteresis`-th overflow; 1: at every one. The allowance is used up by
            overflows, and restored when the scale doubles.
        consecutive_hysteresis: restore the allowance at every good step instead.
        min_scale: the scale never falls below it.
        at_minimum: what an overflow at `min_scale` does: "raise" FloatingPointError, or "warn" once and go on.
    Raises:
        ValueError: for an argument out of range.
    """

    dynamic = True

    def __init__(
        self,
        initial_scale: float = 2.0**16,
        window: int = 1000,
        hysteresis: int = 2,
        *,
        consecutive_hysteresis: bool = False,
        min_scale: float = 1.0,
        at_minimum: AtMinimum = "raise",
    ) -> None:
        self.scale = _positive("initial scale", initial_scale)
        self.window = int(_positive("loss_scale_window", window))
        self.hysteresis = int(_positive("hysteresis", hysteresis))
        self.consecutive_hysteresis = consecutive_hysteresis
        self.min_scale = _positive("min_loss_scale", min_scale)
        self.at_minimum = at_minimum
        self._num_steps = 0
        self._last_overflow = -1
        self._overflows_left = self.hysteresis
        self._warned = False

    def update(self, overflow: bool) -> None:
        """Take note of one optimizer step, skipped ones included."""
        if overflow:
            self._note_overflow()
        else:
            self._note_good_step()
        self._num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, under DeepSpeed's names."""
        return {
            "cur_scale": self.scale,
            "cur_iter": self._num_steps,
            "last_overflow_iter": self._last_overflow,
            "cur_hysteresis": self._overflows_left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.scale = float(state["cur_scale"])
        self._num_steps = int(state["cur_iter"])
        self._last_overflow = int(state["last_overflow_iter"])
        self._overflows_left = int(state["cur_hysteresis"])

    def _note_overflow(self) -> None:
        self._last_overflow = self._num_steps
        if self._overflows_left > 1:
            self._overflows_left -= 1
            return
        if self.scale <= self.min_scale:
            self._report_minimum()
        self.scale = max(self.scale / FACTOR, self.min_scale)

    def _note_good_step(self) -> None:
        num_good = self._num_steps - self._last_overflow - 1
        grows = num_good > 0 and num_good % self.window == 0
        if grows:
            self.scale *= FACTOR
        if grows or self.consecutive_hysteresis:
            self._overflows_left = self.hysteresis

    def _report_minimum(self) -> None:
        message = (
            f"loss scale: expected a finite gradient at fp16.min_loss_scale, got inf or nan at {self.scale:g} "
            f"(optimizer step {self._num_steps}). Fix: use bf16, lower the learning rate, look for the loss that is not"
            ' finite, lower fp16.min_loss_scale, or set lorica.on_min_loss_scale to "warn".'
        )
        if self.at_minimum == "raise":
            raise FloatingPointError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=4)


def make_loss_scale(config: Any) -> LossScale:
    """The loss scale that the block fp16 describes; 1 if it is not enabled.

    Args:
        config: a `lorica.config.Config`, or anything with its `fp16` and `lorica` blocks.
    """
    fp16 = config.fp16
    if not fp16.enabled:
        return StaticScale()
    if fp16.loss_scale:
        return StaticScale(fp16.loss_scale)
    return DynamicScale(
        2.0**fp16.initial_scale_power,
        fp16.loss_scale_window,
        fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        min_scale=fp16.min_loss_scale,
        at_minimum=config.lorica.on_min_loss_scale,
    )


def _positive(key: str, value: float) -> float:
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"fp16: {key} must be a finite number > 0, got {value!r}. Fix: set it, or leave it out.")
    return float(value)
