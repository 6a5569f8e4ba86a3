"""What benchmarks/offload.py says about its jobs: cases, ends of jobs, host memory, tables. Measures nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import gpu_rounds, offload_host
from benchmarks.gpu_rounds import Job
from benchmarks.llama import numel_of
from benchmarks.offload import case_and_engines
from benchmarks.offload_engines import ENGINES
from benchmarks.offload_job import Case
from benchmarks.offload_tables import tables

GIB = 2**30


def outcome(seconds: float, **changed: Any) -> dict[str, Any]:
    """The result of a job as `offload_job.measure` and `run_job` make it."""
    return {
        "median_s": seconds,
        "tokens": 65_536,
        "peak": {"allocated_bytes": 10 * GIB, "reserved_bytes": 11 * GIB},
        "host": {"libraries_bytes": GIB, "peak_bytes": 30 * GIB},
        "host_watch": {"most_rss_bytes": 21 * GIB},
        "offloaded_numel": 0,
        "start_s": 4.0,
        "syncs": {},
        "clipped": 1,
        "norms": [2.0, 0.5],
        "losses": [10.0, 9.0],
        "note": "",
        "with": {},
        "machine": {"device": "GPU", "cuda": None, "allocator": "", "date": "today"},
    } | changed


def test_a_case_names_its_size_its_micro_batches_and_its_engines() -> None:
    assert case_and_engines("3b@4:floor,lorica-host") == (Case("3b", 4), ["floor", "lorica-host"])
    case, engines = case_and_engines("7b")
    assert case == Case("7b", 1) and str(case) == "7b" and set(engines) < set(ENGINES)


@pytest.mark.parametrize(
    ("size", "billions"), [("3b", 3.426), ("13b", 13.0), ("18b", 18.1), ("21b", 21.2), ("32b", 32.5), ("70b", 70.3)]
)
def test_a_size_has_as_many_parameters_as_its_name_says(size: str, billions: float) -> None:
    assert numel_of(size) / 1e9 == pytest.approx(billions, abs=0.05)


def test_a_table_compares_with_the_floor_of_its_case_and_says_what_failed() -> None:
    host = outcome(1.25, offloaded_numel=2 * GIB)
    results = {
        Job("3b@4", "floor", 0): outcome(1.0),
        Job("3b@4", "lorica-host", 0): host,
        Job("3b@4", "lorica-host", 1): host | {"median_s": 1.35},
        Job("3b@4", "fsdp2-cpu", 0): {"problem": "killed (exit 137)", "with": {}},
    }
    (table,) = tables(results, {"steps": 5, "warmup": 2}).values()
    rows = {line.split(" | ")[1]: line for line in table.splitlines() if line.startswith("| 3.43")}
    assert "| 1.300 | 50,412 | 76.9 | 10.0 | 11.0 | 30.0 | 14.5 |" in rows["lorica-host"]
    assert "killed (exit 137)" in rows["fsdp2-cpu"]
    assert len({line.count("|") for line in rows.values()}) == 1
    assert "2 rounds; the largest spread between a row's rounds: 8.0 %" in table


def test_rounds_of_different_options_are_no_row() -> None:
    results = {
        Job("3b", "floor", 0): outcome(1.0),
        Job("3b", "floor", 1): outcome(1.0, **{"with": {"init": "bf16"}}),
    }
    with pytest.raises(ValueError, match="same options"):
        tables(results, {"steps": 5, "warmup": 2})


def test_a_job_is_ended_before_the_machine_has_no_memory_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [100 * GIB, 50 * GIB, 2 * GIB]
    monkeypatch.setattr(offload_host, "left_bytes", lambda: left.pop(0))
    monkeypatch.setattr(offload_host, "total_bytes", lambda: 120 * GIB)
    watch = offload_host.HostWatch(120 * GIB)
    assert watch.look(os.getpid()) is None
    assert watch.look(os.getpid()) == "out of host memory at 98.0 GiB (120.0 GiB in the machine)"
    assert watch.seen()["host_watch"]["most_rss_bytes"] > 2**20


def test_a_machine_that_still_grows_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    left, total = [30 * GIB, GIB, GIB], [32 * GIB, 32 * GIB, 64 * GIB]
    monkeypatch.setattr(offload_host, "left_bytes", lambda: left.pop(0))
    monkeypatch.setattr(offload_host, "total_bytes", lambda: total.pop(0))
    watch = offload_host.HostWatch(120 * GIB)
    assert watch.look(os.getpid()) is None
    assert watch.look(os.getpid()) is None


def test_a_job_that_is_late_is_ended_with_all_it_started_and_says_where_it_was(tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = tmp_path / "job.py"
    script.write_text(
        "import faulthandler, pathlib, signal, subprocess, sys, time\n"
        "faulthandler.register(signal.SIGUSR1)\n"
        "process = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid))\n"
        "def waiting_for_ever(): time.sleep(60)\n"
        "waiting_for_ever()\n"
    )
    found = gpu_rounds.run_process([str(script)], 4.0)
    assert found["problem"] == "no result after 4 s" and "waiting_for_ever" in found["log"]
    end = time.monotonic() + 10
    while int(child.read_text()) in gpu_rounds.family(1) and time.monotonic() < end:
        time.sleep(0.05)
    assert time.monotonic() < end


def test_a_job_that_somebody_kills_is_a_row_that_says_so(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert gpu_rounds.run_process([str(script)], 20.0)["problem"] == "killed (exit 137)"


def test_what_a_job_writes_is_its_result(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(f"import sys; open(sys.argv[2], 'w').write({json.dumps(json.dumps({'value': 3}))})")
    found = gpu_rounds.run_process([str(script)], 20.0)
    assert found["value"] == 3 and found["job_s"] > 0
