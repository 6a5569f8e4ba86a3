"""DDP, FSDP2, DeepSpeed and Lorica on the same GPT, two CPU processes, in rounds: owns jobs and tables, not engines.

    benchmarks/setup_deepspeed.sh                       # once: .venv-bench with DeepSpeed in it
    .venv-bench/bin/python benchmarks/cpu_compare.py    # 25 M and 110 M parameters, fp32; --precisions bf16: that

Every engine is a job of its own (two gloo ranks, OMP_NUM_THREADS=1), and the jobs take turns, A B C A B C ..., so that
a machine that gets slower or faster for a while does so for all. A number is the median over rounds of a job's median
over steps. Writes JSON with every job and a Markdown table; `--doc FILE` also replaces the tables of these
precisions in that file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.documents import replace_between  # noqa: E402
from benchmarks.gpt import SIZES  # noqa: E402
from benchmarks.peers import PEERS  # noqa: E402

NUM_RANKS = 2
MIB = 2**20


class Case(NamedTuple):
    """What all engines do in one table."""

    size: str
    precision: str

    def __str__(self) -> str:
        return f"{self.size}, {self.precision}"


class Job(NamedTuple):
    """One engine in one round of one case."""

    case: Case
    engine: str
    round: int


# Jobs -----------------------------------------------------------------------------------------------------------------


def start_rank(job: Job, options: argparse.Namespace, folder: Path, rank: int) -> subprocess.Popen[bytes]:
    """One process of a job; its output goes to a file beside its result."""
    settings = {
        "engine": job.engine,
        "size": job.case.size,
        "precision": job.case.precision,
        "rendezvous": folder / "rendezvous",
        "out": folder / f"rank{rank}.json",
        "warmup": options.warmup,
        "steps": options.steps,
        "batch_size": options.batch_size,
    }
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_RANKS),
        "LOCAL_WORLD_SIZE": str(NUM_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "extensions"),  # where setup_deepspeed.sh compiled them
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # ninja of this environment, for DeepSpeed
    }
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with open(folder / f"rank{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.measure", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Run both ranks to the end and put their results together; a failure is a result too."""
    with tempfile.TemporaryDirectory(prefix="lorica-bench-") as name:
        folder = Path(name)
        ranks = [start_rank(job, options, folder, rank) for rank in range(NUM_RANKS)]
        problem = wait_for(ranks, options.limit_s)
        results = [folder / f"rank{rank}.json" for rank in range(NUM_RANKS)]
        if problem is None and all(path.exists() for path in results):
            return together([json.loads(path.read_text()) for path in results])
        logs = [(folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(NUM_RANKS)]
        return {"problem": problem or "a rank ended without a result", "logs": logs}


def wait_for(ranks: list[subprocess.Popen[bytes]], limit_s: float) -> str | None:
    """Wait until all have ended well, or say what went wrong and end the rest."""
    deadline, problem = time.monotonic() + limit_s, None
    while problem is None and any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed:
            problem = f"rank {failed[0]} ended with exit code {ranks[failed[0]].returncode}"
        elif time.monotonic() > deadline:
            problem = f"no result after {limit_s:.0f} s"
        time.sleep(0.05)
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(ranks) if process.returncode != 0]
    return problem or (f"rank {failed[0]} ended with exit code {ranks[failed[0]].returncode}" if failed else None)


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The slower rank's wall time, the mean of costs, the larger peak, the mean losses."""
    counted = [rank["counted_bytes"] for rank in ranks]
    return {
        "numel": ranks[0]["numel"],
        "wall_s": max(rank["wall_s"] for rank in ranks),
        "cpu_s": statistics.mean(rank["cpu_s"] for rank in ranks),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "highest_rss_bytes": max(rank["highest_rss_bytes"] for rank in ranks),
        "socket_bytes": statistics.mean(rank["socket_bytes"] for rank in ranks),
        "counted_bytes": statistics.mean(counted) if None not in counted else None,
        "losses": [statistics.mean(step) for step in zip(*(rank["losses"] for rank in ranks), strict=True)],
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def medians(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The rounds of one engine in one case, put together; None if it never worked."""
    good = [result for result in results if "problem" not in result]
    if not good:
        return None
    numbers = ("wall_s", "cpu_s", "peak_bytes", "highest_rss_bytes", "socket_bytes", "counted_bytes")
    row = {key: statistics.median(r[key] for r in good) if good[0][key] is not None else None for key in numbers}
    return row | {"losses": good[0]["losses"], "numel": good[0]["numel"], "num_rounds": len(good)}


def sent(row: dict[str, Any]) -> str:
    """Bytes sent per rank and step: what the engine counts itself, else what went through sockets."""
    if row["counted_bytes"] is not None:
        return f"{row['counted_bytes'] / 1e6:.3g}" + (
            " (shm)" if row["socket_bytes"] < row["counted_bytes"] / 2 else ""
        )
    return f"{row['socket_bytes'] / 1e6:.3g}"


def ratio(row: dict[str, Any], reference: dict[str, Any] | None, key: str) -> str:
    """How many times the reference's cost; a dash where there is no reference."""
    return f"{row[key] / reference[key]:.2f}" if reference else "-"


def table(case: Case, rows: dict[str, dict[str, Any] | None]) -> str:
    """The Markdown table of one case."""
    ddp = rows.get("ddp")
    numel = next((row["numel"] for row in rows.values() if row), 0)
    steps = next((len(row["losses"]) for row in rows.values() if row), 0)
    lines = [
        f"### {numel / 1e6:.1f} M parameters, {case.precision}, {num_rounds(rows)} of {steps} steps with warm-up",
        "",
        "| engine | ms a step | of DDP | of DeepSpeed | CPU s a step and rank | of DDP | of DeepSpeed "
        "| peak MiB | MB sent | largest loss difference from DDP |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for engine, row in rows.items():
        if row is None:
            lines.append(f"| {engine} | failed |" + " |" * 8)
            continue
        peer = rows.get(PEERS[engine].deepspeed_row or "")
        drift = max(abs(a - b) for a, b in zip(row["losses"], ddp["losses"], strict=True)) if ddp else float("nan")
        cells = [
            engine,
            f"{row['wall_s'] * 1e3:.0f}",
            ratio(row, ddp, "wall_s"),
            ratio(row, peer, "wall_s"),
            f"{row['cpu_s']:.3f}",
            ratio(row, ddp, "cpu_s"),
            ratio(row, peer, "cpu_s"),
            f"{row['peak_bytes'] / MIB:.0f}",
            sent(row),
            f"{drift:.1e}" if engine != "independent" else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def num_rounds(rows: dict[str, dict[str, Any] | None]) -> str:
    """How many rounds the medians of a table are of."""
    counts = sorted({row["num_rounds"] for row in rows.values() if row})
    spread = " to ".join(str(count) for count in {counts[0]: None, counts[-1]: None}) if counts else "no"
    return f"{spread} round{'' if counts == [1] else 's'}"


def machine(options: argparse.Namespace) -> str:
    """One line that says what the numbers were measured on and how."""
    import torch

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return (
        f"{os.cpu_count()} cores ({model}), {NUM_RANKS} gloo ranks, torch {torch.__version__}, batch "
        f"{options.batch_size} per rank, "
        f"{time.strftime('%Y-%m-%d')}."
    )


def report(results: dict[Job, dict[str, Any]], cases: list[Case], options: argparse.Namespace) -> str:
    """All tables, under the line about the machine."""
    parts = [machine(options)]
    for case in cases:
        rows = {
            engine: medians([r for job, r in results.items() if job.case == case and job.engine == engine])
            for engine in options.engines
            if any(job.case == case and job.engine == engine for job in results)
        }
        parts.append(table(case, rows))
    return "\n\n".join(parts) + "\n"


# Jobs on disk ---------------------------------------------------------------------------------------------------------


def save_jobs(out: Path, results: dict[Job, dict[str, Any]]) -> None:
    """Write every job so far: what was measured is not lost with what comes after."""
    every = [{"case": job.case._asdict(), "engine": job.engine, "round": job.round} | r for job, r in results.items()]
    (out / "jobs.json").write_text(json.dumps(every, indent=1))


def earlier_jobs(out: Path) -> dict[Job, dict[str, Any]]:
    """The jobs of earlier calls."""
    path = out / "jobs.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return {Job(Case(**row.pop("case")), row.pop("engine"), row.pop("round")): row for row in rows}


# Main -----------------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["25m", "110m"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--engines", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a job")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=1, help="sequences per rank")
    parser.add_argument("--limit_s", type=float, default=600.0, help="longest time for one job")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cpu_compare")
    parser.add_argument("--add", action="store_true", help="add rounds to the jobs that OUT holds already")
    parser.add_argument("--doc", type=Path, help="a Markdown file whose tables are replaced")
    return parser.parse_args()


def main() -> int:
    options = parse()
    cases = [Case(size, precision) for size in options.sizes for precision in options.precisions]
    options.out.mkdir(parents=True, exist_ok=True)
    results = earlier_jobs(options.out) if options.add else {}
    first = 1 + max((job.round for job in results if job.case in cases), default=-1)
    for case in cases:
        for number in range(first, first + options.rounds):
            for engine in options.engines:
                job = Job(case, engine, number)
                results[job] = result = run_job(job, options)
                save_jobs(options.out, results)
                said = result.get("problem") or f"{result['wall_s'] * 1e3:8.1f} ms  {result['cpu_s']:7.3f} CPU s"
                print(f"{case}  round {number + 1}/{first + options.rounds}  {engine:20} {said}", flush=True)
    tables = report(results, cases, options)
    (options.out / "tables.md").write_text(tables)
    print("\n" + tables)
    if options.doc is not None:
        replace_between(options.doc, f"tables {' '.join(options.precisions)}", tables.rstrip("\n"))
    failed = sorted({job.engine for job, result in results.items() if "problem" in result})
    for engine in failed:
        log = next(r["logs"] for job, r in results.items() if job.engine == engine and "problem" in r)
        print(f"{engine} failed; the end of its first log:\n{log[0]}\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
