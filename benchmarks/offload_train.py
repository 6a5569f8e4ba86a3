"""Train a model of the offload comparison on real text for some steps, and keep its loss curve. Compares nothing.

The text is the bytes of the Python standard library's sources, each byte a token; the model keeps its vocabulary, so
that the loss begins near the logarithm of that. No byte is seen twice: every step's loss is that of unknown text.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ceilings import machine, start_memory, synchronize
from benchmarks.gpu_engines import merged
from benchmarks.gpu_job import peaks
from benchmarks.gpu_tables import machine_line
from benchmarks.llama import SIZES, numel_of
from benchmarks.offload_job import Case, number, prepared

READ_EVERY = 5  # steps between two readings of losses: a reading waits for the device
WARMUP_STEPS = 20
END_S = 30.0  # kept for the end of a job
GIB = 2**30


def text_bytes(num_bytes: int) -> Tensor:
    """Sources of the Python standard library, files in an order from a seed: uint8 [num_bytes].

    Raises:
        ValueError: there are fewer bytes.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(0).shuffle(paths)
    text = bytearray()
    for path in paths:
        if len(text) >= num_bytes:
            break
        text += path.read_bytes()
    if len(text) < num_bytes:
        raise ValueError(
            f"--train: expected {num_bytes} bytes of text, found {len(text)} below {folder}. Fix: fewer steps."
        )
    return torch.frombuffer(text[:num_bytes], dtype=torch.uint8)


def text_batches(case: Case, num_steps: int) -> list[list[Tensor]]:
    """Micro-batches [B, L + 1] of every step; consecutive pieces of the text share one byte."""
    shape = SIZES[case.size]
    num_pieces = num_steps * case.accumulation * shape.batch
    text = text_bytes(num_pieces * shape.length + 1).long()
    order = torch.randperm(num_pieces, generator=torch.Generator().manual_seed(0))
    pieces = text.unfold(0, shape.length + 1, shape.length)[order]
    batches = list(pieces.split(shape.batch))
    return [batches[step * case.accumulation : (step + 1) * case.accumulation] for step in range(num_steps)]


def entropies(batches: list[list[Tensor]]) -> dict[str, float]:
    """What a model without any context, and one that sees one byte, could reach on this text; in nats."""
    tokens = torch.cat([batch for step in batches for batch in step])
    pairs = torch.bincount((tokens[:, :-1] * 256 + tokens[:, 1:]).flatten(), minlength=2**16).double().view(256, 256)

    def entropy(counts: Tensor) -> float:
        shares = counts[counts > 0] / counts.sum()
        return -(shares * shares.log()).sum().item()

    return {"no_context": entropy(pairs.sum(0)), "one_byte": entropy(pairs) - entropy(pairs.sum(1))}


def train(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Callable[[], None]]:
    """Train for `options.train` steps, or until the time is spent; the curve is written as it grows."""
    end = time.monotonic() + options.time_limit_s - END_S
    case = Case.parse(options.size)
    batches = text_batches(case, options.train)
    schedule = {
        "optimizer": {"params": {"lr": options.lr}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": options.lr, "warmup_num_steps": WARMUP_STEPS},
        },
    }
    options.lorica = merged(schedule, options.lorica)
    make = prepared(options, device)
    start_memory(device)
    begin = time.perf_counter()
    trainer = make()
    synchronize(device)
    curve: dict[str, Any] = {
        "size": str(case),
        "engine": options.job,
        "numel": numel_of(case.size),
        "lr": options.lr,
        "vocabulary": SIZES[case.size].vocabulary,
        "tokens": sum(batch[:, 1:].numel() for batch in batches[0]),
        "start_s": time.perf_counter() - begin,
        "entropies": entropies(batches),
        "machine": machine(device),
        "note": trainer.note,
        "losses": [],
        "norms": {},
    }
    begin, unread = time.perf_counter(), []
    for step, batch in enumerate(batches):
        unread.append(trainer.step([tokens.to(device) for tokens in batch]))
        if step % READ_EVERY and step < len(batches) - 1:
            continue
        curve["losses"] += [loss.item() for loss in unread]
        curve["norms"][step] = number(trainer.norm)
        curve |= {"seconds": time.perf_counter() - begin, "peak": peaks(device)}
        unread.clear()
        options.curve.write_text(json.dumps(curve, indent=1))
        print(f"step {step}: loss {curve['losses'][-1]:.4f}, {curve['seconds']:.0f} s", flush=True)
        if not math.isfinite(curve["losses"][-1]) or time.monotonic() > end:
            break
    return curve, trainer.close


def curve_table(curve: dict[str, Any]) -> str:
    """The Markdown of a loss curve: a line about the run, then some of its steps."""
    losses, norms = curve["losses"], {int(step): norm for step, norm in curve["norms"].items()}
    shown = sorted(norms | dict.fromkeys((0, 1, 2, 3)))
    shown = [step for step in shown if step < len(losses)]
    known = curve["entropies"]
    rate = curve["tokens"] * len(losses) / curve["seconds"]
    lines = [
        f"{machine_line(curve['machine'])}. {curve['engine']}, {curve['numel']:,} parameters, {curve['tokens']:,} "
        f"bytes of text a step, learning rate {curve['lr']:g} after {WARMUP_STEPS} steps; {len(losses)} steps at "
        f"{rate:,.0f} bytes/s, peak {curve['peak']['allocated_bytes'] / GIB:.1f} GiB on the device and "
        f"{curve['host_watch']['most_rss_bytes'] / GIB:.1f} GiB of host memory, {curve['start_s']:.0f} s to start. "
        f"Guessing costs {math.log(curve['vocabulary']):.2f} nats, knowing how often each byte occurs "
        f"{known['no_context']:.2f}, knowing the byte before {known['one_byte']:.2f}.",
        "",
        "| step | loss | gradient norm |",
        "|---|---|---|",
    ]
    for step in shown:
        norm = norms.get(step)
        lines.append(f"| {step} | {losses[step]:.4f} | {'' if norm is None else f'{norm:.3f}'} |")
    return "\n".join(lines)
