"""The reading of profiler traces and the timeline picture, on a trace that was written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.trace import Span, Trace, common_us, union

ROOT = Path(__file__).parents[2]
COMPUTE, OUT, BACK = 7, 20, 24


class Writer:
    """Writes the events of a trace: host calls with the device work that they launch."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]

    def host(self, category: str, name: str, start: float, stop: float, thread: str = "main", **args: Any) -> None:
        """Something on a thread of the host."""
        event = {"ph": "X", "cat": category, "name": name, "tid": thread, "ts": start, "dur": stop - start}
        self.events.append(event | {"args": args})

    def device(self, category: str, name: str, stream: int, launched: float, start: float, stop: float) -> None:
        """Work on a stream, launched by a thread that its stream tells."""
        correlation = len(self.events)
        thread = "main" if stream == COMPUTE else "worker"
        self.host("cuda_runtime", "cudaLaunchKernel", launched, launched + 1, thread, correlation=correlation)
        self.host(category, name, start, stop, f"stream {stream}", stream=stream, correlation=correlation)


def hand_written() -> dict[str, Any]:
    """A gather half under the forward's kernel, a reduction all under the backward's, an optimizer kernel."""
    write = Writer()
    for name, start, stop in (("whole step", 0, 340), ("forward", 0, 100), ("backward", 100, 300), ("step", 300, 340)):
        write.host("user_annotation", name, start, stop)
    write.device("kernel", "gemm", COMPUTE, 5, 6, 36)
    write.device("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", OUT, 10, 12, 22)
    write.host("cuda_runtime", "cudaEventSynchronize", 11, 22, "worker")
    write.host("lorica_travel", "gather", 23, 29, "travel")
    write.device("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", BACK, 30, 31, 51)
    write.device("kernel", "gemm backward", COMPUTE, 110, 120, 270)
    write.device("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", OUT, 150, 152, 182)
    write.host("lorica_travel", "reduce", 190, 200, "travel")
    write.device("kernel", "add", BACK, 205, 210, 215)
    write.device("kernel", "adam", COMPUTE, 310, 311, 321)
    write.host("cuda_runtime", "cudaDeviceSynchronize", 341, 450, "main")
    return {"traceEvents": write.events, "baseTimeNanoseconds": 0}


def test_spans_are_joined_and_intersected() -> None:
    spans = union([Span(5, 7), Span(0, 2), Span(1, 3)])
    assert spans == [Span(0, 3), Span(5, 7)]
    assert union(spans, gap=2) == [Span(0, 7)]
    assert common_us(spans, [Span(2, 6)]) == 2
    assert common_us(spans, []) == 0


def test_work_is_told_apart_by_stream_and_by_the_phase_that_launched_it() -> None:
    trace = Trace(hand_written())
    assert trace.compute_stream == COMPUTE
    assert {w.stream for w in trace.side_work()} == {OUT, BACK}
    assert [w.name for w in trace.launched_in(trace.kernels(), "backward", "step")] == ["gemm backward", "adam"]
    with pytest.raises(ValueError, match="Fix: "):
        trace.phase("forwards")


def test_the_hidden_share_counts_copies_in_forward_and_backward() -> None:
    """Busy: 10 + 20 + 30 + 5 us; without a kernel beside it: the copy back between 36 and 51."""
    assert Trace(hand_written()).hidden_share() == pytest.approx(50 / 65)


def test_waits_are_found_by_phase_and_thread() -> None:
    trace = Trace(hand_written())
    assert trace.calls_in("whole step", "cudaDeviceSynchronize") == []
    assert [c.thread for c in trace.calls_in("whole step", "cudaEventSynchronize")] == ["worker"]


def test_a_saved_trace_is_drawn(tmp_path: Path) -> None:
    saved, out = tmp_path / "trace.json", tmp_path / "timeline.svg"
    saved.write_text(json.dumps(hand_written()), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_timeline.py"), "--trace", str(saved), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    picture = ElementTree.parse(out).getroot()
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    for text in ("host", "compute", "to the host", "between ranks", "to the device", "forward", "gather parameters"):
        assert text in texts
    assert any(text and text.startswith("77 %") for text in texts)
    fills = [element.get("fill") for element in picture.iter() if element.tag.endswith("rect")]
    gather, reduce = "#5b9bd5", "#f0a04b"  # PARAM and GRAD of docs/pictures/draw.py
    assert fills.count(gather) == fills.count(reduce) == 4, "out, between, back, and the legend"
