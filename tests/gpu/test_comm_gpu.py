"""CUDA transports: NCCL alone on its GPU, and ranks that share one GPU through host memory, with work in flight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.distributed as dist

from lorica.comm import init_distributed, make_collectives
from lorica.comm.nccl import Nccl
from lorica.core.streams import CudaStreams
from tests.harness import Ranks
from tests.mechanism.test_comm import FLOATS, N, reference_sum, values

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def share_one_gpu(transport: str) -> str:
    """Every collective on CUDA tensors of ranks that share a GPU, while it computes, against the CPU's reference."""
    world = dist.get_world_size()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    busy = torch.randn(2000, 2000, device=device)
    with warnings.catch_warnings(record=True):
        comm = make_collectives(range(world), device, streams=CudaStreams(device), transport=transport)
    numel = 40 * N  # several pieces
    for dtype, out_dtype, accumulate in product(FLOATS, (torch.float32, torch.bfloat16), (False, True)):
        fulls = [values(r, world * numel, dtype) for r in range(world)]
        out = values(comm.rank, numel, out_dtype, seed=1)
        expected = reference_sum([f.view(world, numel)[comm.rank] for f in fulls], out, accumulate)
        out = out.to(device)
        gathered = comm.shared(world * numel, dtype)
        shard = gathered[comm.rank * numel : (comm.rank + 1) * numel]
        everywhere, sent = values(comm.rank, numel, dtype, seed=3).to(device), fulls[comm.rank][:numel].to(device)
        for _ in range(20):
            busy = busy @ busy / 50.0  # what follows is queued behind this
        shard.copy_(fulls[comm.rank][numel : 2 * numel], non_blocking=True)
        full = comm.staging(world * numel, dtype)
        full.copy_(fulls[comm.rank], non_blocking=True)
        handles = [
            comm.reduce_scatter(full, out, accumulate=accumulate),
            comm.all_gather(shard, gathered),
            comm.all_reduce(everywhere),
            comm.broadcast(sent, 1),
        ]
        for handle in handles:
            handle.wait()
        out, gathered, everywhere, sent = out * 1, gathered * 1, everywhere * 1, sent * 1  # on the current stream
        assert torch.equal(out.cpu(), expected), (dtype, out_dtype, accumulate)
        assert torch.equal(gathered.cpu(), torch.cat([f[numel : 2 * numel] for f in fulls]))
        summed = reference_sum([values(r, numel, dtype, seed=3) for r in range(world)], everywhere.cpu(), False)
        assert torch.equal(everywhere.cpu(), summed)
        assert torch.equal(sent.cpu(), fulls[1][:numel])
        comm.fence()
    comm.barrier()
    comm.close()
    return comm.name


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_ranks_that_share_a_gpu_get_the_bits_of_the_cpu_transports(
    ranks: Callable[[int], Ranks], transport: str
) -> None:
    assert ranks(2).run(share_one_gpu, transport=transport, limit_s=300.0) == ["host-staged", "host-staged"]


@pytest.fixture
def alone() -> Iterator[Nccl]:
    """NCCL over a group of one rank."""
    init_distributed()
    comm = Nccl(dist.new_group([0], backend="nccl"), torch.device("cuda", 0))
    yield comm
    comm.close()
    dist.destroy_process_group()


def test_nccl_collectives_of_one_rank_are_copies_and_warn_of_nothing(alone: Nccl) -> None:
    device = torch.device("cuda", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for dtype, out_dtype, accumulate in product(FLOATS, FLOATS, (False, True)):
            full, out = values(0, N, dtype), values(1, N, out_dtype)
            expected = reference_sum([full], out, accumulate)
            out = out.to(device)
            alone.reduce_scatter(full.to(device), out, accumulate=accumulate).wait()
            assert torch.equal(out.cpu(), expected), (dtype, out_dtype, accumulate)
        gathered = alone.shared(N, torch.bool)
        alone.all_gather(values(0, N, torch.bool).to(device), gathered).wait()
        assert torch.equal(gathered.cpu(), values(0, N, torch.bool))
        alone.all_gather(gathered, gathered).wait()
        x = torch.ones(5, device=device)
        alone.all_reduce(x).wait()
        alone.broadcast(x, 0).wait()
        alone.fence()
        alone.barrier()
    assert x.tolist() == [1.0] * 5
    assert alone.traffic.total_bytes == 0


def test_a_process_with_its_own_gpu_joins_by_nccl_with_gloo_beside_it(alone: Nccl) -> None:
    x, y = torch.ones(2), torch.ones(2, device="cuda")
    dist.all_reduce(x)
    dist.all_reduce(y)
    assert make_collectives([0], "cuda").name == "solo"
    assert dist.is_nccl_available() and x.tolist() == y.tolist() == [1.0, 1.0]
