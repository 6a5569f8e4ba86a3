"""The swap file: what comes back, which fault gives which error, and that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorica.tier import ALIGNMENT, Arena, SwapError, SwapFile, measure
from lorica.tier.file_io import SystemFileIO
from lorica.tier.swap import HEADER_BYTES, cut

SMALL = 4 * ALIGNMENT  # block size of most tests here


def supports_direct(folder: Path) -> bool:
    try:
        SwapFile(folder, 1, direct=True, reserve_bytes=0).close()
    except SwapError:
        return False
    return True


@pytest.fixture(params=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    if request.param == "direct" and not supports_direct(tmp_path):
        pytest.skip(f"{tmp_path} has no O_DIRECT")
    return bool(request.param == "direct")


@pytest.fixture
def opened(tmp_path: Path, direct: bool) -> Iterator[Callable[..., SwapFile]]:
    files: list[SwapFile] = []

    def open_one(num_bytes: int, **options: Any) -> SwapFile:
        known = {"threads": 3, "block_bytes": SMALL, "direct": direct, "reserve_bytes": 0}
        files.append(SwapFile(tmp_path, num_bytes, **(known | options)))
        return files[-1]

    yield open_one
    for file in files:
        file.close()


def aligned(num_bytes: int) -> Tensor:
    return Arena(num_bytes, threads=1).alloc(num_bytes, torch.uint8)


def noise(num_bytes: int, seed: int = 0) -> Tensor:
    out = aligned(num_bytes)
    out.copy_(torch.from_numpy(np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)))
    return out


class FaultyIO(SystemFileIO):
    """The operating system until `fault` says otherwise; counts and records calls."""

    def __init__(self) -> None:
        self.fault: Callable[[str, int, int], int | None] = lambda call, offset, num_bytes: None
        self.calls: list[tuple[str, int, int]] = []

    def _do(self, call: str, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        num_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        self.calls.append((call, offset, num_bytes))
        short = self.fault(call, offset, num_bytes)
        if short is not None:
            buffers = [memoryview(buffers[0])[:short]]
        return getattr(os, call)(descriptor, buffers, offset) if short != 0 else 0

    def preadv(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        return self._do("preadv", descriptor, buffers, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        return self._do("pwritev", descriptor, buffers, offset)

    def fallocate(self, descriptor: int, num_bytes: int) -> None:
        if self.fault("fallocate", 0, num_bytes) is None:
            super().fallocate(descriptor, num_bytes)


def raising(code: int, call: str, from_offset: int = HEADER_BYTES) -> Callable[[str, int, int], int | None]:
    def fault(called: str, offset: int, num_bytes: int) -> None:
        if called == call and offset + num_bytes > from_offset:
            raise OSError(code, os.strerror(code))

    return fault


# What comes back ------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(start=st.integers(0, 9 * ALIGNMENT), length=st.integers(0, 9 * ALIGNMENT), sectors=st.integers(1, 4))
def test_a_range_is_cut_into_neighbours_that_are_whole_sectors_or_within_one(
    start: int, length: int, sectors: int
) -> None:
    block = sectors * ALIGNMENT
    ranges = list(cut(start, start + length, block))
    borders = [start, *(r.stop for r in ranges)]
    assert [r.start for r in ranges] == borders[:-1] and borders[-1] == start + length
    for begin, stop in ranges:
        assert begin < stop and begin // block == (stop - 1) // block
        whole = begin % ALIGNMENT == 0 and stop % ALIGNMENT == 0
        assert whole or begin // ALIGNMENT == (stop - 1) // ALIGNMENT


def test_a_new_file_reads_as_zeros(opened: Callable[..., SwapFile]) -> None:
    out = noise(5 * SMALL + 77)
    opened(5 * SMALL + 77).read(0, out).wait()
    assert not out.any()


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes_and_offsets_equal_a_model_in_memory(opened: Callable[..., SwapFile], seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([1, ALIGNMENT - 1, 6 * SMALL, 6 * SMALL + 1234])
    file, model = opened(size), torch.zeros(size, dtype=torch.uint8)
    for turn in range(40):
        start = rng.randrange(size)
        stop = rng.randint(start, size)
        if rng.random() < 0.3:  # also what goes straight to the disk
            start, stop = start // ALIGNMENT * ALIGNMENT, stop // ALIGNMENT * ALIGNMENT
        stop = max(start, stop)
        shift = rng.choice([0, 0, 1, 512])
        memory = noise(stop - start + shift, turn)[shift:]
        if rng.random() < 0.5:
            file.write(start, memory).wait()
            model[start:stop] = memory
        else:
            file.read(start, memory).wait()
            assert torch.equal(memory, model[start:stop])
    out = aligned(size)
    file.read(0, out).wait()
    assert torch.equal(out, model)


def test_many_transfers_in_flight_keep_apart(opened: Callable[..., SwapFile]) -> None:
    """Neighbours share sectors at every border, and several threads change parts of one sector."""
    size = 100_003
    content = noise(size, 5)
    file = opened(size, threads=8)
    borders = sorted({0, size, *random.Random(3).sample(range(size), 400)})
    pairs = list(pairwise(borders))
    random.Random(4).shuffle(pairs)
    writes = [file.write(start, content[start:stop]) for start, stop in pairs]
    for transfer in writes:
        transfer.wait()
    out = aligned(size)
    reads = [file.read(start, out[start:stop]) for start, stop in pairs]
    for transfer in reads:
        transfer.wait()
        assert transfer.done()
    assert torch.equal(out, content)


@pytest.mark.parametrize("make", [bytearray, lambda n: memoryview(bytearray(n)), lambda n: torch.zeros(n // 4)])
def test_any_contiguous_memory_will_do(opened: Callable[..., SwapFile], make: Callable[[int], Any]) -> None:
    file, out = opened(8000), make(8000)
    file.write(0, bytes(range(200)) * 40).wait()
    file.read(0, out).wait()
    got = out.numpy().tobytes() if isinstance(out, Tensor) else bytes(out)
    assert got == bytes(range(200)) * 40


def test_memory_that_is_no_flat_memory_is_refused(opened: Callable[..., SwapFile]) -> None:
    file = opened(1000)
    with pytest.raises(ValueError, match="contiguous"):
        file.read(0, torch.zeros(10, 10, dtype=torch.uint8).t()[:5])
    with pytest.raises(ValueError, match="on the CPU"):
        file.read(0, torch.zeros(10, device="meta"))
    for offset in (-1, 991):
        with pytest.raises(ValueError, match="within 1000 bytes"):
            file.write(offset, b"0123456789")


def test_what_is_aligned_goes_to_the_disk_in_whole_blocks_without_a_detour(tmp_path: Path, direct: bool) -> None:
    io = FaultyIO()
    file = SwapFile(tmp_path, 4 * SMALL, block_bytes=SMALL, threads=2, direct=direct, reserve_bytes=0, io=io)
    io.calls.clear()
    file.write(0, noise(4 * SMALL)).wait()
    moved = sorted(io.calls)
    begin = HEADER_BYTES
    first = SMALL - begin % SMALL
    assert moved == [
        ("pwritev", start, min(SMALL - start % SMALL, begin + 4 * SMALL - start))
        for start in [begin, *range(begin + first, begin + 4 * SMALL, SMALL)]
    ]
    file.close()


def test_blocks_move_in_several_threads_at_once(tmp_path: Path, direct: bool) -> None:
    io = FaultyIO()
    file = SwapFile(tmp_path, 9 * SMALL, block_bytes=SMALL, threads=4, direct=direct, reserve_bytes=0, io=io)
    together = threading.Barrier(4, timeout=10)  # breaks unless four threads are in a call at once

    def meet(call: str, offset: int, num_bytes: int) -> None:
        together.wait()

    io.fault = meet
    file.write(SMALL - HEADER_BYTES, noise(8 * SMALL)).wait()
    file.close()
    assert len([call for call in io.calls if call[2] == SMALL]) == 8


def test_a_delayed_transfer_is_waited_for(tmp_path: Path) -> None:
    io = FaultyIO()
    file = SwapFile(tmp_path, SMALL, threads=1, reserve_bytes=0, io=io)
    go = threading.Event()
    io.fault = lambda call, offset, num_bytes: None if go.wait(10) else 0
    transfer = file.write(0, noise(SMALL))
    time.sleep(0.02)
    assert not transfer.done()
    go.set()
    transfer.wait()
    assert transfer.done()
    file.close()


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call, verb", [("preadv", "read"), ("pwritev", "write")])
def test_a_failing_call_names_file_offset_and_bytes(
    tmp_path: Path, direct: bool, code: int, call: str, verb: str
) -> None:
    io = FaultyIO()
    file = SwapFile(tmp_path, 3 * SMALL, threads=2, block_bytes=SMALL, direct=direct, reserve_bytes=0, io=io)
    file.read(0, aligned(ALIGNMENT)).wait()
    io.fault = raising(code, call, from_offset=2 * SMALL)
    transfer = getattr(file, verb)(0, noise(2 * SMALL))
    with pytest.raises(SwapError) as caught:
        transfer.wait()
    assert caught.value.errno == code
    text = str(caught.value)
    assert str(file.path) in text and f"at offset {2 * SMALL}:" in text and "Fix: " in text
    assert f"expected to {verb} {ALIGNMENT} bytes, got {os.strerror(code)}" in text
    io.fault = lambda call, offset, num_bytes: None
    file.write(0, noise(2 * SMALL)).wait()  # the file itself goes on working
    file.close()


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_short_count_is_continued_and_no_progress_is_an_error(tmp_path: Path, direct: bool, verb: str) -> None:
    io = FaultyIO()
    file = SwapFile(tmp_path, SMALL, threads=1, block_bytes=2 * SMALL, direct=direct, reserve_bytes=0, io=io)
    content, out = noise(SMALL), aligned(SMALL)
    io.fault = lambda call, offset, num_bytes: ALIGNMENT
    file.write(0, content).wait()
    file.read(0, out).wait()
    assert torch.equal(out, content)
    io.fault = lambda call, offset, num_bytes: ALIGNMENT if offset < 3 * ALIGNMENT else 0
    with pytest.raises(SwapError, match=rf"at offset {3 * ALIGNMENT}: expected to {verb} {2 * ALIGNMENT} bytes, got 0"):
        getattr(file, verb)(0, out).wait()
    file.close()


def test_a_count_that_ends_within_a_sector_is_an_error_past_the_page_cache(tmp_path: Path) -> None:
    if not supports_direct(tmp_path):
        pytest.skip("no O_DIRECT")
    io = FaultyIO()
    file = SwapFile(tmp_path, SMALL, direct=True, reserve_bytes=0, io=io)
    real = io.preadv
    io.preadv = lambda d, b, o: min(real(d, b, o), 1000) if o else real(d, b, o)  # type: ignore[method-assign]
    with pytest.raises(SwapError, match=rf"expected to read {SMALL} bytes, got 1000"):
        file.read(0, aligned(SMALL)).wait()
    file.close()


def test_the_first_failed_block_is_reported_after_all_have_ended(tmp_path: Path) -> None:
    io = FaultyIO()
    file = SwapFile(tmp_path, 8 * SMALL, threads=4, block_bytes=SMALL, reserve_bytes=0, io=io)
    running = 0
    lock = threading.Lock()

    def fault(call: str, offset: int, num_bytes: int) -> None:
        nonlocal running
        with lock:
            running += 1
        time.sleep(0.01 if offset > SMALL else 0)
        with lock:
            running -= 1
        raise OSError(errno.EIO, "bad disk")

    io.fault = fault
    with pytest.raises(SwapError, match=rf"at offset {HEADER_BYTES}:"):
        file.write(0, noise(8 * SMALL)).wait()
    assert running == 0
    file.close()


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_deleted_file_is_noticed(opened: Callable[..., SwapFile], verb: str) -> None:
    file = opened(SMALL)
    file.write(0, noise(SMALL)).wait()
    file.path.unlink()
    with pytest.raises(SwapError, match="expected the file to be there, got No such file") as caught:
        getattr(file, verb)(0, aligned(SMALL)).wait()
    assert caught.value.errno == errno.ENOENT and str(file.path) in str(caught.value)


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_replaced_file_is_noticed_and_not_removed(opened: Callable[..., SwapFile], verb: str) -> None:
    file = opened(SMALL)
    content = file.path.read_bytes()
    file.path.rename(file.path.with_suffix(".old"))
    file.path.write_bytes(content)
    with pytest.raises(SwapError, match="got another one in its place") as caught:
        getattr(file, verb)(0, aligned(SMALL)).wait()
    assert caught.value.errno == errno.ESTALE
    file.close()
    assert file.path.exists()


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_file_that_was_cut_off_is_noticed(opened: Callable[..., SwapFile], verb: str) -> None:
    file = opened(3 * SMALL)
    os.truncate(file.path, SMALL)
    with pytest.raises(
        SwapError, match=rf"at offset {SMALL}: expected {3 * SMALL + HEADER_BYTES} bytes, got a file of"
    ):
        getattr(file, verb)(0, aligned(SMALL)).wait()


def test_a_file_that_is_cut_off_under_way_is_noticed(tmp_path: Path, direct: bool) -> None:
    io = FaultyIO()
    file = SwapFile(tmp_path, 4 * SMALL, block_bytes=SMALL, direct=direct, threads=1, reserve_bytes=0, io=io)
    file.read(0, aligned(1)).wait()

    def cut_off(call: str, offset: int, num_bytes: int) -> None:
        os.truncate(file.path, 2 * SMALL)

    io.fault = cut_off
    with pytest.raises(SwapError, match=rf"at offset {2 * SMALL}: expected to read {SMALL} bytes, got 0"):
        file.read(0, aligned(4 * SMALL)).wait()
    file.close()


def test_a_foreign_header_is_noticed_at_the_first_read_and_by_verify(opened: Callable[..., SwapFile]) -> None:
    file = opened(SMALL)
    file.verify()
    header = file.path.read_bytes()[:HEADER_BYTES]
    other = opened(SMALL)
    with open(other.path, "r+b") as handle:
        handle.write(header)
    for fails in (lambda: other.read(0, aligned(9)).wait(), other.verify):
        with pytest.raises(SwapError, match="expected the header of this session") as caught:
            fails()
        assert caught.value.errno == errno.EBADMSG
    file.verify()


# Making one -----------------------------------------------------------------------------------------------------------


def test_too_little_space_is_an_error_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        SwapError, match=r"expected 1048576\.00 GiB and 1\.00 GiB in reserve, got .* GiB free"
    ) as caught:
        SwapFile(tmp_path / "swap", 1 << 50)
    assert caught.value.errno == errno.ENOSPC and str(tmp_path / "swap") in str(caught.value)
    assert not list((tmp_path / "swap").iterdir())


def test_a_reserve_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SwapError, match="in reserve"):
        SwapFile(tmp_path, 1, reserve_bytes=1 << 50)


@pytest.mark.parametrize("call, code", [("fallocate", errno.ENOSPC), ("pwritev", errno.EIO)])
def test_a_file_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path, direct: bool, call: str, code: int) -> None:
    io = FaultyIO()
    io.fault = raising(code, call, from_offset=0)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SwapError, match="Fix: ") as caught:
        SwapFile(tmp_path, SMALL, direct=direct, reserve_bytes=0, io=io)
    assert caught.value.errno == code and str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SwapError, match=r"expected to make .*taken/deeper"):
        SwapFile(tmp_path / "taken" / "deeper", 1)


class NoDirectIO(FaultyIO):
    """A file system that opens files with O_DIRECT, and refuses to move a byte."""

    def _do(self, call: str, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super()._do(call, descriptor, buffers, offset)


def test_without_o_direct_it_goes_through_the_page_cache_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lorica"):
        file = SwapFile(tmp_path, SMALL, reserve_bytes=0, io=NoDirectIO())
    assert not file.direct and "no O_DIRECT there" in caplog.text and len(caplog.records) == 1
    content, out = noise(SMALL), aligned(SMALL)
    file.write(0, content).wait()
    file.read(0, out).wait()
    assert torch.equal(out, content) and list(tmp_path.iterdir()) == [file.path]
    file.close()


def test_o_direct_that_is_asked_for_and_refused_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SwapError, match="refuses O_DIRECT"):
        SwapFile(tmp_path, SMALL, direct=True, reserve_bytes=0, io=NoDirectIO())
    assert not list(tmp_path.iterdir())


def test_a_block_must_be_whole_sectors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"multiple of {ALIGNMENT}"):
        SwapFile(tmp_path, 1, block_bytes=ALIGNMENT + 1)


# The end --------------------------------------------------------------------------------------------------------------


def test_close_waits_for_transfers_then_ends_threads_and_removes_the_file(tmp_path: Path) -> None:
    io = FaultyIO()
    file = SwapFile(tmp_path / "new", 3 * SMALL, rank=5, threads=3, block_bytes=SMALL, reserve_bytes=0, io=io)
    assert f"-{os.getpid()}-rank5-" in file.path.name
    io.fault = lambda call, offset, num_bytes: time.sleep(0.01)
    transfer = file.write(0, noise(3 * SMALL))
    assert any(thread.name.startswith("lorica-swap-rank5") for thread in threading.enumerate())
    file.close()
    assert transfer.done()
    transfer.wait()
    assert not any(thread.name.startswith("lorica-swap-rank5") for thread in threading.enumerate())
    assert not list((tmp_path / "new").iterdir())
    file.close()
    with pytest.raises(RuntimeError, match="is closed"):
        file.read(0, aligned(1))


def test_a_forgotten_file_goes_when_it_is_collected(tmp_path: Path) -> None:
    file = SwapFile(tmp_path, SMALL, rank=6, reserve_bytes=0)
    file.write(0, noise(SMALL))  # nobody waits
    del file
    deadline = time.monotonic() + 10
    while (list(tmp_path.iterdir()) or named_threads("rank6")) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not list(tmp_path.iterdir()) and not named_threads("rank6")


def named_threads(part: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if part in thread.name]


def test_a_hundred_files_leak_no_descriptor_and_no_thread(tmp_path: Path, direct: bool) -> None:
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(100):
        file = SwapFile(tmp_path, ALIGNMENT, threads=2, direct=direct, reserve_bytes=0)
        file.write(0, b"x").wait()
        file.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors and threading.active_count() == threads
    assert not list(tmp_path.iterdir())


OWNER = """
import os, signal, sys
from lorica.tier import SwapFile
file = SwapFile(sys.argv[1], 1 << 20, reserve_bytes=0)
file.write(0, b"x" * 5000).wait()
if sys.argv[2] == "fork":
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0 and file.path.exists()
    else:
        sys.exit(0)
print(file.path, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "raises":
    raise RuntimeError
"""


def owner(folder: Path, end: str) -> Path:
    """The file of a process that came to its `end`."""
    done = subprocess.run([sys.executable, "-c", OWNER, str(folder), end], capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (end in ("returns", "fork")), done.stderr
    return Path(done.stdout.strip())


@pytest.mark.parametrize("end", ["returns", "raises", "fork"])
def test_a_process_that_ends_takes_its_file_with_it_and_its_forked_child_does_not(tmp_path: Path, end: str) -> None:
    assert owner(tmp_path, end).parent == tmp_path and not list(tmp_path.iterdir())


def test_the_file_of_a_killed_process_goes_with_the_next_one_and_files_in_use_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = SwapFile(tmp_path, SMALL, reserve_bytes=0)
    left = owner(tmp_path, "killed")
    (tmp_path / "notes.bin").write_text("not ours")
    assert left.exists()
    with caplog.at_level(logging.WARNING, logger="lorica"):
        other = SwapFile(tmp_path, SMALL, reserve_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {mine.path.name, other.path.name, "notes.bin"}
    assert str(left) in caplog.text and "has left" in caplog.text
    mine.close(), other.close()


# Bandwidth ------------------------------------------------------------------------------------------------------------


def test_measure_gives_positive_figures_in_bounded_time_and_leaves_nothing(tmp_path: Path) -> None:
    begin = time.perf_counter()
    found = measure(tmp_path / "disk", num_bytes=32 << 20, seconds=0.1, threads=2)
    assert found.read > 0 and found.write > 0 and found.direct == supports_direct(tmp_path)
    assert time.perf_counter() - begin < 10 and not list((tmp_path / "disk").iterdir())


def test_measure_of_a_full_disk_is_the_error_of_a_swap_file(tmp_path: Path) -> None:
    with pytest.raises(SwapError, match="No space"):
        measure(tmp_path, num_bytes=1 << 50)


def test_the_folder_may_be_deleted_at_the_end(tmp_path: Path) -> None:
    file = SwapFile(tmp_path / "gone", SMALL, reserve_bytes=0)
    file.path.unlink()
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "gone").rmdir()
    file.close()
    assert not (tmp_path / "gone").exists()
