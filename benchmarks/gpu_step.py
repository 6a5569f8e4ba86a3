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
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.documents import replace_between  # noqa: E402
from benchmarks.gpu_engines import ENGINES  # noqa: E402
from benchmarks.gpu_job import CEILINGS, job_main  # noqa: E402
from benchmarks.gpu_rounds import Job, load, run_process, run_rounds, save  # noqa: E402
from benchmarks.gpu_tables import GIB, tables  # noqa: E402
from benchmarks.llama import MODELS, SIZES  # noqa: E402


def run_job(job: Job, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run one job in a process of its own."""
    settings = {
        "job": job.engine,
        "model": options.model,
        "warmup": options.warmup,
        "steps": options.steps,
        "lorica": json.dumps(options.lorica),
        "out": options.out,
    }
    arguments = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    arguments += ["--sizes", job.size] if job.engine != CEILINGS else []
    arguments += ["--trace"] if options.trace and job.round == 0 else []
    return run_process([str(Path(__file__).resolve()), *arguments], limit_s)


def run_all(options: argparse.Namespace) -> dict[Job, dict[str, Any]]:
    """All rounds; results are written after every job."""
    jobs: list[Job] = []
    for number in range(options.rounds):
        jobs.append(Job("-", CEILINGS, number))
        jobs += [Job(size, engine, number) for size in options.sizes for engine in options.engines]
    what = {key: getattr(options, key) for key in ("model", "warmup", "steps", "lorica")}

    def keep(results: dict[Job, dict[str, Any]], job: Job) -> None:
        said = results[job].get("problem") or summary(results[job])
        print(f"{job.size:5} round {job.round + 1}/{options.rounds}  {job.engine:18} {said}", flush=True)
        save(options.out / "jobs.json", results, what)

    return run_rounds(
        jobs,
        lambda job, limit_s: run_job(job, options, limit_s),
        limit_s=options.limit_s,
        time_limit_s=options.time_limit_s,
        keep=keep,
    )


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
