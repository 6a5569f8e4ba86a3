"""Which failure is believed to be the cause, and the words for it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from lorica.launcher.bootstrap import is_peer_loss
from lorica.launcher.report import cpu_model, instruction_sets, memory
from lorica.launcher.verdict import Failure, culprit, describe, read_exit, read_report


def failure(rank: int, monotonic: float, *, secondary: bool = False) -> Failure:
    return Failure(rank, 100 + rank, monotonic, "KeyError: 'x'", 1, secondary, where="train.py:3 in step")


def test_the_earliest_failure_is_the_cause_unless_it_only_lost_a_peer() -> None:
    assert culprit([failure(0, 2.0), failure(1, 1.0)]).rank == 1
    assert culprit([failure(0, 2.0), failure(1, 1.0, secondary=True)]).rank == 0
    assert culprit([failure(0, 2.0, secondary=True), failure(1, 1.0, secondary=True)]).rank == 1


def test_an_abort_may_be_the_answer_to_another_ranks_end() -> None:
    abort = read_exit(0, 100, -signal.SIGABRT, 1.0)
    assert culprit([abort, read_exit(1, 101, -signal.SIGKILL, 1.1)]).rank == 1
    assert (abort.exit_code, culprit([abort]).rank) == (134, 0)


def test_the_last_line_names_rank_exit_code_reason_and_place() -> None:
    text = describe(failure(2, 1.0), seconds=1.25, num_stopped=3, finished=(), log=None)
    first, last = text.splitlines()
    assert first == "lorica: 3 other ranks were stopped"
    assert last.startswith("lorica: rank 2 (local rank 2, host ")
    assert last.endswith("pid 102) failed after 1.2 s with exit code 1: KeyError: 'x', at train.py:3 in step")


def test_signals_without_a_name_and_long_messages_are_shown(tmp_path: Path) -> None:
    assert read_exit(0, 1, -40, 0.0).reason.endswith("signal 40")
    report = {
        "rank": 1, "pid": 2, "monotonic": 3.0, "type": "ValueError", "message": "a\n b" * 1000, "exit_code": 1,
        "where": "", "traceback": "", "lost_peer": False,
    }  # fmt: skip
    path = tmp_path / "rank1.json"
    assert read_report(path) is None
    path.write_text(json.dumps(report))
    found = read_report(path)
    assert found is not None and found.reason.startswith("ValueError: a ba b") and len(found.reason) < 500


def peer_loss() -> Exception:
    return RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (peer_loss(), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1: ncclRemoteError: a remote process exited"), True),
        (RuntimeError("c10d: failed to recv, got 0 bytes. Connection was likely closed."), True),
        (ConnectionResetError(104, "Connection reset by peer"), False),  # the script's own connection to anywhere
        (BrokenPipeError(32, "Broken pipe"), False),
        (RuntimeError("rank 1 (pid 7) has died: its socket closed without a goodbye. Fix: ..."), True),
        (ValueError("gloo"), False),
    ],
)
def test_the_loss_of_a_peer_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_peer_loss(error) is expected


def test_an_error_that_follows_from_the_loss_of_a_peer_counts_as_one() -> None:
    try:
        try:
            raise peer_loss()
        except RuntimeError as error:
            raise ValueError("the step failed") from error
    except ValueError as error:
        assert is_peer_loss(error)


def test_an_error_of_a_transport_can_say_that_it_lost_a_peer() -> None:
    error = RuntimeError("rank 1 is gone")
    error.lost_peer = True  # type: ignore[attr-defined]
    assert is_peer_loss(error)


def test_the_report_reads_the_kernels_files() -> None:
    cpuinfo = "processor : 0\nmodel name\t: Some CPU 9\nflags\t\t: fpu avx2 fma avx512f\n"
    assert (cpu_model(cpuinfo), instruction_sets(cpuinfo)) == ("Some CPU 9", ["fma", "avx2", "avx512f"])
    assert (
        memory("MemTotal:       4194304 kB\nMemFree: 1 kB\nMemAvailable:   2097152 kB\n")
        == "4.0 GiB, 2.0 GiB available"
    )
