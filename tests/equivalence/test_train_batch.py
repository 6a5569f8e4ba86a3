"""`train_batch`: the micro-batches of a step in one call, one by one or unit by unit, give what the loop gives.

Unit by unit, a rank sums its micro-batches before ranks are summed. So the reference, bit for bit, is the loop with
`no_sync` around all micro-batches but the last, which at stages 0 and 1 is what the plain loop does anyway.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.core.flat import Flat
from lorica.core.interleave import Turns
from lorica.data import RepeatingLoader
from lorica.log import logger
from tests.equivalence.training import (
    Report,
    Trained,
    Training,
    finish,
    largest_difference,
    outcome,
    record_step,
    relative_difference,
    start,
    train,
)
from tests.harness import RankFailure, Ranks
from tests.models import RECIPES, Recipe, vectors

Mode = Literal["no_sync", "one by one", "unit by unit"]
ACCUMULATION = 3
PLAIN = Training(accumulation=ACCUMULATION, num_steps=2)


class Skipping(nn.Module):
    """Every micro-batch leaves out another one of four blocks (of two ranks, both leave out the same)."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for _ in range(4))

    def forward(self, x_BD: Tensor, y_BD: Tensor, skipped: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index != skipped.item():
                x_BD = x_BD + block(x_BD)
        return F.mse_loss(x_BD, y_BD)


def with_skips(index: int) -> tuple[Tensor, ...]:
    return *vectors()(index), torch.tensor(index // 2 % 4)


class Dropping(nn.Module):
    """Blocks with dropout, checkpointed or not."""

    def __init__(self, checkpointed: bool, dim: int = 32) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.5)) for _ in range(3))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BD = x_BD + (checkpoint(block, x_BD, use_reentrant=False) if self.checkpointed else block(x_BD))
        return F.mse_loss(x_BD, y_BD)


class Reading(nn.Module):
    """Blocks that note in which state of torch they run."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        for block in self.blocks:
            h_BD = block(x_BD)
            self.seen.append((h_BD.dtype, torch.is_grad_enabled()))
            x_BD = x_BD + h_BD.float()
        return F.mse_loss(x_BD, y_BD)


RECIPES.setdefault("skipping", Recipe(Skipping, with_skips))
RECIPES.setdefault("dropout", Recipe(lambda: Dropping(False), vectors()))
RECIPES.setdefault("dropout, checkpointed", Recipe(lambda: Dropping(True), vectors()))
RECIPES.setdefault("reading", Recipe(Reading, vectors()))


def batches_of(training: Training, step: int) -> list[tuple[Tensor, ...]]:
    """This rank's micro-batches of one step."""
    return [training.micro_batch(step, micro_step, dist.get_rank()) for micro_step in range(training.accumulation)]


def take_step(engine: Any, batches: list[tuple[Tensor, ...]], mode: Mode) -> list[float]:
    """One optimizer step; the losses that are known of it."""
    if mode != "no_sync":
        return [engine.train_batch(iter(batches), unit_major=mode == "unit by unit").item()]
    losses = []
    for index, batch in enumerate(batches):
        with engine.no_sync() if index + 1 < len(batches) else contextlib.nullcontext():
            losses.append(engine(*batch))
            engine.backward(losses[-1])
            engine.step()
    return [torch.stack([loss.detach() for loss in losses]).float().mean().item()]


def run(training: Training, mode: Mode, config: dict[str, Any] | None = None) -> Report:
    """Train in one of the ways."""
    engine, report = start(training, config), Report()
    for step in range(training.num_steps):
        scale = float(engine.loss_scale())
        record_step(engine, report, take_step(engine, batches_of(training, step), mode), scale)
    assert (engine.micro_steps, engine.global_steps) == (training.num_steps * training.accumulation, training.num_steps)
    return finish(engine, report)


def run_both(training: Training, stages: tuple[int, ...], config: dict[str, Any] | None = None) -> list[list[Report]]:
    """Of every stage: the reference, and the same unit by unit. In one call, because calls cost more than steps."""
    return [
        [run(replace(training, stage=stage), mode, config) for mode in ("no_sync", "unit by unit")] for stage in stages
    ]


def assert_same(pair: list[list[Report]]) -> None:
    """Equal losses, norms and parameters, bit for bit; `pair` is one stage of each rank."""
    reference, joint = (outcome(list(reports)) for reports in zip(*pair, strict=True))
    assert joint.losses == reference.losses
    assert str(joint.norms) == str(reference.norms)  # where nan is nan
    assert joint.digest == reference.digest


# Equality -------------------------------------------------------------------------------------------------------------

CHECKPOINTING = ["gpt", "gpt, reentrant checkpointing", "gpt, non-reentrant checkpointing"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("recipe", CHECKPOINTING)
def test_unit_by_unit_is_the_loop_bit_for_bit(
    ranks: Callable[[int], Ranks], recipe: str, world_size: int, precision: Any
) -> None:
    training = replace(PLAIN, recipe=recipe, world_size=world_size, precision=precision)
    for pair in zip(*ranks(world_size).run(run_both, training=training, stages=(0, 1, 2, 3)), strict=True):
        assert_same(list(pair))


@pytest.mark.parametrize("recipe", ["skipping", "branching", "frozen", "structured outputs", "buffers"])
def test_unit_by_unit_is_the_loop_for_models_of_other_kinds(ranks: Callable[[int], Ranks], recipe: str) -> None:
    for pair in zip(*ranks(2).run(run_both, training=replace(PLAIN, recipe=recipe), stages=(1, 3)), strict=True):
        assert_same(list(pair))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_parameter_that_is_used_several_times_differs_only_by_the_order_of_a_sum(
    ranks: Callable[[int], Ranks], trained: Trained, stage: int
) -> None:
    for recipe in ("gpt, tied head", "gpt, functional head", "repeated block", "weights shared across blocks"):
        training = replace(PLAIN, recipe=recipe, stage=stage)
        found = outcome(ranks(2).run(run, training=training, mode="unit by unit"))
        reference = trained.oracle(training)
        assert relative_difference(found.losses, reference.losses) < 1e-6, recipe
        assert largest_difference(found.parameters, reference.parameters) < 1e-4, recipe


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_every_other_model_follows_the_oracle(ranks: Callable[[int], Ranks], trained: Trained, stage: int) -> None:
    others = ["experts", "blocks in any order", "autocast", "odd shapes", "nested reentrant checkpoints"]
    for recipe in (*others, "nested non-reentrant checkpoints"):
        training = replace(PLAIN, recipe=recipe, stage=stage)
        found = outcome(ranks(2).run(run, training=training, mode="unit by unit"))
        reference = trained.oracle(training)
        assert relative_difference(found.losses, reference.losses) < 1e-6, recipe
        assert largest_difference(found.parameters, reference.parameters) < 1e-4, recipe


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_blocks_are_the_loop_bit_for_bit(ranks: Callable[[int], Ranks], stage: int) -> None:
    training = replace(PLAIN, recipe="gpt, compiled blocks")
    for pair in zip(*ranks(2).run(run_both, training=training, stages=(stage,)), strict=True):
        assert_same(list(pair))


def test_fp16_scales_and_skips_as_in_the_loop(ranks: Callable[[int], Ranks]) -> None:
    training = replace(PLAIN, precision="fp16", num_steps=7)
    config = training.config()
    config["fp16"] |= {"initial_scale_power": 20, "hysteresis": 1}  # the first steps overflow
    pairs = ranks(2).run(run_both, training=training, stages=(2,), config=config)
    assert_same([pair[0] for pair in pairs])
    reference, joint = pairs[0][0]
    assert joint.scales[0] > joint.scales[-1] == joint.scales[-2] and joint.scales == reference.scales


@pytest.mark.parametrize("stage", [0, 3])
def test_one_by_one_is_the_plain_loop_bit_for_bit(ranks: Callable[[int], Ranks], stage: int) -> None:
    training = replace(PLAIN, stage=stage)
    found = outcome(ranks(2).run(run, training=training, mode="one by one"))
    reference = outcome(ranks(2).run(train, training=training))
    assert found.digest == reference.digest and found.norms == reference.norms
    assert found.losses == pytest.approx(reference.losses, rel=1e-6)


# What it is for -------------------------------------------------------------------------------------------------------


def gathers(training: Training, mode: Mode) -> list[Counter[str]]:
    """How often each unit's plane is gathered, in each step."""
    engine, counts = start(training), []
    unshard = Flat.unshard

    def counted(flat: Flat) -> None:
        if not flat.is_full and flat._gather is None:
            counts[-1][flat.name.partition("/")[0]] += 1
        unshard(flat)

    Flat.unshard = counted  # type: ignore[method-assign]
    try:
        for step in range(training.num_steps):
            counts.append(Counter())
            take_step(engine, batches_of(training, step), mode)
    finally:
        Flat.unshard = unshard  # type: ignore[method-assign]
    engine.destroy()
    return counts


@pytest.mark.parametrize("recipe", [*CHECKPOINTING, "skipping"])
def test_a_unit_is_gathered_once_per_direction_and_step(ranks: Callable[[int], Ranks], recipe: str) -> None:
    training = replace(PLAIN, recipe=recipe, stage=3)
    joint = ranks(2).run(gathers, training=training, mode="unit by unit")[0][-1]
    single = ranks(2).run(gathers, training=training, mode="one by one")[0][-1]
    last = 2 if "reentrant" in recipe and "non" not in recipe else 1  # kept from forward to backward, if it has a graph
    names = sorted(name for name in joint if name != "root")
    if recipe == "skipping":  # the last unit is left out by some micro-batch, so look-ahead may miss its end
        assert all(joint[name] <= 3 for name in names)
        return
    assert [joint[name] for name in names] == [2] * (len(names) - 1) + [last]
    assert joint["root"] == 1
    assert single == Counter({name: ACCUMULATION * count for name, count in joint.items()})


def traffic(training: Training, mode: Mode) -> dict[str, int]:
    """Bytes that a rank sends in one step, once the order of units is known."""
    engine = start(training)
    take_step(engine, batches_of(training, 0), mode)
    before = engine.traffic()
    take_step(engine, batches_of(training, 1), mode)
    sent = {op: count - before.get(op, 0) for op, count in engine.traffic().items()}
    engine.destroy()
    return sent


def test_a_step_sends_a_fraction_of_the_bytes(ranks: Callable[[int], Ranks]) -> None:
    training = replace(PLAIN, stage=3)
    joint = ranks(2).run(traffic, training=training, mode="unit by unit")[0]
    single = ranks(2).run(traffic, training=training, mode="one by one")[0]
    for op in ("all_gather", "reduce_scatter"):
        assert single[op] == ACCUMULATION * joint[op] > 0


def most_live(training: Training, mode: Mode) -> int:
    """The most elements of sharded parameters that are whole when a unit is used, after the first step."""
    config = training.config()
    config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
    engine, most = start(training, config), 0
    prefetcher = engine._parts.prefetcher
    use = prefetcher.use

    def watched(unit: Any, *, backward: bool) -> None:
        nonlocal most
        use(unit, backward=backward)
        most = max(most, prefetcher.live_numel)

    take_step(engine, batches_of(training, 0), mode)
    prefetcher.use = watched
    take_step(engine, batches_of(training, 1), mode)
    assert prefetcher.live_numel == 0
    engine.destroy()
    return most


@pytest.mark.parametrize("recipe", CHECKPOINTING)
def test_no_more_units_are_whole_at_a_time_than_in_the_loop(ranks: Callable[[int], Ranks], recipe: str) -> None:
    training = replace(PLAIN, recipe=recipe, stage=3)
    joint = ranks(2).run(most_live, training=training, mode="unit by unit")[0]
    assert joint <= ranks(2).run(most_live, training=training, mode="one by one")[0]


def order_of_backward() -> list[tuple[str, str]]:
    """(recomputed or not: layer, micro-batch) as backward comes to them."""
    seen: list[tuple[str, str]] = []
    training = replace(PLAIN, stage=3, recipe="gpt, non-reentrant checkpointing")
    engine = start(training)
    for name, block in engine.module.blocks.named_children():

        def note(_: nn.Module, args: Any, name: str = name) -> None:
            if torch._C._current_graph_task_id() >= 0:
                seen.append((name, f"{args[0].flatten()[0].item():.6f}"))

        block.register_forward_pre_hook(note)
    engine.train_batch(iter(batches_of(training, 0)), unit_major=True)
    engine.destroy()
    return seen


def test_recomputation_is_unit_by_unit_too(ranks: Callable[[int], Ranks]) -> None:
    for seen in ranks(2).run(order_of_backward):
        assert [name for name, _ in seen] == [name for name in "210" for _ in range(ACCUMULATION)]
        assert len(set(seen)) == len(seen)


def run_in_any_order(training: Training) -> Report:
    """Unit by unit in forward, but backward in the order of the threads' own numbers: operation by operation."""
    renumber, Turns.renumber = Turns.renumber, lambda *_: None  # type: ignore[method-assign]
    try:
        return run(training, "unit by unit")
    finally:
        Turns.renumber = renumber  # type: ignore[method-assign]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_order_of_backward_is_only_a_guess(ranks: Callable[[int], Ranks], trained: Trained, stage: int) -> None:
    for recipe in ("skipping", "experts", *CHECKPOINTING, "nested reentrant checkpoints"):
        training = replace(PLAIN, recipe=recipe, stage=stage)
        found = outcome(ranks(2).run(run_in_any_order, training=training))
        reference = trained.oracle(training)
        assert relative_difference(found.losses, reference.losses) < 1e-6, recipe
        assert largest_difference(found.parameters, reference.parameters) < 1e-4, recipe


# Randomness -----------------------------------------------------------------------------------------------------------


def dropout_run(recipe: str, mode: Mode, seed: int) -> tuple[Report, Tensor]:
    """Train with dropout; the report and the state of the generator afterwards."""
    training = replace(PLAIN, recipe=recipe, stage=3)
    engine, report = start(training), Report()
    torch.manual_seed(seed)
    for step in range(training.num_steps):
        record_step(engine, report, take_step(engine, batches_of(training, step), mode), 1.0)
    state = torch.get_rng_state()
    return finish(engine, report), state


def test_dropout_is_deterministic_and_recomputed_alike(ranks: Callable[[int], Ranks]) -> None:
    first, again, other = (
        ranks(2).run(dropout_run, recipe="dropout", mode="unit by unit", seed=seed)[0] for seed in (1, 1, 2)
    )
    recomputed = ranks(2).run(dropout_run, recipe="dropout, checkpointed", mode="unit by unit", seed=1)[0]
    assert first[0].digest == again[0].digest == recomputed[0].digest != other[0].digest
    assert torch.equal(first[1], again[1])


def masks() -> list[list[float]]:
    """Losses of the micro-batches of two steps, and of the loop's first: one batch, no learning, dropout only."""
    config = replace(PLAIN, recipe="dropout", stage=3).config()
    config["optimizer"]["params"]["lr"] = config["optimizer"]["params"]["weight_decay"] = 0.0
    training = replace(PLAIN, recipe="dropout", stage=3)
    engine, rows = start(training, config), []
    batch = batches_of(training, 0)[0]
    for mode in ("unit by unit", "unit by unit", "one by one"):
        if mode == "one by one" or not rows:
            torch.manual_seed(5)
        losses: list[float] = []

        def loss_fn(output: Tensor, _: Any, losses: list[float] = losses) -> Tensor:
            losses.append(output.item())
            return output

        engine.train_batch(iter([batch] * ACCUMULATION), loss_fn=loss_fn, unit_major=mode == "unit by unit")
        rows.append(losses if mode == "one by one" else losses[::-1])
    engine.destroy()
    return rows


def test_every_micro_batch_of_every_step_has_its_own_dropout_and_the_first_that_of_the_loop(
    ranks: Callable[[int], Ranks],
) -> None:
    first, second, loop = ranks(2).run(masks)[0]
    assert len({*first, *second}) == 2 * ACCUMULATION
    assert first[0] == loop[0]
    assert second[0] == loop[1]  # the generator went on after the first micro-batch, as if it had been alone


def test_without_dropout_the_generator_is_left_alone(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(1).run(generator_is_untouched) == [True]


def generator_is_untouched() -> bool:
    training = replace(PLAIN, world_size=1)
    engine = start(training)
    before = torch.get_rng_state()
    engine.train_batch(iter(batches_of(training, 0)), unit_major=True)
    engine.destroy()
    return torch.equal(before, torch.get_rng_state())


# Failures -------------------------------------------------------------------------------------------------------------


def failing_run(training: Training, mark: int, marked: int, mode: Mode) -> tuple[str, int, int, bool, Report]:
    """One step fails in a micro-batch, then training goes on as if that step had never been tried."""
    engine, report, message = start(training), Report(), ""
    threads, randomness = threading.active_count(), torch.get_rng_state()
    batches = [tuple(t.clone() for t in batch) for batch in batches_of(training, 9)]
    batches[marked][0][0, 0] = mark
    try:
        take_step(engine, batches, mode)
    except ArithmeticError as error:
        message = str(error)
    engine.zero_grad()
    assert engine.micro_steps == 0
    left = threading.active_count() - threads
    same = torch.equal(randomness, torch.get_rng_state())
    whole = engine._parts.prefetcher.live_numel
    for step in range(training.num_steps):
        record_step(engine, report, take_step(engine, batches_of(training, step), mode), 1.0)
    return message, left, whole, same, finish(engine, report)


@pytest.mark.parametrize("mode", ["unit by unit", "one by one"])
@pytest.mark.parametrize("marked", [0, 2])
@pytest.mark.parametrize("mark", [1000, 2000], ids=["forward", "backward"])
def test_a_failing_micro_batch_ends_all_and_leaves_nothing_behind(
    ranks: Callable[[int], Ranks], mark: int, marked: int, mode: Mode
) -> None:
    training = replace(PLAIN, recipe="fragile", stage=3)
    reference = outcome(ranks(2).run(run, training=training, mode=mode))
    results = ranks(2).run(failing_run, training=training, mark=mark, marked=marked, mode=mode)
    for message, threads_left, whole, same_randomness, _ in results:
        assert message.endswith("of this batch fails")
        assert (threads_left, whole, same_randomness) == (0, 0, True)
    assert outcome([result[-1] for result in results]).digest == reference.digest


def asked_wrongly(what: str) -> None:
    """Call `train_batch` in a way that it refuses."""
    training = replace(PLAIN, world_size=1)
    batches = batches_of(training, 0)
    changes = {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}} if what == "sums" else {}
    engine = start(training, training.config() | changes)
    if what == "too few":
        engine.train_batch(iter(batches[:2]))
    elif what == "a list":
        engine.train_batch(batches)
    elif what == "no data":
        engine.train_batch()
    elif what == "half way":
        engine.backward(engine(*batches[0]))
        engine.step()
        engine.train_batch(iter(batches))
    elif what == "no scalar":
        engine.train_batch(iter(batches), loss_fn=lambda output, batch: batch[0], unit_major=True)
    elif what == "sums":
        engine.train_batch(iter(batches), unit_major=True)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("too few", "expected 3 micro-batches .gradient_accumulation_steps., got 2"),
        ("a list", "expected an iterator of micro-batches, got list"),
        ("no data", "got neither data_iter nor training data"),
        ("half way", "expected to begin after an optimizer step, got 1 backward passes"),
        ("no scalar", "expected a scalar loss from loss_fn, got a tensor of shape .2, 17."),
        ("sums", "summed in torch.bfloat16, but gradients are to be accumulated in torch.float32"),
    ],
)
def test_what_cannot_be_done_is_refused(ranks: Callable[[int], Ranks], what: str, message: str) -> None:
    with pytest.raises(RankFailure, match=message):
        ranks(1).run(asked_wrongly, what=what)


# Ways to call it ------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model that gives its loss in several ways."""

    def __init__(self, form: str, dim: int = 32) -> None:
        super().__init__()
        self.form, self.layer = form, nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        output = self.layer(x)
        loss = F.mse_loss(output, x.flip(-1) if y is None else y)
        forms: dict[str, Any] = {
            "scalar": loss,
            "tuple": (loss, output),
            "mapping": {"loss": loss, "logits": output},
            "object": type("Output", (), {"loss": loss})(),
            "output": output,
        }
        return forms[self.form]


def forms() -> dict[str, float]:
    """The loss of the same step in all forms of batches and outputs."""
    found = {}
    pairs = [vectors()(index) for index in range(ACCUMULATION)]
    for form in ("scalar", "tuple", "mapping", "object", "output"):
        for kind in ("tuple", "list", "mapping"):
            torch.manual_seed(3)
            training = replace(PLAIN, stage=3, world_size=1)
            engine, *_ = lorica.initialize(model=Wrapped(form), config=training.config())
            by_kind: dict[str, list[Any]] = {
                "tuple": pairs,
                "list": [list(pair) for pair in pairs],
                "mapping": [dict(zip("xy", pair, strict=True)) for pair in pairs],
            }
            target = "y" if kind == "mapping" else 1
            loss_fn = (lambda out, batch, t=target: F.mse_loss(out, batch[t])) if form == "output" else None
            loss = engine.train_batch(iter(by_kind[kind]), loss_fn=loss_fn, unit_major=kind != "list")
            found[f"{form} {kind}"] = loss.item()
            assert not loss.requires_grad
            engine.destroy()
    return found


def test_batches_and_losses_come_in_many_forms(ranks: Callable[[int], Ranks]) -> None:
    assert len(set(ranks(1).run(forms)[0].values())) == 1


def with_training_data() -> tuple[list[float], list[float]]:
    """Losses with the engine's own loader, and with one that is cycled by hand; a batch may be a single tensor."""
    found = []
    for own in (True, False):
        torch.manual_seed(3)
        data = torch.randn(20, 32, generator=torch.Generator().manual_seed(4))
        training = replace(PLAIN, stage=3)
        engine, _, loader, _ = lorica.initialize(
            model=Wrapped("scalar"), config=training.config(), training_data=list(data)
        )
        batches = None if own else iter(RepeatingLoader(loader))
        found.append([engine.train_batch(batches, unit_major=True).item() for _ in range(4)])
        engine.destroy()
    return found[0], found[1]


def test_the_engines_own_loader_is_read_epoch_after_epoch(ranks: Callable[[int], Ranks]) -> None:
    for own, by_hand in ranks(2).run(with_training_data):
        assert own == by_hand and len(set(own)) == 4


def scheduled(mode: str) -> list[float]:
    """Learning rates of a warm-up, and counters, after each step."""
    training = replace(PLAIN, world_size=1)
    config = training.config() | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}
    engine = start(training, config)
    rates = []
    for step in range(3):
        if mode == "loop":
            for batch in batches_of(training, step):
                engine.backward(engine(*batch))
                engine.step()
        else:
            engine.train_batch(iter(batches_of(training, step)), unit_major=mode == "unit by unit")
        rates += [*engine.get_lr(), engine.micro_steps, engine.global_steps, engine.global_samples]
        rates.append(float(engine.is_gradient_accumulation_boundary()))
    engine.destroy()
    return rates


def test_counters_boundaries_and_schedule_are_those_of_the_loop(ranks: Callable[[int], Ranks]) -> None:
    loop = ranks(1).run(scheduled, mode="loop")
    assert ranks(1).run(scheduled, mode="unit by unit") == ranks(1).run(scheduled, mode="one by one") == loop


def evaluations(training: Training) -> list[float]:
    """The mean loss in three ways; counters, modes and parameters stay."""
    engine = start(training)
    engine.train_batch(iter(batches_of(training, 0)), unit_major=True)
    batches = batches_of(training, 1)
    engine.module.blocks[0].eval()
    with torch.no_grad():
        by_hand = torch.stack([engine(*batch) for batch in batches]).float().mean().item()
    found = [engine.eval_batch(iter(batches), unit_major=joint).item() for joint in (True, False)]
    assert engine.module.training and not engine.module.blocks[0].training and engine.module.blocks[1].training
    assert engine.micro_steps == ACCUMULATION
    engine.train_batch(iter(batches), unit_major=True)
    engine.destroy()
    return [by_hand, *found]


def test_eval_batch_is_the_mean_loss_without_training(ranks: Callable[[int], Ranks]) -> None:
    for by_hand, joint, single in ranks(2).run(evaluations, training=replace(PLAIN, stage=3)):
        assert by_hand == joint == single


def offloaded(accumulate: str | None) -> tuple[bool, int]:
    """Whether offloaded parameters run unit by unit without being asked, and how often a unit was read."""
    training = replace(PLAIN, stage=3, world_size=1, precision="bf16")
    config = training.config()
    config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if accumulate is not None:
        config["data_types"] = {"grad_accum_dtype": accumulate}
    engine = start(training, config)
    used: list[bool] = []
    take_turns = engine._hooks.take_turns

    def noted(turns: Any) -> Any:
        used.append(True)
        return take_turns(turns)

    engine._hooks.take_turns = noted
    for step in range(2):
        engine.train_batch(iter(batches_of(training, step)))
    engine.destroy()
    return len(used) == 2, len(used)


def test_offloaded_parameters_run_unit_by_unit_unless_sums_need_another_dtype(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(1).run(offloaded, accumulate=None) == [(True, 2)]
    assert ranks(1).run(offloaded, accumulate="fp32") == [(False, 0)]


def states() -> tuple[list[Any], list[Any]]:
    """What blocks see of autocast and gradients in training and evaluation, under the caller's autocast."""
    training = replace(PLAIN, recipe="reading", world_size=1)
    engine = start(training)
    with torch.autocast("cpu", torch.bfloat16):
        engine.train_batch(iter(batches_of(training, 0)), unit_major=True)
        trained, engine.module.seen = engine.module.seen, []
        engine.eval_batch(iter(batches_of(training, 0)), unit_major=True)
    evaluated = engine.module.seen
    engine.destroy()
    return trained, evaluated


def test_blocks_see_the_callers_autocast_and_grad_mode(ranks: Callable[[int], Ranks]) -> None:
    trained, evaluated = ranks(1).run(states)[0]
    assert set(trained) == {(torch.bfloat16, True)} and len(trained) == 9
    assert set(evaluated) == {(torch.bfloat16, False)} and len(evaluated) == 9


class Careless(nn.Module):
    """Leaves something of its input in an attribute, where a block reads it later."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        self.scale_BD = x_BD.mean()
        for block in self.blocks:
            x_BD = block(x_BD) * self.scale_BD
        return F.mse_loss(x_BD, y_BD)


def careless(model: nn.Module) -> list[str]:
    """The warnings of two steps."""
    training = replace(PLAIN, world_size=1)
    engine, *_ = lorica.initialize(model=model, config=training.config())
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    for step in range(2):
        batches = [vectors()(step * ACCUMULATION + index) for index in range(ACCUMULATION)]
        engine.train_batch(iter(batches), unit_major=True)
    logger.removeHandler(handler)
    engine.destroy()
    return found


def test_a_model_that_keeps_state_in_its_modules_is_warned_of_once(ranks: Callable[[int], Ranks]) -> None:
    (warnings,) = ranks(1).run(careless, model=Careless())
    assert len(warnings) == 1 and "sets attributes (scale_BD)" in warnings[0]
    assert ranks(1).run(careless, model=Reading()) == [[]]
