"""One of several ranks that share a GPU: trains a small GPT at every stage and compares with a plain loop. Not a test.

Started by test_ranks_sharing_a_gpu.py through the launcher. Rank 0 writes what it found as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lorica

STEPS, MICRO, ACCUMULATION, VOCAB, LENGTH = 20, 4, 2, 512, 64


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_a(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_b(x))))


class GPT(nn.Module):
    """A decoder with an untied head."""

    def __init__(self, dim: int = 256, num_blocks: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(num_blocks))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), tokens[:, 1:].flatten())


def micro_batch(step: int, micro_step: int, rank: int) -> Tensor:
    """Tokens [MICRO, LENGTH + 1] that this rank sees."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank)
    return torch.randint(0, VOCAB, (MICRO, LENGTH + 1), generator=generator).cuda()


def plain(world: int) -> list[float]:
    """Losses of a plain PyTorch loop over the batches of all ranks."""
    torch.manual_seed(3)
    model = GPT().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro_step in range(ACCUMULATION):
            for rank in range(world):
                loss = model(micro_batch(step, micro_step, rank)) / (world * ACCUMULATION)
                loss.backward()
                total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def sharded(stage: int, **zero: Any) -> tuple[list[float], str]:
    """Losses under ZeRO, averaged over ranks, and the transport."""
    torch.manual_seed(3)
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage, "overlap_comm": True, "stage3_param_persistence_threshold": 0, **zero},
        "lorica": {"units": {"min_numel": 1}},
    }
    engine, *_ = lorica.initialize(model=GPT(), config=config)
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro_step in range(ACCUMULATION):
            loss = engine(micro_batch(step, micro_step, engine.global_rank))
            engine.backward(loss)
            engine.step()
            total += loss.item() / ACCUMULATION
        dist.all_reduce(total)
        losses.append(float(total) / engine.world_size)
    transport = engine._parts.site.shard.name
    engine.destroy()
    return losses, transport


def main() -> None:
    """Run every case; rank 0 writes {case: {worst relative difference, transport}}."""
    torch.backends.cuda.matmul.allow_tf32 = False
    lorica.init_distributed()
    expected = plain(dist.get_world_size())
    cases: dict[str, dict[str, Any]] = {f"stage {s}": {"stage": s} for s in range(4)}
    cases["stage 2, optimizer on the host"] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    cases["stage 3, everything on the host"] = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    found = {}
    for name, options in cases.items():
        losses, transport = sharded(**options)
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        found[name] = {"worst": worst, "transport": transport, "last": losses[-1], "losses": losses}
    if dist.get_rank() == 0:
        with open(sys.argv[-1], "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
