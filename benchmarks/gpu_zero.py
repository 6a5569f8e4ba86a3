"""One GPU, one model of 1.3 B parameters, ZeRO stages 0 to 3 beside a hand-written loop: step time and memory.

    python benchmarks/gpu_zero.py [--size 1b3] [--micro_batch 8] [--steps 8]

All engines run in one process, one after the other, on the same tokens; the table shows medians over the steps after
two warm-up steps. With one rank nothing is sharded, so every stage should cost what the hand-written loop costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))
from model import GPT, SIZES, GPTConfig

import lorica

WARMUP = 2
LR, DECAY, CLIP = 3e-4, 0.1, 1.0


class Row(NamedTuple):
    """What one engine cost."""

    engine: str
    seconds: float
    tokens_per_second: float
    peak_gib: float
    states_gib: float
    first_loss: float
    last_loss: float


def batch(shape: GPTConfig, micro_batch: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [micro_batch, seq_len]: runs of consecutive numbers, which a model can learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, shape.vocab_size, (micro_batch, 1), generator=generator)
    tokens = ((start + torch.arange(shape.seq_len + 1)) % shape.vocab_size).cuda()
    return tokens[:, :-1], tokens[:, 1:]


def hand_written(shape: GPTConfig) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], float]]:
    """bf16 weights, fp32 masters, fused AdamW, clipping: what one would write without an engine."""
    model = build(shape).cuda()
    masters = [p.detach().float().clone() for p in model.parameters()]
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=LR, weight_decay=DECAY, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = model(inputs, targets)
        loss.backward()
        weights = list(model.parameters())
        nn.utils.clip_grad_norm_(weights, CLIP, foreach=True)
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return loss.detach()

    def states() -> float:
        return sum(m.numel() for m in masters) * 16 / 2**30

    return step, states


def under_zero(
    shape: GPTConfig, micro_batch: int, zero: dict[str, object]
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], float]]:
    """The same under Lorica."""
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY}},
        "zero_optimization": zero,
    }
    engine, *_ = lorica.initialize(model=build(shape), config=config)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = engine(inputs, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step, lambda: engine.memory().allocated_bytes.total / 2**30


def build(shape: GPTConfig) -> GPT:
    """The model, the same for every engine."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return GPT(shape)


def measure(
    name: str,
    make: Callable[[], tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], float]]],
    shape: GPTConfig,
    micro_batch: int,
    steps: int,
) -> Row:
    """Train `steps` steps and report medians."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step, states = make()
    seconds, losses = [], []
    for index in range(WARMUP + steps):
        inputs, targets = batch(shape, micro_batch, index)
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step(inputs, targets)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    median = statistics.median(seconds[WARMUP:])
    tokens = micro_batch * shape.seq_len
    peak = torch.cuda.max_memory_allocated() / 2**30
    return Row(name, median, tokens / median, peak, states(), losses[0], losses[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b3")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    shape = dataclasses.replace(SIZES[arguments.size], activation_checkpointing=True, vocab_size=32000)
    cases: dict[str, Callable[[], tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], float]]]] = {
        "hand-written PyTorch": lambda: hand_written(shape)
    }
    for stage in range(4):
        cases[f"Lorica stage {stage}"] = lambda stage=stage: under_zero(shape, arguments.micro_batch, {"stage": stage})
    host = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    cases["Lorica stage 2, optimizer on the CPU"] = lambda: under_zero(shape, arguments.micro_batch, host)
    rows = [measure(name, make, shape, arguments.micro_batch, arguments.steps) for name, make in cases.items()]
    with torch.device("meta"):
        numel = sum(p.numel() for p in GPT(shape).parameters())
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape}, micro-batch {arguments.micro_batch}")
    print(f"{numel:,} parameters")
    print("| engine | s / step | of hand-written | tokens / s | peak GiB | states GiB | loss first | loss last |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = row.seconds / rows[0].seconds
        print(
            f"| {row.engine} | {row.seconds:.4f} | {ratio:.3f} | {row.tokens_per_second:,.0f} | {row.peak_gib:.1f} | "
            f"{row.states_gib:.1f} | {row.first_loss:.4f} | {row.last_loss:.4f} |"
        )


if __name__ == "__main__":
    main()
