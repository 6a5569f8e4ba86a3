"""How long the phases of a step take. Makes no CUDA event (it is given a factory) and prints nothing.

[Note: times without synchronisation] On an accelerator a phase is bracketed by two events on the current stream: its
time is that of the device's work, not of the calls that queued it. Events are read when the times are asked for, at
the printed step; only that read waits for the device. So that a run that never asks does not collect events for ever,
pairs that the device has passed already are folded into the sums (without waiting) once many have piled up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple, Protocol

MAX_PENDING = 256

_NOTHING: AbstractContextManager[None] = nullcontext()


class TimingEvent(Protocol):
    """The part of `torch.cuda.Event(enable_timing=True)` that timers use."""

    def record(self) -> None:
        """Mark the present end of the current stream."""
        ...

    def query(self) -> bool:
        """Whether the device has passed the mark."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this mark to `end`; both must be passed."""
        ...


class Clock(Protocol):
    """Marks in time and the distance between two of them."""

    def mark(self) -> Any:
        """A mark at the present."""
        ...

    def is_past(self, mark: Any) -> bool:
        """Whether `ms` up to this mark would not wait."""
        ...

    def ms(self, start: Any, stop: Any) -> float:
        """Milliseconds between two marks, which are used up."""
        ...


class HostClock:
    """The clock of the host: the CPU does its work before a call returns."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def is_past(self, mark: float) -> bool:
        """Always."""
        return True

    def ms(self, start: float, stop: float) -> float:
        """Milliseconds between two marks."""
        return (stop - start) * 1e3


class DeviceClock:
    """The clock of a device's current stream. Events are used again once they were read."""

    def __init__(self, make_event: Callable[[], TimingEvent]) -> None:
        self._make_event = make_event
        self._free: list[TimingEvent] = []

    def mark(self) -> TimingEvent:
        """An event behind what the current stream has been given so far."""
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        return event

    def is_past(self, mark: TimingEvent) -> bool:
        """Whether the device got there."""
        return mark.query()

    def ms(self, start: TimingEvent, stop: TimingEvent) -> float:
        """Milliseconds between two events; waits for the later one."""
        stop.synchronize()
        elapsed = start.elapsed_time(stop)
        self._free += (start, stop)
        return elapsed


class PhaseTime(NamedTuple):
    """How often a phase ran and how long it took on average."""

    mean_ms: float
    num_calls: int


class Timers:
    """Times phases: `with timers("forward"): ...`, then `lines()` every few steps."""

    def __init__(self, enabled: bool, make_event: Callable[[], TimingEvent] | None = None) -> None:
        """Choose the clock.

        Args:
            enabled: False makes every call return one shared empty context.
            make_event: makes an event with timing on the compute device (`CudaStreams.timer`); None: the compute device
                is the CPU, whose clock is the host's.
        """
        self.enabled = enabled
        self._clock: Clock = HostClock() if make_event is None else DeviceClock(make_event)
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._sums: dict[str, PhaseTime] = {}  # here `mean_ms` is the sum

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        """A context whose body counts as one call of `phase`; contexts may nest. A body that raises does not count."""
        return _Interval(self, phase) if self.enabled else _NOTHING

    def take(self) -> dict[str, PhaseTime]:
        """The times since the last call, by phase in order of first use. Waits for the device."""
        while self._pending:
            self._fold()
        sums, self._sums = self._sums, {}
        return {phase: PhaseTime(total / count, count) for phase, (total, count) in sums.items()}

    def lines(self) -> list[str]:
        """`take`, as lines to print: mean milliseconds per call of each phase, and the calls."""
        return breakdown_lines(self.take())

    def _add(self, phase: str, start: Any, stop: Any) -> None:
        self._pending.append((phase, start, stop))
        if len(self._pending) > MAX_PENDING:
            while self._pending and self._clock.is_past(self._pending[0][2]):
                self._fold()

    def _fold(self) -> None:
        phase, start, stop = self._pending.popleft()
        total, count = self._sums.get(phase, (0.0, 0))
        self._sums[phase] = PhaseTime(total + self._clock.ms(start, stop), count + 1)


class _Interval:
    """One call of a phase."""

    __slots__ = ("_phase", "_start", "_timers")

    def __init__(self, timers: Timers, phase: str) -> None:
        self._timers, self._phase = timers, phase

    def __enter__(self) -> None:
        self._start = self._timers._clock.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._timers._add(self._phase, self._start, self._timers._clock.mark())


def breakdown_lines(phases: dict[str, PhaseTime]) -> list[str]:
    """`phases` as lines to print; none if nothing was timed."""
    parts = [f"{phase} {time.mean_ms:.2f} ms x {time.num_calls}" for phase, time in phases.items()]
    return ["time per call | " + " | ".join(parts)] if parts else []
