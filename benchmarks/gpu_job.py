"""One job of the GPU comparison: one engine at one size, measured in a process of its own. Owns no table.

Host syncs are counted in two steps after the timed ones: torch's own sync warnings (`.item()`, copies to pageable
memory, stream.synchronize()) and the calls of torch.cuda.synchronize and event.synchronize. Calls that C++ code of NCCL
or of an extension makes on its own are not seen; a traced step counts what the CUDA runtime saw.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import socket
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ceilings import NotOffered, ceilings, machine, start_memory, synchronize, the_device
from benchmarks.gpu_engines import ENGINES, Setup, Step
from benchmarks.gpu_rounds import SAY_WHERE
from benchmarks.llama import numel_of, tokens

CEILINGS = "ceilings"  # the job that measures the device, not an engine
NUM_SYNC_STEPS = 2
SYNC_WARNING = "called a synchronizing CUDA operation"
RUNTIME_SYNCS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def peaks(device: torch.device) -> dict[str, int]:
    """Highest bytes allocated and reserved since `start_memory`; zeros without a GPU."""
    if device.type != "cuda":
        return {"allocated_bytes": 0, "reserved_bytes": 0}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[Counter[str]]:
    """Count host synchronisations by place, in the counter that is yielded, which is complete at the end."""
    counts: Counter[str] = Counter()
    if device.type != "cuda":
        yield counts
        return
    owners = {
        "torch.cuda.synchronize": torch.cuda,
        "torch.accelerator.synchronize": torch.accelerator,
        "event.synchronize": torch.cuda.Event,
    }
    originals = {name: owner.synchronize for name, owner in owners.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, owner in owners.items():
            owner.synchronize = _counting(name, originals[name], counts)  # type: ignore[attr-defined]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for name, owner in owners.items():
                owner.synchronize = originals[name]  # type: ignore[attr-defined]
    counts.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if SYNC_WARNING in str(w.message))


def _counting(name: str, original: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        counts[name] += 1
        torch.cuda.set_sync_debug_mode("default")  # or it might be counted twice
        try:
            return original(*arguments, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("warn")

    return call


def join_group(device: torch.device, *, with_host: bool = False) -> None:
    """A process group of this one rank, described by the environment as torchrun would.

    Args:
        with_host: on a GPU, serve tensors in host memory too.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if device.type == "cuda":
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if with_host else "nccl", device_id=device)
    else:
        torch.distributed.init_process_group("gloo")


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Callable[[], None]]:
    """Everything about one engine at one size, and what closes it."""
    engine, size = ENGINES[options.job], options.sizes[0]
    if engine.grouped:
        join_group(device)
    num_steps = options.warmup + options.steps + NUM_SYNC_STEPS + 1
    batches = [[tokens(size, step, device)] for step in range(num_steps)]
    setup = Setup(size, options.model, device, options.lorica)
    start_memory(device)
    begin = time.perf_counter()
    trainer = engine.make(setup)
    synchronize(device)
    building = {"build_s": time.perf_counter() - begin, "build": peaks(device)}
    start_memory(device)
    losses, seconds = timed_steps(trainer.step, batches[: options.warmup + options.steps], device)
    result = building | {
        "numel": numel_of(size),
        "seconds": seconds,
        "median_s": statistics.median(seconds[options.warmup :]),
        "peak": peaks(device),
        "states": trainer.states() if trainer.states is not None else None,
        "note": trainer.note,
        "machine": machine(device),
    }
    counted = batches[options.warmup + options.steps : -1]
    with counted_syncs(device) as syncs:
        for batch in counted:
            losses.append(trainer.step(batch))
    synchronize(device)
    result["syncs"] = {place: count / len(counted) for place, count in syncs.items()}
    if options.trace and device.type == "cuda":
        result["runtime_syncs"] = traced(trainer.step, batches[-1], options.out / f"trace-{size}-{options.job}.json.gz")
    result["losses"] = [loss.item() for loss in losses]
    return result, trainer.close


def timed_steps(step: Step, batches: list[list[Tensor]], device: torch.device) -> tuple[list[Tensor], list[float]]:
    """Losses (on the device) and wall times of a step on each batch, the device idle before and after each."""
    losses, seconds = [], []
    for batch in batches:
        synchronize(device)
        begin = time.perf_counter()
        losses.append(step(batch))
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return losses, seconds


def traced(step: Step, batch: list[Tensor], path: Path) -> dict[str, int]:
    """Write the timeline of one step, and count the blocking calls that the CUDA runtime saw in it."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("one_step"):
            step(batch)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    events = profiler.events() or []
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    whole = next(event.time_range for event in on_host if event.name == "one_step")
    inside = (event.name for event in on_host if whole.start <= event.time_range.start <= whole.end)
    return dict(Counter(name for name in inside if name in RUNTIME_SYNCS))


def job_main(options: argparse.Namespace) -> None:
    """Run one job and write its result."""

    def measured(device: torch.device) -> tuple[dict[str, Any], Callable[[], None] | None]:
        return (ceilings(device), None) if options.job == CEILINGS else measure(options, device)

    write_and_exit(options.result, measured)


def write_and_exit(
    path: Path, measured: Callable[[torch.device], tuple[dict[str, Any], Callable[[], None] | None]]
) -> None:
    """Write the result of a job; end the process without waiting for threads that engines leave behind.

    Args:
        measured: returns the result, and what closes the engine.
    """
    faulthandler.register(SAY_WHERE)
    device = the_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    close: Callable[[], None] | None = None
    try:
        result, close = measured(device)
    except NotOffered as reason:
        result = {"problem": f"not available: {reason}"}
    except torch.OutOfMemoryError as error:
        result = {"problem": "out of memory", "detail": str(error)[:500]}
    path.write_text(json.dumps(result))
    code = 0
    if close is not None:
        try:
            close()
        except Exception:  # what was measured is on disk; the parent notes the exit code
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
