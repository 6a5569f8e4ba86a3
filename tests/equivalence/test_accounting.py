"""What a stage costs: bytes held against the plan and the ZeRO formula, bytes sent per step against the bound.

The model has no padding (all sizes are multiples of 128 * P elements): the formulas hold to the byte but for scalars.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lorica
from tests.equivalence.training import Training, start
from tests.harness import Ranks
from tests.models import MLP

STAGES = [pytest.param(stage, id=f"stage {stage}") for stage in range(4)]
WORLD_SIZES = [pytest.param(2, id="2 ranks"), pytest.param(4, id="4 ranks")]
PRECISIONS = ["fp32", "bf16"]
SCALARS_BYTES = 1024  # norm, finite flag and the like
MLP_NUMEL = 4 * 128 * 128


def take_step(engine: Any, training: Training, number: int) -> None:
    """One optimizer step of `accumulation` micro-steps."""
    for micro_step in range(training.accumulation):
        engine.backward(engine(*training.micro_batch(number, micro_step, dist.get_rank())))
        engine.step()


# Memory ---------------------------------------------------------------------------------------------------------------


def by_kind(state_bytes: Any) -> dict[str, int]:
    """A NamedTuple or mapping of bytes per kind of state, as a dict."""
    return dict(state_bytes._asdict()) if hasattr(state_bytes, "_asdict") else dict(state_bytes)


def held_memory(training: Training) -> tuple[dict[str, int], dict[str, int]]:
    """Planned and allocated bytes per kind of state: the most that is held after any backward or step of two steps."""
    engine, held = start(training), []
    for number in range(2):
        for micro_step in range(training.accumulation):
            engine.backward(engine(*training.micro_batch(number, micro_step, dist.get_rank())))
            held.append(by_kind(engine.memory().allocated_bytes))
            engine.step()
            held.append(by_kind(engine.memory().allocated_bytes))
    planned = by_kind(engine.memory().planned_bytes)
    engine.destroy()
    return planned, {kind: max(state[kind] for state in held) for kind in planned}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recipe", ["mlp", "gpt", "frozen", "gpt, tied head"])
def test_the_planes_take_what_the_plan_says(
    ranks: Callable[[int], Ranks], recipe: str, accumulation: int, precision: Any, stage: int
) -> None:
    training = Training(recipe=recipe, stage=stage, precision=precision, accumulation=accumulation)
    for planned, allocated in ranks(2).run(held_memory, training=training):
        assert planned.keys() == allocated.keys()
        for kind, planned_bytes in planned.items():
            assert allocated[kind] == pytest.approx(planned_bytes, rel=0.02), kind


def formula(stage: int, precision: str, world_size: int) -> dict[str, float]:
    """Bytes per rank of the MLP with AdamW: `K * numel` optimizer states, parameters, gradients, each over P or not."""
    element_bytes = 4 if precision == "fp32" else 2
    master_bytes = 0 if precision == "fp32" else 2  # in fp32 the parameter is its own master, in bf16 its upper half
    sharded = (1, world_size)
    return {
        "param": element_bytes * MLP_NUMEL / sharded[stage >= 3],
        "grad": element_bytes * MLP_NUMEL / sharded[stage >= 2],
        "master": master_bytes * MLP_NUMEL / sharded[stage >= 1],
        "moments": 8 * MLP_NUMEL / sharded[stage >= 1],
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_rank_holds_what_the_formula_of_its_stage_says(
    ranks: Callable[[int], Ranks], world_size: int, precision: Any, stage: int
) -> None:
    training = Training(recipe="mlp", stage=stage, precision=precision, world_size=world_size, accumulation=2)
    for _, allocated in ranks(world_size).run(held_memory, training=training):
        assert allocated == pytest.approx(formula(stage, precision, world_size), rel=0.02)


def resident_bytes() -> int:
    """Memory of this process: private pages, and its proportion of shared ones."""
    for line in Path(f"/proc/{os.getpid()}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no line Pss")


def resident_growth(stage: int) -> tuple[int, int]:
    """Growth of the resident memory by an engine and two steps, and the planned bytes of its states."""
    model = MLP(dim=1024, num_layers=12)
    before_bytes = resident_bytes() - sum(p.numel() * 4 for p in model.parameters())
    config = Training(stage=stage).config()
    engine, *_ = lorica.initialize(model=model, model_parameters=model.parameters(), config=config)
    batch = torch.ones(2, 1024), torch.ones(2, 1024)
    for _ in range(2):
        engine.backward(engine(*batch))
        engine.step()
    growth = resident_bytes() - before_bytes
    planned = sum(by_kind(engine.memory().planned_bytes).values())
    engine.destroy()
    return growth, planned


@pytest.mark.parametrize("stage", STAGES)
def test_the_process_grows_by_the_planes_and_little_else(ranks: Callable[[int], Ranks], stage: int) -> None:
    model_bytes = 12 * 1024 * 1024 * 4  # 48 MiB of fp32 weights: 192 MiB of states at stage 0
    for growth, planned in ranks(2).run(resident_growth, stage=stage):
        # Beyond the planes: at most the gradients on their way and two unsharded units, less than two models in all.
        assert growth <= planned + 2 * model_bytes, f"{growth / 2**20:.0f} MiB for planes of {planned / 2**20:.0f} MiB"


# Wire -----------------------------------------------------------------------------------------------------------------


def sent_in_a_step(training: Training) -> dict[str, int]:
    """Bytes this rank sends to others in one optimizer step, per operation, after two steps of warm-up."""
    engine = start(training)
    for number in range(2):
        take_step(engine, training, number)
    before = dict(engine.traffic())
    take_step(engine, training, 2)
    after = dict(engine.traffic())
    engine.destroy()
    return {op: after[op] - before.get(op, 0) for op in after}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_step_sends_no_more_than_its_stage_must(
    ranks: Callable[[int], Ranks], world_size: int, precision: Any, stage: int
) -> None:
    training = Training(recipe="mlp", stage=stage, precision=precision, world_size=world_size)
    model_bytes = MLP_NUMEL * (4 if precision == "fp32" else 2)
    passes = (
        3 if stage == 3 else 2
    )  # stage 3 gathers for forward and for backward, and reduces; the others do each once
    bound = passes * (world_size - 1) / world_size * model_bytes
    for sent in ranks(world_size).run(sent_in_a_step, training=training):
        assert sum(sent.values()) <= bound + SCALARS_BYTES, sent
        assert sum(sent.values()) >= bound / passes, f"impossibly little: {sent}"


@pytest.mark.parametrize("stage", [0, 1])
def test_accumulation_sends_nothing_before_the_boundary(ranks: Callable[[int], Ranks], stage: int) -> None:
    one = Training(recipe="mlp", stage=stage)
    for single, triple in zip(
        ranks(2).run(sent_in_a_step, training=one),
        ranks(2).run(sent_in_a_step, training=replace(one, accumulation=3)),
        strict=True,
    ):
        assert single == triple


def test_the_model_of_this_file_has_no_padding() -> None:
    sizes = [p.numel() for p in MLP().parameters()]
    assert sum(sizes) == MLP_NUMEL
    assert all(size % (128 * 4) == 0 for size in sizes)
