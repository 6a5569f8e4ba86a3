"""The small models of the tests: each has one property that a training engine may trip over, and returns its loss.

A `Recipe` is a model and its data: `recipe.model()` is the same on every process, `recipe.batch(i)` is micro-batch i of
an endless stream, and `model(*batch)` is a scalar loss in fp32. Shapes: B batch, L length, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "reentrant", "non-reentrant"]
Batch = tuple[Tensor, ...]


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

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
    """A decoder: the head is its own Linear, one that shares the embedding's weight, or a function of that weight."""

    def __init__(
        self,
        dim: int = 32,
        num_blocks: int = 3,
        vocabulary: int = 64,
        context: int = 16,
        head: Literal["own", "tied", "functional"] = "own",
        checkpointing: Checkpointing = "none",
        compiled: str | None = None,
    ) -> None:
        super().__init__()
        self.head, self.checkpointing = head, checkpointing
        self.wte = nn.Embedding(vocabulary, dim, _weight=0.1 * torch.randn(vocabulary, dim))
        self.wpe = nn.Embedding(context, dim, _weight=0.1 * torch.randn(context, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads=2) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim)
        if head != "functional":
            self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        if head == "tied":
            self.lm_head.weight = self.wte.weight
        if compiled is not None:
            for block in self.blocks:
                block.compile(backend=compiled)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        inputs, targets = tokens_BL[:, :-1], tokens_BL[:, 1:]
        x_BLD = self.wte(inputs) + self.wpe.weight[: inputs.shape[1]]
        for block in self.blocks:
            x_BLD = self.run(block, x_BLD)
        x_BLD = self.norm(x_BLD)
        logits_BLV = F.linear(x_BLD, self.wte.weight) if self.head == "functional" else self.lm_head(x_BLD)
        return F.cross_entropy(logits_BLV.float().flatten(0, 1), targets.flatten())

    def run(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        """One block, checkpointed in the way the model was built for."""
        if self.checkpointing == "none":
            result = block(x_BLD)
        else:
            result = checkpoint(block, x_BLD, use_reentrant=self.checkpointing == "reentrant")
        assert isinstance(result, Tensor)
        return result


class MLP(nn.Module):
    """Layers of 2^14 weights and no biases: no padding anywhere, so bytes can be counted exactly."""

    def __init__(self, dim: int = 128, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(num_layers))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        x_BD = x_BD.to(self.layers[0].weight.dtype)
        for layer in self.layers:
            x_BD = x_BD + torch.tanh(layer(x_BD))
        return F.mse_loss(x_BD.float(), y_BD)


class Branching(nn.Module):
    """The data choose which of two layers runs; a third never runs. Ranks disagree about which one is unused."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.even, self.odd, self.never = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        branch = self.even if x_BD[0, 0] > 0 else self.odd
        x_BD = torch.tanh(self.first(x_BD.to(self.first.weight.dtype)))
        return F.mse_loss(self.last(torch.tanh(branch(x_BD))).float(), y_BD)


class Experts(nn.Module):
    """Blocks of experts of which the data choose one: ranks disagree about which experts run, and in which order."""

    def __init__(self, dim: int = 32, num_blocks: int = 2, num_experts: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(dim, 4 * dim), nn.Tanh(), nn.Linear(4 * dim, dim)) for _ in range(num_experts)
            )
            for _ in range(num_blocks)
        )

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        for depth, experts in enumerate(self.blocks):
            chosen = int(x_BD[0, depth].abs() * 10) % len(experts)
            x_BD = x_BD + experts[chosen](x_BD)
        return F.mse_loss(x_BD, y_BD)


class AnyOrder(nn.Module):
    """Blocks that run in the order that the data name; the same order on all ranks, another one in the next step."""

    def __init__(self, dim: int = 32, num_blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads=2) for _ in range(num_blocks))

    def forward(self, x_BD: Tensor, y_BD: Tensor, order: Tensor) -> Tensor:
        h_BLD = x_BD.unsqueeze(1)
        for index in order.tolist():
            h_BLD = self.blocks[index](h_BLD)
        return F.mse_loss(h_BLD.squeeze(1), y_BD)


class LowRank(nn.Module):
    """A frozen Linear with a trainable low-rank correction (LoRA)."""

    def __init__(self, dim: int, rank: int, base_dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(dim, dim).to(base_dtype).requires_grad_(False)
        self.down, self.up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.base(x_BD.to(self.base.weight.dtype)).to(x_BD.dtype) + self.up(self.down(x_BD))


class Frozen(nn.Module):
    """Frozen weights between trainable ones, and one block that is frozen altogether."""

    def __init__(self, dim: int = 32, base_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LowRank(dim, 4, base_dtype) for _ in range(3))
        self.blocks[1].requires_grad_(False)
        self.embed = nn.Linear(dim, dim).requires_grad_(False)

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        x_BD = self.embed(x_BD.to(self.embed.weight.dtype))
        for block in self.blocks:
            x_BD = x_BD + torch.tanh(block(x_BD))
        return F.mse_loss(x_BD.float(), y_BD)


class OddShapes(nn.Module):
    """Parameters of no element and of no dimension, and sizes that no world size divides."""

    def __init__(self, dim: int = 13) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0))
        self.empty_rows = nn.Parameter(torch.empty(0, dim))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.tensor(0.1))
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        x_BD = torch.cat([x_BD.to(self.scale.dtype), self.empty_rows * self.empty.sum()])
        for layer in self.layers:
            x_BD = x_BD + self.scale * torch.tanh(layer(x_BD)) + self.shift
        return F.mse_loss(x_BD.float(), y_BD)


class MixedDtypes(nn.Module):
    """Trainable weights of two dtypes in one block."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.exact = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.rough = nn.ModuleList(nn.Linear(dim, dim).to(torch.bfloat16) for _ in range(2))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        for exact, rough in zip(self.exact, self.rough, strict=True):
            x_BD = x_BD + torch.tanh(exact(x_BD)) + torch.tanh(rough(x_BD.to(torch.bfloat16))).float()
        return F.mse_loss(x_BD, y_BD)


class Buffers(nn.Module):
    """Batch normalisation: buffers that change in forward, and one that is an integer."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim)) for _ in range(2))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BD = x_BD + torch.tanh(layer(x_BD))
        return F.mse_loss(x_BD, y_BD)


class Nested(nn.Module):
    """ModuleLists in ModuleLists in a ModuleDict, and a bare parameter beside them."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.towers = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.ModuleList(nn.Linear(dim, dim) for _ in range(2)) for _ in range(2))
                for name in ("left", "right")
            }
        )

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        total_BD = torch.zeros_like(x_BD)
        for tower in self.towers.values():
            h_BD = x_BD * self.gain
            for floor in tower:
                for layer in floor:
                    h_BD = torch.tanh(layer(h_BD))
            total_BD = total_BD + h_BD
        return F.mse_loss(total_BD, y_BD)


class Repeated(nn.Module):
    """One block called several times in a forward (ALBERT), and a parameter that two modules share."""

    def __init__(self, dim: int = 32, num_calls: int = 3) -> None:
        super().__init__()
        self.num_calls = num_calls
        self.block = Block(dim, num_heads=2)
        self.enter, self.leave = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.leave.bias = self.enter.bias

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        h_BLD = self.enter(x_BD).unsqueeze(1)
        for _ in range(self.num_calls):
            h_BLD = self.block(h_BLD)
        return F.mse_loss(self.leave(h_BLD.squeeze(1)), y_BD)


def tokens(num_sequences: int = 2, length: int = 17, vocabulary: int = 64) -> Callable[[int], Batch]:
    """Sequences that a model can learn: each token follows from the one before it, with some noise."""

    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 + index)
        start = torch.randint(vocabulary, (num_sequences, 1), generator=generator)
        stride = 3 * torch.arange(length)
        noise = torch.randint(2, (num_sequences, length), generator=generator)
        return ((start + stride + noise) % vocabulary,)

    return batch


def vectors(dim: int = 32, num_rows: int = 4) -> Callable[[int], Batch]:
    """Inputs and targets of a fixed non-linear map."""

    def batch(index: int) -> Batch:
        x_BD = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(2000 + index))
        return x_BD, torch.sin(x_BD.flip(-1) * 2)

    return batch


def ordered(dim: int = 32, num_blocks: int = 4) -> Callable[[int], Batch]:
    """Vectors with an order of blocks that leaves one of them out and changes every fourth micro-batch."""
    plain = vectors(dim)

    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(3000 + index // 4)
        return *plain(index), torch.randperm(num_blocks, generator=generator)[:-1]

    return batch


@dataclass(frozen=True)
class Recipe:
    """A model, built the same way on every process, and its endless stream of micro-batches."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]

    def model(self) -> nn.Module:
        """A fresh model; the same values on every call in every process."""
        torch.manual_seed(7)
        return self.build()


def gpt(**options: Any) -> Recipe:
    """A GPT of the given options on token sequences."""
    return Recipe(lambda: GPT(**options), tokens())


RECIPES: dict[str, Recipe] = {
    "gpt": gpt(),
    "gpt, tied head": gpt(head="tied"),
    "gpt, functional head": gpt(head="functional"),
    "gpt, reentrant checkpointing": gpt(checkpointing="reentrant"),
    "gpt, non-reentrant checkpointing": gpt(checkpointing="non-reentrant"),
    "gpt, compiled blocks": gpt(compiled="aot_eager"),
    "gpt, inductor blocks": gpt(compiled="inductor"),
    "gpt, wide": Recipe(lambda: GPT(dim=64, vocabulary=128, context=32), tokens(length=33, vocabulary=128)),
    "mlp": Recipe(MLP, vectors(dim=128)),
    "branching": Recipe(Branching, vectors()),
    "experts": Recipe(Experts, vectors()),
    "blocks in any order": Recipe(AnyOrder, ordered()),
    "frozen": Recipe(Frozen, vectors()),
    "frozen, half-precision base": Recipe(lambda: Frozen(base_dtype=torch.bfloat16), vectors()),
    "odd shapes": Recipe(OddShapes, vectors(dim=13)),
    "mixed dtypes": Recipe(MixedDtypes, vectors()),
    "buffers": Recipe(Buffers, vectors()),
    "nested lists": Recipe(Nested, vectors()),
    "repeated block": Recipe(Repeated, vectors()),
}
