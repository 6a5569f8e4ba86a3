"""Host memory, seen from outside a job and from inside: what is left, what a job takes; ends one that takes too much.

A job that the kernel kills may take its neighbours with it, so that the benchmark ends it before.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_rounds import family
from lorica.tier.budget import host_available_bytes

GIB = 2**30
LEAST_LEFT_BYTES = 3 * GIB
LOOKS_PER_COUNT = 10  # the processes of a job are counted at every tenth look
ELASTIC_GROWTH_S = 10.0  # a machine that grows with use has this long to do so


def kib_lines(path: Path) -> dict[str, int]:
    """The lines `name: number kB` of a file under /proc, in bytes; empty where the process has ended."""
    try:
        text = path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if line.endswith("kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def left_bytes() -> int:
    """Host memory that is still to be had."""
    return host_available_bytes()


def total_bytes() -> int:
    """Host memory of the machine, as it says at present."""
    return kib_lines(Path("/proc/meminfo"))["MemTotal"]


def family_rss_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; pages that they share count once (as of the largest)."""
    private, shared = 0, 0
    for member in family(pid):
        lines = kib_lines(Path(f"/proc/{member}/status"))
        private += lines.get("RssAnon", lines.get("VmRSS", 0))
        shared = max(shared, lines.get("RssFile", 0) + lines.get("RssShmem", 0))
    return private + shared


class HostWatch:
    """Watches a job from outside; ends it when the machine has less than LEAST_LEFT_BYTES left.

    Args:
        host_bytes: memory that the machine will have once all of it is in use; some virtual machines show less of it
            until then, and nothing is ended before they have shown it or stopped growing.
    """

    def __init__(self, host_bytes: int) -> None:
        self.host_bytes = host_bytes
        self.left_at_start = self.least_left = left_bytes()
        self.total_at_start = self.total = total_bytes()
        self.most_rss = self.most_used = 0
        self._looks = 0
        self._grew = time.monotonic()

    def look(self, pid: int) -> str | None:
        """See gpu_rounds.Watch."""
        left, total = left_bytes(), total_bytes()
        if total > self.total:
            self.total, self._grew = total, time.monotonic()
        used = self.left_at_start + (total - self.total_at_start) - left
        self.least_left, self.most_used = min(self.least_left, left), max(self.most_used, used)
        if self._looks % LOOKS_PER_COUNT == 0:
            self.most_rss = max(self.most_rss, family_rss_bytes(pid))
        self._looks += 1
        may_grow = total < self.host_bytes - GIB and time.monotonic() - self._grew < ELASTIC_GROWTH_S
        if left < LEAST_LEFT_BYTES and not may_grow:
            return f"out of host memory at {used / GIB:.1f} GiB ({total / GIB:.1f} GiB in the machine)"
        return None

    def seen(self) -> dict[str, Any]:
        """See gpu_rounds.Watch."""
        return {
            "host_watch": {
                "most_rss_bytes": self.most_rss,
                "most_used_bytes": self.most_used,
                "left_at_start_bytes": self.left_at_start,
                "least_left_bytes": self.least_left,
            }
        }


def wait_for_memory(least_bytes: int, limit_s: float = 30.0) -> None:
    """Wait until the memory of a job that was ended is free again, or `limit_s` are over."""
    end = time.monotonic() + limit_s
    while left_bytes() < least_bytes and time.monotonic() < end:
        time.sleep(0.2)


# From inside ----------------------------------------------------------------------------------------------------------


def own_rss_bytes() -> int:
    """Resident memory of this process now, pinned memory included."""
    return kib_lines(Path("/proc/self/status"))["VmRSS"]


def own_peak_bytes() -> int:
    """The most resident memory that this process has had so far."""
    highest = kib_lines(Path("/proc/self/status")).get("VmHWM", 0)
    return max(highest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def lift_memlock() -> None:
    """Let this process, and the jobs that it starts, lock as much memory as they are allowed to."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, PermissionError):  # not for this user
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
