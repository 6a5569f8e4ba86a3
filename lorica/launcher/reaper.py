"""Finds and ends every process of one job, and none that is not. Knows nothing about ranks.

Run as a file, `python reaper.py JOB_ID FOLDER`, it is the watcher beside the launcher: its standard input is a pipe
whose other end only the launcher holds. When that closes without a word the launcher was killed, and the watcher ends
the job in its place. The kernel kills the ranks too (bootstrap.die_with_launcher), but not what the ranks have started.

A process belongs to the job if the environment that it was started with carries the job's id, or if it is in the
session of a rank that the launcher still holds. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable

JOB_ID = "LORICA_JOB_ID"  # ids joined by "/": a job started inside a job belongs to both
GONE_S = 2.0
_SCAN_S = 0.01


def job_processes(job_id: str, sessions: Iterable[int] = ()) -> list[int]:
    """The running processes of the job, without this one (Linux; elsewhere the leaders of `sessions`)."""
    leaders = set(sessions)
    if not os.path.isdir("/proc/self"):
        return [pid for pid in leaders if _exists(pid)]
    own = os.getpid()
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if pid != own and _belongs(pid, job_id, leaders)]


def end_processes(job_id: str, sessions: Iterable[int] = ()) -> list[int]:
    """Kill every process of the job and those that they start meanwhile; return what is left after two seconds."""
    leaders = tuple(sessions)
    deadline = time.monotonic() + GONE_S
    while True:
        for leader in leaders:
            _signal_group(leader, signal.SIGKILL)
        left = job_processes(job_id, leaders)
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            _kill(pid, job_id, set(leaders))
        time.sleep(_SCAN_S)


def _belongs(pid: int, job_id: str, leaders: set[int]) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, _, _, session = file.read().rpartition(b")")[2].split()[:4]
        if state in (b"Z", b"X"):
            return False
        if int(session) in leaders:
            return True
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:  # gone meanwhile, or another user's
        return False
    prefix = f"{JOB_ID}=".encode()
    return any(entry.startswith(prefix) and job_id.encode() in entry[len(prefix) :].split(b"/") for entry in variables)


def _kill(pid: int, job_id: str, leaders: set[int]) -> None:
    """Kill `pid`, by a descriptor where the kernel has them, asking again first: it may be somebody else's by now."""
    try:
        descriptor = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except OSError as error:
        if error.errno != errno.ENOSYS:
            return
        descriptor = None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not _belongs(pid, job_id, leaders):
            pass
        elif descriptor is None:
            os.kill(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    if descriptor is not None:
        os.close(descriptor)


def _signal_group(leader: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signum)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def watch(job_id: str, folder: str) -> None:
    """Wait for the launcher's end. It writes "PID" for a rank started, "-PID" for one seen to end, "done" at last."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    leaders: set[int] = set()
    with os.fdopen(0, "r", encoding="ascii") as lines:
        for line in lines:
            word = line.strip()
            if word == "done":
                return
            if word.startswith("-"):
                leaders.discard(int(word[1:]))
            else:
                leaders.add(int(word))
    end_processes(job_id, leaders)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2])
