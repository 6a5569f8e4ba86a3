"""What the device of a benchmark can do: copying, multiplying, and Lorica's optimizer kernels alone. Owns no engine."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class NotOffered(Exception):
    """A row cannot exist here: a library is missing, or the installed version lacks the feature."""


def the_device() -> torch.device:
    """The GPU; without one (a dry run) the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_memory(device: torch.device) -> None:
    """Give back what building left behind, and count peaks from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    from importlib import metadata

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cuda": torch.version.cuda,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")),
        "date": time.strftime("%Y-%m-%d"),
    } | {package: version(package) for package in ("torch", "triton", "deepspeed", "transformers", "liger-kernel")}


# What it can do -------------------------------------------------------------------------------------------------------


def median_seconds(call: Callable[[], Any], device: torch.device, *, warmup: int = 3, repeats: int = 15) -> float:
    """Median time of `call` on the device, the calls issued one after the other without waiting."""
    for _ in range(warmup):
        call()
    synchronize(device)
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    edges = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    edges[0].record()
    for edge in edges[1:]:
        call()
        edge.record()
    torch.cuda.synchronize(device)
    return statistics.median(edges[i].elapsed_time(edges[i + 1]) / 1e3 for i in range(repeats))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a device-to-device copy of random data."""
    numel = 2**30 if device.type == "cuda" else 2**20
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a square bf16 matrix product on random data."""
    side = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / median_seconds(lambda: torch.mm(left, right, out=out), device)


class UpdateCase(NamedTuple):
    """One optimizer on one kind of plane."""

    optimizer: str
    params: dict[str, Any]
    grad_dtype: torch.dtype = torch.bfloat16
    split: bool = False

    def __str__(self) -> str:
        gradient = str(self.grad_dtype).removeprefix("torch.")
        return f"Lorica {self.optimizer}, {gradient} gradient, {'split' if self.split else 'fp32'} master, bf16 out"

    def bytes_per_parameter(self, num_moments: int) -> int:
        """Bytes that must be read and written."""
        master_and_out = 2 * (2 + 2) if self.split else 2 * 4 + 2
        return self.grad_dtype.itemsize + master_and_out + num_moments * 2 * 4


UPDATE_CASES = (
    UpdateCase("AdamW", {"weight_decay": 0.1}),
    UpdateCase("AdamW", {"weight_decay": 0.1}, split=True),
    UpdateCase("AdamW", {"weight_decay": 0.1}, torch.float32),
    UpdateCase("Lion", {"weight_decay": 0.1}),
    UpdateCase("Lion", {"weight_decay": 0.1}, split=True),
    UpdateCase("SGD", {"momentum": 0.9}),
)


def optimizer_bandwidth(device: torch.device, copy_bytes_per_s: float) -> list[dict[str, Any]]:
    """Every optimizer kernel alone on one flat plane: milliseconds, GB/s and share of the copy bandwidth.

    Returns:
        One row per case; a case that this Lorica does not offer says why under "problem".
    """
    numel = 10**9 if device.type == "cuda" else 10**5
    rows = [torch_update(numel, device)]
    for case in UPDATE_CASES:
        start_memory(device)
        try:
            rows.append(lorica_update(case, numel, device))
        except NotOffered as reason:
            rows.append({"kernel": str(case), "problem": f"not available: {reason}"})
    for row in rows:
        if "seconds" in row:
            row["bytes_per_s"] = row["bytes_per_parameter"] * numel / row["seconds"]
            row["of_copy"] = row["bytes_per_s"] / copy_bytes_per_s
    return rows


def torch_update(numel: int, device: torch.device) -> dict[str, Any]:
    """torch's fused AdamW: fp32 gradient, no bf16 parameter (who needs one adds a pass of 6 bytes)."""
    master = torch.randn(numel, device=device)
    master.grad = torch.randn(numel, device=device)
    optimizer = torch.optim.AdamW([master], lr=1e-4, weight_decay=0.1, fused=True)
    seconds = median_seconds(optimizer.step, device)
    return {"kernel": "torch fused AdamW, fp32 gradient, fp32 master", "bytes_per_parameter": 28, "seconds": seconds}


def lorica_update(case: UpdateCase, numel: int, device: torch.device) -> dict[str, Any]:
    """One of Lorica's optimizers on one segment."""
    from lorica.optim.base import Segment
    from lorica.optim.registry import from_config

    optimizer = from_config(case.optimizer, {"lr": 1e-4} | case.params)
    if case.split and not getattr(optimizer, "takes_split", False):
        raise NotOffered("no split master for this optimizer")
    master = torch.randn(numel, device=device)
    if case.split:
        master = torch.randint(-(2**15), 2**15, (numel,), device=device, dtype=torch.int16)
    group = dict(optimizer.defaults)
    segment = Segment(
        master=master,
        grad=torch.randn(numel, device=device, dtype=case.grad_dtype),
        out=torch.randn(numel, device=device, dtype=torch.bfloat16),
        state={name: torch.rand(numel, device=device) for name in optimizer.moments},
        group=group,
    )
    on_device = optimizer.runs_on_device(segment)
    coef = torch.full((1,), 0.5, device=device)
    apply = torch.ones(1, dtype=torch.int32, device=device) if on_device else None
    optimizer.prepare([group], 2, device)
    seconds = median_seconds(lambda: optimizer.update([segment], coef=coef, step=2, apply=apply), device)
    return {
        "kernel": str(case) + ("" if on_device else " (no kernel here: tile by tile)"),
        "bytes_per_parameter": case.bytes_per_parameter(len(optimizer.moments)),
        "seconds": seconds,
    }


def ceilings(device: torch.device) -> dict[str, Any]:
    """Copy bandwidth, matrix rate, optimizer kernels."""
    copy = copy_bandwidth(device)
    start_memory(device)
    return {
        "copy_bytes_per_s": copy,
        "matmul_flop_per_s": matmul_rate(device),
        "optimizers": optimizer_bandwidth(device, copy),
        "machine": machine(device),
    }
