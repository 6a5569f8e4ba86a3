"""Jobs of the GPU comparisons in processes of their own, in rounds: starts, limits and ends them, keeps their results.

What a job measures is the business of gpu_job.py and offload_job.py; tables are made elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ROOT = Path(__file__).resolve().parent.parent
LOG_CHARACTERS = 3000  # kept of a job's output
POLL_S = 0.05
SAY_WHERE = signal.SIGUSR1  # a job that is late writes the stacks of its threads into its log

# Where DeepSpeed's loader compiles its operators; the environment's own choice wins.
EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(tempfile.gettempdir()) / "lorica-bench-extensions"))


class Job(NamedTuple):
    """One engine in one round at one size; the ceilings belong to no size."""

    size: str
    engine: str
    round: int


class Watch(Protocol):
    """Looks at a job while it runs."""

    def look(self, pid: int) -> str | None:
        """Called every POLL_S seconds; a reason ends the job."""
        ...

    def seen(self) -> dict[str, Any]:
        """What to add to the job's result."""
        ...


# One job --------------------------------------------------------------------------------------------------------------


def run_process(
    arguments: Sequence[str],
    limit_s: float,
    *,
    environment: dict[str, str] | None = None,
    watch: Watch | None = None,
    keep_log: bool = False,
) -> dict[str, Any]:
    """Run `python arguments... --result FILE` in a process of its own; a failure is a result too.

    Args:
        environment: variables besides those of `job_environment`.
        watch: may end the job, and adds to its result.
        keep_log: keep the end of the output of a job that went well, too.
    """
    with tempfile.TemporaryDirectory(prefix="lorica-bench-") as name:
        result, log = Path(name) / "result.json", Path(name) / "log"
        begin = time.monotonic()
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments, "--result", str(result)],
                cwd=ROOT,
                env=job_environment() | (environment or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # a group, not a session: it ends with the session that this process is in
            )
            try:
                reason = wait_for(process, limit_s, watch)
            except BaseException:
                end_all(process)
                raise
        outcome = read_result(result, log, process.returncode, reason)
        if keep_log:
            outcome.setdefault("log", log.read_text(errors="replace")[-LOG_CHARACTERS:])
        outcome["job_s"] = time.monotonic() - begin
        return outcome | (watch.seen() if watch is not None else {})


def wait_for(process: subprocess.Popen[bytes], limit_s: float, watch: Watch | None) -> str | None:
    """Wait for the end of a job; end it at its limit or when `watch` says so, and return why."""
    end = time.monotonic() + max(1.0, limit_s)
    while True:
        reason = watch.look(process.pid) if watch is not None else None
        if reason is None and time.monotonic() > end:
            reason = f"no result after {limit_s:.0f} s"
            process.send_signal(SAY_WHERE)
            time.sleep(1)
        if reason is not None:
            end_all(process)
            return reason
        try:
            process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived their job
        return None


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End a job and what it started."""
    for member in family(process.pid):  # a compiler's driver has its children in groups of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.wait()
    drop_locks()


def family(pid: int) -> list[int]:
    """A process and all that descend from it, children behind their parents."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def drop_locks() -> None:
    """Remove the locks of compilations that were cut off: later jobs would wait for them for ever."""
    if "TORCH_EXTENSIONS_DIR" not in os.environ:  # in a folder of the user's own, somebody may be compiling
        for lock in EXTENSIONS.glob("*/lock"):
            lock.unlink()


def job_environment() -> dict[str, str]:
    """What every job is told: where the packages are, and where compiled extensions of all jobs go."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    return os.environ | {
        "TORCH_CUDA_ARCH_LIST": re.sub(r"(?<=\d)[a-z]+", "", architectures),  # DeepSpeed cannot read "9.0a"
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja of this environment
    }


def read_result(result: Path, log: Path, code: int, reason: str | None) -> dict[str, Any]:
    """What a job wrote, or what can be said about its end.

    Args:
        code: its exit code; negative: the signal that ended it.
        reason: why `wait_for` ended it.
    """
    text = log.read_text(errors="replace")
    if result.exists():
        outcome: dict[str, Any] = json.loads(result.read_text())
        if code != 0 and "problem" not in outcome:
            ended = f"ended with {code} after the measurement" if reason is None else f"was ended: {reason}"
            outcome["note"] = "; ".join(filter(None, [outcome.get("note"), ended]))
            outcome["log"] = text[-LOG_CHARACTERS:]
        return outcome
    return {"problem": reason or problem_of(code, text), "log": text[-LOG_CHARACTERS:]}


def problem_of(code: int, text: str) -> str:
    """Why a job that ended by itself has no result: its exit code and the last line of its output."""
    if code == -signal.SIGKILL:
        return "killed (exit 137)"
    lines = [line for line in text.splitlines() if line.strip()]
    said = lines[-1].strip()[:200] if lines else "nothing"
    return "out of memory" if "out of memory" in text else f"exit code {code}: {said}"


# Rounds ---------------------------------------------------------------------------------------------------------------


def run_rounds(
    jobs: Sequence[Job],
    run: Callable[[Job, float], dict[str, Any]],
    *,
    limit_s: float,
    time_limit_s: float,
    keep: Callable[[dict[Job, dict[str, Any]], Job], None],
) -> dict[Job, dict[str, Any]]:
    """Run `jobs` in their order until all are done or the time is spent.

    Args:
        run: makes a result from a job and the seconds that it may take, at most `limit_s`.
        keep: called with all results after every job, and that job.
    """
    results: dict[Job, dict[str, Any]] = {}
    drop_locks()
    end = time.monotonic() + time_limit_s
    for job in jobs:
        left = end - time.monotonic()
        if left < expected_s(job, results):
            print(f"time is spent: {len(jobs) - len(results)} of {len(jobs)} jobs not started", flush=True)
            break
        results[job] = run(job, min(left, limit_s))
        keep(results, job)
    return results


def expected_s(job: Job, results: dict[Job, dict[str, Any]]) -> float:
    """How long the job may take: as long as before, else as the longest of its size so far."""
    same: list[float] = [r["job_s"] for done, r in results.items() if done[:2] == job[:2]]
    alike: list[float] = [r["job_s"] for done, r in results.items() if done.size == job.size]
    return max(same or alike or [1.0])


def save(path: Path, results: dict[Job, dict[str, Any]], options: dict[str, Any]) -> None:
    """Write all results so far, and the options that they share."""
    jobs = [job._asdict() | outcome for job, outcome in results.items()]
    path.write_text(json.dumps({"options": options, "jobs": jobs}, indent=1))


def load(paths: Sequence[Path]) -> tuple[dict[Job, dict[str, Any]], dict[str, Any]]:
    """The results of one or more runs with the same options; a later file's rounds follow the earlier ones'."""
    results: dict[Job, dict[str, Any]] = {}
    options: dict[str, Any] | None = None
    first_round = 0
    for path in paths:
        saved = json.loads(path.read_text())
        if options is not None and saved["options"] != options:
            raise ValueError(
                f"--report: expected runs with the same options, got {options} and {saved['options']} ({path}). "
                "Fix: report them one by one."
            )
        options = saved["options"]
        for entry in saved["jobs"]:
            results[Job(entry["size"], entry["engine"], first_round + entry["round"])] = entry
        first_round = 1 + max((job.round for job in results), default=-1)
    assert options is not None
    return results, options
