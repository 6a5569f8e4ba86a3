"""Overlap as an order of events: 64 ranks, of which 63 are fake, log when collectives are launched and waited for.

A real engine trains a GPT of eight blocks, each a unit, over `tests/fake_ranks.py`. Blocks log the begin and the end of
their forward and backward, so that one list says what was on its way while what was computed. Asserted on the third
step: the first one records the order of units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica import construct
from lorica.core.grads import MAX_UNITS_IN_FLIGHT
from tests.fake_ranks import Event, FakeRanks, Kind, Log, storage_of
from tests.harness import Ranks
from tests.models import GPT, Checkpointing, tokens

WORLD_SIZE, NUM_BLOCKS, NUM_STEPS = 64, 8, 3
BLOCKS = [f"blocks.{index}" for index in range(NUM_BLOCKS)]
UNLIMITED = 10**9


# What is trained ------------------------------------------------------------------------------------------------------


class Mark(torch.autograd.Function):
    """The identity; its backward is logged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: Log, kind: Kind, index: int) -> Tensor:
        ctx.event = log, kind, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        log, kind, index = ctx.event
        log.note(kind, "backward", index)
        return grad, None, None, None


class Watched(nn.Module):
    """A block that logs when its forward and its backward begin and end."""

    def __init__(self, block: nn.Module, index: int, log: Log) -> None:
        super().__init__()
        self.block, self.index, self.log = block, index, log

    def forward(self, x_BLD: Tensor) -> Tensor:
        self.log.note("begin", "forward", self.index)
        inner: Tensor = self.block(Mark.apply(x_BLD, self.log, "end", self.index))
        result = Mark.apply(inner, self.log, "begin", self.index)
        self.log.note("end", "forward", self.index)
        assert isinstance(result, Tensor)
        return result


@dataclass(frozen=True)
class Case:
    """How it is trained. `ahead` and `max_live` count blocks; the root comes on top of `max_live`."""

    stage: Literal[2, 3] = 3
    ahead: float = 1.0
    max_live: int | None = None
    overlap: bool = True
    checkpointing: Checkpointing = "none"

    def config(self, block_numel: int, root_numel: int) -> dict[str, Any]:
        """The engine's configuration."""
        max_live = UNLIMITED if self.max_live is None else self.max_live * block_numel + root_numel
        return {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": self.overlap,
                "stage3_prefetch_bucket_size": int(self.ahead * block_numel),
                "stage3_max_live_parameters": max_live,
                "stage3_max_reuse_distance": 0,
                "stage3_param_persistence_threshold": 0,
            },
            "lorica": {"units": {"min_numel": 1}},
        }


class Collective(NamedTuple):
    """One collective of one unit in the log: where it was launched and waited for."""

    what: str
    unit: str
    launched: int
    waited: int


class Run:
    """The third step: its events, its collectives, and what the plan says of the units."""

    def __init__(self, events: list[Event], engine: Any) -> None:
        units = engine._parts.units
        self.events = events
        self.num_planes = {unit.name: len(unit.flats) for unit in units}
        self.num_sharded = sum(flat.plan.param.sharded for unit in units for flat in unit.flats)
        self.block_numel, self.root_numel = numel_of(engine, BLOCKS[0]), numel_of(engine, "root")
        self.peak_numel = max(event.measured for event in events)
        unit_of = owners(engine)
        self.collectives = [self._collective(at, event, unit_of) for at, event in enumerate(events) if _is(event)]

    def _collective(self, at: int, launch: Event, unit_of: dict[int, str]) -> Collective:
        waited = self.find("wait", launch.what, launch.where, after=at)
        return Collective(launch.what, unit_of[launch.where], at, waited)

    def find(self, kind: Kind, what: str, where: int = -1, *, after: int = 0) -> int:
        """The place in the log of the first such event."""
        return next(at for at, event in enumerate(self.events) if at >= after and event[:3] == (kind, what, where))

    def span(self, phase: str) -> range:
        """The places of a phase of the step: "forward pass", "backward pass", "step"."""
        return range(self.find("begin", phase), self.find("end", phase))

    def launched_in(self, phase: str, what: str) -> list[Collective]:
        """The collectives of a kind that were launched in a phase."""
        return [c for c in self.collectives if c.what == what and c.launched in self.span(phase)]

    def units(self, phase: str, what: str) -> list[str]:
        """The units of these collectives, one by one."""
        return [c.unit for c in self.launched_in(phase, what)]

    def exposed(self, phase: str, what: str) -> list[str]:
        """Units whose collective was waited for before any computation came after its launch."""
        return [
            c.unit
            for c in self.launched_in(phase, what)
            if not any(e.what in ("forward", "backward") for e in self.events[c.launched : c.waited])
        ]


def _is(event: Event) -> bool:
    return event.kind == "launch" and event.what in ("all_gather", "reduce_scatter")


def train(case: Case) -> Run:
    """Three steps over 64 fake ranks."""
    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        everyone = list(range(WORLD_SIZE)), "the test"
        patch.setattr(construct, "_data_parallel_ranks", lambda mpu: everyone)
        patch.setattr(
            construct,
            "make_collectives",
            lambda members, device, *_, **__: FakeRanks(len(members), torch.device(device), log),
        )
        probe = start(Case(stage=3), log, 0, 0)
        sizes = numel_of(probe, BLOCKS[0]), numel_of(probe, "root")
        probe.destroy()
        engine = start(case, log, *sizes)
    flats = [flat for unit in engine._parts.units for flat in unit.flats]
    log.measure = lambda: sum(f.full.numel() for f in flats if f.sharded and f.full.untyped_storage().size())
    for number in range(NUM_STEPS):
        first = len(log.events)
        loss = take_step(engine, log, tokens()(number))
        assert math.isfinite(loss), "a result was used before it was waited for"
    run = Run(log.events[first:], engine)
    log.measure = lambda: 0
    engine.destroy()
    return run


def start(case: Case, log: Log, block_numel: int, root_numel: int) -> Any:
    """A fresh engine on a watched GPT."""
    torch.manual_seed(7)
    model = GPT(num_blocks=NUM_BLOCKS, checkpointing=case.checkpointing)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = Watched(block, index, log)
    engine, *_ = lorica.initialize(model=model, config=case.config(block_numel, root_numel))
    return engine


def take_step(engine: Any, log: Log, batch: tuple[Tensor, ...]) -> float:
    """Forward, backward and step, each between two events."""
    log.note("begin", "forward pass")
    loss = engine(*batch)
    log.note("end", "forward pass")
    log.note("begin", "backward pass")
    engine.backward(loss)
    log.note("end", "backward pass")
    log.note("begin", "step")
    engine.step()
    log.note("end", "step")
    return float(loss.detach())


def numel_of(engine: Any, name: str) -> int:
    """Elements of a unit, padding included."""
    return next(int(unit.numel) for unit in engine._parts.units if unit.name == name)


def owners(engine: Any) -> dict[int, str]:
    """The unit behind the memory of every parameter and gradient plane."""
    found = {}
    for unit in engine._parts.units:
        found.update({storage_of(flat.full): unit.name for flat in unit.flats})
        found.update({storage_of(grad.reduced): unit.name for grad in unit.grads if grad.reduced is not None})
    return found


@pytest.fixture(scope="module")
def trained(ranks: Callable[[int], Ranks]) -> Callable[[Case], Run]:
    """The run of a case, computed once."""
    runs: dict[Case, Run] = {}

    def of(case: Case) -> Run:
        if case not in runs:
            (runs[case],) = ranks(1).run(train, case=case)
        return runs[case]

    return of


CHECKPOINTING = pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
STAGES = pytest.mark.parametrize("stage", [2, 3])


# Gathering ------------------------------------------------------------------------------------------------------------


@CHECKPOINTING
def test_every_gather_is_launched_before_the_unit_before_it_begins(trained: Any, checkpointing: Any) -> None:
    run = trained(Case(checkpointing=checkpointing))
    forward = {c.unit: c for c in run.launched_in("forward pass", "all_gather")}
    backward = {c.unit: c for c in run.launched_in("backward pass", "all_gather")}
    for index in range(1, NUM_BLOCKS):
        assert forward[BLOCKS[index]].launched < run.find("begin", "forward", index - 1)
        assert backward[BLOCKS[index - 1]].launched < run.find("begin", "backward", index)


@CHECKPOINTING
def test_only_the_root_and_the_first_unit_are_waited_for_at_once(trained: Any, checkpointing: Any) -> None:
    """Nothing runs before them; units.md says so. In backward the root and the last unit are whole already.

    But not the last unit under a reentrant checkpoint, see `last_unit`.
    """
    run = trained(Case(checkpointing=checkpointing))
    assert run.exposed("forward pass", "all_gather") == ["root", BLOCKS[0]]
    assert run.exposed("backward pass", "all_gather") == [name for name in BLOCKS[-1:] if not last_unit(checkpointing)]


def test_without_prefetching_every_gather_is_waited_for_at_once(trained: Any) -> None:
    run = trained(Case(ahead=0.0))
    assert run.exposed("forward pass", "all_gather") == ["root", *BLOCKS]
    assert run.exposed("backward pass", "all_gather") == BLOCKS[-2::-1]


@CHECKPOINTING
@pytest.mark.parametrize("max_live", [2, 3, 5])
def test_never_more_is_whole_than_max_live_allows(trained: Any, max_live: int, checkpointing: Any) -> None:
    bound = trained(Case(ahead=NUM_BLOCKS, max_live=max_live, checkpointing=checkpointing))
    free = trained(Case(ahead=NUM_BLOCKS, checkpointing=checkpointing))
    assert bound.peak_numel == bound.root_numel + max_live * bound.block_numel
    assert free.peak_numel == free.root_numel + NUM_BLOCKS * free.block_numel, "the bound above binds nothing"


# Reducing -------------------------------------------------------------------------------------------------------------


@STAGES
@CHECKPOINTING
def test_every_reduction_is_launched_before_the_next_unit_s_backward_ends(
    trained: Any, stage: Any, checkpointing: Any
) -> None:
    run = trained(Case(stage=stage, checkpointing=checkpointing))
    launched = {c.unit: c.launched for c in run.launched_in("backward pass", "reduce_scatter")}
    for index in range(1, NUM_BLOCKS):
        assert launched[BLOCKS[index]] < run.find("end", "backward", index - 1)
    assert launched.keys() == {"root", *BLOCKS}
    assert not run.launched_in("step", "reduce_scatter"), "gradients were left for step()"
    assert all(c.waited in run.span("backward pass") for c in run.collectives if c.what == "reduce_scatter")


@STAGES
@CHECKPOINTING
def test_only_the_last_reduction_is_waited_for_at_once(trained: Any, stage: Any, checkpointing: Any) -> None:
    """Nothing is computed after the root's gradients: the end of backward waits for it."""
    run = trained(Case(stage=stage, checkpointing=checkpointing))
    assert run.exposed("backward pass", "reduce_scatter") == ["root"]


@STAGES
def test_without_overlap_every_reduction_is_waited_for_at_once(trained: Any, stage: Any) -> None:
    run = trained(Case(stage=stage, overlap=False))
    assert run.exposed("backward pass", "reduce_scatter") == [*reversed(BLOCKS), "root"]


@STAGES
def test_a_bounded_number_of_reductions_is_in_flight(trained: Any, stage: Any) -> None:
    flying = most = 0
    for event in trained(Case(stage=stage)).events:
        flying += {"launch": 1, "wait": -1}.get(event.kind, 0) * (event.what == "reduce_scatter")
        most = max(most, flying)
    assert most == MAX_UNITS_IN_FLIGHT + 1  # the third is launched before the first is waited for


# Counting -------------------------------------------------------------------------------------------------------------


@CHECKPOINTING
def test_stage_3_makes_the_collectives_of_its_plan(trained: Any, checkpointing: Any) -> None:
    """Forward gathers every plane once; backward those but the root's and the last unit's, which are whole still."""
    run = trained(Case(stage=3, checkpointing=checkpointing))
    assert run.num_sharded == sum(run.num_planes.values()) == NUM_BLOCKS + 1
    kept = ["root", *last_unit(checkpointing)]
    assert sorted(run.units("forward pass", "all_gather")) == sorted(["root", *BLOCKS])
    assert sorted(run.units("backward pass", "all_gather")) == sorted({"root", *BLOCKS} - set(kept))
    assert sorted(run.units("backward pass", "reduce_scatter")) == sorted(["root", *BLOCKS])
    assert run.units("step", "all_gather") == []


def last_unit(checkpointing: Checkpointing) -> list[str]:
    """The unit that stays whole between its forward and its backward.

    None under a reentrant checkpoint: its forward runs without gradients, so no backward is known to follow.
    """
    return [] if checkpointing == "reentrant" else [BLOCKS[-1]]


def test_stage_2_makes_the_collectives_of_its_plan(trained: Any) -> None:
    """Parameters are whole: nothing is gathered but once per plane in step(), after its update."""
    run = trained(Case(stage=2))
    assert run.num_sharded == 0 and sum(run.num_planes.values()) == NUM_BLOCKS + 1
    assert run.units("forward pass", "all_gather") == run.units("backward pass", "all_gather") == []
    assert sorted(run.units("backward pass", "reduce_scatter")) == sorted(["root", *BLOCKS])
    assert sorted(run.units("step", "all_gather")) == sorted(["root", *BLOCKS])


def test_stage_2_gathers_updated_units_while_the_next_ones_are_updated(trained: Any) -> None:
    """All gathers of step() but the last are in flight together with the one that follows."""
    published = trained(Case(stage=2)).launched_in("step", "all_gather")
    assert all(this.waited > following.launched for this, following in pairwise(published))
