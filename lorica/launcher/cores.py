"""How many CPU cores a job may use, and which rank gets which. Binds nothing: the rank itself does (bootstrap)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorica.launcher.flags import LaunchError

Core = tuple[int, ...]  # the CPUs (hardware threads) of one physical core


class Share(NamedTuple):
    """What one rank gets: CPUs to be bound to (None: not bound) and a number of OpenMP threads."""

    cpus: tuple[int, ...] | None
    num_threads: int


def allowed_cpus() -> tuple[int, ...]:
    """The CPUs that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def physical_cores(cpus: Sequence[int], topology: Path = Path("/sys/devices/system/cpu")) -> tuple[Core, ...]:
    """Group `cpus` by physical core, neighbours (same socket) side by side; one CPU each where that is not known."""
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in cpus:
        folder = topology / f"cpu{cpu}" / "topology"
        try:
            place = tuple(int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            place = (0, cpu)
        cores.setdefault(place, []).append(cpu)
    return tuple(tuple(cores[place]) for place in sorted(cores))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs' worth of time that the control groups of this process allow; infinite if they set no limit."""
    quota = float("inf")
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return quota
    own = next((line.split("::", 1)[1] for line in lines if line.startswith("0::")), "/")
    folder = root / own.lstrip("/")
    for level in (folder, *folder.parents):
        try:
            limit, period = (level / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if limit != "max":
            quota = min(quota, int(limit) / int(period))
    return quota


def num_cores() -> int:
    """Physical cores that this process may keep busy: affinity and control groups allowed for."""
    return max(1, int(min(len(physical_cores(allowed_cpus())), cpu_quota())))


def parse_core_list(text: str) -> tuple[int, ...]:
    """`0-3,8` -> (0, 1, 2, 3, 8).

    Raises:
        LaunchError: if the text is no such list, or names a CPU twice.
    """
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise LaunchError(f"--bind_core_list={text}: expected numbers and ranges, got {part!r}. Fix: write 0-3,8.")
        cpus += range(int(first), int(last or first) + 1)
    if len(set(cpus)) < len(cpus):
        raise LaunchError(f"--bind_core_list={text} names a CPU twice. Fix: name each once.")
    return tuple(cpus)


def share_cores(num_procs: int, *, bind: bool, core_list: str) -> tuple[Share, ...]:
    """Give each of `num_procs` ranks the same number of cores; bound to them if `bind` or a list is given.

    Raises:
        LaunchError: if cores are to be bound and there are fewer than ranks, or a listed CPU may not be used.
    """
    if not bind and not core_list:
        return (Share(None, max(1, num_cores() // num_procs)),) * num_procs
    allowed = allowed_cpus()
    cores = tuple((cpu,) for cpu in parse_core_list(core_list)) if core_list else physical_cores(allowed)
    missing = [cpu for core in cores for cpu in core if cpu not in allowed]
    if missing:
        raise LaunchError(
            f"--bind_core_list={core_list}: this job may not use CPU {missing[0]}. Fix: one of {allowed}."
        )
    each = len(cores) // num_procs
    if each == 0:
        raise LaunchError(
            f"binding cores to ranks needs a core per rank: expected at least {num_procs} cores, got {len(cores)}. "
            "Fix: start fewer processes, or do not bind."
        )
    groups = [cores[rank * each : (rank + 1) * each] for rank in range(num_procs)]
    return tuple(Share(tuple(cpu for core in group for cpu in core), each) for group in groups)
