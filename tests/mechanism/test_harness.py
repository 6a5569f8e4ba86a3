"""The test harness itself: results, tracebacks, hangs and deaths of ranks, each reported as what it is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests import harness
from tests.harness import RankFailure, Ranks


def rank_sum(value: int) -> tuple[int, float]:
    """Every rank's number, and the sum over ranks through the case's own process group."""
    total = torch.tensor(float(value + dist.get_rank()))
    dist.all_reduce(total)
    return os.getpid(), total.item()


def fail_on(rank: int) -> None:
    """Raise on one rank while the others wait for it in a collective, which gives up after the group's time limit."""
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is told to fail")
    dist.barrier()


def hang_on(rank: int) -> None:
    """Sleep for longer than any limit on one rank."""
    if dist.get_rank() == rank:
        time.sleep(3600)


def die_on(rank: int) -> None:
    """End one process without a word."""
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def unpicklable() -> object:
    """A result that cannot travel."""
    return lambda: None


@pytest.fixture(scope="module")
def pair(ranks: Callable[[int], Ranks]) -> Ranks:
    """The session's two processes; failures in this file must leave them usable."""
    return ranks(2)


def test_every_rank_returns_its_result_and_processes_are_reused(pair: Ranks) -> None:
    first = pair.run(rank_sum, value=10)
    second = pair.run(rank_sum, value=20)
    assert [total for _, total in first] == [21.0, 21.0]
    assert [total for _, total in second] == [41.0, 41.0]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first}) == 2


def test_a_world_of_one_runs_in_this_process(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(1).run(rank_sum, value=3) == [(os.getpid(), 3.0)]
    assert not dist.is_initialized()


def test_a_rank_that_raises_is_named_with_its_traceback_and_the_next_call_works(pair: Ranks) -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1\n.*rank 1 is told to fail"):
        pair.run(fail_on, rank=1, limit_s=2.0)
    assert pair.run(rank_sum, value=0)[0][1] == 1.0


def test_a_result_that_cannot_be_pickled_is_the_failure_of_its_call(pair: Ranks) -> None:
    with pytest.raises(RankFailure, match="pickle"):
        pair.run(unpicklable)


def test_a_hang_is_cut_after_its_limit_and_the_line_is_named(pair: Ranks) -> None:
    with pytest.raises(RankFailure, match=r"(?s)failed on 1 of 2 ranks.*rank 0\nno answer.*hang_on"):
        pair.run(hang_on, rank=0, limit_s=2.0)
    assert pair.run(rank_sum, value=0)[0][1] == 1.0


def test_the_death_of_a_process_is_reported_with_its_exit_code(pair: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "GRACE_S", 2.0)
    with pytest.raises(RankFailure, match=r"rank 1\nno answer.*\n.*exit code -9"):
        pair.run(die_on, rank=1, limit_s=30.0)
    assert pair.run(rank_sum, value=0)[0][1] == 1.0
