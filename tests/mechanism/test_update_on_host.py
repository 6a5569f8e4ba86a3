"""The executor that updates in a thread: each element once, in order, slots reused when free, faults handed over."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from lorica.core.gradient import GradPlane
from lorica.core.streams import HostStreams
from lorica.optim.base import Segment
from lorica.update.on_host import OnHost
from tests.mechanism.update_planes import GROUPS, Counting, Disk, assert_updated, make_planes, site, work

NUMELS = [4096 * 3 + 256, 256, 4096 * 2, 4096 + 1280]
SECONDS = 20.0  # until a test that hangs is given up


class Gate:
    """Lets the update thread through a given number of times."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)

    def __call__(self) -> None:
        self.arrived.release()
        assert self._passes.acquire(timeout=SECONDS)

    def let(self, count: int = 1) -> None:
        """Let it through `count` times more."""
        self._passes.release(count)


@pytest.fixture
def make() -> Iterator[Callable[..., OnHost]]:
    """Executors that are closed after the test."""
    made: list[OnHost] = []

    def of(planes: Sequence[GradPlane], *, chunk: int = 4096, slots: int = 4, **how: Any) -> OnHost:
        where = planes[0].flat.site
        made.append(OnHost(Counting(), planes, GROUPS, where, HostStreams(), chunk_numel=chunk, num_slots=slots, **how))
        return made[-1]

    yield of
    for each in made:
        each.close()


@pytest.fixture
def disk() -> Iterator[Disk]:
    found = Disk()
    yield found
    found.close()


def update_threads() -> list[str]:
    """Threads of executors."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lorica-update")]


def optimizer_of(executor: OnHost) -> Counting:
    """The counting optimizer of an executor."""
    assert isinstance(executor._optimizer, Counting)
    return executor._optimizer


# What is computed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("chunk", [1, 4096, 8192, 1 << 24])
def test_every_element_is_updated_once_in_every_step(make: Callable[..., OnHost], chunk: int, fp32: bool) -> None:
    planes = make_planes(site(), NUMELS, "host", fp32=fp32)
    executor = make(planes, chunk=chunk)
    for step in (1, 2, 3):
        executor.start(work(step))
        for plane in planes:
            executor.finish(plane)
    assert_updated(planes, [1, 2, 3])
    assert sum(call.numel for call in optimizer_of(executor).calls) == 3 * sum(NUMELS)
    assert all(call.thread.startswith("lorica-update") for call in optimizer_of(executor).calls)


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 100])
@pytest.mark.parametrize("chunk", [4096, 8192, 1 << 24])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_slot_is_reused_only_when_its_transfers_have_ended(
    make: Callable[..., OnHost], slots: int, chunk: int, seed: int
) -> None:
    """Bytes move at the end of a transfer, and what was written is destroyed then: too early is another value."""
    disk = Disk(seed)
    planes = make_planes(site(), NUMELS, "host")
    disk.take(planes)
    executor = make(planes, chunk=chunk, slots=slots)
    for step in (1, 2, 3):
        executor.start(work(step))
        for plane in planes:
            executor.finish(plane)
    executor.open(planes[0], write=False)
    assert_updated(planes, [1, 2, 3])
    num_chunks = {4096: 9, 8192: 6, 1 << 24: 4}[chunk]
    assert disk.most["read"] <= 2 * max(1, min(slots, num_chunks) // 2), "master and moment of each slot fetched ahead"
    disk.close()


def test_the_next_record_is_read_while_one_is_updated(make: Callable[..., OnHost], disk: Disk) -> None:
    planes = make_planes(site(), NUMELS, "host")
    disk.take(planes)
    reads, gate = list[str](), Gate()
    disk.fail = reads.append
    executor = make(planes, before_chunk=gate)
    executor.start(work(1))
    assert gate.arrived.acquire(timeout=SECONDS)
    deadline = time.monotonic() + SECONDS
    while reads.count("read") < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert reads == ["read"] * 4, "two chunks of master and moment, and none is written"
    gate.let(100)


def test_a_plane_is_done_before_the_planes_behind_it(make: Callable[..., OnHost]) -> None:
    planes = make_planes(site(), NUMELS, "host")
    gate = Gate()
    executor = make(planes, before_chunk=gate)
    executor.start(work(1))
    assert not executor.is_done(planes[0])
    gate.let(4)  # the chunks of plane 0
    executor.finish(planes[0])
    assert executor.is_done(planes[0])
    assert_updated(planes[:1], [1])
    assert not any(executor.is_done(plane) for plane in planes[1:])
    gate.let(1)
    executor.finish(planes[1])
    assert not executor.is_done(planes[2])
    gate.let(100)
    executor.finish(planes[3])
    assert_updated(planes, [1])


def test_opening_waits_for_all_records(make: Callable[..., OnHost], disk: Disk) -> None:
    planes = make_planes(site(), NUMELS, "host")
    disk.take(planes)
    executor = make(planes, before_chunk=lambda: time.sleep(0.002))
    executor.start(work(1))
    executor.open(planes[0], write=False)
    assert all(executor.is_done(plane) for plane in planes)
    assert_updated(planes, [1])


def test_starting_returns_at_once_and_keeps_what_it_was_told(make: Callable[..., OnHost]) -> None:
    """Rates that change afterwards, and gradients that are dropped, are not this step's."""
    planes = make_planes(site(), NUMELS, "host")
    gate, groups = Gate(), [dict(group) for group in GROUPS]
    executor = make(planes, before_chunk=gate)
    executor._groups = groups
    executor.start(work(1))
    groups[1]["add"] = 7.0
    for plane in planes:
        plane.reduced = None
    gate.let(100)
    for plane in planes:
        executor.finish(plane)
    assert_updated(planes, [1])


def test_the_thread_learns_of_the_verdict_by_itself(make: Callable[..., OnHost]) -> None:
    planes = make_planes(site(), NUMELS, "host")
    executor = make(planes)
    executor.start(work(1, coef=torch.full((1,), 9.0), apply=torch.zeros(1, dtype=torch.int32)))
    for plane in planes:
        executor.finish(plane)
    executor.start(work(1, coef=torch.ones(1), apply=torch.ones(1, dtype=torch.int32)))
    for plane in planes:
        executor.finish(plane)
    assert_updated(planes, [1])
    assert len(optimizer_of(executor).calls) < 20, "the first step must not have been computed"


# Guesses --------------------------------------------------------------------------------------------------------------


def guessed(make: Callable[..., OnHost], **how: Any) -> tuple[OnHost, list[GradPlane]]:
    """An executor that has guessed the first step of every plane, and is done with it."""
    planes = make_planes(site(), NUMELS, "host")
    executor = make(planes, guessed=planes, **how)
    for plane in reversed(planes):
        executor.guess(plane, 1.0, 1)
    executor.open(planes[0], write=False)
    assert sum(call.numel for call in optimizer_of(executor).calls) == sum(NUMELS)
    assert_updated(planes, [])
    return executor, planes


def test_a_right_guess_is_taken_and_not_computed_again(make: Callable[..., OnHost]) -> None:
    executor, planes = guessed(make)
    executor.start(work(1))
    for plane in planes:
        executor.finish(plane)
    assert_updated(planes, [1])
    assert sum(call.numel for call in optimizer_of(executor).calls) == sum(NUMELS)
    for plane in planes:
        executor.guess(plane, 1.0, 2)
    executor.start(work(2))
    for plane in planes:
        executor.finish(plane)
    assert_updated(planes, [1, 2])


WRONG: dict[str, Callable[[OnHost, list[GradPlane]], None]] = {
    "another gradient": lambda executor, planes: [setattr(p, "version", p.version + 1) for p in planes] and None,
    "another rate": lambda executor, planes: executor._groups[0].update(other=1),
    "a written record": lambda executor, planes: executor.open(planes[0], write=True),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_guess_that_something_has_overtaken_is_dropped(make: Callable[..., OnHost], what: str) -> None:
    executor, planes = guessed(make)
    executor._groups = [dict(group) for group in GROUPS]
    WRONG[what](executor, planes)
    executor.start(work(1))
    for plane in planes:
        executor.finish(plane)
    assert_updated(planes, [1])
    assert sum(call.numel for call in optimizer_of(executor).calls) == 2 * sum(NUMELS), "it was computed again"


def test_a_guess_of_another_factor_is_dropped_and_the_record_is_as_it_was(make: Callable[..., OnHost]) -> None:
    planes = make_planes(site(), NUMELS, "host")
    executor = make(planes, guessed=planes)
    for plane in planes:
        executor.guess(plane, 3.0, 1)
    executor.start(work(1, coef=1.0))
    for plane in planes:
        executor.finish(plane)
    assert_updated(planes, [1])


def test_a_guess_for_a_step_that_is_skipped_is_dropped(make: Callable[..., OnHost]) -> None:
    executor, planes = guessed(make)
    executor.start(work(1, apply=torch.zeros(1, dtype=torch.int32)))
    executor.open(planes[0], write=False)
    for plane in planes:
        executor.finish(plane)
    assert_updated(planes, [])
    executor.start(work(1))
    for plane in planes:
        executor.finish(plane)
    assert_updated(planes, [1])


# Faults ---------------------------------------------------------------------------------------------------------------


def fail_at(executor: OnHost, name: str) -> None:
    """Let the update of a parameter raise."""

    def fail(segment: Segment) -> None:
        if any(piece.name == name for piece in segment.slices):
            raise ArithmeticError(f"{name} cannot be updated")

    optimizer_of(executor).fail = fail


def test_what_goes_wrong_is_raised_by_whoever_waits(make: Callable[..., OnHost]) -> None:
    planes = make_planes(site(), NUMELS, "host")
    executor = make(planes)
    fail_at(executor, "2.a")
    executor.start(work(1))
    with pytest.raises(ArithmeticError, match=r"2\.a"):
        executor.finish(planes[3])
    for call in (
        lambda: executor.finish(planes[2]),
        lambda: executor.open(planes[0], write=False),
        lambda: executor.start(work(2)),
    ):
        with pytest.raises(ArithmeticError, match=r"2\.a"):
            call()
    assert_updated(planes[:2], [1])
    executor.close()


def test_on_several_ranks_only_opening_raises_and_the_step_agrees_on_it(make: Callable[..., OnHost]) -> None:
    """A rank that raised in the middle of a step would leave the others waiting: see `Update`."""
    planes = make_planes(site(num_replicas=2), NUMELS, "host")
    executor = make(planes)
    fail_at(executor, "1.b")
    executor.start(work(1))
    for plane in planes:
        executor.finish(plane)
    assert isinstance(executor.problem, ArithmeticError)
    num_calls = len(optimizer_of(executor).calls)
    executor.start(work(2))  # it may turn out between the agreement and the start
    for plane in planes:
        executor.finish(plane)
    assert len(optimizer_of(executor).calls) == num_calls, "nothing is updated any more"
    with pytest.raises(ArithmeticError):
        executor.open(planes[0], write=True)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_transfer_that_fails_is_a_problem_of_the_update(make: Callable[..., OnHost], disk: Disk, kind: str) -> None:
    planes = make_planes(site(), NUMELS, "host")
    disk.take(planes)

    def fail(called: str) -> None:
        if called == kind:
            raise OSError("the disk is gone")

    disk.fail = fail
    executor = make(planes)
    executor.start(work(1))
    with pytest.raises(OSError, match="the disk is gone"):
        executor.open(planes[0], write=False)
    with pytest.raises(OSError, match="the disk is gone"):
        executor.start(work(2))
    executor.close()


# The end --------------------------------------------------------------------------------------------------------------


def test_closing_finishes_what_was_begun_ends_the_thread_and_may_be_repeated(make: Callable[..., OnHost]) -> None:
    planes = make_planes(site(), NUMELS, "host")
    executor = make(planes, before_chunk=lambda: time.sleep(0.001))
    executor.start(work(1))
    executor.close()
    executor.close()
    assert update_threads() == []
    assert_updated(planes, [1])


def test_an_executor_that_never_worked_can_be_closed(make: Callable[..., OnHost]) -> None:
    executor = make(make_planes(site(), NUMELS, "host"))
    executor.close()
    assert update_threads() == []


def test_an_executor_that_is_dropped_ends_its_thread() -> None:
    """Nobody has closed it: its engine was not destroyed, only forgotten."""
    planes = make_planes(site(), NUMELS, "host")
    executor = OnHost(Counting(), planes, GROUPS, planes[0].flat.site, HostStreams(), chunk_numel=4096)
    executor.start(work(1))
    alive = weakref.ref(executor)
    executor.open(planes[0], write=False)
    del executor
    deadline = time.monotonic() + SECONDS
    while (alive() is not None or update_threads()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    assert alive() is None
    assert update_threads() == []
