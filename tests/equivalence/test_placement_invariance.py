"""The bits of a training do not depend on where its states live, who updates them, in what pieces, when, or how fast.

Each case trains once with everything on the device and then under placements drawn by lot: for every plane a tier for
its record, one for its parameters, and an executor; sizes of chunks and rings; threads; pauses in all workers. Losses,
norms, scales, rates, skipped steps, parameters, masters and moments must be equal in every bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.equivalence.offloading import Case, Plan, Result, Used, training_of
from tests.equivalence.training import Training, start
from tests.harness import RankFailure, Ranks

ADAM_L2 = (("lr", 3e-3), ("weight_decay", 0.1), ("adam_w_mode", False))
LION = (("lr", 3e-4), ("weight_decay", 0.1))
SGD = (("lr", 0.05), ("momentum", 0.9), ("weight_decay", 0.01))
ADAGRAD = (("lr", 0.02), ("initial_accumulator_value", 0.1))


def case(recipe: str, stage: int, precision: str, world_size: int, steps: int = 5, **keys: object) -> Case:
    """A case in one line; `clip` and `accumulation` are the training's, other keys the case's."""
    of_training = {key: keys.pop(key) for key in ("clip", "accumulation") if key in keys}
    training = Training(recipe, stage, precision, world_size, num_steps=steps, **of_training)  # type: ignore[arg-type]
    return Case(training, **keys)  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "AdamW, bf16, stage 2, overflow": case("gpt", 2, "bf16", 1, overflows=(2,)),
    "AdamW, bf16, stage 3, accumulation": case("gpt", 3, "bf16", 1, accumulation=3, overflows=(1,), steps=4),
    "AdamW, fp32, stage 1, two groups": case("gpt, tied head", 1, "fp32", 1, two_groups=True, schedule=True, clip=0.0),
    "Adam, fp16, stage 3, overflows": case("gpt", 3, "fp16", 1, optimizer="Adam", params=ADAM_L2, overflows=(1, 3)),
    "Lion, bf16, stage 3, frozen": case("frozen", 3, "bf16", 1, optimizer="Lion", params=LION, clip=0.05),
    "SGD, bf16, stage 2, two groups": case(
        "mlp", 2, "bf16", 1, optimizer="SGD", params=SGD, two_groups=True, schedule=True
    ),
    "Adagrad, fp32, stage 3, unused units": case("experts", 3, "fp32", 1, optimizer="Adagrad", params=ADAGRAD),
    "AdamW, bf16, stage 3, 2 ranks": case("gpt", 3, "bf16", 2, clip=0.3, overflows=(2,)),
    "AdamW, fp16, stage 2, 2 ranks": case("gpt, tied head", 2, "fp16", 2, overflows=(1,), accumulation=3, steps=4),
    "AdamW, bf16, stage 1, 2 ranks": case("frozen", 1, "bf16", 2, two_groups=True, schedule=True, accumulation=3),
    "Lion, bf16, stage 2, 2 ranks": case("gpt, functional head", 2, "bf16", 2, optimizer="Lion", params=LION, clip=0.0),
    "SGD, fp32, stage 3, 2 ranks": case("weights shared across blocks", 3, "fp32", 2, optimizer="SGD", params=SGD),
    "Adagrad, fp16, stage 3, 2 ranks": case(
        "odd shapes", 3, "fp16", 2, optimizer="Adagrad", params=ADAGRAD, two_groups=True
    ),
    "mixed dtypes, stage 3, 2 ranks": case("mixed dtypes", 3, "fp32", 2, two_groups=True, schedule=True),
}
SEEDS_PER_CASE, MORE_SEEDS = 4, 40
FIXED = [(name, 100 * i + k) for i, name in enumerate(CASES) for k in range(SEEDS_PER_CASE)]
MORE = [(name, 10_000 + 100 * i + k) for i, name in enumerate(CASES) for k in range(MORE_SEEDS)]


class Runs:
    """Reference runs, each trained once, and what the placements of all runs have used."""

    def __init__(self, ranks: Callable[[int], Ranks], folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._resident: dict[Case, list[Result]] = {}
        self.used: list[Used] = []

    def run(self, case: Case, plan: Plan | None) -> list[Result]:
        """Every rank's result."""
        world = self._ranks(case.training.world_size)
        answers = world.run(training_of, case=case, plan=plan, folder=str(self._folder), limit_s=60)
        self.used += [used for _, used in answers if plan is not None]
        return [result for result, _ in answers]

    def resident(self, case: Case) -> list[Result]:
        """The results with everything on the device."""
        if case not in self._resident:
            self._resident[case] = self.run(case, None)
        return self._resident[case]


@pytest.fixture(scope="module")
def runs(ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("swap"))


def assert_same(runs: Runs, case: Case, plan: Plan) -> None:
    """Train under the plan and compare every rank's bits with the run on the device."""
    for rank, (found, wanted) in enumerate(zip(runs.run(case, plan), runs.resident(case), strict=True)):
        for name, one, other in zip(Result._fields, found, wanted, strict=True):
            assert repr(one) == repr(other), f"rank {rank}: {name} differ under {plan}"


@pytest.mark.parametrize(("name", "seed"), FIXED)
def test_no_bit_depends_on_the_placement(runs: Runs, name: str, seed: int) -> None:
    assert_same(runs, CASES[name], Plan.drawn(seed))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), MORE)
def test_no_bit_depends_on_any_of_many_placements(runs: Runs, name: str, seed: int) -> None:
    assert_same(runs, CASES[name], Plan.drawn(seed))


def test_the_placements_drawn_here_use_every_tier_and_executor_and_mix_them(runs: Runs) -> None:
    """Without this, the tests above might compare runs on the device with each other."""
    for name, seed in FIXED[::SEEDS_PER_CASE]:
        assert_same(runs, CASES[name], Plan.drawn(seed))
    assert {tier for used in runs.used for tier in used.records} == {"device", "host", "nvme"}
    assert {tier for used in runs.used for tier in used.params} == {"device", "host"}
    assert {executor for used in runs.used for executor in used.executors} == {"resident", "device", "host"}
    assert any(len(used.records) == 3 for used in runs.used)
    assert any(len(used.executors) == 3 for used in runs.used)
    assert_same(runs, CASES["AdamW, fp32, stage 1, two groups"], ALONE["guesses"])
    assert_same(runs, CASES["AdamW, bf16, stage 3, 2 ranks"], ALONE["guesses"])
    guesses = Counter(right for used in runs.used for right in used.guesses)
    assert guesses[True] > 10 and guesses[False] > 2, guesses


# What a test must be able to see --------------------------------------------------------------------------------------


def test_the_cases_clip_overflow_and_learn(runs: Runs) -> None:
    """The reference runs contain what the placements are to be tried on."""
    for name, case in CASES.items():
        first = runs.resident(case)[0]
        assert first.skipped == len(case.overflows), name
        assert first.losses[-1] != first.losses[0], name
    clipped = [
        name
        for name, c in CASES.items()
        if c.training.clip and max(n for n in runs.resident(c)[0].norms if n < float("inf")) > c.training.clip
    ]
    assert 3 <= len(clipped) < len(CASES)
    assert any(len(set(runs.resident(c)[0].scales)) > 2 for c in CASES.values()), "no loss scale moves"


# Each choice alone ----------------------------------------------------------------------------------------------------

ALONE = {
    "device executor, one slot": Plan(1, ("host",), ("device",), delays=False),
    "device executor, all near": Plan(2, ("host",), ("device",), staging_bytes=1 << 26),
    "device executor, whole planes": Plan(3, ("host",), ("device",), chunk_numel=1 << 24, staging_bytes=1 << 26),
    "device executor, sync": Plan(4, ("host",), ("device",), overlap=False, staging_bytes=1 << 18),
    "host executor": Plan(5, ("host",), ("host",)),
    "host executor, whole planes, sync": Plan(6, ("host",), ("host",), chunk_numel=1 << 24, overlap=False),
    "host executor, three threads": Plan(7, ("host",), ("host",), threads=3),
    "files": Plan(8, ("nvme",)),
    "files, three buffers, whole planes": Plan(9, ("nvme",), num_buffers=3, chunk_numel=1 << 24),
    "files, sync": Plan(10, ("nvme",), overlap=False, num_buffers=5),
    "only parameters": Plan(11, ("device",), params=True),
    "guesses": Plan(13, ("host",), ("host",), keys=(("speculate", True),)),
    "no guesses": Plan(14, ("host",), ("host",), keys=(("speculate", False),)),
}


@pytest.mark.parametrize("choice", ALONE)
@pytest.mark.parametrize("name", ["AdamW, bf16, stage 3, accumulation", "AdamW, bf16, stage 3, 2 ranks"])
def test_no_bit_depends_on_one_choice(runs: Runs, name: str, choice: str) -> None:
    assert_same(runs, CASES[name], ALONE[choice])


# What is refused ------------------------------------------------------------------------------------------------------


def start_stage_0(training: Training) -> None:
    """An engine with a whole optimizer on every rank, to be offloaded."""
    config = training.config()
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    start(training, config)


@pytest.mark.parametrize("world_size", [1, 2])
def test_stage_0_is_refused_and_says_what_to_set(ranks: Callable[[int], Ranks], world_size: int) -> None:
    with pytest.raises(RankFailure, match=r"offload_optimizer.*stage 0 .* Fix: set .*stage to 1") as got:
        ranks(world_size).run(start_stage_0, training=Training(stage=0), limit_s=60)
    assert f"on {world_size} of {world_size} ranks" in str(got.value)
