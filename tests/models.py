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


class Segments(nn.Module):
    """Checkpoints around pairs of blocks, around all of them, and inside one of them."""

    def __init__(self, use_reentrant: bool, dim: int = 32) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.enter = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads=2) for _ in range(4))

    def pair(self, start: int, h_BLD: Tensor) -> Tensor:
        """Two blocks, the second one under a checkpoint of its own."""
        inner = checkpoint(self.blocks[start + 1], self.blocks[start](h_BLD), use_reentrant=self.use_reentrant)
        assert isinstance(inner, Tensor)
        return inner

    def all_pairs(self, h_BLD: Tensor) -> Tensor:
        """Both pairs, each checkpointed."""
        for start in (0, 2):
            h_BLD = checkpoint(self.pair, start, h_BLD, use_reentrant=self.use_reentrant)
        return h_BLD

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        h_BLD = checkpoint(self.all_pairs, self.enter(x_BD).unsqueeze(1), use_reentrant=self.use_reentrant)
        assert isinstance(h_BLD, Tensor)
        return F.mse_loss(h_BLD.squeeze(1), y_BD)


class TwoFaced(nn.Module):
    """A block with keyword arguments and several outputs, of which the model uses some."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.main, self.side, self.unused = nn.Linear(dim, dim), nn.Linear(dim, 1), nn.Linear(dim, dim)

    def forward(self, x_BD: Tensor, *, options: dict[str, Any]) -> dict[str, Any]:
        h_BD = torch.tanh(self.main(x_BD)) * options["gain"]
        return {"hidden": x_BD + h_BD, "extras": (self.side(h_BD), [self.unused(h_BD), None, "text"])}


class Structured(nn.Module):
    """Blocks that speak in dictionaries, tuples and lists."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoFaced(dim) for _ in range(3))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        sides = []
        for block in self.blocks:
            output = block(x_BD, options={"gain": 0.5})
            x_BD = output["hidden"]
            sides.append(output["extras"][0])
        return F.mse_loss(x_BD, y_BD) + 0.01 * torch.stack(sides).square().mean()


class SharedAcross(nn.Module):
    """Two blocks that own the same weight, and a weight that the model reads though a block owns it."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim)) for _ in range(3)
        )
        last, first = self.blocks[2].get_submodule("2"), self.blocks[0].get_submodule("0")
        last.weight = first.weight

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        h_BD = x_BD
        for block in self.blocks:
            h_BD = h_BD + block(h_BD)
        return F.mse_loss(F.linear(h_BD, self.blocks[1].get_submodule("0").weight), y_BD)


class Autocast(nn.Module):
    """fp32 weights, bf16 matrix products by autocast."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.inner = Nested(dim)

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.inner(x_BD, y_BD)
        assert isinstance(loss, Tensor)
        return loss.float()


class Trap(torch.autograd.Function):
    """The identity, but its backward raises if the input is marked with a huge number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marked: bool) -> Tensor:
        ctx.marked = marked
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.marked:
            raise ArithmeticError("the backward of this batch fails")
        return grad, None


class Fragile(nn.Module):
    """Fails on marked batches, in the middle of forward (x = 1000) or of backward (x = 2000)."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for _ in range(4))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        mark = x_BD[0, 0].item()
        for depth, block in enumerate(self.blocks):
            if depth == 2 and mark == 1000:
                raise ArithmeticError("the forward of this batch fails")
            x_BD = Trap.apply(block(x_BD), depth == 2 and mark == 2000)
        return F.mse_loss(x_BD, y_BD)


def with_hooks(model: nn.Module) -> nn.Module:
    """The user's own hooks on parameters: they change gradients."""
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * 0.5 + 0.001)
    return model


class SelfInitialised(nn.Module):
    """The constructor changes the weights of its submodules: by `apply`."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.apply(self.initialise)

    @staticmethod
    def initialise(module: nn.Module) -> None:
        """Normal weights and no bias, as GPTs have it."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.zeros_(module.bias)

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BD = x_BD + torch.tanh(layer(x_BD))
        return F.mse_loss(x_BD, y_BD)


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
    "nested reentrant checkpoints": Recipe(lambda: Segments(use_reentrant=True), vectors()),
    "nested non-reentrant checkpoints": Recipe(lambda: Segments(use_reentrant=False), vectors()),
    "structured outputs": Recipe(Structured, vectors()),
    "weights shared across blocks": Recipe(SharedAcross, vectors()),
    "autocast": Recipe(Autocast, vectors()),
    "fragile": Recipe(Fragile, vectors()),
    "hooks on parameters": Recipe(lambda: with_hooks(Nested()), vectors()),
    "self-initialised": Recipe(SelfInitialised, vectors()),
    "repeated block": Recipe(Repeated, vectors()),
}
