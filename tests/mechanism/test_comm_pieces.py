"""The parts of the communication layer that need no second process: sums, slots, places, choices, argument checks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lorica.comm import find_place, init_distributed, make_collectives
from lorica.comm.environment import first_host
from lorica.comm.groups import Member, choose_transport
from lorica.comm.links import Kind, Links, Listener, Message
from lorica.comm.reduction import SMALL_BYTES, TILE_NUMEL, cut_all_reduce, sum_into
from lorica.comm.slots import Slot, SlotPool
from lorica.comm.solo import Solo
from tests.mechanism.test_comm import FLOATS, reference_sum, values

# -- sums ------------------------------------------------------------------------------------------------------------

EVERYONE = {dtype: [values(r, TILE_NUMEL + 1, dtype) for r in range(5)] for dtype in FLOATS}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_sum_into_is_the_reference_formula_for_all_dtypes(num_ranks: int) -> None:
    for dtype, out_dtype, accumulate, numel in product(FLOATS, FLOATS, (False, True), (1, TILE_NUMEL, TILE_NUMEL + 1)):
        contributions = [EVERYONE[dtype][r][:numel] for r in range(num_ranks)]
        out = values(9, 4096, out_dtype).repeat(40)[:numel]
        expected = reference_sum(contributions, out, accumulate)
        sum_into(contributions, out, accumulate=accumulate)
        assert torch.equal(out, expected), (dtype, out_dtype, accumulate, numel)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_result_may_replace_one_of_the_contributions(place: int) -> None:
    contributions = [values(r, TILE_NUMEL + 9, torch.bfloat16) for r in range(3)]
    expected = reference_sum(contributions, contributions[0], accumulate=False)
    sum_into(contributions, contributions[place], accumulate=False)
    assert torch.equal(contributions[place], expected)


@given(st.integers(1, 100_000), st.integers(1, 64), st.sampled_from([2, 4, 8]))
def test_the_parts_of_an_all_reduce_cover_the_tensor_and_its_bytes_are_counted(
    numel: int, world_size: int, itemsize: int
) -> None:
    cut = cut_all_reduce(numel, itemsize, world_size)
    if numel * itemsize <= SMALL_BYTES:
        assert cut.bounds == () and set(cut.sent_numel) == {numel * (world_size - 1)}
    else:
        assert cut.bounds[0] == 0 and cut.bounds[-1] == numel and list(cut.bounds) == sorted(cut.bounds)
        assert sum(cut.sent_numel) == 2 * (world_size - 1) * numel


# -- solo ------------------------------------------------------------------------------------------------------------


def test_alone_collectives_are_copies_with_the_same_bits_as_between_ranks() -> None:
    comm = Solo(torch.device("cpu"))
    for dtype, out_dtype, accumulate in product(FLOATS, FLOATS, (False, True)):
        full, out = values(0, 70_000, dtype), values(1, 70_000, out_dtype)
        expected = reference_sum([full], out, accumulate)
        comm.reduce_scatter(full, out, accumulate=accumulate).wait()
        assert torch.equal(out, expected), (dtype, out_dtype, accumulate)
    gathered = torch.zeros(5)
    comm.all_gather(torch.ones(5), gathered).wait()
    comm.all_reduce(gathered).wait()
    comm.broadcast(gathered, 0).wait()
    assert gathered.tolist() == [1.0] * 5
    assert comm.traffic.total_bytes == 0


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    comm = Solo(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"full must have world_size \* shard = 1 \* 3 = 3 elements, got 4"):
        comm.all_gather(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"shard must be a contiguous, non-empty 1-D tensor, got shape \(2, 2\)"):
        comm.all_gather(torch.zeros(2, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="non-empty"):
        comm.all_reduce(torch.zeros(0))
    with pytest.raises(ValueError, match=r"same dtype, got torch.float32 and torch.float64"):
        comm.all_gather(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out must have a floating-point dtype, got torch.int64"):
        comm.reduce_scatter(torch.zeros(3), torch.zeros(3, dtype=torch.int64), accumulate=False)
    with pytest.raises(ValueError, match=r"src must be a rank inside the group, 0 to 0, got 1"):
        comm.broadcast(torch.zeros(3), 1)


# -- slots -----------------------------------------------------------------------------------------------------------


class Pool:
    """A pool that notes what it allocates and reclaims."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.reclaimed: list[Slot] = []
        self.slots = SlotPool(self._allocate, self._reclaim)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        self.allocated.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def _reclaim(self, slot: Slot) -> None:
        self.reclaimed.append(slot)
        self.slots.retire(slot)


def test_two_buffers_serve_any_number_of_collectives_in_flight() -> None:
    pool = Pool()
    flying = [pool.slots.launch(pool.slots.take(100, torch.float32)) for _ in range(10)]
    assert pool.allocated == [400, 400]
    assert pool.reclaimed == flying[:8]


def test_a_buffer_that_fits_is_waited_for_rather_than_a_free_one_replaced() -> None:
    pool = Pool()
    large = pool.slots.launch(pool.slots.take(100, torch.float32))
    small = pool.slots.launch(pool.slots.take(10, torch.float32))
    assert large is not None and small is not None
    pool.slots.retire(small)
    pool.slots.take(90, torch.bfloat16)
    assert pool.reclaimed == [large] and pool.allocated == [400, 40]
    pool.slots.take(90, torch.bfloat16)
    assert pool.reclaimed == [large] and pool.allocated == [400, 40, 180]  # the free small one made room


def test_buffers_that_the_caller_still_packs_are_never_reused() -> None:
    pool = Pool()
    held = [pool.slots.take(10, torch.float32) for _ in range(5)]
    assert len({x.data_ptr() for x in held}) == 5
    for x in held:
        slot = pool.slots.launch(x)
        assert slot is not None
        pool.slots.retire(slot)
    assert len({pool.slots.take(10, torch.float32).data_ptr() for _ in range(2)} & {x.data_ptr() for x in held}) == 2


def test_a_part_of_a_staging_buffer_or_a_second_use_of_it_is_refused() -> None:
    pool = Pool()
    full = pool.slots.take(10, torch.float32)
    with pytest.raises(ValueError, match=r"whole tensor that staging\(\) returned, 10 x torch.float32, got 4 x"):
        pool.slots.launch(full[:4])
    assert pool.slots.launch(full) is not None
    with pytest.raises(RuntimeError, match="given back before"):
        pool.slots.launch(full)
    assert pool.slots.launch(torch.zeros(10)) is None


# -- links -----------------------------------------------------------------------------------------------------------


def connect(world_size: int) -> list[Links]:
    """All ranks' links in one process."""
    listeners = [Listener() for _ in range(world_size)]
    addresses = [listener.address for listener in listeners]
    links: dict[int, Links] = {}

    def join(rank: int) -> None:
        links[rank] = Links(rank, addresses, listeners[rank], timeout_s=5.0)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()
    return [links[rank] for rank in range(world_size)]


def test_ranks_that_signal_far_ahead_of_waiting_do_not_block_each_other() -> None:
    first, second = connect(2)
    num = 3000  # far more than a socket's queue holds
    received = {0: 0, 1: 0}

    def signal(links: Links) -> None:
        for seq in range(1, num + 1):
            links.send(Message(Kind.BARRIER, seq=seq))
        for seq in range(1, num + 1):
            received[links.rank] += links.receive(1 - links.rank, seq, "barrier").seq == seq

    threads = [threading.Thread(target=signal, args=(links,)) for links in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert received == {0: num, 1: num}
    first.close()
    second.close()


def test_what_a_peer_sent_before_it_closed_is_received_and_its_absence_named_after() -> None:
    first, second = connect(2)
    second.send(Message(Kind.BARRIER, seq=1))
    second.close()
    assert first.receive(1, 1, "barrier").seq == 1
    first.wait_acked(100, "a peer that has left reads nothing any more")
    with pytest.raises(RuntimeError, match="rank 1 has closed its transport and will not come"):
        first.receive(1, 2, "barrier")
    with pytest.raises(RuntimeError, match="rank 1 has closed"):
        first.receive(1, 3, "again")
    first.close()


def test_waiting_for_one_rank_notices_the_death_of_another() -> None:
    first, second, third = connect(3)
    third.forget()  # closes its sockets without a goodbye, as a killed process does
    with pytest.raises(RuntimeError, match=r"rank 2 \(pid \d+\) has died"):
        first.receive(1, 1, "barrier")
    with pytest.raises(RuntimeError, match=r"rank 0 \(pid \d+\) gave up: rank 2|rank 2 \(pid \d+\) has died"):
        second.receive(0, 1, "barrier")
    first.close()
    second.close()


# -- places and choices ----------------------------------------------------------------------------------------------


def test_torchruns_variables_give_the_place() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    place = find_place(environ, default_port=1234)
    assert place is not None
    assert place[:6] == (3, 8, 1, 2, "a", 1234)
    assert place.variables()["MASTER_PORT"] == "1234"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {
                f"OMPI_COMM_WORLD_{k}": v
                for k, v in {"RANK": "1", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items()
            },
            (1, 4, 1, 4, "127.0.0.1", 29500, "Open MPI"),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "b"},
            (1, 2, 0, 1, "b", 29500, "MPICH"),
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
                "SLURM_STEP_NODELIST": "gpu[07-08]",
            },
            (5, 8, 1, 4, "gpu07", 29500, "SLURM"),
        ),
    ],
)
def test_mpi_and_slurm_give_the_place(environ: dict[str, str], expected: tuple[object, ...]) -> None:
    assert find_place(environ) == expected
    assert find_place(environ, discover_mpi=False) is None


def test_a_batch_script_outside_of_srun_is_one_plain_process() -> None:
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[07-08]"}) is None
    assert find_place({}) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "zero", "WORLD_SIZE": "1"}, "RANK: expected a whole number, got 'zero'"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}, "export MASTER_ADDR"),
    ],
)
def test_half_a_description_of_a_job_is_an_error_that_names_what_is_missing(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_place(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9],n1", "gpu03"), ("login,gpu[1-2]", "login"), ("r[2,4]-ib", "r2-ib")],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def members(requested: str, *devices_hosts: tuple[str, str]) -> list[Member]:
    """A group of ranks on the given devices and hosts."""
    ranks = tuple(range(len(devices_hosts)))
    return [Member(r, ranks, requested, device, host, "x") for r, (device, host) in enumerate(devices_hosts)]


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (members("auto", ("cpu", "a")), "solo"),
        (members("auto", ("cpu", "a"), ("cpu", "a")), "shm"),
        (members("auto", ("cpu", "a"), ("cpu", "b")), "gloo"),
        (members("gloo", ("cpu", "a"), ("cpu", "a")), "gloo"),
        (members("auto", ("cuda 0", "a"), ("cuda 1", "a")), "nccl"),
        (members("auto", ("cuda 0", "a"), ("cuda 0", "b")), "nccl"),
        (members("auto", ("cuda 0", "a"), ("cuda 0", "a")), "host-staged:shm"),
        (members("auto", ("cuda 0", "a"), ("cuda 0", "a"), ("cuda 0", "b")), "host-staged:gloo"),
        (members("gloo", ("cuda 0", "a"), ("cuda 1", "a")), "host-staged:gloo"),
        (members("host-staged", ("cuda 0", "a"), ("cuda 1", "a")), "host-staged:shm"),
    ],
)
def test_the_transport_follows_from_where_the_ranks_are(group: list[Member], choice: str) -> None:
    assert choose_transport(group) == choice


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (members("shm", ("cpu", "a"), ("cpu", "b")), "'shm' needs all ranks on one Linux host"),
        (members("nccl", ("cuda 0", "a"), ("cuda 0", "a")), "'nccl' needs a GPU of its own"),
        (members("host-staged", ("cpu", "a"), ("cpu", "a")), "'host-staged' is for CUDA tensors"),
    ],
)
def test_a_transport_that_cannot_serve_the_group_is_refused(group: list[Member], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_transport(group)


# -- joining ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """An environment that describes no job, and no process group after the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield  # type: ignore[misc]
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_plain_process_is_a_world_of_one_and_says_nothing(plain: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert init_distributed() is None
    init_distributed()  # the group is reused
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    x = torch.ones(2)
    dist.all_reduce(x)
    assert make_collectives([0], "cpu").name == "solo"
    assert capfd.readouterr() == ("", "")


def test_a_group_that_must_exist_is_not_made(plain: None) -> None:
    with pytest.raises(RuntimeError, match="dist_init_required is False"):
        init_distributed(dist_init_required=False)
    assert not dist.is_initialized()


def test_a_rank_outside_of_the_world_is_refused(plain: None) -> None:
    with pytest.raises(ValueError, match="got rank=2, world_size=2"):
        init_distributed(rank=2, world_size=2)
    with pytest.raises(ValueError, match="nothing says which rank"):
        init_distributed(init_method="tcp://127.0.0.1:1")


def test_requests_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="transport must be one of auto, gloo, shm, nccl, host-staged, got 'mpi'"):
        make_collectives([0], "cpu", transport="mpi")
    with pytest.raises(ValueError, match=r"contain this rank 0, got \(1, 2\)"):
        make_collectives([1, 2], "cpu")
    with pytest.raises(RuntimeError, match=r"call lorica\.init_distributed"):
        make_collectives([0, 1], "cpu")
