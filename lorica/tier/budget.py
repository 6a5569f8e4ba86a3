"""What memory this machine has left: host, disk, device. Figures only: who gets it is the plan's business."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

_UNLIMITED = 1 << 60  # version 1 of control groups writes "no limit" as a number near 2**63


def host_available_bytes(*, local_ranks: int = 1, root: Path = Path("/")) -> int:
    """Host memory that this process may still use, its share of what is left to `local_ranks` processes alike.

    The smallest of what the kernel deems available without swapping, and of what the memory limits of control groups
    leave (version 1 or 2, this process's own and all above it). There, file cache not used lately counts as free.

    Args:
        local_ranks: processes on this host that ask at the same time.
        root: where /proc and /sys are.
    Raises:
        OSError: if the system does not say (no Linux).
    """
    limits = [_meminfo_available(root), *_control_group_available(root)]
    return max(0, min(limits)) // local_ranks


def disk_available_bytes(folder: str | Path, *, local_ranks: int = 1) -> int:
    """Bytes free to this user on the disk of `folder` (which need not be there yet), divided as in host memory."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free // local_ranks


def device_available_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that is free or that PyTorch holds without using it.

    Raises:
        ValueError: for any other device: the CPU's memory is the host's.
    """
    if device.type != "cuda":
        raise ValueError(f"Free device memory: expected a CUDA device, got {device}. Fix: host_available_bytes().")
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _meminfo_available(root: Path) -> int:
    path = root / "proc/meminfo"
    try:
        fields = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError) as error:
        raise OSError(
            f"Free host memory is not known: expected MemAvailable in {path}, got {error!r}. Fix: give the host budget "
            "in the configuration."
        ) from error


def _control_group_available(root: Path) -> Iterator[int]:
    """What each memory limit above this process leaves."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # a kernel without control groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left(root / "sys/fs/cgroup/memory", path, *names)


def _left(mount: Path, path: str, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    """What the limits of the group at `path` and of those above it leave.

    Inside a container `path` may be as the host sees it, and not be there: the mount's root is this group then.
    """
    group = mount / path.lstrip("/")
    for place in [group, *group.parents]:
        if (place / limit_name).is_file() and (place / usage_name).is_file():
            limit = (place / limit_name).read_text(encoding="utf-8").strip()
            if limit != "max" and int(limit) < _UNLIMITED:
                usage = int((place / usage_name).read_text(encoding="utf-8"))
                yield int(limit) - usage + _stat(place / "memory.stat", cache_name)
        if place == mount:
            return


def _stat(path: Path, name: str) -> int:
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
