"""One rank of one job of the CPU comparison: warm up, time some steps, watch memory in others, write one JSON file.

Started by cpu_compare.py with RANK, WORLD_SIZE and a rendezvous file; prints nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import gpt, peers


def field_bytes(path: str, name: str) -> int:
    """A line `name: value [kB]` of a file under /proc/self."""
    for line in Path("/proc/self", path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            number, *unit = value.split()
            return int(number) * (1024 if unit else 1)
    raise ValueError(f"/proc/self/{path} has no line {name}")


class MemoryWatch(threading.Thread):
    """Samples this process's memory (shared pages in proportion) and keeps the largest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            self.peak_bytes = max(self.peak_bytes, field_bytes("smaps_rollup", "Pss"))
            self.stop.wait(0.005)


def timed_steps(trainer: peers.Trainer, arguments: argparse.Namespace, first: int, rank: int) -> dict[str, list[float]]:
    """Wall time, CPU time (all threads of this process), loss and bytes sent, for each of `arguments.steps` steps."""
    rows: dict[str, list[float]] = {"wall_s": [], "cpu_s": [], "loss": [], "socket_bytes": [], "counted_bytes": []}
    for step in range(first, first + arguments.steps):
        tokens = gpt.tokens(arguments.size, arguments.batch_size, step, rank)
        counted = trainer.sent_bytes() if trainer.sent_bytes is not None else 0
        written, wall, cpu = field_bytes("io", "wchar"), time.perf_counter(), time.process_time()
        loss = trainer.step(tokens)
        rows["wall_s"].append(time.perf_counter() - wall)
        rows["cpu_s"].append(time.process_time() - cpu)
        rows["socket_bytes"].append(field_bytes("io", "wchar") - written)
        rows["counted_bytes"].append(trainer.sent_bytes() - counted if trainer.sent_bytes is not None else 0)
        rows["loss"].append(loss.item())
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything this rank knows about the job."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    library = peers.PEERS[arguments.engine].library
    if library is not None:
        importlib.import_module(library)
    store = f"file://{arguments.rendezvous}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    libraries_bytes = field_bytes("smaps_rollup", "Pss")
    model = gpt.build(arguments.size)
    numel = sum(p.numel() for p in model.parameters())
    trainer = peers.make(arguments.engine, model, arguments.precision, arguments.batch_size)
    first_losses = [
        trainer.step(gpt.tokens(arguments.size, arguments.batch_size, step, rank)).item()
        for step in range(arguments.warmup)
    ]
    dist.barrier()
    rows = timed_steps(trainer, arguments, arguments.warmup, rank)
    watch = MemoryWatch()
    watch.start()
    for step in range(2):
        trainer.step(gpt.tokens(arguments.size, arguments.batch_size, 10_000 + step, rank))
    watch.stop.set()
    watch.join()
    dist.barrier()
    return {
        "numel": numel,
        "wall_s": statistics.median(rows["wall_s"]),
        "cpu_s": statistics.median(rows["cpu_s"]),
        "losses": first_losses + rows["loss"],
        "socket_bytes": statistics.median(rows["socket_bytes"]),
        "counted_bytes": statistics.median(rows["counted_bytes"]) if trainer.sent_bytes is not None else None,
        "peak_bytes": watch.peak_bytes - libraries_bytes,
        "highest_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - libraries_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("engine", "size", "precision", "rendezvous", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("warmup", "steps", "batch_size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    result = measure(arguments)
    Path(arguments.out).write_text(json.dumps(result))
    os._exit(0)  # some engines leave threads behind; what was measured is on disk


if __name__ == "__main__":
    main()
