"""The placement planner: budgets, order, constraints, the split between executors, what it says when nothing fits."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorica.config import load
from lorica.config.offload import Offload
from lorica.layout import CHUNK_ALIGN, chunk_size
from lorica.place import (
    Budget,
    Budgets,
    Constraints,
    DoesNotFit,
    Free,
    Placements,
    PlaneDemand,
    Speeds,
    assign,
    place,
)
from lorica.place.assign import MIN_CHUNKS, PARAM_WINDOW, device_numel, link_bytes
from lorica.place.demand import chunk_numel, num_chunks, slot_numel
from lorica.place.placements import size_text
from lorica.plan import Request, plan_unit

PAGE = Path(__file__).parents[2] / "docs" / "offload-planning.md"
GIB = 2**30
PLENTY = Budget(10**18)
NOTHING = Budget(0)
LEVEL = {"device": 0, "host": 1, "nvme": 2, None: 0}

planes_st = st.lists(
    st.builds(
        PlaneDemand,
        name=st.just("plane"),
        unit_index=st.integers(0, 9),
        numel=st.integers(1, 400).map(lambda n: n * 128),
        record_itemsize=st.sampled_from([0, 6, 10]),
        record_shards=st.sampled_from([1, 2]),
        trainable=st.sampled_from([True, True, True, False]),
        param_can_leave=st.booleans(),
    ),
    max_size=9,
)
budget_st = st.one_of(st.just(0), st.integers(0, 6_000_000)).map(Budget)
constraints_st = st.builds(
    Constraints,
    records=st.sampled_from(["device", "host", "nvme", "auto", "auto", "auto"]),
    params=st.sampled_from(["device", "host", "auto"]),
    ratio=st.sampled_from([0.0, 0.3, 0.75, 1.0, 1.0]),
    executor=st.sampled_from(["auto", "device", "host"]),
    overlap=st.booleans(),
    on_cuda=st.booleans(),
    staging_numel=st.sampled_from([None, 128, 10_000]),
    staging_bytes=st.sampled_from([None, 200_000]),
    passing_bytes=st.sampled_from([0, 5_000]),
)
budgets_st = st.builds(Budgets, device=budget_st, host=budget_st, disk=budget_st)


def blocks(count: int, numel: int, **fields: Any) -> list[PlaneDemand]:
    """Equal planes, one per unit."""
    fields = {"param_can_leave": True, **fields}
    return [PlaneDemand(f"block.{i}", i, numel, **fields) for i in range(count)]


def tiers(placements: Placements) -> list[str | None]:
    """The tier of every record."""
    return [p.record for p in placements.planes]


# What must hold for every placement -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(planes_st, budgets_st, constraints_st)
def test_a_placement_stays_within_its_budgets_and_places_every_plane_once(
    planes: list[PlaneDemand], budgets: Budgets, constraints: Constraints
) -> None:
    try:
        placements = place(planes, budgets, constraints)
    except DoesNotFit as error:
        assert not error.placements.fits
        return
    assert [p.plane for p in placements.planes] == planes
    held = {"device": 0, "host": 0, "nvme": 0}
    for p in placements.planes:
        assert (p.record is None) == (p.executor is None) == (not p.plane.trainable)
        held[p.param] += p.plane.param_bytes
        held["device"] += p.plane.grad_bytes
        if p.record is not None:
            held[p.record] += p.record_bytes
        assert p.record != "device" or p.executor == "device"
        assert p.record != "nvme" or p.executor == "host"
    device, host, disk = placements.device, placements.host, placements.disk
    assert device.used == held["device"] + device.passing + device.staging <= budgets.device.usable
    assert host.used == held["host"] + host.staging <= budgets.host.usable
    assert disk.used == held["nvme"] <= budgets.disk.usable


@settings(max_examples=100, deadline=None)
@given(planes_st, budgets_st, constraints_st)
def test_the_same_question_has_the_same_answer(
    planes: list[PlaneDemand], budgets: Budgets, constraints: Constraints
) -> None:
    assert assign(planes, budgets, constraints) == assign(tuple(planes), budgets, constraints)


@settings(max_examples=200, deadline=None)
@given(planes_st, budgets_st, constraints_st)
def test_records_go_down_the_tiers_in_forward_order_and_parameters_leave_from_the_end(
    planes: list[PlaneDemand], budgets: Budgets, constraints: Constraints
) -> None:
    placements = assign(planes, budgets, constraints)
    levels = [LEVEL[p.record] for p in placements.planes if p.plane.trainable]
    assert levels == sorted(levels)
    leaving = [p.param for p in placements.planes if p.plane.param_can_leave]
    assert leaving == sorted(leaving)
    assert all(p.param == "device" for p in placements.planes if not p.plane.param_can_leave)


@settings(max_examples=200, deadline=None)
@given(planes_st, budgets_st, constraints_st, st.integers(0, 2_000_000))
def test_more_device_memory_moves_nothing_away_from_the_device(
    planes: list[PlaneDemand], budgets: Budgets, constraints: Constraints, more: int
) -> None:
    before = assign(planes, budgets, constraints)
    after = assign(planes, replace(budgets, device=Budget(budgets.device.size + more)), constraints)
    for old, new in zip(before.planes, after.planes, strict=True):
        assert LEVEL[new.record] <= LEVEL[old.record] and LEVEL[new.param] <= LEVEL[old.param]


@settings(max_examples=200, deadline=None)
@given(planes_st, budgets_st, constraints_st)
def test_the_table_adds_up_to_what_each_tier_holds(
    planes: list[PlaneDemand], budgets: Budgets, constraints: Constraints
) -> None:
    placements = assign(planes, budgets, constraints)
    rows = placements.rows()
    for name, tier in placements.tiers.items():
        assert sum(getattr(row, name) for row in rows) == tier.used
    text = placements.table()
    assert len(text.splitlines()) == len(rows) + 6


@settings(max_examples=150, deadline=None)
@given(planes_st, st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.sampled_from(["host", "nvme"]))
def test_ratio_keeps_the_rest_on_the_device_within_one_plane(
    planes: list[PlaneDemand], ratio: float, tier: str
) -> None:
    wishes = Constraints(records=tier, ratio=ratio)  # type: ignore[arg-type]
    placements = place(planes, Budgets(PLENTY, PLENTY, PLENTY), wishes)
    total = sum(plane.owned_numel for plane in planes)
    on_device = sum(p.plane.owned_numel for p in placements.planes if p.record == "device")
    largest = max((plane.owned_numel for plane in planes), default=0)
    assert (1 - ratio) * total - largest <= on_device <= (1 - ratio) * total + 1
    assert set(tiers(placements)) <= {"device", tier, None}


# When it does not fit -------------------------------------------------------------------------------------------------


def some_placement_fits(planes: list[PlaneDemand], budgets: Budgets, wishes: Constraints) -> bool:
    """Whether any placement that keeps the order is within the budgets: every cut is tried."""
    trainable = [plane for plane in planes if plane.trainable]
    leaving = [plane for plane in planes if plane.param_can_leave]
    slot = slot_numel(planes, wishes)
    held = sum(n <= device_numel(planes, wishes.ratio) for n in accumulate(p.owned_numel for p in trainable))
    cuts = {"device": [0], "host": [len(leaving)], "auto": range(len(leaving) + 1)}[wishes.params]
    to_disk = wishes.records == "nvme" or (wishes.records == "auto" and budgets.disk.usable > 0)
    carries = wishes.on_cuda and (wishes.executor != "device" or to_disk)
    width = max((p.record_itemsize + 2 * (wishes.params != "device") for p in trainable), default=0)
    ring_width = max((4 * carries + p.record_itemsize * to_disk for p in trainable), default=0)
    slots = max(MIN_CHUNKS, (wishes.staging_bytes or 0) // max(1, slot * width))
    streams = wishes.executor == "device" or (wishes.executor == "auto" and wishes.on_cuda)
    for streamed in cuts:
        gone = leaving[len(leaving) - streamed :]
        window = max((p.numel * 2 for p in gone), default=0) * PARAM_WINDOW * wishes.on_cuda
        fixed = sum(p.param_bytes + p.grad_bytes for p in planes) - sum(p.param_bytes for p in gone)
        for first in range(len(trainable) + 1):
            if first < held or (wishes.records == "device" and first < len(trainable)):
                continue
            if wishes.records in ("host", "nvme") and first != held:
                continue
            if wishes.params == "auto" and streamed and wishes.records == "auto" and first != held:
                continue
            away = len(trainable) - first
            staged = away and streams and wishes.records in ("host", "auto")
            staging = slots * slot * width if staged else 0
            device = fixed + window + wishes.passing_bytes + staging + sum(p.record_bytes for p in trainable[:first])
            for second in range(first, len(trainable) + 1):
                if (wishes.records == "nvme" and second > first) or (not to_disk and second < len(trainable)):
                    continue
                ring = wishes.host_slots * slot * ring_width if away else 0
                host = sum(p.param_bytes for p in gone) + ring + sum(p.record_bytes for p in trainable[first:second])
                disk = sum(p.record_bytes for p in trainable[second:])
                needs = zip((device, host, disk), (budgets.device, budgets.host, budgets.disk), strict=True)
                if all(need <= budget.usable for need, budget in needs):
                    return True
    return False


@settings(max_examples=200, deadline=None)
@given(planes_st, budgets_st, constraints_st)
@example(  # host memory for its ring only, so that every record goes to disk; the device's ring stays reserved
    blocks(4, 51200), Budgets(Budget(4 * 51200 * 4 + 100_000), Budget(4 * 4096 * 14), PLENTY),
    Constraints(records="auto", staging_numel=4096),
)  # fmt: skip
def test_what_is_refused_fits_in_no_way_that_keeps_the_order(
    planes: list[PlaneDemand], budgets: Budgets, constraints: Constraints
) -> None:
    assert assign(planes, budgets, constraints).fits == some_placement_fits(planes, budgets, constraints)


def test_a_refusal_names_every_tier_with_its_need_its_budget_and_what_is_missing() -> None:
    budgets = Budgets(Budget(8 * GIB, reserve=GIB), Budget(4 * GIB))
    with pytest.raises(DoesNotFit) as caught:
        place(blocks(10, GIB // 10), budgets, Constraints(records="host", staging_numel=2**24))
    text = str(caught.value)
    slot = 3745 * 4096  # a plane in 7 equal chunks of at most 16 Mi elements
    staging = size_text(3 * slot * 10 + 10 * (GIB // 10) * 4)
    assert f"device memory: {staging}, the budget is 7.00 GiB (8.00 GiB less a reserve of 1.00 GiB): enough" in text
    assert "host memory: 10.23 GiB, the budget is 4.00 GiB: short by 6.23 GiB" in text
    assert "disk" not in text.split("Fix")[0]


@settings(max_examples=60, deadline=None)
@given(planes_st, budgets_st, constraints_st)
def test_every_alternative_of_a_refusal_fits(
    planes: list[PlaneDemand], budgets: Budgets, constraints: Constraints
) -> None:
    try:
        place(planes, budgets, constraints)
    except DoesNotFit as error:
        assert all(alternative.placements.fits for alternative in error.alternatives)
        assert "Fix: " in str(error)


def alternatives(planes: list[PlaneDemand], budgets: Budgets, wishes: Constraints) -> list[str]:
    """The settings that a refusal proposes."""
    with pytest.raises(DoesNotFit) as caught:
        place(planes, budgets, wishes)
    return [alternative.setting for alternative in caught.value.alternatives]


def test_a_refusal_proposes_other_tiers_reserves_ranks_and_model_sizes() -> None:
    planes = blocks(16, 2**26)  # 1 Gi parameters: 4 GiB that stay, 10 GiB of records
    small = Budgets(Budget(12 * GIB, reserve=4 * GIB), Budget(16 * GIB), Budget(16 * GIB))
    found = alternatives(planes, small, Constraints(records="device"))
    assert found[0] == 'zero_optimization.offload_optimizer.device "auto"'
    assert 'zero_optimization.offload_optimizer.device "cpu"' in found
    assert 'zero_optimization.offload_optimizer.device "nvme"' in found
    assert "stage 3 over 2 ranks with such budgets each" in found
    assert re.fullmatch(r"a model of 6\d\d\.\d\d M parameters", found[-1])
    roomy = Budgets(Budget(16 * GIB, reserve=4 * GIB), NOTHING)
    assert 'lorica.offload.device_reserve "2GiB"' in alternatives(planes, roomy, Constraints(records="device"))


def test_a_refusal_for_lack_of_room_for_parameters_proposes_to_offload_them() -> None:
    planes = blocks(16, 2**26)
    budgets = Budgets(Budget(3 * GIB + GIB // 2), Budget(16 * GIB))
    both = 'zero_optimization.offload_param.device "auto" with zero_optimization.offload_optimizer.device "auto"'
    assert both in alternatives(planes, budgets, Constraints(records="host"))
    assert f"{both} and stage 3" in alternatives(planes, budgets, Constraints(records="host", stage=2))


def test_a_refusal_at_stage_0_proposes_a_stage_at_which_the_optimizer_can_leave() -> None:
    budgets = Budgets(Budget(6 * GIB), Budget(16 * GIB))
    found = alternatives(blocks(16, 2**26), budgets, Constraints(records="device", stage=0))
    assert found[0] == 'zero_optimization.offload_optimizer.device "auto" with stage 1'


def test_a_refusal_of_a_ratio_proposes_to_let_everything_leave() -> None:
    budgets = Budgets(Budget(6 * GIB), Budget(16 * GIB))
    found = alternatives(blocks(16, 2**26), budgets, Constraints(records="host", ratio=0.5))
    assert found[0] == "zero_optimization.offload_optimizer.ratio 1.0"


def test_a_refusal_for_lack_of_room_for_the_ring_proposes_the_cpu() -> None:
    budgets = Budgets(Budget(16 * 2**26 * 4 + 3 * 2**24 * 10 - 1), Budget(16 * GIB))
    wishes = Constraints(records="host", staging_numel=2**24)
    assert alternatives(blocks(16, 2**26), budgets, wishes)[0] == 'lorica.offload.executor "host"'


def test_where_nothing_helps_the_refusal_says_so() -> None:
    with pytest.raises(DoesNotFit, match="no other setting fits"):
        place(blocks(2, 1280), Budgets(NOTHING, NOTHING), Constraints())


# Executors and staging ------------------------------------------------------------------------------------------------


THREE_SLOTS = Constraints(records="host", staging_numel=2**24, staging_bytes=1)


def seconds(placements: Placements, speeds: Speeds) -> dict[str, float]:
    """How long each executor works on records in host memory, both using the link at the same time.

    What the ring holds needs no link.
    """
    numel = {"host": 0, "device": 0}
    for p in placements.planes:
        if p.record == "host" and p.executor is not None:
            numel[p.executor] += p.plane.owned_numel
    host = min(speeds.host_beside, speeds.link / 4)
    far = max(0, numel["device"] - placements.staging_bytes // 10)
    return {"host": numel["host"] / host, "device": far / ((speeds.link - 4 * host) / 10)}


@pytest.mark.parametrize("num_slots", [3, 30])
@pytest.mark.parametrize("host_beside", [0.5e9, 2.75e9, 5.9e9, 9e9])
def test_both_executors_finish_within_one_plane_of_each_other(host_beside: float, num_slots: int) -> None:
    speeds = Speeds(host_beside=host_beside)
    planes = blocks(60, 10**8)  # 6 chunks each
    wishes = replace(THREE_SLOTS, staging_bytes=num_slots * 10 * slot_numel(planes, THREE_SLOTS))
    placements = place(planes, Budgets(PLENTY, PLENTY), wishes, speeds)
    busy = seconds(placements, speeds)
    rate = min(host_beside, (speeds.link - 4 * host_beside) / 10)
    assert {p.executor for p in placements.planes} == {"host", "device"}
    assert busy["host"] > 0 and abs(busy["host"] - busy["device"]) <= 10**8 / rate


def test_executors_alternate_so_that_early_units_are_ready_early() -> None:
    placements = place(blocks(60, 10**8), Budgets(PLENTY, PLENTY), THREE_SLOTS)
    for part in (placements.planes[:20], placements.planes[20:40], placements.planes[40:]):
        share = sum(p.executor == "device" for p in part) / len(part)
        assert 0.7 <= share <= 0.85  # 4.5 of 5.7 thousand million parameters a second


@pytest.mark.parametrize("host_beside", [0.5e9, 2.75e9, 9e9])
def test_a_ring_that_holds_all_that_streams_gives_everything_to_the_device(host_beside: float) -> None:
    planes = [*blocks(30, 10**8), *blocks(30, 3 * 10**7)]
    wishes = Constraints(records="host", staging_numel=2**24)
    placements = place(planes, Budgets(PLENTY, PLENTY), wishes, Speeds(host_beside=host_beside))
    assert {p.executor for p in placements.planes} == {"device"}
    assert placements.staging_bytes == (30 * 6 + 30 * 2) * 10 * slot_numel(planes, wishes)


def test_a_forced_executor_updates_all_records_in_host_memory_and_the_cpu_those_in_files() -> None:
    planes = blocks(8, 2**20)
    budgets = Budgets(PLENTY, Budget(96 * 2**20), PLENTY)
    for executor in ("host", "device"):
        wishes = Constraints(records="auto", executor=executor, ratio=1.0)  # type: ignore[arg-type]
        placements = place(planes, replace(budgets, device=Budget(66 * 2**20)), wishes)
        by_tier = {(p.record, p.executor) for p in placements.planes}
        assert by_tier - {("device", "device")} == {("host", executor), ("nvme", "host")}


def test_without_an_accelerator_the_cpu_updates() -> None:
    placements = place(blocks(8, 2**20), Budgets(PLENTY, PLENTY), Constraints(records="host", on_cuda=False))
    assert {p.executor for p in placements.planes} == {"host"}
    assert placements.staging_bytes == 0 and placements.traffic == (0, 0, 0, 0)


def test_leftover_device_memory_becomes_staging_up_to_all_that_streams() -> None:
    planes = blocks(40, 2**24)
    wishes = Constraints(records="host", executor="device", staging_numel=2**24)
    slot, parameters = 10 * 2**24, 40 * 2**24 * 4
    for left, expected in ((3 * slot, 3), (20 * slot, 18), (500 * slot, 40)):
        placements = place(planes, Budgets(Budget(parameters + left), PLENTY), wishes)
        assert placements.staging_bytes == expected * slot
    plenty = Budgets(PLENTY, PLENTY)
    assert place(planes, plenty, replace(wishes, overlap=False)).staging_bytes == 3 * slot
    assert place(planes, plenty, replace(wishes, staging_bytes=7 * slot + 5)).staging_bytes == 7 * slot
    small = replace(wishes, staging_bytes=1, staging_numel=8192)
    assert place(planes, plenty, small).staging_bytes == 3 * 10 * 8192


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**9), st.integers(1, 10**8))
def test_a_plane_is_cut_into_as_few_chunks_as_may_be_of_equal_size(numel: int, most: int) -> None:
    size, limit = chunk_size(numel, most), max(CHUNK_ALIGN, most // CHUNK_ALIGN * CHUNK_ALIGN)
    count = -(-numel // size)
    assert size % CHUNK_ALIGN == 0 and size <= limit and count == -(-numel // limit)
    last = numel - (count - 1) * size
    assert last > 0 and size - last < count * CHUNK_ALIGN  # equal, but for the rounding of the others


@settings(max_examples=100, deadline=None)
@given(planes_st, constraints_st)
def test_a_slot_holds_the_largest_of_the_equal_chunks_of_every_plane(
    planes: list[PlaneDemand], constraints: Constraints
) -> None:
    most = max(4096, chunk_numel(planes, constraints) // 4096 * 4096)
    owned = [plane.owned_numel for plane in planes if plane.trainable]
    counts = [-(-numel // most) for numel in owned]
    assert [num_chunks(plane, most) for plane in planes if plane.trainable] == counts
    shares = [-(-numel // count) for numel, count in zip(owned, counts, strict=True)]
    assert slot_numel(planes, constraints) == max((-(-share // 4096) * 4096 for share in shares), default=0)


@pytest.mark.parametrize(
    ("numel", "expected"),
    [
        (2**20, 2**20),
        (2**23, 2**22),  # 4 Mi at least, or the plane
        (2**26, 5462 * 4096),  # a third of a block, rounded up: 120 chunks
        (2**30, 2**26),  # 64 Mi at most
    ],
)
def test_a_step_has_about_96_chunks_that_the_blocks_fill(numel: int, expected: int) -> None:
    planes = [PlaneDemand("root", 40, numel * 5 // 4), *blocks(40, numel)]
    assert chunk_numel(planes, Constraints()) == slot_numel(planes, Constraints()) == expected
    assert chunk_numel(planes, Constraints(staging_numel=10_000)) == 10_000
    assert slot_numel(planes, Constraints(staging_numel=10_000)) == 8192


def test_the_traffic_of_a_step_counts_records_gradients_and_parameters() -> None:
    n = 2**20
    for executor, down, up in (("device", 10, 10), ("host", 4, 2)):
        wishes = Constraints(records="host", executor=executor)  # type: ignore[arg-type]
        assert place(blocks(4, n), Budgets(PLENTY, PLENTY), wishes).traffic[:2] == (4 * n * down, 4 * n * up)
    wishes = Constraints(records="nvme", params="host", param_uses=4)
    traffic = place(blocks(4, n), Budgets(PLENTY, PLENTY, PLENTY), wishes).traffic
    assert traffic == (4 * n * 2, 4 * n * 2 * 4, 4 * n * 10, 4 * n * 10)
    assert link_bytes(blocks(1, n)[0], "host", "device")[:2] == (12 * n, 12 * n)


def test_what_the_update_takes_is_what_the_slowest_resource_takes() -> None:
    planes = blocks(10, 10**8)
    on_host = place(planes, Budgets(PLENTY, PLENTY), Constraints(records="host", executor="host"))
    assert on_host.update_seconds == pytest.approx(1e9 / 3.2e9)
    streamed = place(planes, Budgets(PLENTY, PLENTY), Constraints(records="host", executor="device"))
    assert streamed.update_seconds == pytest.approx(10e9 / 50e9)
    files = place(planes, Budgets(PLENTY, PLENTY, PLENTY), Constraints(records="nvme"))
    assert files.update_seconds == pytest.approx(20e9 / 2.6e9)


# Demands, budgets and wishes out of what the engine knows -------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "dtype", "split", "shards", "record"),
    [
        (0, "bfloat16", True, (1, 1, 1), 10),
        (1, "bfloat16", True, (1, 1, 4), 10),
        (2, "bfloat16", False, (1, 4, 4), 12),
        (3, "float32", True, (4, 4, 4), 8),
        (3, "float16", True, (4, 4, 4), 12),
    ],
)
def test_the_demand_of_a_plane_follows_its_plan(
    stage: int, dtype: str, split: bool, shards: tuple[int, int, int], record: int
) -> None:
    plan = plan_unit(Request(stage, dtype, dtype, dtype, split_master=split))
    demand = PlaneDemand.of("plane", 0, plan, 4096, 4, 2, trainable=True)
    assert (demand.param_shards, demand.grad_shards, demand.record_shards) == shards
    held = plan.bytes_per_rank(4096, 4, 2, trainable=True)
    assert (demand.param_bytes, demand.grad_bytes) == (held.param, held.grad)
    assert demand.record_bytes == held.master + held.moments == record * 4096 // shards[2]


def test_budgets_are_what_is_free_less_a_reserve() -> None:
    free = Free(device_total=100 * GIB, device=90 * GIB, host_total=200 * GIB, host=180 * GIB, disk=100 * GIB)
    budgets = Budgets.of(free, Offload(), on_cuda=True, uses_disk=True, ranks_on_host=2)
    assert budgets.device == Budget(90 * GIB, 20 * GIB)
    assert budgets.host == Budget(90 * GIB, 5 * GIB)
    assert budgets.disk.size == 50 * GIB and budgets.disk.usable == 49 * GIB
    assert Budgets.of(free, Offload(), on_cuda=True, uses_disk=False).disk.usable == 0
    little = free._replace(host_total=10 * GIB, host=8 * GIB)
    assert Budgets.of(little, Offload(), on_cuda=True, uses_disk=False).host == Budget(8 * GIB, 4 * GIB)


def test_given_budgets_are_taken_as_they_are_and_must_be_there() -> None:
    free = Free(device_total=100, device=90, host_total=200, host=180, disk=100)
    given = Offload(device_memory=50, host_memory=60, disk_space=70)
    expected = Budgets(Budget(50), Budget(60), Budget(70))
    assert Budgets.of(free, given, on_cuda=True, uses_disk=True) == expected
    reserves = Offload(device_reserve=10, host_reserve=20)
    budgets = Budgets.of(free, reserves, on_cuda=True, uses_disk=False, ranks_on_host=2)
    assert (budgets.device, budgets.host) == (Budget(90, 10), Budget(90, 10))
    for key in ("device_memory", "host_memory", "disk_space"):
        with pytest.raises(ValueError, match=f"lorica.offload.{key}: expected at most what is free"):
            Budgets.of(free, Offload(**{key: 10**9}), on_cuda=True, uses_disk=True)


def test_without_an_accelerator_device_and_host_share_one_memory() -> None:
    free = Free(device_total=0, device=0, host_total=200 * GIB, host=100 * GIB, disk=0)
    whole = Budgets.of(free, Offload(), on_cuda=False, uses_disk=False)
    assert whole.shared and whole.device == whole.host == Budget(100 * GIB, 10 * GIB)
    given = Budgets.of(free, Offload(device_memory=30 * GIB), on_cuda=False, uses_disk=False)
    assert not given.shared and given.device == Budget(30 * GIB) and given.host == Budget(70 * GIB, 10 * GIB)
    other = Budgets.of(free, Offload(host_memory=30 * GIB), on_cuda=False, uses_disk=False)
    assert not other.shared and other.device == Budget(70 * GIB, 10 * GIB) and other.host == Budget(30 * GIB)
    with pytest.raises(ValueError, match="device_memory and host_memory together"):
        Budgets.of(free, Offload(device_memory=60 * GIB, host_memory=60 * GIB), on_cuda=False, uses_disk=False)


@settings(max_examples=150, deadline=None)
@given(planes_st, budget_st, budget_st, constraints_st)
def test_one_memory_is_not_planned_twice(
    planes: list[PlaneDemand], memory: Budget, disk: Budget, constraints: Constraints
) -> None:
    wishes = replace(constraints, on_cuda=False, executor="auto")
    placements = assign(planes, Budgets(memory, memory, disk, shared=True), wishes)
    if placements.fits:
        assert placements.device.used + placements.host.used <= memory.usable


def test_the_wishes_of_a_configuration_become_constraints() -> None:
    config = load(
        {
            "gradient_accumulation_steps": 3,
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/x", "ratio": 0.5, "buffer_count": 6},
                "offload_param": {"device": "auto"},
            },
            "lorica": {
                "offload": {"executor": "host", "overlap": False, "staging_numel": 64, "staging_memory": "1KiB"}
            },
        }
    )
    assert Constraints.of(config, on_cuda=True, ranks=4, passing_bytes=7) == Constraints(
        records="nvme",
        params="auto",
        ratio=0.5,
        executor="host",
        overlap=False,
        on_cuda=True,
        stage=3,
        ranks=4,
        staging_numel=64,
        staging_bytes=1024,
        host_slots=6,
        param_uses=6,
        passing_bytes=7,
    )
    nothing = Constraints.of(load({}), on_cuda=False)
    assert (nothing.records, nothing.params) == ("device", "device")


def test_threads_beyond_the_cores_that_reach_the_memorys_limit_add_nothing() -> None:
    rates = [Speeds.with_threads(threads).host_update for threads in (1, 4, 8, 16)]
    assert rates == [3.2e9 / 8, 3.2e9 / 2, 3.2e9, 3.2e9]


# The table and the page -----------------------------------------------------------------------------------------------


def test_neighbours_with_the_same_tiers_share_a_row_and_frozen_planes_have_their_own() -> None:
    planes = [PlaneDemand("root", 4, 128), *blocks(4, 128), *blocks(2, 256, trainable=False, grad_itemsize=0)]
    placements = place(planes, Budgets(PLENTY, PLENTY), Constraints(records="host", ratio=0.6))
    rows = [(r.units, r.parameters, r.weights, r.gradients, r.states) for r in placements.rows()[:3]]
    assert rows == [
        ("0,4", "256", "device", "device", "device"),
        ("1-3", "384", "device", "device", "host"),
        ("0-1", "512", "device", "frozen", "-"),
    ]


def page_blocks() -> list[tuple[str, str]]:
    """The code of the page that is followed by its output, and that output."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```python\n((?:(?!^```).)*?)^```\n\n```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_page_prints_what_it_shows() -> None:
    shown, names = page_blocks(), {}  # type: ignore[var-annotated]
    assert len(shown) >= 2
    for code, output in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == output


def largest(units: int, budgets: Budgets, wishes: Constraints, **fields: Any) -> int:
    """The most parameters, in `units` equal planes, that the planner places."""
    low, high = 0, 10**12
    while high - low > 10**6:
        middle = (low + high) // 2
        fits = assign(blocks(units, middle // units, **fields), budgets, wishes).fits
        low, high = (middle, high) if fits else (low, middle)
    return low


D, H, S = 110 * GIB, 100 * GIB, 45 * GIB


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("choice", ["none", "cpu", "nvme", "auto", "auto both"])
def test_the_capacity_formulas_of_the_page_are_the_planners(choice: str, stage: int, ranks: int) -> None:
    if (stage == 0 and choice != "none") or (stage < 3 and choice == "auto both"):
        return
    shards = {"param_shards": ranks if stage == 3 else 1, "grad_shards": ranks if stage >= 2 else 1}
    p, g = 2 / shards["param_shards"], 2 / shards["grad_shards"]
    record_shards = ranks if stage >= 1 else 1
    r = 10 / record_shards
    formula = {
        "none": D / (p + g + r),
        "cpu": min(D / (p + g), H / r),
        "nvme": min(D / (p + g), S / r),
        "auto": min(D / (p + g), (D + H + S) / (p + g + r)),
        "auto both": min(D / g, (D + H) / (p + g), (D + H + S) / (p + g + r)),
    }[choice]
    records = {"none": "device", "cpu": "host", "nvme": "nvme", "auto": "auto", "auto both": "auto"}[choice]
    wishes = Constraints(
        records=records,  # type: ignore[arg-type]
        params="auto" if choice == "auto both" else "device",
        stage=stage,
        staging_numel=2**16,
    )
    budgets = Budgets(Budget(D), Budget(H), Budget(S))
    found = largest(400, budgets, wishes, **shards, record_shards=record_shards)
    # Rings and chunks are left out, as are the rests of two tiers into which no whole record fits, and three whole
    # units where parameters stream.
    tolerance = 0.03 if choice == "auto both" else 0.01
    assert formula * (1 - tolerance) <= found <= formula * 1.0001
