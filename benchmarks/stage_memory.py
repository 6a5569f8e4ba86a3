"""What each ZeRO stage holds on a rank: the formula beside what was counted, as the table of the README.

    lorica --num_gpus=4 benchmarks/stage_memory.py        # four CPU processes on a machine without GPUs

Counts the bytes of every tensor that holds model states on rank 0, in the middle of gradient accumulation, when all
kinds exist. P is the number of ranks, Psi the number of parameters, K the bytes of optimizer state per parameter: 10
(the lower half of the fp32 master and two moments) beside bf16 parameters and gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))
from model import GPT, SIZES

import lorica
from lorica.plan import STAGE

PARAM_BYTES, GRAD_BYTES, STATE_BYTES = 2, 2, 10
MIB = 2**20


class Held(NamedTuple):
    """Bytes on one rank."""

    optimizer: float
    param: float
    grad: float

    @property
    def total(self) -> float:
        """All three."""
        return sum(self)


def formula(stage: int, numel: int, num_ranks: int) -> Held:
    """The published formula: sharded kinds are divided by the number of ranks."""
    sharded = STAGE[stage]
    shares = [1 / num_ranks if flag else 1.0 for flag in (sharded.states, sharded.param, sharded.grad)]
    return Held(*(b * numel * s for b, s in zip((STATE_BYTES, PARAM_BYTES, GRAD_BYTES), shares, strict=True)))


def counted(stage: int) -> tuple[Held, int, int]:
    """What rank 0 holds after the first of two micro-steps, the number of parameters, and of ranks."""
    torch.manual_seed(0)
    shape = SIZES["small"]
    model = GPT(shape)
    numel = model.num_parameters()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = lorica.initialize(model=model, config=config)
    tokens = torch.randint(0, shape.vocab_size, (1, 129), device=engine.device)
    engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
    engine.step()
    held = engine.memory().allocated_bytes
    ranks = engine.world_size
    engine.destroy()
    return Held(held.master + held.moments, held.param, held.grad), numel, ranks


def main() -> None:
    """Print the table on rank 0."""
    lorica.init_distributed()
    lines = []
    for stage in STAGE:
        held, numel, ranks = counted(stage)
        expected = formula(stage, numel, ranks)
        share = ["/P" if flag else "" for flag in (STAGE[stage].states, STAGE[stage].param, STAGE[stage].grad)]
        kinds = [
            f"{symbol}{part} = {e / MIB:.1f} / **{h / MIB:.1f}**"
            for symbol, part, e, h in zip(("K Ψ", "2 Ψ", "2 Ψ"), share, expected, held, strict=True)
        ]
        together = f"{expected.total / MIB:.1f} / **{held.total / MIB:.1f}**"
        lines.append(f"| {stage} | {' | '.join(kinds)} | {together} | {held.total / expected.total - 1:+.2%} |")
    if torch.distributed.get_rank() == 0:
        print(
            f"\nΨ = {numel:,} parameters, P = {ranks} ranks, K = {STATE_BYTES}; MiB on a rank, formula / **counted**\n"
        )
        print("| stage | optimizer states | parameters | gradients | together | difference |")
        print("|---|---|---|---|---|---|")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
