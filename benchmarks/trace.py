"""What a trace of torch.profiler says about overlap: work by stream, host calls by thread, named phases. Draws nothing.

Read from the Chrome JSON that `profile.export_chrome_trace` writes. Times are microseconds on one clock for host and
device, as the profiler aligned them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
TRAVEL = "lorica_travel"  # events that benchmarks/gpu_timeline.py adds: bytes on their way between ranks


class Span(NamedTuple):
    """From `start` to `stop`."""

    start: float
    stop: float

    def __contains__(self, time: object) -> bool:
        """Whether a point in time lies in it."""
        return isinstance(time, (int, float)) and self.start <= time <= self.stop


class Work(NamedTuple):
    """A kernel, copy or fill on a stream, and when the host launched it (None: the trace does not say)."""

    category: str
    name: str
    stream: int
    span: Span
    launched: float | None


class Call(NamedTuple):
    """A call into CUDA, a named phase or a travel, on a thread of the host."""

    category: str
    name: str
    thread: str
    span: Span


class Trace:
    """One profiled stretch of one process."""

    def __init__(self, data: dict[str, Any]) -> None:
        """Take the parsed JSON of a Chrome trace."""
        events = [e for e in data["traceEvents"] if e.get("ph") == "X"]
        launched = {
            e["args"]["correlation"]: float(e["ts"])
            for e in events
            if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
        }
        self.work = [_work(e, launched) for e in events if e.get("cat") in DEVICE_WORK]
        self.calls = [
            Call(e["cat"], e["name"], str(e["tid"]), _span(e))
            for e in events
            if e.get("cat") in (*LAUNCHES, "user_annotation", TRAVEL)
        ]

    @classmethod
    def read(cls, path: Path) -> Trace:
        """The trace in a file."""
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def phase(self, name: str) -> Call:
        """The first phase that was named with `record_function(name)`.

        Raises:
            ValueError: if there is none.
        """
        for call in self.calls:
            if call.category == "user_annotation" and call.name == name:
                return call
        known = sorted({call.name for call in self.calls if call.category == "user_annotation"})
        raise ValueError(
            f"Trace: expected a phase {name!r}, got {known}. Fix: record it with benchmarks/gpu_timeline.py."
        )

    @property
    def travels(self) -> list[Call]:
        """When bytes were on their way between ranks, in order."""
        return sorted((c for c in self.calls if c.category == TRAVEL), key=lambda call: call.span.start)

    @property
    def compute_stream(self) -> int:
        """The stream with the most kernel time."""
        busy: dict[int, float] = defaultdict(float)
        for work in self.work:
            if work.category == "kernel":
                busy[work.stream] += work.span.stop - work.span.start
        return max(busy, key=lambda stream: busy[stream])

    def kernels(self) -> list[Work]:
        """The kernels of the compute stream."""
        return [w for w in self.work if w.category == "kernel" and w.stream == self.compute_stream]

    def side_work(self) -> list[Work]:
        """Everything on streams that copy between host and device, besides the compute stream."""
        copying = {w.stream for w in self.work if "HtoD" in w.name or "DtoH" in w.name} - {self.compute_stream}
        return [w for w in self.work if w.stream in copying]

    def launched_in(self, work: Iterable[Work], *phases: str) -> list[Work]:
        """Those that the host launched during one of the phases."""
        spans = [self.phase(name).span for name in phases]
        return [w for w in work if w.launched is not None and any(w.launched in span for span in spans)]

    def calls_in(self, phase: str, *names: str) -> list[Call]:
        """Calls into CUDA of these names, on any thread, that began during a phase."""
        span = self.phase(phase).span
        return [c for c in self.calls if c.category in LAUNCHES and c.name in names and c.span.start in span]

    def hidden_share(self) -> float:
        """The part under kernels of the side streams' busy time, from forward's first kernel to backward's last."""
        kernels = union(w.span for w in self.launched_in(self.kernels(), "forward", "backward"))
        window = Span(kernels[0].start, kernels[-1].stop)
        side = [
            Span(max(s.start, window.start), min(s.stop, window.stop)) for s in union(w.span for w in self.side_work())
        ]
        busy = [span for span in side if span.stop > span.start]
        return common_us(busy, kernels) / total_us(busy)


def _span(event: dict[str, Any]) -> Span:
    start = float(event["ts"])
    return Span(start, start + float(event.get("dur", 0)))


def _work(event: dict[str, Any], launched: dict[int, float]) -> Work:
    details = event.get("args", {})
    return Work(
        event["cat"], event["name"], int(details["stream"]), _span(event), launched.get(details.get("correlation", -1))
    )


def union(spans: Iterable[Span], gap: float = 0.0) -> list[Span]:
    """Spans in order, joined where they overlap or lie at most `gap` apart."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start <= joined[-1].stop + gap:
            joined[-1] = Span(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


def total_us(spans: Sequence[Span]) -> float:
    """The length of disjoint spans."""
    return sum(span.stop - span.start for span in spans)


def common_us(first: Sequence[Span], second: Sequence[Span]) -> float:
    """How long two lists of disjoint, ordered spans overlap."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        low, high = max(first[i].start, second[j].start), min(first[i].stop, second[j].stop)
        total += max(0.0, high - low)
        if first[i].stop < second[j].stop:
            i += 1
        else:
            j += 1
    return total
