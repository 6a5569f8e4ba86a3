"""The model of the CPU comparison: a small pre-norm GPT with a tied head, in plain PyTorch, and its random tokens.

Shapes: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Size(NamedTuple):
    """What makes a GPT of a size."""

    dim: int
    num_blocks: int
    num_heads: int
    vocabulary: int
    length: int


SIZES = {
    "tiny": Size(dim=64, num_blocks=4, num_heads=2, vocabulary=512, length=32),  # for trying the benchmark itself
    "25m": Size(dim=512, num_blocks=6, num_heads=8, vocabulary=12_288, length=256),
    "110m": Size(dim=768, num_blocks=12, num_heads=12, vocabulary=32_768, length=256),
}


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind its norm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, dim = x_BLD.shape
        heads = (batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = self.qkv(self.norm1(x_BLD)).view(heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BLD = x_BLD + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return x_BLD + self.down(F.gelu(self.up(self.norm2(x_BLD))))


class GPT(nn.Module):
    """Tokens [B, L + 1] in, mean cross-entropy of the next token out (fp32)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(size.vocabulary, size.dim), nn.Embedding(size.length, size.dim)
        self.blocks = nn.ModuleList(Block(size.dim, size.num_heads) for _ in range(size.num_blocks))
        self.norm = nn.LayerNorm(size.dim)
        self.head = nn.Linear(size.dim, size.vocabulary, bias=False)
        self.head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        inputs, targets = tokens_BL[:, :-1], tokens_BL[:, 1:]
        x_BLD = self.wte(inputs) + self.wpe.weight[: inputs.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits_BLV = self.head(self.norm(x_BLD))
        return F.cross_entropy(logits_BLV.float().flatten(0, 1), targets.flatten())


def build(size: str) -> GPT:
    """The GPT of that size; the same values in every process."""
    torch.manual_seed(0)
    return GPT(SIZES[size])


def tokens(size: str, batch_size: int, step: int, rank: int) -> Tensor:
    """The [B, L + 1] tokens that `rank` sees in `step`."""
    shape = SIZES[size]
    generator = torch.Generator().manual_seed(1_000_000 * rank + step)
    return torch.randint(shape.vocabulary, (batch_size, shape.length + 1), generator=generator)
