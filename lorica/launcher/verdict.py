"""Which rank failed first, and why, in words. Reads reports and exit codes; ends nothing."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN_CHARS = 240
LOG_LINES = 20


@dataclass(frozen=True)
class Failure:
    """How one rank failed. `monotonic` is the machine's clock; `secondary`: perhaps only because another one did."""

    rank: int
    pid: int
    monotonic: float
    reason: str
    exit_code: int
    secondary: bool
    where: str = ""
    traceback: str = ""
    hint: str = ""


def read_report(path: Path) -> Failure | None:
    """Read what a rank wrote about its uncaught exception; None if it wrote nothing."""
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    kind, message = report["type"], one_line(report["message"])
    return Failure(
        rank=report["rank"],
        pid=report["pid"],
        monotonic=report["monotonic"],
        reason=f"sys.exit({message})" if kind == "SystemExit" else f"{kind}: {message}".removesuffix(": "),
        exit_code=report["exit_code"],
        secondary=report["lost_peer"],
        where=report["where"],
        traceback=report["traceback"],
    )


def read_exit(rank: int, pid: int, code: int, monotonic: float) -> Failure:
    """Describe the end of a process that left no report. `code` is Popen's: -n for signal n."""
    if code >= 0:
        reason = "it ended without an exception, by os._exit or in native code"
        return Failure(rank, pid, monotonic, reason, code, secondary=False)
    name = signal_name(-code)
    # An abort may be the answer of a communication library's own thread to the end of another rank.
    return Failure(
        rank,
        pid,
        monotonic,
        f"killed by {name}",
        128 - code,
        secondary=-code == signal.SIGABRT,
        hint=_HINTS.get(-code, ""),
    )


_HINTS: dict[int, str] = {
    signal.SIGKILL: "if nobody killed it, the kernel did for want of memory: see dmesg or the container's memory limit",
    signal.SIGSEGV: "a crash in native code; where Python was is printed above",
    signal.SIGBUS: "often a full /dev/shm; a crash in native code",
    signal.SIGILL: "native code for another CPU; lorica report shows what this one can do",
}


def signal_name(number: int) -> str:
    """`9` -> `SIGKILL (signal 9)`."""
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def culprit(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from: the earliest one that is not a mere loss of a peer."""
    return min(failures, key=lambda failure: (failure.secondary, failure.monotonic))


def one_line(text: str) -> str:
    """`text` in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else line[: SHOWN_CHARS - 3] + "..."


def describe(failure: Failure, *, seconds: float, num_stopped: int, finished: tuple[int, ...], log: Path | None) -> str:
    """The launcher's last words, several lines; the last one says which rank failed, its exit code, and why."""
    lines = []
    if failure.secondary and failure.traceback:
        lines.append(
            f"rank {failure.rank} lost another rank, and none has reported a reason:\n{failure.traceback.rstrip()}"
        )
    if failure.secondary and finished:
        ended = ", ".join(map(str, finished))
        lines.append(f"rank {ended} had finished with exit code 0 before; do all ranks take the same number of steps?")
    if log is not None:
        lines.append(f"the last lines of {log}:\n{_tail(log)}")
    if failure.hint:
        lines.append(f"{failure.reason}: {failure.hint}")
    if num_stopped:
        lines.append(f"{num_stopped} other {'rank was' if num_stopped == 1 else 'ranks were'} stopped")
    place = f", at {failure.where}" if failure.where else ""
    who = f"rank {failure.rank} (local rank {failure.rank}, host {socket.gethostname()}, pid {failure.pid})"
    lines.append(f"{who} failed after {seconds:.1f} s with exit code {failure.exit_code}: {failure.reason}{place}")
    return "\n".join(f"lorica: {line}" for line in lines)


def _tail(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 16384))
        lines = file.read().decode(errors="backslashreplace").splitlines()[-LOG_LINES:]
    return "\n".join(f"  | {line}" for line in lines)
