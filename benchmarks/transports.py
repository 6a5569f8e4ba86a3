"""CPU time of reduce-scatter and all-gather over torch's gloo, Lorica's gloo and shared memory, as a Markdown table.

    python benchmarks/transports.py [--numel 25000000] [--num_ranks 2] [--repeats 7]

Each rank is one process with one thread. CPU time (user and system, all threads of a rank) is what to compare: it says
what a transport takes away from the model, and it is meaningful on a machine that does other things too. Wall time is
printed beside it. The ways are measured in turns, and the median over repeats is kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lorica.comm import Collectives, init_distributed, make_collectives

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Cost(NamedTuple):
    """What one call takes from one rank."""

    cpu_ms: float
    wall_ms: float


class Way(NamedTuple):
    """One way to do a collective: a row of the table."""

    collective: str
    transport: str
    call: Callable[[], None]


def torch_ways(full: Tensor, shard: Tensor) -> list[Way]:
    """torch.distributed's own collectives over gloo, by the name that this version does not warn about."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    received = torch.empty_like(full)
    return [
        Way("reduce-scatter", "torch gloo", lambda: reduce_scatter(shard, full)),
        Way("all-gather", "torch gloo", lambda: all_gather(full, shard)),
        Way("(all-to-all)", "torch gloo", lambda: dist.all_to_all_single(received, full)),
    ]


def lorica_ways(comm: Collectives, numel: int, dtype: torch.dtype) -> list[Way]:
    """The same through Lorica's transports: gradients from staging(), shards and outputs as the engine keeps them."""
    out = torch.zeros(numel // comm.world_size, dtype=torch.float32)
    shard = comm.shared(numel // comm.world_size, dtype)
    full = torch.zeros(numel, dtype=dtype)

    def reduce_scatter() -> None:
        comm.reduce_scatter(comm.staging(numel, dtype), out, accumulate=False).wait()

    def all_gather() -> None:
        comm.all_gather(shard, full).wait()
        comm.fence()

    name = f"lorica {comm.name}"
    return [Way("reduce-scatter", name, reduce_scatter), Way("all-gather", name, all_gather)]


def measure(call: Callable[[], None]) -> Cost:
    """Time one call between two barriers."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    cost = Cost((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)
    dist.barrier()
    return cost


def run_rank(rank: int, port: int, args: argparse.Namespace, folder: str) -> None:
    """Measure on one rank; rank 0 leaves the medians in `folder`."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(args.num_ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    init_distributed(dist_backend="gloo", verbose=False)
    rows: dict[tuple[str, str], dict[str, Cost]] = {}
    for dtype_name, dtype in DTYPES.items():
        comms = [make_collectives(range(args.num_ranks), "cpu", transport=name) for name in ("gloo", "shm")]
        ways = torch_ways(torch.ones(args.numel, dtype=dtype), torch.ones(args.numel // args.num_ranks, dtype=dtype))
        for comm in comms:
            ways += lorica_ways(comm, args.numel, dtype)
        costs: list[list[Cost]] = [[] for _ in ways]
        for repeat in range(args.repeats + 1):
            for samples, way in zip(costs, ways, strict=True):
                cost = measure(way.call)
                if repeat > 0:  # the first touches memory and opens connections
                    samples.append(cost)
        for way, samples in zip(ways, costs, strict=True):
            median = Cost(*(statistics.median(column) for column in zip(*samples, strict=True)))
            rows.setdefault((way.collective, way.transport), {})[dtype_name] = median
        for comm in comms:
            comm.close()
    if rank == 0:
        torch.save(rows, os.path.join(folder, "rows"))
    dist.barrier()
    dist.destroy_process_group()


def print_table(rows: dict[tuple[str, str], dict[str, Cost]], args: argparse.Namespace) -> None:
    """One row per way; CPU time first, wall time in brackets."""
    print(
        f"{date.today()}, torch {torch.__version__}, {platform.system()}, {os.cpu_count()} cores, "
        f"{args.num_ranks} ranks, {args.numel / 1e6:g} M elements, median of {args.repeats}\n"
    )
    print("| collective | transport | fp32, CPU ms (wall ms) | bf16, CPU ms (wall ms) |")
    print("|---|---|---|---|")
    for (collective, transport), costs in sorted(rows.items()):
        cells = [f"{cost.cpu_ms:.1f} ({cost.wall_ms:.1f})" for cost in costs.values()]
        print(f"| {collective} | {transport} | {' | '.join(cells)} |")


def main() -> None:
    """Start the ranks and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=25_000_000, help="elements of the full plane")
    parser.add_argument("--num_ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    args.numel -= args.numel % args.num_ranks
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (port, args, folder), args.num_ranks)  # type: ignore[attr-defined, no-untyped-call]
        print_table(torch.load(os.path.join(folder, "rows"), weights_only=False), args)


if __name__ == "__main__":
    main()
