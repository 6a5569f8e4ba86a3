"""One training step on one GPU, all engines in one table: owns the order of jobs and the command line.

    python benchmarks/gpu_step.py --sizes 1b3 7b --rounds 2 --time_limit_s 560 --out runs/gpu_step
    python benchmarks/gpu_step.py --report runs/gpu_step/jobs.json --doc docs/benchmarks-gpu.md    # needs no GPU
    python benchmarks/gpu_step.py --sizes tiny --rounds 1 --steps 2    # a dry run, any device

Every engine is a job of its own, a fresh process that builds the decoder of benchmarks/llama.py, warms up and times
some steps; the jobs take turns, A B C A B C ..., so that a machine that gets slower or faster for a while does so for
all. A number is the median over rounds of a job's median over steps; a peak is the highest of all rounds, from the end
of building to the end of the timed steps. In each round a job named `ceilings` measures what the device can do:
copying, multiplying, and Lorica's optimizer kernels alone. A job that fails is a row that says so.

On a machine without a package index, carry wheels: put deepspeed (a pure wheel, built with DS_BUILD_OPS=0), hjson,
pydantic and what else is missing into .whl/, then, where the GPU is,

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site python3 benchmarks/gpu_step.py ...

DeepSpeed compiles its FusedAdam there, once, with that machine's nvcc; if it cannot, its rows run torch's fused AdamW
and the table says so. Results are written after every job: a run that is cut off loses only the job it was in, and
--report puts several runs' rounds together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.documents import replace_between  # noqa: E402
from benchmarks.gpu_engines import ENGINES  # noqa: E402
from benchmarks.gpu_job import CEILINGS, job_main  # noqa: E402
from benchmarks.gpu_tables import GIB, Job, tables  # noqa: E402
from benchmarks.llama import MODELS, SIZES  # noqa: E402

# Where DeepSpeed's loader compiles its operators; the environment's own choice wins.
EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(tempfile.gettempdir()) / "lorica-bench-extensions"))


def run_job(job: Job, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run one job in a process of its own; a failure is a result too."""
    with tempfile.TemporaryDirectory(prefix="lorica-bench-") as name:
        result, log = Path(name) / "result.json", Path(name) / "log"
        settings = {
            "job": job.engine,
            "model": options.model,
            "warmup": options.warmup,
            "steps": options.steps,
            "lorica": json.dumps(options.lorica),
            "out": options.out,
            "result": result,
        }
        arguments = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        arguments += ["--sizes", job.size] if job.engine != CEILINGS else []
        arguments += ["--trace"] if options.trace and job.round == 0 else []
        begin = time.monotonic()
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), *arguments],
                cwd=ROOT,
                env=job_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # a group, not a session: it ends with the session that this process is in
            )
            try:
                code: int | None = process.wait(timeout=max(1.0, limit_s))
            except subprocess.TimeoutExpired:
                end_all(process)
                code = None
            except BaseException:
                end_all(process)
                raise
        outcome = read_result(result, log, code, limit_s)
        return outcome | {"job_s": time.monotonic() - begin}


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End a job and what it started (compilers)."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    drop_locks()


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


def read_result(result: Path, log: Path, code: int | None, limit_s: float) -> dict[str, Any]:
    """What a job wrote, or what can be said about its end."""
    text = log.read_text(errors="replace")
    if result.exists():
        outcome: dict[str, Any] = json.loads(result.read_text())
        if code != 0 and "problem" not in outcome:
            ended = f"ended with {code} after the measurement" if code is not None else "did not end by itself"
            outcome["note"] = "; ".join(filter(None, [outcome.get("note"), ended]))
            outcome["log"] = text[-3000:]
        return outcome
    if code is None:
        return {"problem": f"no result after {limit_s:.0f} s", "log": text[-3000:]}
    lines = [line for line in text.splitlines() if line.strip()]
    said = lines[-1].strip()[:200] if lines else "nothing"
    problem = "out of memory" if "out of memory" in text else f"exit code {code}: {said}"
    return {"problem": problem, "log": text[-3000:]}


def run_all(options: argparse.Namespace) -> dict[Job, dict[str, Any]]:
    """Rounds of jobs until all are done or the time is spent; results are written after every job."""
    results: dict[Job, dict[str, Any]] = {}
    drop_locks()
    jobs: list[Job] = []
    for number in range(options.rounds):
        jobs.append(Job("-", CEILINGS, number))
        jobs += [Job(size, engine, number) for size in options.sizes for engine in options.engines]
    end = time.monotonic() + options.time_limit_s
    for job in jobs:
        left = end - time.monotonic()
        if left < expected_s(job, results):
            print(f"time is spent: {len(jobs) - len(results)} of {len(jobs)} jobs not started", flush=True)
            break
        results[job] = outcome = run_job(job, options, min(left, options.limit_s))
        said = outcome.get("problem") or summary(outcome)
        print(f"{job.size:5} round {job.round + 1}/{options.rounds}  {job.engine:18} {said}", flush=True)
        save(results, options)
    return results


def expected_s(job: Job, results: dict[Job, dict[str, Any]]) -> float:
    """How long the job may take: as long as before, else as the longest of its size so far."""
    same = [r["job_s"] for done, r in results.items() if (done.size, done.engine) == (job.size, job.engine)]
    alike = [r["job_s"] for done, r in results.items() if done.size == job.size]
    return max(same or alike or [1.0])


def summary(outcome: dict[str, Any]) -> str:
    """One line of progress."""
    if "copy_bytes_per_s" in outcome:
        return (
            f"copy {outcome['copy_bytes_per_s'] / 1e9:.0f} GB/s, product {outcome['matmul_flop_per_s'] / 1e12:.0f} T/s"
        )
    return (
        f"{outcome['median_s']:.4f} s  {outcome['peak']['allocated_bytes'] / GIB:6.2f} GiB  "
        f"{sum(outcome['syncs'].values()):g} syncs  loss {outcome['losses'][0]:.4f}  (job {outcome['job_s']:.0f} s)"
    )


def save(results: dict[Job, dict[str, Any]], options: argparse.Namespace) -> None:
    """Write all results so far."""
    what = {key: getattr(options, key) for key in ("model", "warmup", "steps", "lorica")}
    jobs = [job._asdict() | outcome for job, outcome in results.items()]
    (options.out / "jobs.json").write_text(json.dumps({"options": what, "jobs": jobs}, indent=1))


def load(paths: list[Path]) -> tuple[dict[Job, dict[str, Any]], dict[str, Any]]:
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


# Main -----------------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    standard = [name for name, engine in ENGINES.items() if engine.standard]
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1b3", "7b"])
    parser.add_argument(
        "--engines", nargs="*", choices=list(ENGINES), default=standard, help="none: the ceilings alone"
    )
    parser.add_argument("--model", choices=list(MODELS), default="plain", help="hf: transformers' LlamaForCausalLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a job")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--lorica", type=json.loads, default={}, help="JSON laid over the configuration of Lorica's rows"
    )
    parser.add_argument("--trace", action="store_true", help="write a timeline of one more step in the first round")
    parser.add_argument("--limit_s", type=float, default=240.0, help="longest time for one job")
    parser.add_argument("--time_limit_s", type=float, default=float("inf"), help="start no job that would end later")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_step")
    parser.add_argument("--doc", type=Path, help="a Markdown file whose tables are replaced")
    parser.add_argument("--report", type=Path, nargs="+", help="make the tables of these jobs.json; run nothing")
    parser.add_argument("--job", choices=[CEILINGS, *ENGINES], help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.job is not None:
        job_main(options)
    if options.report:
        results, what = load(options.report)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        results, what = run_all(options), {key: getattr(options, key) for key in ("model", "warmup", "steps")}
    made = tables(results, what)
    text = "\n\n".join(f"### {name}\n\n{table}" for name, table in made.items()) + "\n"
    print("\n" + text)
    if not options.report:
        (options.out / "tables.md").write_text(text)
    if options.doc is not None:
        for name, table in made.items():
            replace_between(options.doc, f"gpu_step {name}", table)
    failed = {(job.size, job.engine): o for job, o in results.items() if "log" in o and "problem" in o}
    for (size, engine), outcome in failed.items():
        print(f"{engine} at {size} failed; the end of its log:\n{outcome['log']}\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
