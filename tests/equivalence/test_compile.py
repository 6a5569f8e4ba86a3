"""torch.compile of blocks by configuration: the oracle's training, one compilation per kind of block, no trace left.

The models of `tests/models.py`; each block is a unit. Compilations are counted by Dynamo itself.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lorica
from tests.equivalence.training import (
    Trained,
    Training,
    expected,
    largest_difference,
    outcome,
    relative_difference,
    start,
    train,
)
from tests.harness import Ranks
from tests.models import GPT, Block

STAGES = [pytest.param(stage, id=f"stage {stage}") for stage in range(4)]
GPT_RUN = Training(recipe="gpt", num_steps=4)


def config_of(training: Training, **compile_keys: Any) -> dict[str, Any]:
    """The training's configuration with compiled blocks."""
    return training.config() | {"compile": {"enabled": True, "backend": "eager"} | compile_keys}


def step(engine: Any, training: Training, number: int) -> float:
    """One ordinary step; returns this rank's loss."""
    loss = engine(*training.micro_batch(number, 0, dist.get_rank()))
    engine.backward(loss)
    engine.step()
    return float(loss.item())


def forget() -> None:
    """Make Dynamo a stranger to all that ran in this process before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compilations() -> int:
    """Graphs that Dynamo has made since then."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def train_compiled(training: Training, **compile_keys: Any) -> Any:
    """The loop of the README with compiled blocks, by a Dynamo that remembers nothing."""
    forget()
    return train(training, config_of(training, **compile_keys))


# Numbers --------------------------------------------------------------------------------------------------------------


CHECKPOINTED = ["gpt, reentrant checkpointing", "gpt, non-reentrant checkpointing"]
CASES = [
    *(pytest.param("gpt", stage, id=f"gpt, stage {stage}") for stage in range(4)),
    *(pytest.param(recipe, 3, id=f"{recipe}, stage 3") for recipe in (*CHECKPOINTED, "experts")),
]


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_compiled_blocks_train_as_the_oracle(
    ranks: Callable[[int], Ranks], trained: Trained, recipe: str, stage: int
) -> None:
    training = replace(GPT_RUN, recipe=recipe, stage=stage)
    run = outcome(ranks(2).run(train_compiled, training=training, backend="aot_eager"))
    assert relative_difference(run.losses, trained.oracle(training).losses) < 1e-6
    assert largest_difference(run.parameters, trained.oracle(training).parameters) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_blocks_that_inductor_compiles_train_as_the_oracle(ranks: Callable[[int], Ranks], stage: int) -> None:
    training = replace(GPT_RUN, stage=stage)
    run = outcome(ranks(2).run(train_compiled, training=training, backend="inductor", limit_s=600.0))
    reference = expected(training)  # inductor fuses, so its own rounding is in the difference
    assert relative_difference(run.losses, reference.losses) < 5e-6
    assert largest_difference(run.parameters, reference.parameters) < 5e-4


# Compilations ---------------------------------------------------------------------------------------------------------


def compilations_of_five_steps(training: Training) -> list[int]:
    """How many graphs there are after each of five steps."""
    forget()
    engine, counts = start(training, config_of(training)), []
    for number in range(5):
        step(engine, training, number)
        counts.append(compilations())
    engine.destroy()
    return counts


# A reentrant checkpoint runs every block twice: without gradients in forward, with them in backward. The first expert's
# input needs no gradient, those of the others do.
GRAPHS = {"gpt": 1, "gpt, non-reentrant checkpointing": 1, "gpt, reentrant checkpointing": 2, "experts": 2}


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_equal_blocks_are_compiled_once_and_never_again(ranks: Callable[[int], Ranks], recipe: str, stage: int) -> None:
    for counts in ranks(2).run(compilations_of_five_steps, training=Training(recipe=recipe, stage=stage)):
        assert counts == [GRAPHS[recipe]] * 5


class Mixed(nn.Module):
    """Twelve blocks of ten sizes, more than the variants that Dynamo keeps of one function."""

    WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 80, 8)

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8)) for width in self.WIDTHS
        )

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = self.enter(x_BD)
        for block in self.blocks:
            x_BD = x_BD + block(x_BD)
        return x_BD.square().mean()


def compilations_of_many_sizes(stage: int) -> tuple[int, int]:
    """Graphs after the first and after the third step of `Mixed`."""
    forget()
    training = Training(stage=stage)
    engine, *_ = lorica.initialize(model=Mixed(), config=config_of(training))
    counts = []
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 8)))
        engine.step()
        counts.append(compilations())
    engine.destroy()
    return counts[0], counts[-1]


@pytest.mark.parametrize("stage", [0, 3])
def test_each_size_of_block_is_compiled_once_however_many_there_are(ranks: Callable[[int], Ranks], stage: int) -> None:
    sizes = len(set(Mixed.WIDTHS))
    assert ranks(2).run(compilations_of_many_sizes, stage=stage) == [(sizes, sizes)] * 2


def compilations_of_eval(training: Training) -> list[int]:
    """Graphs after steps, after evaluations, after steps again; evaluation gives what uncompiled blocks give."""
    forget()
    engine, plain = start(training, config_of(training)), start(training)
    counts = []
    for number in range(2):
        step(engine, training, number)
        step(plain, training, number)
        counts.append(compilations())
        with torch.no_grad():
            batch = training.micro_batch(9, 0, dist.get_rank())
            torch.testing.assert_close(engine.eval()(*batch), plain.eval()(*batch), rtol=1e-6, atol=0.0)
        engine.train()
        plain.train()
        counts.append(compilations())
    engine.destroy()
    plain.destroy()
    return counts


@pytest.mark.parametrize("stage", [0, 3])
def test_evaluation_is_compiled_once_beside_training(ranks: Callable[[int], Ranks], stage: int) -> None:
    assert ranks(2).run(compilations_of_eval, training=Training(stage=stage)) == [[1, 2, 2, 2]] * 2


# engine.compile and the way back --------------------------------------------------------------------------------------


def alone(model: nn.Module, **config: Any) -> Any:
    """An engine of one rank."""
    training = Training(stage=2, world_size=1)
    engine, *_ = lorica.initialize(model=model, config=training.config() | config)
    return engine


def call_compile_by_hand() -> None:
    """DeepSpeed's call: off, on with one backend, on with another; then off with the engine."""
    forget()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.append("mine")
        return graph.forward

    engine = alone(GPT())
    block = engine.module.blocks[0]
    assert not engine.is_compiled and "forward" not in vars(block)
    batch = Training().micro_batch(0, 0, 0)
    plain = engine(*batch)
    engine.compile(backend=backend, compile_kwargs={"dynamic": False})
    assert engine.is_compiled
    torch.testing.assert_close(engine(*batch), plain, rtol=1e-6, atol=0.0)
    assert seen == ["mine"]
    engine.compile(backend="eager", compile_kwargs={"fullgraph": False})
    torch.testing.assert_close(engine(*batch), plain, rtol=1e-6, atol=0.0)
    assert seen == ["mine"]
    engine.destroy()
    assert not engine.is_compiled and "forward" not in vars(block)


def test_engine_compile_takes_a_backend_and_can_be_called_again(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).run(call_compile_by_hand)


def refuse_what_is_not_there() -> None:
    """Schedules, compiled autograd and CUDA graphs are refused; nothing is compiled then."""
    engine = alone(GPT())
    for arguments in (
        {"schedule": [(0, [])]},
        {"compiled_autograd_enabled": True},
        {"compile_kwargs": {"mode": "reduce-overhead"}},
        {"compile_kwargs": {"options": {"triton.cudagraphs": True}}},
        {"backend": "cudagraphs"},
    ):
        with pytest.raises(NotImplementedError, match="Fix: "):
            engine.compile(**arguments)
    assert not engine.is_compiled
    engine.destroy()


def test_engine_compile_refuses_what_is_not_there(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).run(refuse_what_is_not_there)


class Breaking(Block):
    """A block that asks for a value in the middle."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # the line that the error must name
        return super().forward(x_BLD)


def break_the_graph() -> None:
    """With `fullgraph` the error names block, file and line; without it the block runs in pieces."""
    forget()
    model, batch = GPT(), Training().micro_batch(0, 0, 0)
    model.blocks[1] = Breaking(32, num_heads=2)
    plain = model(*batch).detach()
    engine = alone(model, compile={"enabled": True, "backend": "eager"})
    with pytest.raises(RuntimeError, match=r"Block blocks\.1 \(Breaking\): .*test_compile\.py:\d+\. Fix: "):
        engine(*batch)
    engine.compile(compile_kwargs={"fullgraph": False})
    torch.testing.assert_close(engine(*batch), plain, rtol=1e-6, atol=0.0)
    engine.destroy()


def test_a_graph_break_in_a_block_is_an_error_that_says_where(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).run(break_the_graph)


class Numbered(Block):
    """A block that reads a number of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(32, num_heads=2)
        self.number = number

    def forward(self, x_BLD: Tensor) -> Tensor:
        return super().forward(x_BLD) * (1 + self.number)


def compile_numbered_blocks() -> None:
    """More variants than Dynamo keeps: an error, or uncompiled blocks without `fullgraph`."""
    forget()
    model, batch = GPT(), Training().micro_batch(0, 0, 0)
    model.blocks = nn.ModuleList(Numbered(number) for number in range(10))
    plain = model(*batch).detach()
    engine = alone(model, compile={"enabled": True, "backend": "eager"})
    with pytest.raises(RuntimeError, match=r"Block blocks\.8 \(Numbered\): .*recompile_limit.* Fix: "):
        engine(*batch)
    engine.compile(compile_kwargs={"fullgraph": False})
    torch.testing.assert_close(engine(*batch), plain, rtol=1e-6, atol=0.0)
    engine.destroy()


def test_too_many_variants_of_a_block_are_an_error_that_says_so(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).run(compile_numbered_blocks)


def keep_a_forward_of_the_instance() -> None:
    """A forward that somebody hung on a block is what is compiled, and is back afterwards."""
    forget()
    model, batch = GPT(), Training().micro_batch(0, 0, 0)
    block, usual = model.blocks[1], model.blocks[1].forward
    block.forward = lambda x_BLD: usual(x_BLD) * 0.5
    own, plain = block.forward, model(*batch).detach()
    engine = alone(model, compile={"enabled": True, "backend": "eager"})
    assert block.forward is not own
    torch.testing.assert_close(engine(*batch), plain, rtol=1e-6, atol=0.0)
    engine.destroy()
    assert block.forward is own


def test_a_forward_of_the_instance_is_compiled_and_restored(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).run(keep_a_forward_of_the_instance)


def copy_a_compiled_model() -> None:
    """A copy (an average of weights) runs its own weights, not those of the compiled original."""
    forget()
    engine, batch = alone(GPT(), compile={"enabled": True, "backend": "eager"}), Training().micro_batch(0, 0, 0)
    before = engine(*batch).detach()
    averaged = copy.deepcopy(engine.module)
    for number in range(3):
        step(engine, Training(world_size=1), number)
    assert not torch.equal(engine(*batch), before)
    torch.testing.assert_close(averaged(*batch), before, rtol=1e-6, atol=0.0)
    engine.destroy()


def test_a_copy_of_a_compiled_model_has_its_own_weights(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).run(copy_a_compiled_model)


class Tied(nn.Module):
    """The second block uses a weight of the first; the third is on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3))
        self.blocks[1].get_submodule("0").weight = self.blocks[0].get_submodule("0").weight

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BD = x_BD + block(x_BD)
        return F.mse_loss(x_BD, y_BD)


def compile_tied_blocks() -> tuple[list[bool], float, float]:
    """Which blocks are compiled, and the loss with and without."""
    forget()
    torch.manual_seed(1)
    model, batch = Tied(), (torch.ones(2, 8), torch.zeros(2, 8))
    plain = model(*batch).item()
    engine, *_ = lorica.initialize(model=model, config=config_of(Training(stage=3)))
    compiled = ["forward" in vars(block) for block in engine.module.blocks]
    loss = engine(*batch)
    engine.backward(loss)
    engine.step()
    engine.destroy()
    return compiled, loss.item(), plain


def test_blocks_that_share_parameters_with_others_are_left_as_they_are(ranks: Callable[[int], Ranks]) -> None:
    for compiled, loss, plain in ranks(2).run(compile_tied_blocks):
        assert compiled == [False, False, True]
        assert loss == pytest.approx(plain, rel=1e-6)


def forget_a_compiled_engine(training: Training) -> list[str]:
    """Kinds of things that are still alive after a compiled engine was destroyed."""
    forget()
    engine = start(training, config_of(training, backend="aot_eager"))
    step(engine, training, 0)
    planes = [flat.full for unit in engine._parts.units for flat in unit.flats]
    watched = [weakref.ref(x) for x in (engine, engine.module, *engine.module.blocks, *planes)]
    engine.destroy()
    del engine, planes
    gc.collect()
    return [type(ref()).__name__ for ref in watched if ref() is not None]


@pytest.mark.parametrize("stage", [0, 3])
def test_destroy_leaves_nothing_of_compiled_blocks_alive(ranks: Callable[[int], Ranks], stage: int) -> None:
    assert ranks(2).run(forget_a_compiled_engine, training=Training(stage=stage)) == [[], []]
