"""Planes in a file: the same as a tensor, whatever range, alignment and chunking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.tier import ALIGNMENT, Arena, FilePlane, NvmeTier, SwapError, SwapFile, TierFull, padded_bytes

CHUNK = 4096  # elements
DTYPES = [torch.float32, torch.int16, torch.bfloat16, torch.uint8, torch.float64]


@pytest.fixture(params=[None, False], ids=["direct if it can", "buffered"], scope="module")
def tier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NvmeTier]:
    folder, direct = tmp_path_factory.mktemp("nvme"), request.param
    tier = NvmeTier(SwapFile(folder, 256 << 20, threads=3, block_bytes=8 * ALIGNMENT, direct=direct, reserve_bytes=0))
    yield tier
    tier.close()


def pattern(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, as integers of the dtype's width see them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), numel=st.integers(1, 40_000), dtype=st.sampled_from(DTYPES))
def test_any_range_is_as_in_a_tensor_and_neighbours_stay_as_they_are(
    tier: NvmeTier, data: st.DataObject, numel: int, dtype: torch.dtype
) -> None:
    before, plane, after = tier.alloc(5, dtype), tier.alloc(numel, dtype), tier.alloc(5, dtype)
    edge = pattern(5, dtype, 1)
    before.store(0, edge), after.store(0, edge)
    model = torch.zeros(numel, dtype=dtype)
    assert same(plane.load(), model)
    for turn in range(5):
        start = data.draw(st.integers(0, numel))
        stop = data.draw(st.integers(start, numel))
        values = pattern(stop - start, dtype, turn)
        plane.store(start, values)
        model[start:stop] = values
        start = data.draw(st.integers(0, numel))
        stop = data.draw(st.integers(start, numel))
        assert same(plane.load(start, stop), model[start:stop])
    assert same(plane.load(), model) and same(before.load(), edge) and same(after.load(), edge)


@pytest.mark.parametrize("numel", [CHUNK, 5 * CHUNK, 5 * CHUNK + 7, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_in_flight_through_a_ring_give_what_an_update_in_memory_gives(
    tier: NvmeTier, numel: int, dtype: torch.dtype
) -> None:
    """Read the next chunk, change this one, write the last one: as an update of the optimizer does."""
    plane, content = tier.alloc(numel, dtype), pattern(numel, dtype)
    plane.write(0, content).wait()
    chunks = [(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK)]
    ring = [Arena(CHUNK * dtype.itemsize, threads=1).alloc(CHUNK, dtype) for _ in range(3)]
    reads = {0: plane.read(*chunks[0], ring[0][: chunks[0][1]])}
    writes = {}
    for number, (start, stop) in enumerate(chunks):
        if number + 1 < len(chunks):
            if number >= 2:
                writes.pop(number - 2).wait()
            begin, end = chunks[number + 1]
            reads[number + 1] = plane.read(begin, end, ring[(number + 1) % 3][: end - begin])
        reads.pop(number).wait()
        here = ring[number % 3][: stop - start]
        here.view(torch.uint8).bitwise_xor_(0x35)
        writes[number] = plane.write(start, here)
    for transfer in writes.values():
        transfer.wait()
    content.view(torch.uint8).bitwise_xor_(0x35)
    assert same(plane.load(), content)


def test_planes_begin_at_sectors_and_chunks_go_straight_to_the_disk(tmp_path: Path) -> None:
    tier = NvmeTier(SwapFile(tmp_path, 10 * ALIGNMENT, reserve_bytes=0))
    first, second = tier.alloc(1, torch.uint8), tier.alloc(2 * CHUNK, torch.int16)
    assert tier.free_bytes == 9 * ALIGNMENT - padded_bytes(4 * CHUNK)
    second.store(0, pattern(2 * CHUNK, torch.int16))
    assert not first.load().any()
    raw = tier.file.path.read_bytes()
    begin = 2 * ALIGNMENT  # header, first plane
    assert raw[begin : begin + 4 * CHUNK] == pattern(2 * CHUNK, torch.int16).numpy().tobytes()
    tier.close()


def test_a_plane_has_the_figures_of_its_tensor(tier: NvmeTier) -> None:
    plane = tier.alloc(11, torch.bfloat16)
    assert (plane.numel(), plane.dtype, plane.element_size(), plane.device) == (11, torch.bfloat16, 2, tier.device)
    assert tier.name == "nvme" and tier.device == torch.device("cpu")
    assert tier.alloc(0, torch.float32).load().numel() == 0


def test_store_takes_tensors_that_are_not_contiguous_or_need_a_gradient(tier: NvmeTier) -> None:
    plane = tier.alloc(4, torch.float32)
    plane.store(0, torch.arange(8.0, requires_grad=True)[::2])
    assert plane.load().tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("start, values", [(-1, 2), (3, 2), (5, 0)])
def test_a_range_outside_of_the_plane_is_refused(tier: NvmeTier, start: int, values: int) -> None:
    plane = tier.alloc(4, torch.float32)
    with pytest.raises(ValueError, match="range within it"):
        plane.write(start, torch.zeros(values))
    with pytest.raises(ValueError, match="range within it"):
        plane.read(start, start + values, torch.zeros(values))
    with pytest.raises(ValueError, match="range within it"):
        plane.load(3, 1)


def test_memory_of_another_dtype_or_size_is_refused(tier: NvmeTier) -> None:
    plane = tier.alloc(4, torch.float32)
    with pytest.raises(ValueError, match=r"4 x torch\.float32.*4 x torch\.bfloat16"):
        plane.write(0, torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"got \[0, 4\) and 3 x"):
        plane.read(0, 4, torch.zeros(3))


def test_a_full_file_says_what_was_asked_and_what_is_free(tmp_path: Path) -> None:
    tier = NvmeTier(SwapFile(tmp_path, 3 * ALIGNMENT, reserve_bytes=0))
    tier.alloc(1, torch.uint8)
    with pytest.raises(TierFull, match=rf"room for {4 * ALIGNMENT} .*{2 * ALIGNMENT} of {3 * ALIGNMENT} bytes free"):
        tier.alloc(ALIGNMENT, torch.float32)
    assert isinstance(tier.alloc(2 * ALIGNMENT, torch.uint8), FilePlane)
    tier.close()


def test_a_fault_of_the_file_reaches_who_waits(tmp_path: Path) -> None:
    tier = NvmeTier(SwapFile(tmp_path, ALIGNMENT, reserve_bytes=0))
    plane = tier.alloc(100, torch.float32)
    tier.verify()
    tier.file.path.unlink()
    transfer = plane.write(0, torch.ones(100))
    with pytest.raises(SwapError, match="expected the file to be there"):
        transfer.wait()
    with pytest.raises(SwapError, match="expected the file to be there"):
        plane.load()
    with pytest.raises(SwapError, match="expected the file to be there"):
        tier.verify()
    tier.close()
