"""Starts the ranks of a job, watches them and ends them. `job` says what is started, `verdict` who is to blame.

One thread, one loop: it sleeps until a signal (a child's end among them) or a tenth of a second, then looks at exit
codes and reports. Every rank leads a session of its own: what it starts can be found and ended with it, and Ctrl-C
reaches the launcher alone, which decides.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from lorica.launcher import reaper
from lorica.launcher.flags import LaunchError
from lorica.launcher.job import Job, RankCommand
from lorica.launcher.verdict import Failure, culprit, describe, read_exit, read_report, signal_name

logger = logging.getLogger("lorica.launcher")

POLL_S = 0.1
SETTLE_S = 0.1  # a signal's victim may become visible after the exception that it caused elsewhere
SETTLE_SECONDARY_S = 1.0  # how long ranks that only lost a peer are not believed to be the cause


@dataclass
class Rank:
    """A started rank; `ended` is the machine's clock when its end was seen."""

    command: RankCommand
    process: subprocess.Popen[bytes]
    ended: float | None = None

    def look(self) -> bool:
        """Whether this call saw the end of the process."""
        if self.ended is not None or self.process.poll() is None:
            return False
        self.ended = time.monotonic()
        return True

    def failure(self) -> Failure | None:
        """Why this rank has failed; None while it runs or if it finished well."""
        report = read_report(self.command.report)
        if report is not None or self.ended is None or self.process.returncode == 0:
            return report
        return read_exit(self.command.rank, self.process.pid, self.process.returncode, self.ended)


def supervise(job: Job, *, grace: float) -> int:
    """Run the job to its end and return the exit code of the launcher.

    Args:
        grace: seconds that ranks have between a polite signal and SIGKILL.
    Returns:
        0; the failed rank's exit code (128 + n for signal n); 128 + n if the launcher itself was sent signal n.
    """
    with SignalInbox() as inbox, Watcher(job) as watcher:
        started = time.monotonic()
        ranks: list[Rank] = []
        try:
            for command in job.ranks:
                ranks.append(start(command, job.store.fileno()))
                watcher.tell(f"{ranks[-1].process.pid}")
            stop_signal, failures = watch(ranks, inbox, watcher)
            if stop_signal is None and not failures:
                return 0
            running = [rank for rank in ranks if rank.ended is None]
            polite = signal.SIGINT if stop_signal == signal.SIGINT else signal.SIGTERM
            stop(job, ranks, polite, grace, inbox, watcher)
        except BaseException:
            reaper.end_processes(job.job_id, [rank.process.pid for rank in ranks if rank.ended is None])
            raise
    if stop_signal is not None:
        logger.error("stopped by %s, ranks ended: %d", signal_name(stop_signal), len(running))
        return 128 + stop_signal
    first = culprit(failures)
    print(
        describe(
            first,
            seconds=first.monotonic - started,
            num_stopped=sum(rank.command.rank not in {failure.rank for failure in failures} for rank in running),
            finished=tuple(rank.command.rank for rank in ranks if rank not in running and rank.failure() is None),
            log=job.ranks[first.rank].log,
        ),
        file=sys.stderr,
        flush=True,
    )
    return first.exit_code


def start(command: RankCommand, store: int) -> Rank:
    """Start one rank in a session of its own; rank 0 inherits the launcher's input and the reserved port's socket."""
    first = command.rank == 0
    with contextlib.ExitStack() as files:
        output: IO[bytes] | None = None
        if command.log is not None:
            output = files.enter_context(open(command.log, "wb"))
        try:
            process = subprocess.Popen(
                command.argv,
                env=command.environ,
                stdin=None if first else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                start_new_session=True,
                pass_fds=(store,) if first else (),
            )
        except OSError as error:
            raise LaunchError(
                f"rank {command.rank} could not be started: {error}. Fix: see the reason given."
            ) from error
    logger.debug("rank %d is process %d: %s", command.rank, process.pid, command.argv)
    return Rank(command, process)


def watch(ranks: Sequence[Rank], inbox: SignalInbox, watcher: Watcher) -> tuple[int | None, list[Failure]]:
    """Wait until the launcher is told to stop (the signal), a rank has failed (all failures seen) or all are done."""
    first_seen: float | None = None
    while True:
        for signum in inbox.wait(POLL_S if first_seen is None else 0.02):
            return signum, []
        for rank in ranks:
            if rank.look():
                watcher.tell(f"-{rank.process.pid}")
        failures = [failure for failure in (rank.failure() for rank in ranks) if failure is not None]
        all_ended = all(rank.ended is not None for rank in ranks)
        if not failures:
            if all_ended:
                return None, []
            continue
        first_seen = first_seen or time.monotonic()
        settle = SETTLE_SECONDARY_S if all(failure.secondary for failure in failures) else SETTLE_S
        if all_ended or time.monotonic() - first_seen >= settle:
            return None, failures


def stop(
    job: Job, ranks: Sequence[Rank], polite: signal.Signals, grace: float, inbox: SignalInbox, watcher: Watcher
) -> None:
    """End all ranks and everything that they started: politely, then, after `grace` or a second signal, by SIGKILL.

    Only the ranks are asked politely: one that saves its state at a signal may still need what it has started.
    """
    for rank in ranks:
        if rank.ended is None:
            rank.process.send_signal(polite)
    deadline = time.monotonic() + grace
    while any(rank.ended is None for rank in ranks) and time.monotonic() < deadline:
        if inbox.wait(0.02):
            break
        for rank in ranks:
            if rank.look():
                watcher.tell(f"-{rank.process.pid}")
    left = reaper.end_processes(job.job_id, [rank.process.pid for rank in ranks if rank.ended is None])
    for rank in ranks:
        if rank.process.pid not in left:
            rank.process.wait()
    if left:
        logger.error("processes %s do not die; they wait for a device or a network file system", left)


class SignalInbox:
    """Collects signals in a pipe instead of letting them interrupt whatever runs; `wait` sleeps until one is there."""

    STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> SignalInbox:
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(writer, False)
        self._writer = writer
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for signum in (*self.STOP, signal.SIGCHLD):
            # Ignored on purpose by whoever started us (nohup, a shell's &): leave it so, here and in the ranks.
            if signum == signal.SIGCHLD or signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, _noted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self, timeout: float) -> list[int]:
        """Sleep until a signal or `timeout` seconds; return the stop signals that came."""
        ready, _, _ = select.select([self._reader], [], [], timeout)
        numbers = os.read(self._reader, 4096) if ready else b""
        return [number for number in numbers if number in self.STOP]


def _noted(signum: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up pipe has the number."""


class Watcher:
    """The process that ends the job if this one is killed (see `reaper`)."""

    def __init__(self, job: Job) -> None:
        program = Path(reaper.__file__)
        # Isolated, without site packages: it starts in milliseconds and nobody's settings matter.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(program), job.job_id, str(job.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def tell(self, word: str) -> None:
        """Send one line; a watcher that was killed cannot hear it, and the job goes on without one."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self.tell("done")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def pid_file(folder: Path) -> Iterator[Path]:
    """Keep the launcher's pid in `folder` while a `with` block runs."""
    path = folder / f"{os.getpid()}.lorica"
    path.write_text(f"{os.getpid()}\n", encoding="ascii")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
