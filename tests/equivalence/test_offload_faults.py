"""What goes wrong in a disk, a swap file or an update thread ends training on all ranks, in seconds, with the cause.

The rank with the cause raises it: in the next use of what was being updated (one rank), or in the next step (several:
all of them raise there, the others saying that it was another one). Nothing hangs, nothing is left, a new engine works.
"""

from __future__ import annotations

import errno
import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch.distributed as dist

import lorica
from lorica.place import DoesNotFit
from lorica.tier.file_io import SystemFileIO
from tests.equivalence.offloading import (
    Case,
    Plan,
    before_each_chunk,
    io,
    result_of,
    start_engine,
    swap_files,
    take_step,
    update_threads,
)
from tests.equivalence.training import Training, start
from tests.harness import Ranks

FILES, ON_HOST = Plan(1, ("nvme",), delays=False), Plan(2, ("host",), ("host",), delays=False)
SECONDS = 10.0  # machines are busy; a hang would take minutes


class Caught(NamedTuple):
    """An exception: what, the whole text, in which step, after how many seconds."""

    kind: str
    text: str
    step: int
    seconds: float


class Trigger:
    """Raises on this rank once it is armed; counts nothing, forgets nothing."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.armed, self._error = False, error

    def __call__(self) -> None:
        if self.armed:
            raise self._error()


class FaultyIO(SystemFileIO):
    """The operating system, whose call `call` goes through a trigger."""

    def __init__(self, call: str, trigger: Trigger) -> None:
        self._call, self._trigger = call, trigger

    def _pull(self, call: str) -> None:
        if call == self._call:
            self._trigger()

    def preadv(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self._pull("preadv")
        return super().preadv(descriptor, buffers, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self._pull("pwritev")
        return super().pwritev(descriptor, buffers, offset)

    def fallocate(self, descriptor: int, num_bytes: int) -> None:
        self._pull("fallocate")
        super().fallocate(descriptor, num_bytes)


def os_error(code: int) -> Callable[[], OSError]:
    """Makes what the system raises."""
    return lambda: OSError(code, os.strerror(code))


class Fault(NamedTuple):
    """What is broken, and how: a system call that fails, something done to the file, or the update's own arithmetic."""

    plan: Plan
    code: int | None = None
    call: str | None = None
    harm: Callable[[Path], None] | None = None
    message: str = ""


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_file(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


IN_A_STEP: dict[str, Fault] = {
    "no space for a write": Fault(FILES, errno.ENOSPC, "pwritev", message="No space left on device"),
    "a read fails": Fault(FILES, errno.EIO, "preadv", message="Input/output error"),
    "the file is truncated": Fault(FILES, harm=truncate, message="got a file of"),
    "the file is deleted": Fault(FILES, harm=Path.unlink, message="expected the file to be there"),
    "the file is replaced": Fault(FILES, harm=replace_file, message="another one in its place"),
    "the update raises": Fault(ON_HOST, message="a chunk cannot be updated"),
    "the update of a record from a file raises": Fault(FILES, message="a chunk cannot be updated"),
}


def case_for(world_size: int, stage: int) -> Case:
    """Four blocks' worth of a short bf16 training."""
    return Case(Training("gpt", stage, "bf16", world_size, num_steps=2))


def caught(call: Callable[[], Any], number: int) -> Caught | None:
    """What `call` raises."""
    begin = time.monotonic()
    try:
        call()
    except Exception as problem:
        return Caught(type(problem).__name__, str(problem), number, time.monotonic() - begin)
    return None


class Ending(NamedTuple):
    """How a run with a fault ended on one rank, and how the next one went."""

    first: Caught
    again: Caught | None
    path: str
    threads: list[str]
    files: list[str]
    fresh: str
    wanted: str


def own_files(folder: str) -> list[Path]:
    """Swap files of this process."""
    return [path for path in swap_files(folder) if f"-{os.getpid()}-" in path.name]


def break_in_a_step(case: Case, name: str, broken_rank: int, overlap: bool, folder: str) -> Ending:
    """Train, break something on one rank, train on until that is noticed; then train anew."""
    fault = IN_A_STEP[name]
    plan = replace(fault.plan, overlap=overlap)
    trigger = Trigger(os_error(fault.code) if fault.code else lambda: ArithmeticError(fault.message))
    with ExitStack() as stack:
        stack.enter_context(io(FaultyIO(fault.call or "", trigger)))
        if fault.call is None and fault.harm is None:
            stack.enter_context(before_each_chunk(trigger))
        engine = start_engine(case, plan, folder)
    path = engine._parts.site.tiers["nvme"].file.path if plan is not ON_HOST and "nvme" in plan.records else Path()
    take_step(engine, case, 0)
    for param in engine.module.parameters():
        lorica.zero.safe_get_full_fp32_param(param)  # every record is at home now
    if dist.get_rank() == broken_rank:
        trigger.armed = True
        if fault.harm is not None:
            fault.harm(path)
    first = next(found for n in range(1, 8) if (found := caught(partial(take_step, engine, case, n), n)) is not None)
    again = caught(partial(take_step, engine, case, 9), 9)
    engine.destroy()
    files = [] if fault.harm is replace_file else [path.name for path in own_files(folder)]
    threads = update_threads()
    fresh, wanted = (result_of(start_engine(case, each, folder), case).digest for each in (plan, None))
    return Ending(first, again, str(path), threads, files, fresh, wanted)


@pytest.mark.parametrize("name", IN_A_STEP)
@pytest.mark.parametrize(
    ("world_size", "stage", "broken_rank", "overlap"),
    [(1, 2, 0, True), (1, 3, 0, False), (2, 3, 1, True), (2, 2, 0, False)],
    ids=["1 rank", "1 rank, sync", "2 ranks", "2 ranks, stage 2, sync"],
)
def test_a_fault_in_a_step_ends_training_on_all_ranks_with_its_cause(
    ranks: Callable[[int], Ranks],
    tmp_path: Path,
    world_size: int,
    stage: int,
    broken_rank: int,
    overlap: bool,
    name: str,
) -> None:
    endings = ranks(world_size).run(
        break_in_a_step,
        case=case_for(world_size, stage),
        name=name,
        broken_rank=broken_rank,
        overlap=overlap,
        folder=str(tmp_path),
        limit_s=60,
    )
    first, fault = endings[broken_rank].first, IN_A_STEP[name]
    assert fault.message in first.text
    if "nvme" in fault.plan.records and "update" not in name:
        assert first.kind == "SwapError"
        assert endings[broken_rank].path in first.text and "at offset" in first.text and "Fix:" in first.text
    else:
        assert first.kind == "ArithmeticError"
    for rank, ending in enumerate(endings):
        assert ending.first.step == first.step <= 3, "all ranks stop in one step"
        assert ending.first.seconds < SECONDS
        assert ending.again is not None, "training must not go on"
        assert (ending.threads, ending.files) == ([], [])
        assert ending.fresh == ending.wanted, "a new engine does not work"
        if rank != broken_rank:
            assert ending.first.kind == "RuntimeError" and "failed on another rank" in ending.first.text


# Reading what was not updated -----------------------------------------------------------------------------------------


def read_after_a_fault(case: Case, folder: str, how: str) -> Caught | None:
    """The last update fails on every rank, and nobody takes another step."""
    trigger = Trigger(lambda: ArithmeticError("a chunk cannot be updated"))
    with before_each_chunk(trigger):
        engine = start_engine(case, ON_HOST, folder)
    take_step(engine, case, 0)
    engine.synchronize()
    trigger.armed = True
    engine.backward(engine(*case.training.micro_batch(1, 0, dist.get_rank())))
    found = caught(engine.step, 1) or caught(partial(READINGS[how], engine), 1)
    engine.destroy()
    assert update_threads() == []
    return found


READINGS: dict[str, Callable[[Any], Any]] = {
    "synchronize": lambda engine: engine.synchronize(),
    "parameters": lambda engine: list(engine.parameters()),
    "state dict": lambda engine: engine.module_state_dict(),
    "consolidated state dict": lambda engine: engine.consolidated_state_dict(),
    "master": lambda engine: lorica.zero.safe_get_full_fp32_param(next(iter(engine.module.parameters()))),
    "destroy at once": lambda engine: None,
}


@pytest.mark.parametrize("how", READINGS)
@pytest.mark.parametrize(("world_size", "stage"), [(1, 2), (1, 3), (2, 3)])
def test_what_a_failed_update_has_left_is_not_given_out(
    ranks: Callable[[int], Ranks], tmp_path: Path, world_size: int, stage: int, how: str
) -> None:
    answers = ranks(world_size).run(read_after_a_fault, case=case_for(world_size, stage), folder=str(tmp_path), how=how)
    for found in answers:
        if how != "destroy at once":
            assert found is not None and "a chunk cannot be updated" in found.text


# At the start ---------------------------------------------------------------------------------------------------------


def fail_at_the_start(case: Case, broken_rank: int, folder: str) -> tuple[Caught | None, list[str], list[str], bool]:
    """The disk has no room for the swap file of one rank; then training with the same placement."""
    trigger = Trigger(os_error(errno.ENOSPC))
    trigger.armed = dist.get_rank() == broken_rank
    with io(FaultyIO("fallocate", trigger)):
        found = caught(partial(start_engine, case, FILES, folder), 0)
    gc.collect()
    left = [path.name for path in own_files(folder)], update_threads()
    fresh, wanted = (result_of(start_engine(case, each, folder), case) for each in (FILES, None))
    return found, *left, fresh.same(wanted)


@pytest.mark.parametrize(("world_size", "broken_rank"), [(1, 0), (2, 0), (2, 1)])
def test_no_space_for_a_swap_file_is_said_at_the_start_on_all_ranks(
    ranks: Callable[[int], Ranks], tmp_path: Path, world_size: int, broken_rank: int
) -> None:
    answers = ranks(world_size).run(
        fail_at_the_start, case=case_for(world_size, 3), broken_rank=broken_rank, folder=str(tmp_path), limit_s=60
    )
    for rank, (found, files, threads, works) in enumerate(answers):
        assert found is not None and found.seconds < SECONDS
        if rank == broken_rank:
            assert found.kind == "SwapError" and str(tmp_path) in found.text and "No space left" in found.text
        else:
            assert found.kind == "RuntimeError" and "another rank" in found.text
        assert (files, threads, works) == ([], [], True)


def start_without_room(training: Training, keys: dict[str, Any], device: str, folder: str) -> tuple[Caught | None, int]:
    """An engine whose budgets are too small; also how many arenas and swap files were made."""
    config = training.config()
    config["zero_optimization"]["offload_optimizer"] = {"device": device, "nvme_path": folder}
    config["lorica"]["offload"] = keys
    with mock.patch("lorica.offload.Arena") as arena, mock.patch("lorica.offload.NvmeTier") as nvme:
        found = caught(partial(start, training, config), 0)
        return found, arena.call_count + nvme.call_count + len(swap_files(folder))


NO_ROOM: dict[str, tuple[str, dict[str, Any], str]] = {
    "host": ("cpu", {"host_memory": "100KB"}, "host memory"),
    "disk": ("nvme", {"disk_space": "100KB"}, "disk space"),
    "device": ("cpu", {"device_memory": "10KB"}, "device memory"),
    "all": ("auto", {"device_memory": "150KB", "host_memory": "1KB", "disk_space": "1KB"}, "disk space"),
}


@pytest.mark.parametrize("name", NO_ROOM)
@pytest.mark.parametrize("world_size", [1, 2])
def test_states_that_do_not_fit_are_refused_with_figures_before_anything_is_allocated(
    ranks: Callable[[int], Ranks], tmp_path: Path, world_size: int, name: str
) -> None:
    device, keys, tier = NO_ROOM[name]
    training = Training("gpt", 3, "bf16", world_size)
    answers = ranks(world_size).run(
        start_without_room, training=training, keys=keys, device=device, folder=str(tmp_path)
    )
    for found, num_made in answers:
        assert found is not None and found.kind == DoesNotFit.__name__
        assert tier in found.text and "the budget is" in found.text and "short by" in found.text
        assert "MiB" in found.text and "Fix:" in found.text
        assert found.seconds < SECONDS and num_made == 0


def start_with_free_memory(case: Case, folder: str) -> dict[str, tuple[str, str, str]]:
    """Train where the ranks see different amounts of free memory; returns the placement."""
    free = 5_000_000_000 + 2 * (500_000 if dist.get_rank() == 0 else 340_000)
    plan = Plan(1, delays=False)
    config = case.config()
    plan.into(config, folder)
    config["lorica"]["offload"] |= {"host_reserve": 5_000_000_000, "staging_numel": 4096}
    with mock.patch("lorica.offload.host_available_bytes", lambda **_: free):
        engine = start(case.training, config)
    take_step(engine, case, 0)
    plans = {flat.name: flat.plan for unit in engine._parts.units for flat in unit.flats}
    engine.destroy()
    return {name: (plan.param.tier, plan.moments.tier, plan.executor) for name, plan in plans.items()}


def test_ranks_with_different_free_memory_make_one_plan(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Transports and agreements rely on it: what one rank does in a step, the others do."""
    first, second = ranks(2).run(start_with_free_memory, case=case_for(2, 3), folder=str(tmp_path), limit_s=60)
    assert first == second
    assert len({record for _, record, _ in first.values()}) > 1, "the budgets of this test are meant to split the model"
