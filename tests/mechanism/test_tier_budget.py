"""What a machine has left, from the files in which Linux says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lorica.tier import device_available_bytes, disk_available_bytes, host_available_bytes

GIB = 1 << 30


def machine(root: Path, cgroup: str | None = None, **files: object) -> Path:
    """A root with 64 GiB available and these files below /sys/fs/cgroup (a "/" is written as two underscores)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999999 kB\nMemAvailable:   {64 << 20} kB\nHugePages: 0\n")
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_without_control_groups_it_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert host_available_bytes(root=machine(tmp_path)) == 64 * GIB


def test_it_is_divided_by_the_ranks_of_the_host(tmp_path: Path) -> None:
    assert host_available_bytes(local_ranks=4, root=machine(tmp_path)) == 16 * GIB


@pytest.mark.parametrize("group", ["/", "/user/job"])
def test_a_limit_of_version_2_counts_less_its_usage_plus_idle_cache(tmp_path: Path, group: str) -> None:
    at = "" if group == "/" else "user__job__"
    files: dict[str, object] = {
        f"{at}memoryDOTmax": 10 * GIB,
        f"{at}memoryDOTcurrent": 4 * GIB,
        f"{at}memoryDOTstat": f"anon 1\ninactive_file {GIB}\nactive_file {GIB}",
    }
    assert host_available_bytes(root=machine(tmp_path, f"0::{group}\n", **files)) == 7 * GIB


def test_the_tightest_limit_above_counts(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "user__job__memoryDOTmax": "max",
        "user__job__memoryDOTcurrent": 1 * GIB,
        "user__memoryDOTmax": 8 * GIB,
        "user__memoryDOTcurrent": 5 * GIB,
    }
    assert host_available_bytes(root=machine(tmp_path, "0::/user/job\n", **files)) == 3 * GIB


def test_a_limit_of_version_1_counts(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "memory__job__memoryDOTlimit_in_bytes": 20 * GIB,
        "memory__job__memoryDOTusage_in_bytes": 12 * GIB,
        "memory__job__memoryDOTstat": f"inactive_file 5\ntotal_inactive_file {2 * GIB}",
        "memory__memoryDOTlimit_in_bytes": 9223372036854771712,
        "memory__memoryDOTusage_in_bytes": 60 * GIB,
    }
    groups = "12:cpu,cpuacct:/job\n7:memory:/job\n0::/job\n"
    assert host_available_bytes(root=machine(tmp_path, groups, **files)) == 10 * GIB


def test_inside_a_container_the_path_of_the_host_leads_to_the_mounts_root(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "memory__memoryDOTlimit_in_bytes": 6 * GIB,
        "memory__memoryDOTusage_in_bytes": 1 * GIB,
    }
    assert host_available_bytes(root=machine(tmp_path, "7:memory:/docker/0123\n", **files)) == 5 * GIB


@pytest.mark.parametrize("used", [10 * GIB, 11 * GIB])
def test_a_group_at_its_limit_has_nothing_left(tmp_path: Path, used: int) -> None:
    files: dict[str, object] = {"memoryDOTmax": 10 * GIB, "memoryDOTcurrent": used}
    assert host_available_bytes(root=machine(tmp_path, "0::/\n", **files)) == 0


def test_a_system_that_does_not_say_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"MemAvailable in .*proc/meminfo.*Fix: give the host budget"):
        host_available_bytes(root=tmp_path)


def test_this_machine_has_something_left() -> None:
    assert 1 << 20 < host_available_bytes() < 1 << 60


def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_its_parent(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert abs(disk_available_bytes(tmp_path / "a" / "b") - free) < GIB
    assert abs(disk_available_bytes(str(tmp_path), local_ranks=2) - free // 2) < GIB


def test_the_memory_of_a_cpu_is_the_hosts() -> None:
    with pytest.raises(ValueError, match="expected a CUDA device, got cpu"):
        device_available_bytes(torch.device("cpu"))
