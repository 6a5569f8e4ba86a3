"""The host arena: where planes lie, what they contain, when memory comes and goes, what is page-locked."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorica.tier.arena as arena_file
from lorica.tier import ALIGNMENT, Arena, HostTier, PageLock, TierFull, padded_bytes

MIB = 1 << 20
DTYPES = [torch.float32, torch.bfloat16, torch.int16, torch.int64, torch.uint8, torch.bool]


class Ledger:
    """Page locks as a table: what is registered, and whether a rule of CUDA was broken."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def register(self, address: int, num_bytes: int) -> None:
        with self._lock:
            assert address % ALIGNMENT == 0 and num_bytes % ALIGNMENT == 0 and num_bytes > 0
            for start, length in self.locked.items():
                assert address + num_bytes <= start or start + length <= address, "registered twice"
            self.locked[address] = num_bytes
            self.threads.add(threading.current_thread().name)

    def unregister(self, address: int) -> None:
        with self._lock:
            del self.locked[address]

    def covers(self, plane: Tensor) -> bool:
        """Whether one registration holds all of `plane`."""
        begin, end = plane.data_ptr(), plane.data_ptr() + plane.numel() * plane.element_size()
        return any(start <= begin and end <= start + length for start, length in self.locked.items())

    def page_lock(self) -> PageLock:
        return PageLock(self.register, self.unregister)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


planes_of = st.lists(st.tuples(st.integers(0, 200_000), st.sampled_from(DTYPES)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(
    sizes=planes_of, late=planes_of, piece_bytes=st.sampled_from([1, 300_000, MIB, 1 << 30]), threads=st.integers(1, 3)
)
def test_planes_are_aligned_zero_exact_disjoint_and_each_within_one_registration(
    sizes: list[tuple[int, torch.dtype]], late: list[tuple[int, torch.dtype]], piece_bytes: int, threads: int
) -> None:
    ledger = Ledger()
    need = sum(padded_bytes(numel * dtype.itemsize) for numel, dtype in sizes + late)
    arena = Arena(need, page_lock=ledger.page_lock(), threads=threads, piece_bytes=piece_bytes)
    planes = [arena.alloc(numel, dtype) for numel, dtype in sizes]
    assert not ledger.locked
    committed = arena.commit()
    assert committed.num_bytes == sum(ledger.locked.values()) and 0 <= committed.prefault_s <= committed.seconds
    planes += [arena.alloc(numel, dtype) for numel, dtype in late]
    assert arena.free_bytes == 0
    for number, (plane, (numel, dtype)) in enumerate(zip(planes, sizes + late, strict=True)):
        assert plane.dtype == dtype and plane.shape == (numel,) and plane.data_ptr() % ALIGNMENT == 0
        assert plane.untyped_storage().nbytes() == numel * dtype.itemsize
        assert not plane.view(torch.uint8).any()
        assert not numel or ledger.covers(plane)
        plane.view(torch.uint8).fill_(number + 1)
    for number, plane in enumerate(planes):
        assert bool((plane.view(torch.uint8) == number + 1).all()) or plane.dtype == torch.bool
    arena.close()
    assert not any(plane.numel() for plane in planes) or ledger.locked
    del arena, planes, plane
    assert not ledger.locked


def test_a_registration_ends_where_a_plane_ends_and_is_as_large_as_asked() -> None:
    ledger = Ledger()
    arena = Arena(10 * MIB, page_lock=ledger.page_lock(), threads=2, piece_bytes=2 * MIB)
    planes = [arena.alloc(MIB // 2 + 5, torch.int16) for _ in range(7)]
    arena.commit()
    assert sorted(ledger.locked.values()) == [padded_bytes(MIB + 10), *[2 * padded_bytes(MIB + 10)] * 3]
    assert all(ledger.covers(plane) for plane in planes)


def test_several_threads_touch_and_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_file, "_PREFAULT_BYTES", MIB)
    touching: set[str] = set()
    both = threading.Barrier(2, timeout=10)
    populate = arena_file._populate

    def seen(address: int, num_bytes: int) -> bool:
        touching.add(threading.current_thread().name)
        both.wait()  # breaks unless two threads are here at once
        return populate(address, num_bytes)

    monkeypatch.setattr(arena_file, "_populate", seen)
    ledger = Ledger()
    arena = Arena(8 * MIB, page_lock=ledger.page_lock(), threads=2, piece_bytes=MIB)
    planes = [arena.alloc(MIB, torch.uint8) for _ in range(8)]
    arena.commit()
    assert len(touching) == 2 and len(planes) == len(ledger.locked) == 8


@pytest.mark.parametrize("kernel_populates", [True, False])
def test_commit_makes_pages_resident_and_leaves_contents(
    kernel_populates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_populates:
        monkeypatch.setattr(arena_file, "_populate", lambda address, num_bytes: False)
    arena = Arena(64 * MIB, threads=2)
    before = resident_bytes()
    plane = arena.alloc(64 * MIB, torch.uint8)
    plane[::MIB] = 7
    arena.commit()
    assert resident_bytes() - before > 60 * MIB
    assert int(plane.sum()) == 64 * 7


def test_room_that_is_not_allocated_costs_no_memory() -> None:
    before = resident_bytes()
    arena = Arena(256 * MIB, threads=1)
    plane = arena.alloc(10, torch.float32)
    arena.commit()
    assert resident_bytes() - before < 16 * MIB and plane.numel() == 10


def test_memory_goes_back_when_the_last_plane_goes_and_not_before() -> None:
    gc.collect()
    arena = Arena(64 * MIB, threads=2)
    first, second = arena.alloc(32 * MIB, torch.uint8), arena.alloc(16 * MIB, torch.int16)
    arena.commit()
    first.fill_(1), second.fill_(2)
    full = resident_bytes()
    arena.close()
    arena.close()
    del arena, first
    view = second[5:9]
    del second
    gc.collect()
    assert view.tolist() == [2] * 4 and full - resident_bytes() < 16 * MIB
    del view
    assert full - resident_bytes() > 60 * MIB


def test_close_of_an_arena_without_planes_gives_everything_back() -> None:
    ledger = Ledger()
    arena = Arena(64 * MIB, page_lock=ledger.page_lock(), threads=2)
    plane = arena.alloc(64 * MIB, torch.uint8)
    arena.commit()
    del plane
    full = resident_bytes()
    assert ledger.locked
    arena.close()
    assert not ledger.locked and full - resident_bytes() > 60 * MIB


def test_a_full_arena_says_what_was_asked_and_what_is_free() -> None:
    arena = Arena(3 * ALIGNMENT)
    arena.alloc(1, torch.uint8)
    with pytest.raises(TierFull, match=rf"room for {4 * ALIGNMENT} .*{2 * ALIGNMENT} of {3 * ALIGNMENT} bytes free"):
        arena.alloc(ALIGNMENT, torch.float32)
    assert arena.alloc(2 * ALIGNMENT, torch.uint8).numel() == 2 * ALIGNMENT


def test_a_closed_arena_refuses() -> None:
    arena = Arena(ALIGNMENT)
    arena.close()
    with pytest.raises(RuntimeError, match="arena is closed"):
        arena.alloc(1, torch.uint8)
    with pytest.raises(RuntimeError, match="arena is closed"):
        arena.commit()


def test_an_arena_beyond_the_address_space_says_how_much_was_asked() -> None:
    with pytest.raises(TierFull, match=r"expected 1073741824\.00 GiB of address space"):
        Arena(1 << 60)


def test_a_refused_page_lock_reaches_the_caller_and_what_was_locked_is_unlocked() -> None:
    ledger = Ledger()

    def register(address: int, num_bytes: int) -> None:
        if len(ledger.locked) == 2:
            raise RuntimeError("error 2. Fix: raise `ulimit -l`")
        ledger.register(address, num_bytes)

    arena = Arena(4 * ALIGNMENT, page_lock=PageLock(register, ledger.unregister), threads=1, piece_bytes=1)
    planes = [arena.alloc(1, torch.uint8) for _ in range(4)]
    with pytest.raises(RuntimeError, match="ulimit -l"):
        arena.commit()
    assert len(ledger.locked) == 2
    del planes, arena
    gc.collect()  # the error and its traceback are a cycle
    assert not ledger.locked


def test_locked_memory_is_not_copied_to_forked_children() -> None:
    arena = Arena(MIB, page_lock=Ledger().page_lock())
    address = arena.alloc(1, torch.uint8).data_ptr()
    flags = ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "VmFlags:":
            flags = line
    assert " dc" in flags


def test_an_interpreter_that_ends_with_a_living_arena_ends_cleanly() -> None:
    code = (
        "import torch; from lorica.tier import Arena\n"
        "arena = Arena(1 << 20); plane = arena.alloc(1000, torch.float32); arena.commit(); plane.fill_(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr


# The host tier --------------------------------------------------------------------------------------------------------


def test_the_host_tier_cuts_planes_from_its_arena() -> None:
    arena = Arena(4 * ALIGNMENT)
    tier = HostTier(torch.device("cpu"), pin_memory=True, arena=arena)
    plane = tier.alloc(3, torch.bfloat16)
    assert plane.data_ptr() % ALIGNMENT == 0 and arena.free_bytes == 3 * ALIGNMENT
    own = tier.alloc(4 * ALIGNMENT, torch.uint8)  # no room: memory of its own
    assert own.numel() == 4 * ALIGNMENT and arena.free_bytes == 3 * ALIGNMENT


def test_the_host_tier_locks_a_plane_of_its_own_as_long_as_it_lives() -> None:
    ledger = Ledger()
    tier = HostTier(torch.device("cuda"), pin_memory=True, page_lock=ledger.page_lock())
    plane = tier.alloc(5000, torch.float32)
    assert not plane.any() and list(ledger.locked.values()) == [padded_bytes(20_000)]
    assert ledger.covers(plane)
    del plane
    assert not ledger.locked


@pytest.mark.parametrize("compute_device, pin", [("cpu", True), ("cuda", False)])
def test_the_host_tier_locks_nothing_that_need_not_be(compute_device: str, pin: bool) -> None:
    ledger = Ledger()
    plane = HostTier(torch.device(compute_device), pin_memory=pin, page_lock=ledger.page_lock()).alloc(9, torch.int16)
    assert plane.tolist() == [0] * 9 and not ledger.locked
