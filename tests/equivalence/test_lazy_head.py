"""Training with a lazy head is training: every stage follows the oracle, the loss inside or outside of the forward.

Two ranks, fp32 unless said otherwise, tolerance 1e-6 as in test_ordinary_use.py. `Counted` counts the logits that were
formed: none, wherever the model only wants its loss.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lorica
from lorica.core.parameter import ShardedParameter
from lorica.kernels.deferred import Deferred
from lorica.kernels.lazy_logits import LazyLogits
from lorica.ops.inject import whole
from lorica.ops.linear_cross_entropy import LazyHead
from tests.equivalence.test_matrix import LOSS_TOLERANCE, NORM_TOLERANCE
from tests.equivalence.test_ordinary_use import follows, is_same
from tests.equivalence.training import (
    Report,
    Trained,
    Training,
    expected,
    finish,
    outcome,
    record_step,
    relative_difference,
    rms_difference,
    train_engine,
)
from tests.harness import Ranks
from tests.models import GPT, RECIPES, tokens

STAGES = [pytest.param(stage, id=f"stage {stage}") for stage in range(4)]
PLAIN = Training(recipe="gpt", num_steps=4)
LARGE = 2**20  # elements from which a head is a unit of its own


class Counted:
    """Counts deferred tensors that are asked for their values."""

    def __enter__(self) -> list[Deferred]:
        self.formed, found = Deferred.formed, []

        def formed(tensor: Deferred) -> Tensor:
            found.append(tensor)
            return self.formed(tensor)

        Deferred.formed = formed  # type: ignore[method-assign]
        return found

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        Deferred.formed = self.formed  # type: ignore[method-assign]


def start(training: Training, model: Any, *, lazy: bool = True, hook: Any = whole, **zero: Any) -> Any:
    """An engine for a model whose head is lazy; further keys are those of `zero_optimization`."""
    if lazy:
        LazyHead.attach(model.lm_head, whole=hook)
    config = training.config()
    config["zero_optimization"] |= zero
    engine, *_ = lorica.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


# The loss inside ------------------------------------------------------------------------------------------------------


def train_inside(training: Training) -> tuple[Report, int]:
    """The README's loop."""
    engine = start(training, RECIPES[training.recipe].model())
    with Counted() as formed:
        report = train_engine(engine, training)
    return report, len(formed)


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [(recipe, stage) for recipe in ("gpt", "gpt, tied head") for stage in range(4)],
)
def test_a_model_trains_as_the_oracle_and_forms_no_logits(
    ranks: Callable[[int], Ranks], trained: Trained, recipe: str, stage: int
) -> None:
    training = replace(PLAIN, recipe=recipe, stage=stage, accumulation=2)
    results = ranks(2).run(train_inside, training=training)
    follows(outcome([report for report, _ in results]), trained.oracle(training))
    assert [count for _, count in results] == [0, 0]


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 0), ("bf16", 3), ("fp16", 2)])
def test_half_precision_trains_as_the_oracle(
    ranks: Callable[[int], Ranks], trained: Trained, precision: Any, stage: int
) -> None:
    training = replace(PLAIN, recipe="gpt, tied head", stage=stage, precision=precision)
    results = ranks(2).run(train_inside, training=training)
    run, reference = outcome([report for report, _ in results]), trained.oracle(training)
    assert relative_difference(run.losses, reference.losses) < LOSS_TOLERANCE[precision]
    assert relative_difference(run.norms, reference.norms) < NORM_TOLERANCE[precision]
    assert rms_difference(run.parameters, reference.parameters) < 3e-3
    assert run.scales == reference.scales and [count for _, count in results] == [0, 0]


# A head that is a unit of its own -------------------------------------------------------------------------------------


class Wide(GPT):
    """A GPT whose head is large; another unit may run between head and loss, and the loss may be one for each row."""

    def __init__(self, tail: bool, row_by_row: bool) -> None:
        super().__init__(dim=32, num_blocks=1, vocabulary=LARGE // 32)
        self.tail = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 1)) if tail else None
        self.reduction = "none" if row_by_row else "mean"
        self.head_was_hidden: list[bool] = []

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_BLD = self.wte(tokens_BL[:, :-1]) + self.wpe.weight[: tokens_BL.shape[1] - 1]
        x_BLD = self.norm(self.blocks[0](x_BLD))
        logits_BLV = self.lm_head(x_BLD)
        extra = 0.0 if self.tail is None else self.tail(x_BLD).square().mean()
        self.head_was_hidden.append(isinstance(self.lm_head.weight, ShardedParameter))
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten(), reduction=self.reduction)
        return loss.mean() + extra


def train_wide(training: Training, tail: bool, row_by_row: bool, lazy: bool) -> tuple[Report, int, bool]:
    """The README's loop; stage 3 keeps nothing that it can gather again."""
    torch.manual_seed(7)
    model, report, batch = Wide(tail, row_by_row), Report(), tokens()
    engine = start(training, model, lazy=lazy, hook=None, stage3_max_reuse_distance=0)
    assert any(unit.name == "lm_head" for unit in engine._parts.units)
    with Counted() as formed:
        for step in range(training.num_steps):
            loss = engine(*batch(2 * step + dist.get_rank()))
            engine.backward(loss)
            engine.step()
            record_step(engine, report, [loss.item()], 1.0)
    return finish(engine, report), len(formed), model.head_was_hidden[-1]


@pytest.mark.parametrize("row_by_row", [False, True], ids=["one loss", "a loss for each row"])
@pytest.mark.parametrize("tail", [False, True], ids=["the head is last", "another unit follows"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_head_that_is_freed_after_its_forward_is_there_for_the_loss(
    ranks: Callable[[int], Ranks], stage: int, tail: bool, row_by_row: bool
) -> None:
    arguments = {"training": replace(PLAIN, stage=stage, num_steps=3), "tail": tail, "row_by_row": row_by_row}
    lazy = ranks(2).run(train_wide, lazy=True, **arguments)
    plain = ranks(2).run(train_wide, lazy=False, **arguments)
    follows(outcome([report for report, *_ in lazy]), outcome([report for report, *_ in plain]))
    assert [count for _, count, _ in lazy] == [0, 0]
    assert [hidden for *_, hidden in lazy] == [stage == 3 and tail] * 2, "the engine no longer frees this head"


# The loss outside -----------------------------------------------------------------------------------------------------


class Logits(GPT):
    """A GPT that returns its logits."""

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_BLD = self.wte(tokens_BL) + self.wpe.weight[: tokens_BL.shape[1]]
        for block in self.blocks:
            x_BLD = self.run(block, x_BLD)
        logits = self.lm_head(self.norm(x_BLD))
        assert isinstance(logits, Tensor)
        return logits


def returning_logits(tied: bool) -> nn.Module:
    """The model of the recipe "gpt" (or "gpt, tied head"), without its loss."""
    torch.manual_seed(7)
    return Logits(head="tied" if tied else "own")


def fused(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The loss as models have it."""
    return F.cross_entropy(logits_BLV.float().flatten(0, 1), targets_BL.flatten())


def row_by_row(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """A loss for each token first: its backward needs the head again."""
    return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="none").mean()


def by_hand(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """A loss that needs the logits."""
    return -logits_BLV.log_softmax(-1).gather(-1, targets_BL.unsqueeze(-1)).mean()


def evaluated_first(engine: Any, tokens_BL: Tensor, logits_BLV: Tensor) -> None:
    """Another forward between forward and loss; at stage 3 it frees what the first one left."""
    with torch.no_grad():
        engine.module(tokens_BL)


def nothing(engine: Any, tokens_BL: Tensor, logits_BLV: Tensor) -> None:
    """The loss follows at once."""


def train_outside(
    training: Training,
    tied: bool,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    between: Callable[[Any, Tensor, Tensor], None],
    in_torch_style: bool,
) -> tuple[Report, int]:
    """The user's own loss, of what the engine returned."""
    engine, report = start(training, returning_logits(tied)), Report()
    with Counted() as formed:
        for step in range(training.num_steps):
            (tokens_BL,) = training.micro_batch(step, 0, dist.get_rank())
            logits_BLV = engine(tokens_BL[:, :-1])
            assert isinstance(logits_BLV, LazyLogits)
            between(engine, tokens_BL[:, :-1], logits_BLV)
            loss = loss_of(logits_BLV, tokens_BL[:, 1:])
            loss.backward() if in_torch_style else engine.backward(loss)
            engine.step()
            record_step(engine, report, [loss.item()], 1.0)
    return finish(engine, report), len(formed)


OUTSIDE = {
    "at once": (False, fused, nothing, False),
    "tied, after an evaluation": (True, fused, evaluated_first, True),
    "row by row": (True, row_by_row, evaluated_first, False),
    "by hand": (False, by_hand, evaluated_first, False),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", OUTSIDE)
def test_a_loss_outside_of_the_forward_trains_as_the_oracle(
    ranks: Callable[[int], Ranks], trained: Trained, how: str, stage: int
) -> None:
    tied, loss_of, between, in_torch_style = OUTSIDE[how]
    training = replace(PLAIN, recipe="gpt, tied head" if tied else "gpt", stage=stage)
    arguments = {"tied": tied, "loss_of": loss_of, "between": between, "in_torch_style": in_torch_style}
    results = ranks(2).run(train_outside, training=training, **arguments)
    follows(outcome([report for report, _ in results]), trained.oracle(training))
    assert all((count == 0) == (loss_of is not by_hand) for _, count in results)


def train_interleaved(training: Training) -> Report:
    """Two forwards, then two losses and two backwards, one after the other."""
    config = replace(training, accumulation=1)
    engine, report = start(config, returning_logits(tied=True)), Report()
    for step in range(training.num_steps):
        batches = [training.micro_batch(step, k, dist.get_rank())[0] for k in range(training.accumulation)]
        outputs = [engine(tokens_BL[:, :-1]) for tokens_BL in batches]
        losses = []
        for logits_BLV, tokens_BL in zip(outputs, batches, strict=True):
            losses.append(fused(logits_BLV, tokens_BL[:, 1:]))
            engine.backward(losses[-1] / training.accumulation)
        engine.step()
        record_step(engine, report, [loss.item() for loss in losses], 1.0)
    return finish(engine, report)


@pytest.mark.parametrize("stage", STAGES)
def test_graphs_may_overlap(ranks: Callable[[int], Ranks], trained: Trained, stage: int) -> None:
    training = replace(PLAIN, recipe="gpt, tied head", stage=stage, accumulation=2)
    follows(outcome(ranks(2).run(train_interleaved, training=training)), trained.oracle(training))


def use_without_a_hook(training: Training) -> str:
    """What somebody reads who attaches a head without telling it how to gather, and needs it outside."""
    engine = start(training, returning_logits(tied=True), hook=None)
    tokens_BL = training.micro_batch(0, 0, 0)[0]
    logits_BLV = engine(tokens_BL[:, :-1])
    evaluated_first(engine, tokens_BL[:, :-1], logits_BLV)
    with pytest.raises(RuntimeError) as raised:
        fused(logits_BLV, tokens_BL[:, 1:])
    engine.destroy()
    return str(raised.value)


def test_without_a_way_to_gather_the_error_says_what_to_do(ranks: Callable[[int], Ranks]) -> None:
    for message in ranks(2).run(use_without_a_hook, training=replace(PLAIN, stage=3)):
        assert "sharded over the ranks" in message and "GatheredParameters" in message


# Memory ---------------------------------------------------------------------------------------------------------------


def what_is_left(training: Training) -> int:
    """Hidden states that are alive after loss and logits are gone, without the garbage collector's help."""
    engine = start(training, returning_logits(tied=False))
    kept: list[weakref.ref[Tensor]] = []
    engine.module.norm.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        for step in range(2):
            (tokens_BL,) = training.micro_batch(step, 0, 0)
            logits_BLV = engine(tokens_BL[:, :-1])
            logits_BLV.detach().sum()
            loss = fused(logits_BLV, tokens_BL[:, 1:])
            del logits_BLV
            engine.backward(loss)
            engine.step()
            del loss
        return sum(reference() is not None for reference in kept)
    finally:
        gc.enable()
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_outlives_a_step(ranks: Callable[[int], Ranks], stage: int) -> None:
    assert ranks(2).run(what_is_left, training=replace(PLAIN, stage=stage)) == [0, 0]


# Hugging Face ---------------------------------------------------------------------------------------------------------


def train_hugging_face(family: str, training: Training, lazy: bool) -> tuple[Report, int]:
    """The loop of docs/huggingface.md on an unmodified model."""
    from tests.huggingface_models import FAMILIES

    model: Any = FAMILIES[family].model()
    if lazy:
        LazyHead.attach(model.get_output_embeddings(), whole=whole)
    engine, *_ = lorica.initialize(model=model, config=training.config())
    report = Report()
    with Counted() as formed:
        for step in range(training.num_steps):
            loss = engine(**FAMILIES[family].batch(2 * step + dist.get_rank())).loss
            engine.backward(loss)
            engine.step()
            record_step(engine, report, [loss.item()], 1.0)
    return finish(engine, report), len(formed)


@pytest.mark.parametrize(("family", "stage"), [("llama", 1), ("llama", 3), ("gpt2", 2), ("gpt2", 3)])
def test_an_unmodified_model_of_hugging_face_trains_alike(
    ranks: Callable[[int], Ranks], family: str, stage: int
) -> None:
    training = replace(PLAIN, stage=stage)
    lazy, plain = (
        ranks(2).run(train_hugging_face, family=family, training=training, lazy=lazy) for lazy in (True, False)
    )
    # Parameters as in test_huggingface.py: AdamW makes steps of what is rounding only.
    follows(outcome([r for r, _ in lazy]), outcome([r for r, _ in plain]), parameters=3e-4)
    assert [count for _, count in lazy] == [0, 0]


def train_plainly(training: Training, attached: bool) -> Report:
    """The README's loop, with a head that was lazy and is plain again."""
    model: Any = RECIPES[training.recipe].model()
    if attached:
        LazyHead.detach(LazyHead.attach(model.lm_head))
    engine, *_ = lorica.initialize(model=model, model_parameters=list(model.parameters()), config=training.config())
    report = Report()
    for step in range(training.num_steps):
        loss = engine(*training.micro_batch(step, 0, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        record_step(engine, report, [loss.item()], 1.0)
    return finish(engine, report)


def test_a_head_that_was_taken_back_leaves_no_trace(ranks: Callable[[int], Ranks]) -> None:
    training = replace(PLAIN, stage=2, num_steps=3)
    runs = [outcome(ranks(2).run(train_plainly, training=training, attached=attached)) for attached in (True, False)]
    is_same(*runs)
    follows(runs[0], expected(training))
