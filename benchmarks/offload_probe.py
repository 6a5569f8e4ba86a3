"""What the links of the test machine carry: PCIe, page locks, the CPU's update and the disk, alone and together.

The planner's figures come from here. All host memory is a `lorica.tier.arena`, all files are its NVMe tier's. Owns no
engine. Every question is one line on the screen and one record in a JSON file.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_ceilings import machine, synchronize
from lorica.core.streams import CudaStreams
from lorica.kernels import native
from lorica.kernels.hyper import adam_hyper
from lorica.tier.arena import Arena, PageLock
from lorica.tier.base import padded_bytes
from lorica.tier.swap import SwapFile, Transfer

MIB, GIB = 2**20, 2**30
Record = dict[str, Any]


class Scale(NamedTuple):
    """How much is moved: enough for steady figures on a GPU machine, little for a dry run."""

    plane_bytes: int  # of each buffer that is copied
    copies: int  # of a plane, in each direction
    products: int  # matrix products beside copies
    side: int  # of those matrices
    lock_bytes: int
    update_numel: int
    file_bytes: int
    ctas: Sequence[int] = (4, 8, 16, 32)


GPU_SCALE = Scale(512 * MIB, 40, 280, 8192, 8 * GIB, 2**27, 8 * GIB)
DRY_SCALE = Scale(4 * MIB, 4, 4, 256, 64 * MIB, 2**20, 64 * MIB)


def page_lock(device: torch.device) -> PageLock | None:
    """cudaHostRegister; None without a GPU."""
    if device.type != "cuda":
        return None
    streams = CudaStreams(device)
    return PageLock(streams.register, streams.unregister)


def host_planes(num_bytes: Sequence[int], device: torch.device, *, locked: bool = True) -> list[Tensor]:
    """Bytes in an arena, committed."""
    arena = Arena(sum(padded_bytes(number) for number in num_bytes), page_lock=page_lock(device) if locked else None)
    planes = [arena.alloc(number, torch.uint8) for number in num_bytes]
    arena.commit()
    return planes


# PCIe -----------------------------------------------------------------------------------------------------------------


class Copies:
    """Planes in host and device memory, and copies of them on two streams."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale, self.device = scale, device
        self.out, self.into = host_planes([scale.plane_bytes] * 2, device)
        self.on_device = [torch.empty(scale.plane_bytes, dtype=torch.uint8, device=device).fill_(3) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) for _ in range(2)]

    def start(self, directions: str, copies: int | None = None) -> list[tuple[str, Any, Any]]:
        """Begin copying ("up" to the device, "down", or "up down"); per direction, events around all its copies."""
        begun = []
        for direction, stream in zip(("up", "down"), self.streams, strict=True):
            if direction not in directions.split():
                continue
            with torch.cuda.stream(stream):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                for _ in range(copies or self.scale.copies):
                    if direction == "up":
                        self.on_device[0].copy_(self.out, non_blocking=True)
                    else:
                        self.into.copy_(self.on_device[1], non_blocking=True)
                after.record()
            begun.append((direction, before, after))
        return begun

    def rates(self, begun: list[tuple[str, Any, Any]], copies: int | None = None) -> dict[str, float]:
        """Bytes per second of each direction, once all is done."""
        moved = self.scale.plane_bytes * (copies or self.scale.copies)
        return {direction: moved / (before.elapsed_time(after) / 1e3) for direction, before, after in begun}


def pcie(scale: Scale, device: torch.device) -> Iterator[Record]:
    """Each way alone, both together, and beside a stream of matrix products."""
    copies = Copies(scale, device)
    for directions in ("up", "down", "up down"):
        copies.start(directions, 2)
        synchronize(device)
        begun = copies.start(directions)
        synchronize(device)
        yield {"what": f"registered arena, {directions}", "bytes_per_s": copies.rates(begun)}
    products = Products(scale, device)
    alone = products.seconds()
    for directions in ("up", "down", "up down"):
        begun = copies.start(directions)
        beside = products.seconds()
        synchronize(device)
        yield {
            "what": f"the same beside matrix products, {directions}",
            "bytes_per_s": copies.rates(begun),
            "product_ms": {"alone": alone * 1e3, "beside": beside * 1e3},
            "slowdown": beside / alone,
        }


class Products:
    """Square bf16 matrix products on random data."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.number, self.device = scale.products, device
        self.left, self.right = (
            torch.randn(scale.side, scale.side, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        self.product = torch.mm(self.left, self.right)
        synchronize(device)

    def seconds(self) -> float:
        """Of one product, in a row of them."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(self.number):
            torch.mm(self.left, self.right, out=self.product)
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after) / 1e3 / self.number)


def zero_copy(scale: Scale, device: torch.device) -> Iterator[Record]:
    """A kernel of a few blocks reads and writes registered host memory itself, alone and beside matrix products."""
    from benchmarks.offload_zero_copy import copy_words

    host = [plane.view(torch.int64) for plane in host_planes([scale.plane_bytes] * 2, device)]
    here = [torch.ones(scale.plane_bytes // 8, dtype=torch.int64, device=device) for _ in range(2)]
    stream, products = torch.cuda.Stream(device), Products(scale, device)
    alone = products.seconds()
    for direction, source, target in (("up", host[0], here[0]), ("down", here[1], host[1])):
        for ctas in scale.ctas:
            copy_words(source, target, ctas)
            synchronize(device)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(stream):
                before.record()
                for _ in range(scale.copies):
                    copy_words(source, target, ctas)
                after.record()
            beside = products.seconds()
            synchronize(device)
            rate = scale.plane_bytes * scale.copies / (before.elapsed_time(after) / 1e3)
            yield {
                "what": f"zero-copy {direction}, {ctas} blocks, beside matrix products",
                "bytes_per_s": {direction: rate},
                "slowdown": beside / alone,
            }


# Page locks -----------------------------------------------------------------------------------------------------------


def page_locks(scale: Scale, device: torch.device) -> Iterator[Record]:
    """Pages brought into being, then registered by one thread and by many; and what the arena does, both at once."""
    lock = page_lock(device)
    number = max(1, scale.lock_bytes // GIB)
    sizes = [scale.lock_bytes // number] * number
    for threads in dict.fromkeys((1, min(8, os.cpu_count() or 1), os.cpu_count() or 1)):
        begin = time.perf_counter()
        planes = host_planes(sizes, device, locked=False)
        touched_s = time.perf_counter() - begin
        record: Record = {"what": f"pages and page locks, {threads} threads"}
        record["bytes_per_s"] = {"touch, all cores": scale.lock_bytes / touched_s}
        if lock is not None:
            begin = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda plane: lock.register(plane.data_ptr(), plane.numel()), planes))
            record["bytes_per_s"]["register"] = scale.lock_bytes / (time.perf_counter() - begin)
            for plane in planes:
                lock.unregister(plane.data_ptr())
        yield record
    begin = time.perf_counter()
    planes = host_planes(sizes, device)
    whole_s = time.perf_counter() - begin
    yield {"what": "arena, pages and locks at once", "bytes_per_s": {"commit": scale.lock_bytes / whole_s}}


# The CPU's update -----------------------------------------------------------------------------------------------------


def updates(scale: Scale, device: torch.device) -> Iterator[Record]:
    """Lorica's native AdamW on split masters, and torch's fused AdamW, alone and while both copy engines run."""
    numel, cores = scale.update_numel, sorted(os.sched_getaffinity(0))
    pool = native.Pool(len(cores), cores)
    lo, hi, grad = (plane.view(kind) for plane, kind in zip(
        host_planes([2 * numel] * 3, device), (torch.int16, torch.bfloat16, torch.bfloat16), strict=True
    ))  # fmt: skip
    m, v = (plane.view(torch.float32) for plane in host_planes([4 * numel] * 2, device))
    hi.normal_(std=0.02), grad.normal_(std=1e-3)
    hyper = adam_hyper(2, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decoupled=True, bias_correction=True)
    yield from beside_copies(
        scale, device, f"Lorica's CPU AdamW, {len(cores)} threads, {native.isa()}", 26 * numel, numel,
        lambda: native.adam(lo, hi, grad, m, v, coef=0.5, hyper=hyper, pool=pool),
    )  # fmt: skip
    master = torch.randn(numel)
    master.grad = torch.randn(numel)
    optimizer = torch.optim.AdamW([master], lr=1e-4, weight_decay=0.1, fused=True)
    yield from beside_copies(
        scale, device, f"torch's fused CPU AdamW, {torch.get_num_threads()} threads", 28 * numel, numel, optimizer.step
    )


def beside_copies(
    scale: Scale, device: torch.device, name: str, num_bytes: int, numel: int, call: Callable[[], Any]
) -> Iterator[Record]:
    """The rate of an update on the CPU; with a GPU, while copies run both ways too."""

    def seconds() -> float:
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    def record(what: str, second: float) -> Record:
        rates = {"DRAM": num_bytes / second}
        return {"what": what, "parameters_per_s": numel / second, "bytes_per_s": rates}

    alone = seconds()
    yield record(name, alone)
    if device.type != "cuda":
        return
    copies = Copies(scale, device)
    copies.start("up down", 2)
    synchronize(device)
    number = max(4, int(6 * alone * 50e9 / scale.plane_bytes))  # about as long as the updates, and longer
    begun = copies.start("up down", number)
    beside = seconds()
    still_copying = not all(after.query() for _, _, after in begun)
    synchronize(device)
    both = record(f"{name}, both copy engines busy", beside)
    both["bytes_per_s"] |= copies.rates(begun, number)
    yield both | {"slowdown": beside / alone, "copies_outlasted_it": still_copying}


# The disk -------------------------------------------------------------------------------------------------------------


def disk(scale: Scale, folder: str) -> Iterator[Record]:
    """Writing, reading, and half of each at once, by the NVMe tier's file."""
    block_bytes, threads = 8 * MIB, 8
    file = SwapFile(folder, scale.file_bytes, threads=threads, block_bytes=block_bytes, reserve_bytes=0)
    try:
        (memory,) = host_planes([2 * threads * block_bytes], torch.device("cpu"))
        memory.random_(0, 256)
        blocks = memory.split(block_bytes)
        half = scale.file_bytes // 2 // block_bytes * block_bytes
        for what, moves in {
            "write": [(file.write, offset) for offset in range(0, 2 * half, block_bytes)],
            "read": [(file.read, offset) for offset in range(0, 2 * half, block_bytes)],
            "half read, half written": [
                move
                for offset in range(0, half, block_bytes)
                for move in ((file.read, offset), (file.write, half + offset))
            ],
        }.items():
            seconds = moved_in(moves, blocks)
            yield {
                "what": f"disk, {what}, {'O_DIRECT' if file.direct else 'through the page cache'}, {folder}",
                "bytes_per_s": {what: len(moves) * block_bytes / seconds},
            }
    finally:
        file.close()


def moved_in(moves: Sequence[tuple[Callable[[int, Tensor], Transfer], int]], blocks: Sequence[Tensor]) -> float:
    """Seconds for all moves, one per block of memory in flight."""
    flying: list[Transfer | None] = [None] * len(blocks)
    begin = time.perf_counter()
    for index, (move, offset) in enumerate(moves):
        place = index % len(blocks)
        earlier = flying[place]
        if earlier is not None:
            earlier.wait()
        flying[place] = move(offset, blocks[place])
    for transfer in filter(None, flying):
        transfer.wait()
    return time.perf_counter() - begin


# All ------------------------------------------------------------------------------------------------------------------


def probe_all(device: torch.device, folder: str, out: Path) -> None:
    """Run every probe that this machine can answer; print and keep what it found, one probe failing or not."""
    on_gpu = device.type == "cuda"
    scale = GPU_SCALE if on_gpu else DRY_SCALE
    probes: dict[str, Callable[[], Iterator[Record]]] = {
        "pcie": lambda: pcie(scale, device),
        "page locks": lambda: page_locks(scale, device),
        "update": lambda: updates(scale, device),
        "disk": lambda: disk(scale, folder),
        "zero-copy": lambda: zero_copy(scale, device),
    }
    needs_gpu = {"pcie", "zero-copy"}
    found: list[Record] = []
    for name, probe in probes.items():
        if name in needs_gpu and not on_gpu:
            print(f"{name}: not asked without a GPU", flush=True)
            continue
        begin = time.perf_counter()
        try:
            for record in probe():
                found.append({"probe": name} | record)
                print(line_of(record), flush=True)
                out.write_text(json.dumps({"machine": machine(device), "records": found}, indent=1))
        except Exception as error:  # the other probes are worth their time all the same; the line says what happened
            found.append({"probe": name, "problem": f"{type(error).__name__}: {error}"})
            print(f"{name}: {found[-1]['problem']}", flush=True)
        print(f"  ({name}: {time.perf_counter() - begin:.1f} s)", flush=True)
    out.write_text(json.dumps({"machine": machine(device), "records": found}, indent=1))


def line_of(record: Record) -> str:
    """A record in one line."""
    parts = [f"{name} {rate / 1e9:.2f} GB/s" for name, rate in record["bytes_per_s"].items()]
    if "parameters_per_s" in record:
        parts.append(f"{record['parameters_per_s'] / 1e9:.3f} G parameters/s")
    if "product_ms" in record:
        parts.append("product {alone:.3f} ms alone, {beside:.3f} ms beside".format(**record["product_ms"]))
    if "slowdown" in record:
        parts.append(f"slowdown {record['slowdown']:.3f}")
    if record.get("copies_outlasted_it") is False:
        parts.append("(the copies ended before it)")
    return f"{record['what']}: {', '.join(parts)}"


def probe_table(found: dict[str, Any]) -> str:
    """The Markdown of a probe's records."""
    from benchmarks.gpu_tables import machine_line

    lines = [f"{machine_line(found['machine'])}.", "", "| probe | GB/s | besides |", "|---|---|---|"]
    for record in found["records"]:
        if "problem" in record:
            lines.append(f"| {record['probe']} | {record['problem'].replace('|', '/')} | |")
            continue
        rates = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in record["bytes_per_s"].items())
        besides = [f"{record['parameters_per_s'] / 1e9:.3f} G parameters/s"] if "parameters_per_s" in record else []
        besides += [f"slowdown {record['slowdown']:.3f}"] if "slowdown" in record else []
        lines.append(f"| {record['what']} | {rates} | {', '.join(besides)} |")
    return "\n".join(lines)
