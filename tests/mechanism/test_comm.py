"""The CPU transports between real processes: gloo and shm against one reference formula, bit by bit."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lorica.comm import Collectives, make_collectives, reduction, shared_memory
from tests import harness
from tests.harness import RankFailure, Ranks

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int8, torch.uint8, torch.int64, torch.bool)
N = 70_001  # several tiles of the reduction, and no round number

CASES = pytest.mark.parametrize(("world_size", "transport"), list(product((2, 4), ("gloo", "shm"))))


def open_world(transport: str, timeout_s: float | None = None) -> Collectives:
    """Collectives over all ranks of the case."""
    shared_memory.BOUNCE_BYTES = 1 << 18  # so that small tensors need several rounds
    reduction.TILE_NUMEL = 1 << 14  # and several tiles
    timeout = timedelta(seconds=timeout_s) if timeout_s is not None else None
    return make_collectives(range(dist.get_world_size()), "cpu", transport=transport, timeout=timeout)


def values(rank: int, numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """What rank `rank` contributes: the same on whichever rank it is computed."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (numel,), generator=generator).to(dtype)


def reference_sum(contributions: list[Tensor], out: Tensor, accumulate: bool) -> Tensor:
    """The formula: rank order, fp32 (fp64 if one is fp64), rounded once."""
    wide = torch.float64 if torch.float64 in (out.dtype, contributions[0].dtype) else torch.float32
    total = contributions[0].to(wide)
    for part in contributions[1:]:
        total = total + part.to(wide)
    if accumulate:
        total = out.to(wide) + total
    return total.to(out.dtype)


# -- reduce_scatter --------------------------------------------------------------------------------------------------


def check_reduce_scatter(transport: str, origin: str) -> None:
    """Every pair of dtypes, with and without accumulation."""
    comm = open_world(transport)
    place = {"staging": comm.staging, "shared": comm.shared, "ordinary": torch.empty}[origin]
    for dtype in FLOATS:
        fulls = [values(r, comm.world_size * N, dtype) for r in range(comm.world_size)]
        mine = [f.view(comm.world_size, N)[comm.rank] for f in fulls]
        for out_dtype, accumulate in product(FLOATS, (False, True)):
            full = place(comm.world_size * N, dtype=dtype)
            full.copy_(fulls[comm.rank])
            out = values(comm.rank, N, out_dtype, seed=1)
            expected = reference_sum(mine, out, accumulate)
            comm.reduce_scatter(full, out, accumulate=accumulate).wait()
            assert torch.equal(out, expected), (dtype, out_dtype, accumulate)
    comm.close()


@CASES
def test_reduce_scatter_is_the_reference_sum_bit_by_bit(
    ranks: Callable[[int], Ranks], world_size: int, transport: str
) -> None:
    ranks(world_size).run(check_reduce_scatter, transport=transport, origin="staging")


@pytest.mark.parametrize("origin", ["shared", "ordinary"])
def test_reduce_scatter_takes_memory_that_is_not_from_staging(ranks: Callable[[int], Ranks], origin: str) -> None:
    ranks(2).run(check_reduce_scatter, transport="shm", origin=origin)


def check_cuts(transport: str) -> None:
    """One plane reduced whole and in three uneven pieces."""
    comm = open_world(transport)
    world = comm.world_size
    plane = values(comm.rank, world * N, torch.bfloat16).view(world, N)
    whole, pieces = torch.zeros(N), torch.zeros(N)
    for out, bounds in ((whole, (0, N)), (pieces, (0, 1, 40_000, N))):
        for start, stop in pairwise(bounds):
            staging = comm.staging(world * (stop - start), torch.bfloat16)
            staging.view(world, -1).copy_(plane[:, start:stop])
            comm.reduce_scatter(staging, out[start:stop], accumulate=False).wait()
    assert torch.equal(whole, pieces)
    comm.close()


@CASES
def test_cutting_a_plane_into_calls_changes_no_bit(
    ranks: Callable[[int], Ranks], world_size: int, transport: str
) -> None:
    ranks(world_size).run(check_cuts, transport=transport)


def check_many_in_flight(transport: str) -> int:
    """Twelve reduce-scatters of two sizes, waited for at the end, with ranks that lag behind each other."""
    comm = open_world(transport)
    outs, handles, addresses = [], [], set()
    for step in range(12):
        n = 1000 if step % 3 else 3000
        staging = comm.staging(comm.world_size * n, torch.float32)
        addresses.add(staging.data_ptr())
        staging.copy_(values(comm.rank, comm.world_size * n, torch.float32, seed=step))
        outs.append(torch.zeros(n))
        handles.append(comm.reduce_scatter(staging, outs[-1], accumulate=False))
        time.sleep(0.01 * ((step + comm.rank) % 3))
    for handle in handles:
        handle.wait()
    for step, out in enumerate(outs):
        fulls = [values(r, comm.world_size * out.numel(), torch.float32, seed=step) for r in range(comm.world_size)]
        mine = [f.view(comm.world_size, -1)[comm.rank] for f in fulls]
        assert torch.equal(out, reference_sum(mine, out, accumulate=False)), step
    comm.close()
    return len(addresses)


@CASES
def test_staging_buffers_are_recycled_without_losing_what_peers_still_read(
    ranks: Callable[[int], Ranks], world_size: int, transport: str
) -> None:
    num_buffers = ranks(world_size).run(check_many_in_flight, transport=transport)
    assert max(num_buffers) <= 4  # two, each replaced at most once by a larger one


# -- all_gather ------------------------------------------------------------------------------------------------------


def check_all_gather(transport: str) -> None:
    """Every dtype; the shard in ordinary memory, in shared memory, or in place."""
    comm = open_world(transport)
    for dtype, origin in product((*FLOATS, *OTHERS), ("ordinary", "shared", "in place")):
        expected = torch.cat([values(r, N, dtype) for r in range(comm.world_size)])
        full = (comm.shared if origin == "in place" else torch.zeros)(comm.world_size * N, dtype=dtype)
        if origin == "in place":
            shard = full[comm.rank * N : (comm.rank + 1) * N]
        else:
            shard = (comm.shared if origin == "shared" else torch.zeros)(N, dtype=dtype)
        shard.copy_(values(comm.rank, N, dtype))
        comm.all_gather(shard, full).wait()
        assert torch.equal(full, expected), (dtype, origin)
        comm.fence()
    comm.close()


@CASES
def test_all_gather_concatenates_shards_of_every_dtype(
    ranks: Callable[[int], Ranks], world_size: int, transport: str
) -> None:
    ranks(world_size).run(check_all_gather, transport=transport)


def check_fence(transport: str) -> None:
    """Rank 0 overwrites its shard behind the fence while the others have not looked at it yet."""
    comm = open_world(transport)
    shard = comm.shared(N, torch.float32)
    full = torch.zeros(comm.world_size * N)
    for step in range(5):
        shard.fill_(10.0 * step + comm.rank)
        handle = comm.all_gather(shard, full)
        if comm.rank > 0:
            time.sleep(0.02 * comm.rank)
        handle.wait()
        comm.fence()
        shard.fill_(-1.0)
        expected = torch.arange(comm.world_size, dtype=torch.float32) + 10.0 * step
        assert torch.equal(full.view(-1, N)[:, 0], expected) and torch.equal(full.view(-1, N)[:, -1], expected)
    comm.close()


@CASES
def test_behind_a_fence_a_shard_may_be_overwritten(
    ranks: Callable[[int], Ranks], world_size: int, transport: str
) -> None:
    ranks(world_size).run(check_fence, transport=transport)


# -- all_reduce, broadcast -------------------------------------------------------------------------------------------


def check_all_reduce(transport: str) -> list[bytes]:
    """Small, large and larger than a bounce buffer, in ordinary and in shared memory; returns the bits."""
    comm = open_world(transport)
    bits = []
    for dtype, numel, origin in product((*FLOATS, torch.int64), (1, 5, N, 300_001), ("ordinary", "shared")):
        if numel > N and dtype is not torch.float32:
            continue
        x = (comm.shared if origin == "shared" else torch.zeros)(numel, dtype=dtype)
        x.copy_(values(comm.rank, numel, dtype))
        comm.all_reduce(x).wait()
        everyone = [values(r, numel, dtype) for r in range(comm.world_size)]
        expected = reference_sum(everyone, x, accumulate=False) if dtype.is_floating_point else sum(everyone)
        assert torch.equal(x, expected), (dtype, numel, origin)
        bits.append(x.view(torch.uint8)[:4096].numpy().tobytes())
        x.zero_()  # at once: nobody may still be reading it
    comm.close()
    return bits


@CASES
def test_all_reduce_gives_all_ranks_the_bits_of_the_reference_sum(
    ranks: Callable[[int], Ranks], world_size: int, transport: str
) -> None:
    bits = ranks(world_size).run(check_all_reduce, transport=transport)
    assert all(other == bits[0] for other in bits)


def check_broadcast(transport: str) -> None:
    """From every rank, several dtypes, up to more than two bounce buffers."""
    comm = open_world(transport)
    for dtype, numel in ((torch.bool, 3), (torch.int64, N), (torch.bfloat16, N), (torch.float32, 300_001)):
        for src in range(comm.world_size):
            x = values(comm.rank, numel, dtype)
            comm.broadcast(x, src).wait()
            expected = values(src, numel, dtype)
            assert torch.equal(x, expected), (dtype, src)
            x.zero_()
    comm.close()


@CASES
def test_broadcast_copies_from_any_rank(ranks: Callable[[int], Ranks], world_size: int, transport: str) -> None:
    ranks(world_size).run(check_broadcast, transport=transport)


# -- accounting ------------------------------------------------------------------------------------------------------


def count_traffic(transport: str) -> dict[str, int]:
    """Bytes of one call of each kind."""
    comm = open_world(transport)
    world = comm.world_size
    comm.all_gather(torch.zeros(100, dtype=torch.bfloat16), torch.zeros(world * 100, dtype=torch.bfloat16)).wait()
    comm.reduce_scatter(comm.staging(world * 300, torch.float32), torch.zeros(300), accumulate=False).wait()
    comm.all_reduce(torch.zeros(10, dtype=torch.int64)).wait()
    small = comm.traffic.bytes_by_op["all_reduce"]
    comm.all_reduce(torch.zeros(world * 50_000)).wait()
    comm.broadcast(torch.zeros(7, dtype=torch.uint8), 1).wait()
    comm.barrier()
    counted = dict(comm.traffic.bytes_by_op) | {"small": small, "calls": sum(comm.traffic.num_calls.values())}
    assert comm.traffic.total_bytes == sum(comm.traffic.bytes_by_op.values())
    comm.traffic.reset()
    assert comm.traffic.total_bytes == 0
    comm.close()
    return counted


@CASES
def test_traffic_counts_the_bytes_that_leave_a_rank(
    ranks: Callable[[int], Ranks], world_size: int, transport: str
) -> None:
    others = world_size - 1
    for rank, counted in enumerate(ranks(world_size).run(count_traffic, transport=transport)):
        assert counted == {
            "all_gather": others * 200,
            "reduce_scatter": others * 1200,
            "small": others * 80,
            "all_reduce": others * 80 + 2 * others * 200_000,
            "broadcast": others * 7 if rank == 1 else 0,
            "calls": 5,
        }


def compare_leftovers(transport: str) -> None:
    """File descriptors and files in /dev/shm before and after a transport's whole life."""

    def look() -> set[str]:
        names = set(os.listdir("/dev/shm"))
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one that listed the directory
                names.add(os.readlink(f"/proc/self/fd/{fd}"))
        return names

    open_world(transport).close()  # what torch opens once and keeps
    dist.barrier()
    before = look()
    comm = open_world(transport)
    shard = comm.shared(1000, torch.float32)
    comm.all_gather(shard, torch.zeros(comm.world_size * 1000)).wait()
    staging = comm.staging(comm.world_size * 1000, torch.float32)
    comm.reduce_scatter(staging, torch.zeros(1000), accumulate=False).wait()
    comm.all_reduce(torch.zeros(3)).wait()
    comm.barrier()
    comm.close()
    comm.close()
    shard.fill_(1.0)  # memory outlives the transport as long as it is held
    deadline = time.monotonic() + 5.0
    while look() - before and time.monotonic() < deadline:
        time.sleep(0.01)  # gloo closes its sockets in a thread of its own
    assert look() - before == set()


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_close_leaves_no_file_descriptor_and_no_file(ranks: Callable[[int], Ranks], transport: str) -> None:
    ranks(2).run(compare_leftovers, transport=transport)


def count_mappings() -> tuple[int, int]:
    """How many segments of the peer this rank maps while a tensor lives, and after it died."""
    comm = open_world("shm")
    shard = comm.shared(1000, torch.float32)
    full = torch.zeros(comm.world_size * 1000)
    comm.all_gather(shard, full).wait()
    comm.fence()
    during = len(comm._links._memory)  # type: ignore[attr-defined]
    comm.fence()  # the peer may announce `another` only now that this rank has counted
    del shard
    another = comm.shared(1000, torch.float32)
    for _ in range(2):
        comm.all_gather(another, full).wait()
        comm.fence()
    after = len(comm._links._memory)  # type: ignore[attr-defined]
    comm.close()
    return during, after


def test_memory_that_no_tensor_uses_any_more_is_unmapped_by_the_peers(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(2).run(count_mappings) == [(1, 1), (1, 1)]


# -- groups ----------------------------------------------------------------------------------------------------------


def use_many_groups() -> list[str]:
    """A 2 x 2 mesh's two axes, an uneven split, and several transports over the same ranks, all alive at once."""
    rank = dist.get_rank()
    rows = make_collectives((0, 1) if rank < 2 else (2, 3), "cpu", transport="shm")
    columns = make_collectives((rank % 2, rank % 2 + 2), "cpu", transport="gloo")
    three = make_collectives((0, 1, 2) if rank < 3 else (3,), "cpu")
    worlds = [open_world("auto"), open_world("gloo"), open_world("shm")]
    opened = [rows, columns, three, *worlds]
    results = [torch.tensor([float(2**rank)]) for _ in opened]
    for comm, x in zip(opened, results, strict=True):
        comm.all_reduce(x).wait()
    row = 3.0 if rank < 2 else 12.0
    column = 5.0 if rank % 2 == 0 else 10.0
    assert [x.item() for x in results] == [row, column, 7.0 if rank < 3 else 8.0, 15.0, 15.0, 15.0]
    for dtype in (torch.float32, torch.bfloat16):  # three ranks: nothing divides evenly
        x = values(three.rank if rank < 3 else 9, 100_003, dtype)
        expected = reference_sum([values(r, 100_003, dtype) for r in range(three.world_size)], x, False)
        three.all_reduce(x).wait()
        assert torch.equal(x, expected) or rank == 3
    for comm in opened:
        comm.close()
    return [comm.name for comm in opened]


def test_groups_of_several_axes_and_transports_live_side_by_side(ranks: Callable[[int], Ranks]) -> None:
    names = ranks(4).run(use_many_groups)
    assert names[:3] == [["shm", "gloo", "shm", "shm", "gloo", "shm"]] * 3
    assert names[3] == ["shm", "gloo", "solo", "shm", "gloo", "shm"]


def ask_for_groups_that_do_not_fit() -> None:
    """Rank 0 wants everybody, the others want to be alone."""
    make_collectives(range(dist.get_world_size()) if dist.get_rank() == 0 else (dist.get_rank(),), "cpu")


def test_groups_that_do_not_fit_are_refused_on_all_ranks(ranks: Callable[[int], Ranks]) -> None:
    with pytest.raises(RankFailure, match=r"(?s)failed on 2 of 2.*rank 0 asks for group \(0, 1\).*rank 1 asks for \(1"):
        ranks(2).run(ask_for_groups_that_do_not_fit)


# -- failures --------------------------------------------------------------------------------------------------------


def call_different_collectives() -> None:
    """Rank 1 gathers where rank 0 reduces."""
    comm = open_world("shm")
    if comm.rank == 0:
        comm.reduce_scatter(comm.staging(2000, torch.float32), torch.zeros(1000), accumulate=False).wait()
    else:
        comm.all_gather(comm.shared(1000, torch.float32), torch.zeros(2000)).wait()


def test_different_collectives_are_named_on_both_sides(ranks: Callable[[int], Ranks]) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks(2).run(call_different_collectives)
    text = str(failure.value)
    assert "failed on 2 of 2" in text
    assert "rank 0 called reduce_scatter number 1 (2000 x torch.float32" in text
    assert "rank 1 called all_gather number 1 (1000 x torch.float32" in text


def gather_different_sizes() -> None:
    """Rank 1's shard is one element longer."""
    comm = open_world("shm")
    n = 1000 + comm.rank
    comm.all_gather(torch.zeros(n), torch.zeros(2 * n)).wait()


def test_different_sizes_are_named(ranks: Callable[[int], Ranks]) -> None:
    with pytest.raises(RankFailure, match=r"(?s)do not match.*1000 x torch.float32.*1001 x torch.float32"):
        ranks(2).run(gather_different_sizes)


def come_late() -> None:
    """Rank 1 does not come in time."""
    comm = open_world("shm", timeout_s=0.3)
    if comm.rank == 1:
        time.sleep(1.0)
    comm.barrier()
    comm.barrier()


def test_a_rank_that_does_not_come_in_time_is_named_with_the_call(ranks: Callable[[int], Ranks]) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks(2).run(come_late)
    text = str(failure.value)
    assert "waits in barrier number 1" in text and "did not come within 0.3 s" in text
    assert "rank 0 (pid" in text and "gave up" in text  # rank 1 learns why


def lose_rank_1() -> None:
    """Rank 1 is killed between two collectives, with a child of its own that lives on."""
    comm = open_world("shm", timeout_s=60.0)
    comm.barrier()
    if comm.rank == 1:
        if os.fork() == 0:
            time.sleep(3.0)
            os._exit(0)
        os.kill(os.getpid(), 9)
    began = time.monotonic()
    try:
        comm.all_reduce(torch.zeros(10)).wait()
    finally:
        assert time.monotonic() - began < 2.0


def test_the_death_of_a_rank_is_noticed_at_once_and_named(
    ranks: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "GRACE_S", 2.0)
    with pytest.raises(RankFailure, match=r"RuntimeError: rank 1 \(pid \d+\) has died") as failure:
        ranks(2).run(lose_rank_1)
    assert "AssertionError" not in str(failure.value).split("--- rank 1")[0]
