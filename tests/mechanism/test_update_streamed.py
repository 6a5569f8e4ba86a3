"""The executor that streams records through the device: each element once, in order, and no access that races."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch

from lorica.core.gradient import GradPlane
from lorica.core.streams import HostStreams
from lorica.update.streamed import Streamed
from tests.mechanism.update_planes import (
    GROUPS,
    Counting,
    Watch,
    WatchedStreams,
    assert_updated,
    make_planes,
    site,
    work,
)

NUMELS = [4096 * 3 + 256, 256, 4096 * 2, 4096 + 1280]


def executor(planes: Sequence[GradPlane], streams: object = None, *, chunk: int = 4096, slots: int = 3) -> Streamed:
    """With a counting optimizer."""
    streams = streams or HostStreams()
    return Streamed(Counting(), planes, GROUPS, planes[0].flat.site, streams, chunk_numel=chunk, num_slots=slots)


def calls(streamed: Streamed) -> list[int]:
    """Elements of each call of the optimizer so far."""
    optimizer = streamed._optimizer
    assert isinstance(optimizer, Counting)
    return [call.numel for call in optimizer.calls]


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 100])
@pytest.mark.parametrize("chunk", [1, 4096, 8192, 1 << 24])
def test_every_element_is_updated_once_in_every_step(chunk: int, slots: int, fp32: bool) -> None:
    planes = make_planes(site(), NUMELS, "device", fp32=fp32)
    streamed = executor(planes, chunk=chunk, slots=slots)
    for step in (1, 2, 3):
        streamed.start(work(step))
        for plane in planes:
            streamed.finish(plane)
    for plane in planes:
        streamed.open(plane, write=False)
    assert_updated(planes, [1, 2, 3])
    assert sum(calls(streamed)) == 3 * sum(NUMELS)
    streamed.close()


def test_planes_are_updated_in_the_order_of_their_use() -> None:
    planes = make_planes(site(), NUMELS, "device")
    streamed = executor(planes)
    streamed.start(work(1))
    optimizer = streamed._optimizer
    assert isinstance(optimizer, Counting)
    order = [int(call.names[0].split(".")[0]) for call in optimizer.calls]
    assert order == sorted(order) and set(order) == set(range(len(planes)))
    streamed.close()


def loop(streams: WatchedStreams, watch: Watch, slots: int, *, wait: bool = True) -> None:
    """Three steps: backward writes gradients and reads parameters, the update, forward reads parameters."""
    planes = make_planes(site(), NUMELS, "device")
    with watch:
        streamed = executor(planes, streams, slots=slots)
        for step in (1, 2, 3):
            for plane in reversed(planes):
                assert plane.reduced is not None
                plane.flat.owned.sum()
                plane.reduced.copy_(torch.ones(plane.reduced.numel()))
            streamed.start(work(step))
            for plane in planes:
                if wait:
                    streamed.finish(plane)
                plane.flat.owned.sum()
        for plane in planes:
            streamed.open(plane, write=False)
            with streams.on_host():
                plane.flat.master.sum()
                plane.flat.moments["m"].sum()
        streamed.open(planes[1], write=True)
        with streams.on_host():
            planes[1].flat.master.add_(5.0)
        streamed.start(work(4))
        streamed.close()
        with streams.on_host():
            for plane in planes:
                plane.flat.master.sum()
    assert planes[1].flat.master[0] == 9.0, "what the host wrote was lost"


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 100])
def test_no_two_accesses_of_the_same_memory_race(slots: int) -> None:
    """Records, slots, parameters and gradients, on all streams and on the host."""
    streams = WatchedStreams()
    watch = Watch(streams)
    loop(streams, watch, slots)
    assert {"main", "records up", "update", "records down", "host"} == {a.stream for a in watch.accesses}
    assert watch.races() == []


def test_the_detector_sees_streams_that_do_not_wait() -> None:
    """Otherwise the test above could not fail."""
    streams = WatchedStreams(forgetful=True)
    watch = Watch(streams)
    loop(streams, watch, 3)
    racing = {frozenset((a.stream, b.stream)) for a, b in watch.races()}
    assert frozenset(("records up", "update")) in racing
    assert frozenset(("update", "records down")) in racing
    assert frozenset(("main", "update")) in racing


def test_the_detector_sees_a_use_that_does_not_wait_for_the_update() -> None:
    streams = WatchedStreams()
    watch = Watch(streams)
    loop(streams, watch, 3, wait=False)
    assert {frozenset((a.stream, b.stream)) for a, b in watch.races()} == {frozenset(("main", "update"))}


@pytest.mark.parametrize(("slots", "near"), [(1, 1), (3, 3), (100, 9)])
def test_records_come_near_before_the_verdict_as_far_as_there_are_slots(slots: int, near: int) -> None:
    planes = make_planes(site(), NUMELS, "device")
    streams = WatchedStreams()
    watch = Watch(streams)
    with watch:
        streamed = executor(planes, streams, slots=slots)
        at_start = [a for a in watch.accesses if a.stream == "records up" and a.writes]
        assert len(at_start) == 2 * near  # master and moment
        streamed.start(work(1))
        before = len(watch.accesses)
        streamed.start(work(2))
    first = [a.stream for a in watch.accesses[before:] if a.stream in ("records up", "update")]
    assert first[0] == "update", "nothing of the second step's first record is left to bring up"
    streamed.close()


def test_what_the_host_writes_is_what_the_next_step_starts_from() -> None:
    planes = make_planes(site(), NUMELS, "device")
    streamed = executor(planes, slots=100)  # every record is near already
    for plane in planes:
        streamed.open(plane, write=True)
        plane.flat.master.zero_()
        plane.flat.moments["m"].fill_(-1.0)
    streamed.start(work(1))
    for plane in planes:
        streamed.finish(plane)
        plane.flat.moments["m"].add_(1.0)
    assert_updated(planes, [1])
    streamed.close()


def test_a_step_that_is_not_applied_changes_nothing() -> None:
    planes = make_planes(site(), NUMELS, "device")
    streamed = executor(planes)
    streamed.start(work(1, apply=torch.zeros(1, dtype=torch.int32)))
    streamed.start(work(1, coef=torch.ones(1), apply=torch.ones(1, dtype=torch.int32)))
    for plane in planes:
        streamed.finish(plane)
    assert_updated(planes, [1])
    streamed.close()


def test_gradients_and_verdict_live_until_the_update_was_waited_for() -> None:
    """Their memory must not be given out while a side stream reads it."""
    planes = make_planes(site(), NUMELS, "device")
    streamed = executor(planes)
    coef = torch.ones(1)
    held = [weakref.ref(coef), weakref.ref(planes[0].reduced)]  # type: ignore[arg-type]
    streamed.start(work(1, coef=coef))
    del coef
    planes[0].reduced = None
    gc.collect()
    assert [ref() is not None for ref in held] == [True, True]
    for plane in planes:
        streamed.finish(plane)
    gc.collect()
    assert [ref() is not None for ref in held] == [False, False]
    streamed.close()


def test_closing_frees_the_ring_and_may_be_repeated() -> None:
    planes = make_planes(site(), NUMELS, "device")
    streamed = executor(planes, slots=100)
    slots = [weakref.ref(staged.slot) for staged in streamed._staged]
    assert slots
    streamed.start(work(1))
    streamed.close()
    streamed.close()
    gc.collect()
    assert [ref() for ref in slots] == [None] * len(slots)
    assert_updated(planes, [1])
