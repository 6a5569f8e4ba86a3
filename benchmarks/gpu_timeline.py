"""A picture of one training step of two ranks on one GPU: what is computed while parameters and gradients travel.

    python -m lorica --share_gpu --num_gpus=2 benchmarks/gpu_timeline.py [--stage 3] [--save file.json] [--out file.svg]
    python benchmarks/gpu_timeline.py --trace file.json [--out file.svg]

The first form trains and traces (rank 0 draws), the second draws a saved trace. The ranks exchange everything through
host memory, because NCCL refuses to serve two ranks on one GPU. The model computes in fp32 without TF32, so that a
block's computation takes as long as this slow way needs: what is shown is the order of things, not a speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "pictures"), str(ROOT / "examples" / "gpt")]

from draw import FAINT, GRAD, MUTED, PARAM, STATES, WORK, Picture, Tint  # noqa: E402

from benchmarks.trace import TRAVEL, Call, Span, Trace, Work, union  # noqa: E402
from lorica.comm import Done  # noqa: E402

PHASES = ("forward", "backward", "step")
WHOLE = "whole step"
WARMUP, SEQ_LEN = 3, 1024
ABOUT = "lorica"  # key of a saved trace: what was traced, in words


# Recording ------------------------------------------------------------------------------------------------------------


class Travelling:
    """The transport between the ranks' host buffers; notes when bytes are under way. Everything else is passed on."""

    def __init__(self, inner: Any, events: list[tuple[str, int, int]]) -> None:
        self._inner, self._events = inner, events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def all_gather(self, *arguments: Any) -> Any:
        """As the inner transport does it, with the time it takes."""
        return self._timed("gather", self._inner.all_gather, arguments, {})

    def reduce_scatter(self, *arguments: Any, accumulate: bool) -> Any:
        """As the inner transport does it, with the time it takes."""
        return self._timed("reduce", self._inner.reduce_scatter, arguments, {"accumulate": accumulate})

    def _timed(self, name: str, call: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        start = time.time_ns()
        handle = call(*arguments, **options)
        handle.wait()  # the worker of the host-staged transport would wait next
        self._events.append((name, start, time.time_ns()))
        return Done()


def record(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Train, and return the trace of one step of rank 0 as parsed JSON; None on other ranks."""
    import torch

    import lorica

    lorica.init_distributed()
    if not torch.cuda.is_available() or torch.distributed.get_world_size() < 2:
        raise SystemExit(
            "gpu_timeline: expected two ranks that share a GPU. "
            "Fix: python -m lorica --share_gpu --num_gpus=2 benchmarks/gpu_timeline.py"
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    engine, batches = start(arguments)
    rank = engine.global_rank
    travels: list[tuple[str, int, int]] = []
    transport = engine._parts.site.shard
    if transport.name.startswith("host-staged"):
        transport._inner = Travelling(transport._inner, travels)
    for batch in batches[:WARMUP]:
        take_step(engine, batch)
    torch.cuda.synchronize()
    travels.clear()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        take_step(engine, batches[WARMUP])
        with torch.profiler.record_function("synchronize"):
            torch.cuda.synchronize()
    engine.destroy()
    if rank:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    add_travels(data, travels)
    data[ABOUT] = (
        f"ZeRO stage {arguments.stage}, {arguments.layers} blocks of width {arguments.width}, {arguments.micro_batch} "
        f"x {SEQ_LEN} tokens per rank, fp32, prefetching one unit ahead; {torch.cuda.get_device_name()}"
    )
    return data


def start(arguments: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The engine, and the batches of all steps on the device."""
    import torch
    from model import GPT, GPTConfig

    import lorica

    shape = GPTConfig(
        num_layers=arguments.layers, num_heads=8, width=arguments.width, seq_len=SEQ_LEN, vocab_size=512, tied=False
    )
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {
            "stage": arguments.stage,
            "overlap_comm": True,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 1,  # one unit ahead
        },
    }
    engine, *_ = lorica.initialize(model=GPT(shape), config=config)
    generator = torch.Generator().manual_seed(engine.global_rank)
    sizes = (arguments.micro_batch, shape.seq_len + 1)
    tokens = [torch.randint(shape.vocab_size, sizes, generator=generator).cuda() for _ in range(WARMUP + 1)]
    return engine, [(t[:, :-1], t[:, 1:]) for t in tokens]


def take_step(engine: Any, batch: Any) -> None:
    """One optimizer step with named phases; nothing here waits for the device."""
    from torch.profiler import record_function

    with record_function(WHOLE):
        with record_function("forward"):
            loss = engine(*batch)
        with record_function("backward"):
            engine.backward(loss)
        with record_function("step"):
            engine.step()


def add_travels(data: dict[str, Any], travels: list[tuple[str, int, int]]) -> None:
    """Put what `Travelling` noted into a Chrome trace, on its clock."""
    base_ns = int(data.get("baseTimeNanoseconds", 0))
    for name, start_ns, stop_ns in travels:
        where = {"ph": "X", "cat": TRAVEL, "name": name, "pid": "travel", "tid": "travel"}
        data["traceEvents"].append(where | {"ts": (start_ns - base_ns) / 1e3, "dur": (stop_ns - start_ns) / 1e3})


# Drawing --------------------------------------------------------------------------------------------------------------

LEFT, WIDTH, TOP, ROW, BAR = 150, 1000, 80, 46, 30
TINTS = {"forward": WORK, "backward": Tint("#c3b4e8", WORK.edge, WORK.light), "step": STATES}
COPIES = {"gather": PARAM, "reduce": GRAD}


class Bar(NamedTuple):
    """Busy time in one row, of one colour."""

    row: str
    span: Span
    tint: Tint
    label: str = ""


def draw(trace: Trace, about: str) -> Picture:
    """The step as rows of bars over one axis of time."""
    bars = [*host_bars(trace), *kernel_bars(trace), *copy_bars(trace)]
    rows = ["host", "compute", "to the host", "between ranks", "to the device"]
    first, last = min(bar.span.start for bar in bars), max(bar.span.stop for bar in bars)
    scale = WIDTH / (last - first)
    height = TOP + len(rows) * ROW + 96
    picture = Picture(LEFT + WIDTH + 30, height, "One step of two ranks on one GPU, as the profiler saw it")
    picture.text(24, 26, about, size=13, color=MUTED)
    axis(picture, (last - first) / 1e3, TOP + len(rows) * ROW)
    for number, row in enumerate(rows):
        y = TOP + number * ROW
        picture.text(24, y + 20, row, bold=True)
        picture.line(24, y + ROW - 8, LEFT + WIDTH, y + ROW - 8)
        for bar in merged([bar for bar in bars if bar.row == row], gap=1 / scale):
            x, width = LEFT + (bar.span.start - first) * scale, (bar.span.stop - bar.span.start) * scale
            picture.rect(round(x, 1), y, round(max(width, 0.4), 1), BAR, bar.tint.fill, round=0)
            if width > 60 and bar.label:
                picture.text(round(x + width / 2, 1), y + 20, bar.label, size=12, at="middle")
    legend(picture, trace, TOP + len(rows) * ROW + 44)
    return picture


def host_bars(trace: Trace) -> list[Bar]:
    """When the training loop was in which call."""
    return [Bar("host", trace.phase(name).span, TINTS[name], name) for name in PHASES]


def kernel_bars(trace: Trace) -> list[Bar]:
    """Kernels of the compute stream, by the phase that launched them."""
    kernels = trace.kernels()
    return [Bar("compute", w.span, TINTS[name]) for name in PHASES for w in trace.launched_in(kernels, name)]


def copy_bars(trace: Trace) -> list[Bar]:
    """Travels between ranks, and the copies before and after them."""
    travels, side = trace.travels, trace.launched_in(trace.side_work(), WHOLE)
    outward = {work.stream for work in side if "DtoH" in work.name}
    bars = [Bar("between ranks", travel.span, COPIES[travel.name]) for travel in travels]
    for work in side:
        row = "to the host" if work.stream in outward else "to the device"
        bars.append(Bar(row, work.span, COPIES[collective_of(work, travels, before=work.stream in outward)]))
    return bars


def collective_of(work: Work, travels: list[Call], *, before: bool) -> str:
    """Which collective a copy belongs to: one thread launches copy, travel, copy back, one after the other."""
    assert work.launched is not None
    ahead = [t.name for t in travels if t.span.stop > work.launched]
    behind = [t.name for t in travels if t.span.stop <= work.launched]
    return (ahead[:1] or behind[-1:])[0] if before else (behind[-1:] or ahead[:1])[0]


def merged(bars: list[Bar], gap: float) -> list[Bar]:
    """Bars of one row with gaps that nobody would see closed."""
    result: list[Bar] = []
    for tint, label in dict.fromkeys((bar.tint, bar.label) for bar in bars):
        spans = union((bar.span for bar in bars if (bar.tint, bar.label) == (tint, label)), gap)
        result += [Bar(bars[0].row, span, tint, label) for span in spans]
    return result


def axis(picture: Picture, total_ms: float, bottom: float) -> None:
    """Milliseconds, about ten ticks."""
    tick = next(t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000) if total_ms / t <= 12)
    for number in range(int(total_ms // tick) + 1):
        x = round(LEFT + WIDTH * number * tick / total_ms, 1)
        picture.line(x, TOP - 10, x, bottom, FAINT)
        picture.text(x, TOP - 18, f"{number * tick:g} ms", size=11, at="middle", color=MUTED)


def legend(picture: Picture, trace: Trace, y: float) -> None:
    """What the colours mean, and the measured share."""
    x = 24
    named = {**TINTS, "gather parameters": PARAM, "reduce gradients": GRAD}
    for label, tint in named.items():
        picture.rect(x, y - 12, 16, 14, tint.fill)
        picture.text(x + 22, y, label, size=12)
        x += 50 + 6 * len(label)
    share = (
        f"{100 * trace.hidden_share():.0f} % of the time in which copies run in forward and backward lies under kernels"
    )
    picture.text(24, y + 28, f"{share}. Both ranks compute on the GPU; only this one's kernels are drawn.", size=12)


def main() -> None:
    """Record or read, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="draw this saved trace instead of training")
    parser.add_argument("--save", type=Path, help="keep the trace here")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "timeline.svg")
    parser.add_argument("--stage", type=int, choices=(2, 3), default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--micro_batch", type=int, default=32)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    arguments = parser.parse_args()
    data = record(arguments) if arguments.trace is None else json.loads(arguments.trace.read_text(encoding="utf-8"))
    if data is None:
        return
    if arguments.save is not None:
        arguments.save.write_text(json.dumps(data), encoding="utf-8")
    trace = Trace(data)
    arguments.out.write_text(draw(trace, data.get(ABOUT, "")).svg(), encoding="utf-8")
    print(f"{arguments.out}: {100 * trace.hidden_share():.0f} % of the copy time lies under kernels")


if __name__ == "__main__":
    main()
