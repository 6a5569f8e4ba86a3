"""Activations in host memory: the same training, fewer tensors held by autograd, errors where values would be lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.core.activations import HostActivations
from lorica.core.streams import HostStreams

WIDTH, BATCH = 256, 1024  # a saved input is 1 MiB: what is large enough to leave


class Block(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.dropout(torch.tanh(self.up(x)), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def train(stage: int, reentrant: bool | None, *, offload: bool, accumulation: int = 1) -> tuple[list[float], int]:
    """Losses of four steps, and the bytes that went to host memory."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(reentrant) for _ in range(3)))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "lorica": {"offload": {"activations": offload}, "units": {"min_numel": 1}},
    }
    engine, *_ = lorica.initialize(model=model, model_parameters=model.parameters(), config=config)
    losses = []
    for number in range(4 * accumulation):
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(number), requires_grad=True)
        loss = engine(x * 1.0).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    moved = engine._activations.moved_bytes if engine._activations is not None else 0
    engine.destroy()
    return losses, moved


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["whole", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_training_is_the_same(stage: int, reentrant: bool | None) -> None:
    losses, moved = train(stage, reentrant, offload=True, accumulation=2)
    assert losses == train(stage, reentrant, offload=False, accumulation=2)[0]
    saved = 8 * BATCH * WIDTH * 4  # of the eight forwards, in bytes
    assert moved == (saved * 3 if reentrant is not None else moved)  # the input of every checkpointed block
    assert moved >= saved * 3


def test_buffers_are_used_again() -> None:
    made: list[int] = []

    def alloc(numel: int, dtype: torch.dtype) -> Tensor:
        made.append(numel)
        return torch.zeros(numel, dtype=dtype)

    activations = HostActivations(HostStreams(), alloc, lambda tensor: isinstance(tensor, nn.Parameter))
    layer = nn.Linear(WIDTH, WIDTH)
    for _ in range(5):
        x = torch.randn(BATCH, WIDTH, requires_grad=True)
        with activations.saving():
            y = torch.tanh(layer(torch.tanh(x)))
        y.sum().backward()
        del y
    assert len(made) <= 4


def test_weights_and_small_tensors_stay() -> None:
    activations = HostActivations(HostStreams(), lambda n, d: torch.zeros(n, dtype=d), lambda t: t is weight)
    weight = torch.randn(1024, 1024, requires_grad=True)
    small = torch.randn(4, 1024, requires_grad=True)
    with activations.saving():
        (small @ weight).sum().backward()
    assert activations.moved_bytes == 0


def test_a_tensor_written_to_before_it_left_is_an_error() -> None:
    activations = HostActivations(HostStreams(), lambda n, d: torch.zeros(n, dtype=d), lambda tensor: False)
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    with activations.saving():
        y = torch.exp(x * 1.0)
        y.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an in-place operation"):
            y.sum().backward()


def test_a_graph_can_be_used_twice() -> None:
    activations = HostActivations(HostStreams(), lambda n, d: torch.zeros(n, dtype=d), lambda tensor: False)
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    with activations.saving():
        y = torch.sin(x * 3.0).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    assert torch.equal(first, 3 * torch.cos(3 * x.detach()))


def test_lengths_that_vary_need_no_more_buffers_than_one() -> None:
    made: list[int] = []

    def alloc(numel: int, dtype: torch.dtype) -> Tensor:
        made.append(numel)
        return torch.zeros(numel, dtype=dtype)

    activations = HostActivations(HostStreams(), alloc, lambda tensor: False, min_bytes=1)
    for length in (300, 310, 290, 305, 5, 337):
        x = torch.randn(length, 64, requires_grad=True)
        with activations.saving():
            y = torch.tanh(torch.tanh(x))
        y.sum().backward()
        del y
        assert torch.equal(x.grad, torch.autograd.grad(torch.tanh(torch.tanh(x)).sum(), x)[0])  # type: ignore[arg-type]
        assert len(activations._free) == 2
    assert len(made) == 4, "the first two, and two in their place that are an eighth longer than they had to be"


@pytest.mark.parametrize("layout", ["transposed", "expanded", "contiguous"])
def test_strides_are_kept_where_a_tensor_fills_its_memory(layout: str) -> None:
    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(ctx.saved_tensors[0].clone(memory_format=torch.preserve_format))
            strides.append(ctx.saved_tensors[0].stride())
            return grad

    seen: list[Tensor] = []
    strides: list[tuple[int, ...]] = []
    activations = HostActivations(
        HostStreams(), lambda n, d: torch.zeros(n, dtype=d), lambda tensor: False, min_bytes=1
    )
    base = torch.randn(1, 32, requires_grad=True)
    x = {"transposed": (base * torch.ones(16, 1)).t(), "expanded": base.expand(16, 32), "contiguous": base * 1.0}[
        layout
    ]
    with activations.saving():
        Look.apply(x).sum().backward()
    assert torch.equal(seen[0], x)
    assert strides == [(32, 1) if layout == "expanded" else x.stride()]
