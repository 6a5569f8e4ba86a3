"""host-staged collectives with streams that only keep a diary, on CPU tensors: pieces, bits, order, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lorica.comm import Handle, make_collectives
from lorica.comm.host_staged import HostStaged
from lorica.comm.solo import Solo
from tests.harness import Ranks
from tests.mechanism.test_comm import FLOATS, reference_sum, values

N = 5_001
BLOCK_BYTES = 16_384  # a few pieces for every tensor below
CPU = torch.device("cpu")


class DiaryEvent:
    """An event that notes who waits for it."""

    def __init__(self, diary: list[str], where: str) -> None:
        self._diary = diary
        self._where = where

    def wait(self) -> None:
        self._diary.append(f"wait {self._where}")

    def synchronize(self) -> None:
        self._diary.append(f"synchronize {self._where}")


class DiaryStreams:
    """Streams that do everything at once and write down the order."""

    def __init__(self) -> None:
        self.diary: list[str] = []
        self.pinned: list[int] = []
        self._current = "main"

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self._current = self._current, name
        yield
        self._current = before

    def record(self) -> DiaryEvent:
        self.diary.append(f"record {self._current}")
        return DiaryEvent(self.diary, self._current)

    def pin(self, host: Tensor) -> None:
        self.pinned.append(host.data_ptr())

    def unpin(self, host: Tensor) -> None:
        self.pinned.remove(host.data_ptr())


def check_all_collectives(inner: str) -> None:
    """Every collective in several pieces, several in flight, against the reference formula."""
    world = dist.get_world_size()
    streams = DiaryStreams()
    comm = HostStaged(make_collectives(range(world), "cpu", transport=inner), CPU, streams, block_bytes=BLOCK_BYTES)
    for dtype, out_dtype, accumulate in product(FLOATS, (torch.float32, torch.bfloat16), (False, True)):
        fulls = [values(r, world * N, dtype) for r in range(world)]
        full = comm.staging(world * N, dtype)
        full.copy_(fulls[comm.rank])
        out = values(comm.rank, N, out_dtype, seed=1)
        expected = reference_sum([f.view(world, N)[comm.rank] for f in fulls], out, accumulate)
        gathered = comm.shared(world * N, dtype)
        shard = gathered[comm.rank * N : (comm.rank + 1) * N]
        shard.copy_(values(comm.rank, N, dtype, seed=2))
        everywhere, sent = values(comm.rank, N, dtype, seed=3), values(comm.rank, N, dtype, seed=4)
        handles = [
            comm.reduce_scatter(full, out, accumulate=accumulate),
            comm.all_gather(shard, gathered),
            comm.all_reduce(everywhere),
            comm.broadcast(sent, 1),
        ]
        for handle in reversed(handles):
            handle.wait()
        summed = reference_sum([values(r, N, dtype, seed=3) for r in range(world)], everywhere, False)
        assert torch.equal(out, expected)
        assert torch.equal(gathered, torch.cat([values(r, N, dtype, seed=2) for r in range(world)]))
        assert torch.equal(everywhere, summed)
        assert torch.equal(sent, values(1, N, dtype, seed=4))
        comm.fence()
    apart = torch.zeros(world * N, dtype=torch.int64)
    comm.all_gather(values(comm.rank, N, torch.int64), apart).wait()
    assert torch.equal(apart, torch.cat([values(r, N, torch.int64) for r in range(world)]))
    assert len(streams.pinned) == 2
    comm.barrier()
    comm.close()
    assert streams.pinned == []


@pytest.mark.parametrize("inner", ["gloo", "shm"])
def test_collectives_in_pieces_through_the_host_are_the_reference(ranks: Callable[[int], Ranks], inner: str) -> None:
    ranks(2).run(check_all_collectives, inner=inner)


def test_a_piece_is_loaded_before_it_travels_and_a_block_is_reused_only_after_its_store() -> None:
    streams = DiaryStreams()
    comm = HostStaged(Solo(CPU), CPU, streams, block_bytes=416)
    comm.all_reduce(torch.ones(300)).wait()  # three pieces through two blocks
    comm.close()
    assert streams.diary == [
        "record main",
        "wait main",  # d2h
        "wait main",  # h2d
        "record d2h",  # piece 0 and 1 are on their way to the host
        "record d2h",
        "synchronize d2h",  # piece 0 is there: it travels and goes back
        "record h2d",
        "synchronize h2d",  # its block is free for piece 2
        "record d2h",
        "synchronize d2h",
        "record h2d",
        "synchronize d2h",
        "record h2d",
        "wait h2d",  # the caller's stream, in wait()
        "synchronize h2d",  # close(): before the blocks are unpinned
        "synchronize h2d",
    ]


class Broken(Solo):
    """An inner transport whose peer has died."""

    def all_reduce(self, x: Tensor) -> Handle:
        raise RuntimeError("rank 3 has died")


def test_an_error_of_the_worker_comes_back_at_wait_and_refuses_all_that_follows() -> None:
    comm = HostStaged(Broken(CPU), CPU, DiaryStreams())
    first, second = comm.all_reduce(torch.ones(3)), comm.all_gather(torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="rank 3 has died"):
        first.wait()
    with pytest.raises(RuntimeError, match="an earlier collective failed: rank 3 has died"):
        second.wait()
    comm.close()
