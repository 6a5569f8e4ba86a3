"""How a job ends: the culprit's name and exit code, signals, and that no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mechanism.test_launcher import environ, lorica

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the promises about processes are Linux's")

FAILURES = {
    "raise ValueError('wrong\\nvalue')": (1, "ValueError: wrong value, at "),
    "raise KeyError": (1, "KeyError, at "),
    "sys.exit(3)": (3, "sys.exit(3)"),
    "sys.exit('no data')": (1, "sys.exit(no data)"),
    "os._exit(7)": (7, "it ended without an exception"),
    "os.kill(os.getpid(), signal.SIGKILL)": (137, "killed by SIGKILL (signal 9)"),
    "os.kill(os.getpid(), signal.SIGSEGV)": (139, "killed by SIGSEGV (signal 11)"),
    "os.abort()": (134, "killed by SIGABRT (signal 6)"),
    "resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)); bytearray(2**30)": (1, "MemoryError"),
}


@pytest.mark.parametrize("statement", FAILURES)
def test_a_failing_rank_is_named_its_exit_code_returned_and_the_job_over_within_2_s(
    tmp_path: Path, statement: str
) -> None:
    exit_code, reason = FAILURES[statement]
    (tmp_path / "train.py").write_text(
        "import os, resource, signal, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    time.sleep(0.2)\n"
        "    open('died', 'w').write(str(time.time()))\n"
        f"    {statement}\n"
        "time.sleep(60)\n"
    )
    done = lorica("--num_procs=2", "train.py", cwd=tmp_path)
    seconds = time.time() - float((tmp_path / "died").read_text())
    last = done.stderr.splitlines()[-1]
    assert done.returncode == exit_code, done.stderr
    assert last.startswith("lorica: rank 1 (local rank 1, host ")
    assert f"with exit code {exit_code}: {reason}" in last
    assert seconds < 2.0


def test_the_traceback_is_printed_once_and_without_the_launchers_frames(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("def step():\n    raise ValueError('wrong')\nstep()\n")
    done = lorica("train.py", cwd=tmp_path)
    direct = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("lorica: ")]
    assert lines == direct.stderr.splitlines()


def test_a_rank_that_lost_a_peer_is_not_blamed_though_it_failed_first(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '0': raise RuntimeError('[gloo/pair.cc:553] Connection closed by peer')\n"
        "time.sleep(0.5)\nos._exit(5)\n"
    )
    done = lorica("--num_procs=2", "train.py", cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("lorica: rank 1 ")
    assert "Connection closed" not in done.stderr


def test_a_lost_peer_that_nobody_explains_is_shown_with_the_rank_that_finished_early(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os\nif os.environ['RANK'] == '0': raise RuntimeError('gloo: Connection closed by peer')\n"
    )
    done = lorica("--num_procs=2", "train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "rank 1 had finished with exit code 0 before" in done.stderr
    assert "lorica: rank 0 " in done.stderr.splitlines()[-1]


def test_with_real_collectives_the_rank_that_died_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "if dist.get_rank() == 1: os._exit(9)\n"
        "while True: dist.all_reduce(torch.ones(8))\n"
    )
    done = lorica("--num_procs=2", "train.py", cwd=tmp_path)
    assert done.returncode == 9, done.stderr
    assert done.stderr.splitlines()[-1].startswith("lorica: rank 1 ")


def test_a_failure_in_a_forked_child_is_not_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os\nif os.fork() == 0: raise ValueError('in the child')\nos.wait()\n")
    assert lorica("train.py", cwd=tmp_path).returncode == 0


# -- signals and survivors -------------------------------------------------------------------------------------------

FAMILY = """
import os, signal, subprocess, sys, time
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(300)"]
children = [subprocess.Popen(sleep, start_new_session=detached) for detached in (False, True)]
if os.environ.get("DEAF"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
name = "pids" + os.environ.get("RANK", "")
open(name + ".part", "w").write(" ".join(str(pid) for pid in [os.getpid(), *(child.pid for child in children)]))
os.rename(name + ".part", name)
time.sleep(300)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Return those of `pids` that still run after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


def read_pids(folder: Path, *names: str) -> list[int]:
    deadline = time.monotonic() + 20
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)
    return [int(pid) for name in names for pid in (folder / name).read_text().split()]


def hear_signals() -> None:
    """Under nohup, or in the background of a shell, signals are ignored, and children inherit that: hear them again."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def running(folder: Path, **extra: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A job of two ranks with two grandchildren each; yields the launcher and the six processes."""
    (folder / "train.py").write_text(FAMILY)
    job = subprocess.Popen(
        [sys.executable, "-m", "lorica", "--num_procs=2", "train.py"],
        cwd=folder, env=environ(TMPDIR=str(folder), **extra), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=hear_signals,
    )  # fmt: skip
    pids: list[int] = []
    try:
        pids = read_pids(folder, "pids0", "pids1")
        yield job, pids
    finally:
        job.kill()
        job.communicate()
        for pid in wait_until_gone(pids, 5):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("signum", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=lambda value: str(value),
)
def test_a_signal_to_the_launcher_ends_everything_at_once(tmp_path: Path, signum: int, exit_code: int) -> None:
    with running(tmp_path) as (job, pids):
        job.send_signal(signum)
        _, stderr = job.communicate(timeout=5)
        assert job.returncode == exit_code
        assert not [pid for pid in pids if alive(pid)]
        assert "Traceback" not in stderr and f"signal {signum:d}" in stderr.splitlines()[-1]


def test_ranks_that_ignore_ctrl_c_are_killed_after_the_grace(tmp_path: Path) -> None:
    with running(tmp_path, DEAF="1") as (job, pids):
        start = time.monotonic()
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=10)
        assert job.returncode == 130
        assert not [pid for pid in pids if alive(pid)]
        assert 0.9 < time.monotonic() - start < 4


def test_nothing_outlives_a_launcher_that_is_killed_and_a_stranger_is_left_alone(tmp_path: Path) -> None:
    decoy_folder = tmp_path / "decoy"
    decoy_folder.mkdir()
    (decoy_folder / "train.py").write_text(FAMILY)
    decoy = subprocess.Popen([sys.executable, "train.py"], cwd=decoy_folder, start_new_session=True)
    try:
        with running(tmp_path) as (job, pids):
            strangers = read_pids(decoy_folder, "pids")
            job.kill()
            assert wait_until_gone(pids, 5) == []
            assert all(alive(pid) for pid in strangers)
            deadline = time.monotonic() + 5
            while list(tmp_path.glob("lorica-*")) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not list(tmp_path.glob("lorica-*"))  # its temporary folder
    finally:
        for pid in read_pids(decoy_folder, "pids"):
            os.kill(pid, signal.SIGKILL)
        decoy.wait()


def test_ranks_die_with_the_launcher_even_without_the_watcher(tmp_path: Path) -> None:
    with running(tmp_path) as (job, pids):
        ranks = [pids[0], pids[3]]
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        watcher = next(int(pid) for pid in children if int(pid) not in ranks)
        os.kill(watcher, signal.SIGKILL)
        job.kill()
        assert wait_until_gone(ranks, 5) == []
        for pid in set(pids) - set(ranks):  # what the watcher would have ended
            os.kill(pid, signal.SIGKILL)


def test_a_failing_rank_takes_the_grandchildren_along(tmp_path: Path) -> None:
    with running(tmp_path) as (job, pids):
        os.kill(pids[3], signal.SIGKILL)
        _, stderr = job.communicate(timeout=5)
        assert job.returncode == 137
        assert "rank 1 " in stderr.splitlines()[-1]
        assert not [pid for pid in pids if alive(pid)]


def test_a_stopped_rank_is_ended_too(tmp_path: Path) -> None:
    with running(tmp_path) as (job, pids):
        os.kill(pids[0], signal.SIGSTOP)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=10)
        assert job.returncode == 143
        assert not [pid for pid in pids if alive(pid)]
