"""What is recorded: the event, its tags, the contract of a writer. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

TRAIN_LOSS = "Train/Samples/train_loss"
LEARNING_RATE = "Train/Samples/lr"
LOSS_SCALE = "Train/Samples/loss_scale"
ELAPSED_TIME_MS = "Train/Samples/elapsed_time_ms_"  # followed by the phase

# Phases whose tag in DeepSpeed's logs, and so on existing dashboards, is not their own name.
PHASE_TAG = {"reduce": "backward_allreduce"}


class Event(NamedTuple):
    """One value of one metric. The engine counts `step` in samples over all ranks since the start of training."""

    tag: str
    value: float
    step: int


class Writer(Protocol):
    """A place that events go to."""

    def write(self, events: Sequence[Event]) -> None:
        """Record `events`; they can be read by others when this returns, as far as the place allows."""
        ...

    def close(self) -> None:
        """Finish; nothing is written afterwards."""
        ...


def training_events(
    samples: int,
    *,
    loss: float | None,
    lr: float,
    loss_scale: float | None = None,
    phase_ms: Mapping[str, float] | None = None,
) -> list[Event]:
    """The events of one optimizer step.

    Args:
        samples: samples over all ranks so far; the step of every event.
        loss: mean over the micro-batches; None: not known, no event.
        loss_scale: None where there is none (fp32, bf16).
        phase_ms: mean duration by phase of `Timers`, in milliseconds.
    """
    values = {TRAIN_LOSS: loss, LEARNING_RATE: lr, LOSS_SCALE: loss_scale}
    for phase, ms in (phase_ms or {}).items():
        values[ELAPSED_TIME_MS + PHASE_TAG.get(phase, phase)] = ms
    return [Event(tag, value, samples) for tag, value in values.items() if value is not None]
