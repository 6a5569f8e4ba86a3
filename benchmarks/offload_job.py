"""One job of the offload comparison: one engine at one size, measured in a process of its own. Owns no table.

An engine that overlaps its update with the next step must not be stopped between steps: the timed steps follow each
other without a wait, and a step's time is that between two events behind `step()` in the compute stream (the CPU's
clock without a GPU). Loss and gradient norm are read in the steps before and after the timed ones only.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_ceilings import NotOffered, machine, start_memory, synchronize
from benchmarks.gpu_engines import CLIP, Setup, Step, Trainer
from benchmarks.gpu_job import counted_syncs, join_group, peaks, traced
from benchmarks.llama import numel_of, tokens
from benchmarks.offload_engines import ENGINES
from benchmarks.offload_host import own_peak_bytes, own_rss_bytes

NUM_CHECKED = 2  # steps after the timed ones, in which host syncs are counted
LARGE_NUMEL = 10**10  # models from here on are made in bf16


class Case(NamedTuple):
    """A size and how many micro-batches make a step: `7b`, `7b@4`."""

    size: str
    accumulation: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """From `size` or `size@accumulation`."""
        size, _, accumulation = text.partition("@")
        return cls(size, int(accumulation or 1))

    def __str__(self) -> str:
        return self.size if self.accumulation == 1 else f"{self.size}@{self.accumulation}"


def prepared(options: argparse.Namespace, device: torch.device) -> Callable[[], Trainer]:
    """Import and connect what the engine needs; what makes it."""
    case, engine = Case.parse(options.size), ENGINES[options.job]
    if engine.library is not None:
        try:
            importlib.import_module(engine.library)
        except ImportError as error:
            raise NotOffered(f"import {engine.library}: {error}") from error
    if engine.grouped:
        join_group(device, with_host=engine.host_group)
    importlib.import_module("torch._dynamo")  # torch.optim would, at the first optimizer
    torch.zeros(1, device=device)  # a context
    init = init_dtype(options, case)
    setup = Setup(case.size, "plain", device, options.lorica, case.accumulation, init, options.folder)
    return lambda: engine.make(setup)


def init_dtype(options: argparse.Namespace, case: Case) -> torch.dtype:
    """The dtype in which weights are made."""
    choice = options.init or ("bf16" if numel_of(case.size) >= LARGE_NUMEL else "fp32")
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]


def step_batches(case: Case, step: int, device: torch.device) -> list[Tensor]:
    """The micro-batches of one step: of random tokens, the same for every engine."""
    return [tokens(case.size, step * case.accumulation + index, device) for index in range(case.accumulation)]


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Callable[[], None]]:
    """Everything about one engine at one size, and what closes it."""
    case = Case.parse(options.size)
    make = prepared(options, device)
    numel = numel_of(case.size)
    libraries_bytes = own_rss_bytes()
    start_memory(device)
    begin = time.perf_counter()
    trainer = make()
    synchronize(device)
    result: dict[str, Any] = {"start_s": time.perf_counter() - begin, "start_peak": peaks(device)}
    start_memory(device)
    batches = [step_batches(case, step, device) for step in range(options.warmup + options.steps + NUM_CHECKED + 1)]
    timed_from, timed_to = options.warmup, options.warmup + options.steps
    first = [checked_step(trainer, batch) for batch in batches[:timed_from]]
    begin = time.perf_counter()
    losses, seconds = timed_intervals(trainer.step, batches[timed_from:timed_to], device)
    result["wall_s"] = (time.perf_counter() - begin) / options.steps
    with counted_syncs(device) as syncs:
        losses += [trainer.step(batch) for batch in batches[timed_to:-1]]
    norms = [norm for _, norm in first] + [number(trainer.norm)]
    known = [norm for norm in norms if norm is not None]
    if options.trace and device.type == "cuda":
        traced(trainer.step, batches[-1], options.out / f"trace-{case.size}-{case.accumulation}-{options.job}.json.gz")
    return result | {
        "numel": numel,
        "offloaded_numel": offloaded(options.job, numel),
        "tokens": sum(batch[:, 1:].numel() for batch in batches[0]),
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "peak": peaks(device),
        "device_used_bytes": device_used_bytes(device),
        "host": {"libraries_bytes": libraries_bytes, "peak_bytes": own_peak_bytes(), "end_bytes": own_rss_bytes()},
        "losses": [loss for loss, _ in first] + [loss.item() for loss in losses],
        "norms": known,
        "clipped": sum(norm > CLIP for norm in known),
        "syncs": {place: count / NUM_CHECKED for place, count in syncs.items()},
        "states": trainer.states() if trainer.states is not None else None,
        "note": trainer.note,
        "machine": machine(device),
    }, trainer.close


def checked_step(trainer: Trainer, batch: Sequence[Tensor]) -> tuple[float, float | None]:
    """Loss and gradient norm of a step."""
    loss = trainer.step(batch)
    return loss.item(), number(trainer.norm)


def number(norm: Callable[[], Any] | None) -> float | None:
    """A gradient norm, if the engine knows it."""
    value = norm() if norm is not None else None
    return None if value is None else float(value)


def offloaded(engine: str, numel: int) -> int | None:
    """Parameters whose optimizer state is on the host; None where the engine decides."""
    share = ENGINES[engine].host_share
    return None if share is None else round(share * numel)


def device_used_bytes(device: torch.device) -> int:
    """What everybody holds of the device now, allocators of others than torch's included."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# Time -----------------------------------------------------------------------------------------------------------------


def timed_intervals(
    step: Step, batches: Sequence[Sequence[Tensor]], device: torch.device
) -> tuple[list[Tensor], list[float]]:
    """Losses (on the device) and times from the end of one step to that of the next, without a wait between steps.

    What `step()` leaves to be done later delays the next step, and is counted there.
    """
    losses, marks = [], [mark(device)]
    for batch in batches:
        losses.append(step(batch))
        marks.append(mark(device))
    synchronize(device)
    return losses, [between(before, after) for before, after in pairwise(marks)]


def mark(device: torch.device) -> Any:
    """An event behind what the compute stream has been given so far; without a GPU, the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before: Any, after: Any) -> float:
    """Seconds between two marks."""
    return float(after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3)
