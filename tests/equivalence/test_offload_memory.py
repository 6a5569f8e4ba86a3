"""What an engine with offloaded states holds: in each tier what was planned, 10 bytes a parameter, never more."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import lorica
from lorica.tier import padded_bytes
from tests.equivalence.offloading import (
    Case,
    Plan,
    num_descriptors,
    placing,
    start_engine,
    status,
    swap_files,
    take_step,
    update_threads,
)
from tests.equivalence.training import Training
from tests.harness import Ranks
from tests.models import MLP

PLANS = {
    "device": Plan(1, ("device",), delays=False),
    "host, by the device": Plan(2, ("host",), ("device",), delays=False),
    "host, by the CPU": Plan(3, ("host",), ("host",), delays=False),
    "files": Plan(4, ("nvme",), delays=False),
    "everything": Plan(5, delays=False),
}
# What AdamW's master and moments add to a parameter; in fp32 a parameter in the same tier is its own master.
RECORD_BYTES = {"bf16": {10}, "fp32": {8, 12}, "fp16": {12}}


# Planned and counted --------------------------------------------------------------------------------------------------


class Tiers(NamedTuple):
    """Bytes per tier: device, host, files."""

    device: int = 0
    host: int = 0
    nvme: int = 0

    def plus(self, tier: str, count: int) -> Tiers:
        """With more in one of them."""
        return self._replace(**{tier: getattr(self, tier) + count})


class Held(NamedTuple):
    """Bytes of one rank: of records and of parameters per tier, planned and counted; per kind, as the engine says."""

    planned_records: Tiers
    records: Tiers
    planned_params: Tiers
    params: Tiers
    planned: dict[str, int]
    allocated: dict[str, int]
    record_bytes_per_element: set[float]


def size(stored: Any) -> int:
    """Bytes of a plane in memory or in a file."""
    return int(stored.numel()) * int(stored.element_size())


def held(case: Case, plan: Plan, folder: str) -> Held:
    """Count after a step."""
    with placing(plan) as made:
        engine = start_engine(case, plan, folder)
    take_step(engine, case, 0)
    engine.backward(engine(*case.training.micro_batch(1, 0, dist.get_rank())))  # gradients count too
    memory, placements = engine.memory(), made[-1]
    records, params, per_element = Tiers(), Tiers(), set()
    for flat in (flat for unit in engine._parts.units for flat in unit.flats):
        params = params.plus(flat.plan.param.tier, size(flat.shard if flat.sharded else flat.full))
        if not flat.trainable:
            continue
        own_master = 0 if flat.plan.master_is_param else size(flat.master)
        record = own_master + sum(map(size, flat.moments.values()))
        records = records.plus(flat.plan.moments.tier, record)
        if flat.plan.moments.tier != "device":
            per_element.add(record / flat.owned.numel())
    planned_records, planned_params = Tiers(), Tiers()
    for placed in placements.planes:
        planned_params = planned_params.plus(placed.param, placed.plane.param_bytes)
        if placed.record is not None:
            planned_records = planned_records.plus(placed.record, placed.record_bytes)
    engine.destroy()
    planned, allocated = (dict(each._asdict()) for each in (memory.planned_bytes, memory.allocated_bytes))
    return Held(planned_records, records, planned_params, params, planned, allocated, per_element)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("stage", "precision", "world_size", "recipe"),
    [
        (1, "bf16", 1, "gpt"),
        (3, "bf16", 1, "gpt, tied head"),
        pytest.param(2, "fp16", 1, "frozen", marks=pytest.mark.slow),
        pytest.param(1, "fp16", 2, "gpt", marks=pytest.mark.slow),
        (2, "bf16", 2, "frozen"),
        (3, "fp32", 2, "gpt"),
    ],
)
def test_every_tier_holds_what_was_planned(
    ranks: Callable[[int], Ranks], tmp_path: Path, stage: int, precision: Any, world_size: int, recipe: str, plan: str
) -> None:
    case = Case(Training(recipe, stage, precision, world_size))
    for found in ranks(world_size).run(held, case=case, plan=PLANS[plan], folder=str(tmp_path)):
        assert found.records == found.planned_records
        assert found.params == found.planned_params
        assert found.planned.keys() == found.allocated.keys()
        for kind, count in found.planned.items():
            assert found.allocated[kind] == pytest.approx(count, rel=0.02), kind
        assert found.record_bytes_per_element <= RECORD_BYTES[precision]
        assert found.record_bytes_per_element or plan in ("device", "everything")


# Pages ----------------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Memory of this process that is neither a file's nor shared with other ranks, all ranks at rest."""
    gc.collect()
    dist.barrier()
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no line Anonymous")


def growth(plan: Plan, folder: str) -> tuple[int, int, int]:
    """Growth of the resident memory by an engine, and by two steps; bytes of masters and moments."""
    before = anonymous_bytes()
    model = MLP(dim=1024, num_layers=16)
    config = Case(Training("mlp", 2, "bf16")).config()
    plan.into(config, folder)
    with placing(plan):
        engine, *_ = lorica.initialize(model=model, model_parameters=model.parameters(), config=config)
    at_start = anonymous_bytes() - before
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 1024), torch.ones(2, 1024)))
        engine.step()
    engine.synchronize()
    grown, allocated = anonymous_bytes() - before, engine.memory().allocated_bytes
    engine.destroy()
    return at_start, grown, allocated.master + allocated.moments


@pytest.mark.parametrize("name", ["host, by the CPU", "files"])
def test_offloaded_states_take_ten_bytes_a_parameter_in_host_memory_and_none_in_files(
    ranks: Callable[[int], Ranks], tmp_path: Path, name: str
) -> None:
    for _ in range(2):  # the first time modules are imported
        answers = ranks(2).run(growth, plan=replace(PLANS[name], chunk_numel=1 << 17), folder=str(tmp_path))
    own_numel = 16 * 1024 * 1024 // 2  # on each of two ranks; parameters are in memory that they share
    for at_start, grown, states in answers:
        assert states == 10 * own_numel
        in_memory = states if name != "files" else 0
        assert at_start == pytest.approx(in_memory, abs=0.05 * states)
        gradients = 2 * own_numel
        assert grown < in_memory + gradients + 0.25 * states, "steps take more than the gradients and small rings"


# Nothing grows --------------------------------------------------------------------------------------------------------


class Holdings(NamedTuple):
    """What a process holds: kB, threads, files, bytes of arenas that are taken, tensors."""

    resident_kb: int
    threads: int
    descriptors: int
    arena: int
    tensors: int


def holdings(engine: Any) -> Holdings:
    """Of this process, with nothing under way."""
    engine.synchronize()
    for flat in (flat for unit in engine._parts.units for flat in unit.flats if flat.trainable):
        flat.open_record(write=False)
    gc.collect()
    arena = engine._parts.site.tiers["host"]._arena
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    return Holdings(status("VmRSS"), status("Threads"), num_descriptors(), arena.num_bytes - arena.free_bytes, tensors)


def run_long(plan: Plan, folder: str, num_steps: int) -> tuple[Holdings, Holdings]:
    """What is held after a few steps and after many."""
    torch.manual_seed(0)
    model = MLP(dim=64, num_layers=2)
    config = Case(Training("mlp", 2, "bf16", clip=0.0)).config()
    plan.into(config, folder)
    with placing(plan):
        engine, *_ = lorica.initialize(model=model, model_parameters=model.parameters(), config=config)
    batch = torch.ones(2, 64), torch.ones(2, 64)

    def train(steps: int) -> Holdings:
        for _ in range(steps):
            engine.backward(engine(*batch))
            engine.step()
        return holdings(engine)

    train(20)  # pools of threads fill up, the allocator settles
    first, last = train(10), train(num_steps)
    engine.destroy()
    return first, last


LONG = {
    "streamed": (Plan(2, ("host",), ("device",), delays=False, staging_bytes=1 << 18), 1000),
    "by the CPU, guessing": (Plan(3, ("host",), ("host",), delays=False, keys=(("speculate", True),)), 1000),
    "files": (Plan(4, ("nvme",), delays=False), 300),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_grows_over_many_steps(
    ranks: Callable[[int], Ranks], tmp_path: Path, world_size: int, name: str
) -> None:
    plan, num_steps = LONG[name]
    arguments = {"plan": plan, "folder": str(tmp_path), "num_steps": num_steps}
    for first, last in ranks(world_size).run(run_long, **arguments):
        assert last.descriptors <= first.descriptors
        assert (last.threads, last.arena, last.tensors) == (first.threads, first.arena, first.tensors)
        assert last.resident_kb - first.resident_kb < 2 * num_steps, "more than 2 KiB a step"
    assert not swap_files(tmp_path)


def test_engines_one_after_the_other_leave_nothing(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """An engine is made, trained and destroyed many times in one process."""
    ((first, last),) = ranks(1).run(many_engines, folder=str(tmp_path))
    assert last[1:] == first[1:]
    assert last[0] - first[0] < 4096, "kB"
    assert not update_threads() and not swap_files(tmp_path)


def many_engines(folder: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """kB, threads and open files after a few engines and after many."""
    case = Case(Training("mlp", 3, "bf16", 1))

    def engines(count: int) -> tuple[int, ...]:
        for number in range(count):
            for name in ("everything", "files", "host, by the device"):
                engine = start_engine(case, PLANS[name], folder)
                take_step(engine, case, number)
                engine.destroy()
        gc.collect()
        return status("VmRSS"), status("Threads"), num_descriptors()

    engines(3)
    return engines(2), engines(8)


def test_an_arena_is_as_large_as_what_lies_in_it(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Planes of the host tier come out of the arena, and nothing else is asked of the system for them."""
    ((taken, planes, free),) = ranks(1).run(arena_use, folder=str(tmp_path))
    assert planes <= taken
    assert free >= 0


def arena_use(folder: str) -> tuple[int, int, int]:
    """Bytes taken of the arena, those of the planes in it, and those left."""
    case = Case(Training("mlp", 2, "bf16", 1))
    engine = start_engine(case, PLANS["host, by the CPU"], folder)
    arena = engine._parts.site.tiers["host"]._arena
    flats = [flat for unit in engine._parts.units for flat in unit.flats]
    planes = sum(padded_bytes(size(t)) for flat in flats for t in (flat.master, *flat.moments.values()))
    result = arena.num_bytes - arena.free_bytes, planes, arena.free_bytes
    engine.destroy()
    return result
