"""Training with offloaded state on one GPU, all engines in one table: owns the order of jobs and the command line.

    python benchmarks/offload.py --cases 3b:floor,lorica-host,deepspeed-3-ratio-0.4 3b@4 --rounds 2 --time_limit_s 560
    python benchmarks/offload.py --probe                                  # what the links carry
    python benchmarks/offload.py --train 40 --size 18b --time_limit_s 500 # a loss curve on real text
    python benchmarks/offload.py --report runs/offload/*.json --doc docs/benchmarks-offload.md       # needs no GPU
    python benchmarks/offload.py --cases tiny tiny@4 --steps 2            # a dry run, any device

A case is a size, `@` how many micro-batches make a step (1), `:` which engines (those marked standard). Every engine is
a job of its own, a fresh process; the jobs of a round take turns, and numbers are medians over rounds of a job's median
over steps. Steps are timed without a wait between them (offload_job.py says why). Results are written after every job.

A job is ended when the machine has less than 3 GiB of host memory left: its row says at how much. Machines whose memory
grows as it is used want `--host_gib`, how much they will have.

DeepSpeed travels as a wheel, as gpu_step.py describes. Its CPUAdam is compiled before the first job that needs it, with
that machine's compiler; options of torch's pinned allocator that this torch refuses are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.documents import replace_between  # noqa: E402
from benchmarks.gpu_ceilings import the_device  # noqa: E402
from benchmarks.gpu_job import write_and_exit  # noqa: E402
from benchmarks.gpu_rounds import Job, job_environment, load, run_process, run_rounds, save  # noqa: E402
from benchmarks.llama import SIZES  # noqa: E402
from benchmarks.offload_engines import DEEPSPEED, ENGINES  # noqa: E402
from benchmarks.offload_host import GIB, HostWatch, left_bytes, lift_memlock, total_bytes, wait_for_memory  # noqa: E402
from benchmarks.offload_job import Case, measure  # noqa: E402
from benchmarks.offload_probe import probe_all, probe_table  # noqa: E402
from benchmarks.offload_tables import tables  # noqa: E402
from benchmarks.offload_train import curve_table, train  # noqa: E402

SHARED = ("warmup", "steps")  # options that the runs of one report must share
ALLOCATOR = "expandable_segments:True"
PINNED = ("pinned_use_cuda_host_register:True", "pinned_num_register_threads:8", "pinned_max_round_threshold_mb:128")
COMPILE_LIMIT_S = 240.0


# Jobs -----------------------------------------------------------------------------------------------------------------


def run_job(job: Job, options: argparse.Namespace, limit_s: float, *more: str) -> dict[str, Any]:
    """Run one job in a process of its own, its host memory watched.

    Args:
        more: further words of its command line.
    """
    before = left_bytes()
    settings = {
        "job": job.engine,
        "size": job.size,
        "warmup": options.warmup,
        "steps": options.steps,
        "lorica": json.dumps(options.lorica),
        "folder": options.folder,
        "out": options.out,
    }
    arguments = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    arguments += ["--init", options.init] if options.init else []
    arguments += ["--trace"] if options.trace and job.round == 0 else []
    environment = environment_of(job.engine, options)
    outcome = run_process(
        [str(Path(__file__).resolve()), *arguments, *more],
        limit_s,
        environment=environment,
        watch=HostWatch(int((options.host_gib or total_bytes() / GIB) * GIB)),
        keep_log=True,
    )
    wait_for_memory(before - GIB)
    own = options.lorica if job.engine.startswith("lorica") else options.peer_env
    return outcome | {"with": {"init": options.init, "own": own}, "environment": environment}


def environment_of(name: str, options: argparse.Namespace) -> dict[str, str]:
    """The variables of an engine's job; prepares what DeepSpeed needs at the first of its jobs."""
    engine = ENGINES[name]
    wished = options.peer_env if engine.environment else {}
    variables = engine.environment | {"PYTORCH_CUDA_ALLOC_CONF": accepted_allocator(engine.pinned)} | wished
    if engine.library == "deepspeed":
        variables = {"TORCH_CUDA_ARCH_LIST": job_environment()["TORCH_CUDA_ARCH_LIST"] or "9.0"} | variables
        compile_cpu_adam(variables["TORCH_CUDA_ARCH_LIST"])
    return variables


@cache
def accepted_allocator(pinned: bool) -> str:
    """Options of torch's allocators, those for pinned memory only as far as this torch knows them."""
    if not pinned or the_device().type != "cuda":
        return ALLOCATOR
    known = [ALLOCATOR]
    if refusal(everything := ",".join([ALLOCATOR, *PINNED])) is None:
        return everything
    for option in PINNED:
        said = refusal(",".join([*known, option]))
        if said is None:
            known.append(option)
        else:
            print(f"torch refuses the allocator option {option}: {said}", flush=True)
    return ",".join(known)


def refusal(allocator: str) -> str | None:
    """What torch says to these options of its allocators; None: it takes them."""
    command = "import torch; torch.empty(8).pin_memory(); torch.ones(1, device='cuda')"
    variables = job_environment() | {"PYTORCH_CUDA_ALLOC_CONF": allocator}
    done = subprocess.run([sys.executable, "-c", command], env=variables, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["nothing"])[-1][:200] if done.returncode else None


@cache
def compile_cpu_adam(architectures: str) -> None:
    """Let DeepSpeed's loader compile its CPU optimizer, so that no job's time has that in it."""
    begin = time.monotonic()
    command = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", command],
            env=job_environment() | DEEPSPEED | {"TORCH_CUDA_ARCH_LIST": architectures},
            capture_output=True,
            text=True,
            timeout=COMPILE_LIMIT_S,
        )
        said = "" if done.returncode == 0 else f": {done.stderr.strip()[-2000:]}"
        print(f"DeepSpeed's CPUAdam {'compiled' if not said else 'did not compile'}{said}", end="", flush=True)
    except subprocess.TimeoutExpired:
        print("DeepSpeed's CPUAdam did not compile in time", end="", flush=True)
    print(f" ({time.monotonic() - begin:.0f} s)", flush=True)


def run_all(options: argparse.Namespace) -> dict[Job, dict[str, Any]]:
    """All rounds; results are written after every job."""
    jobs = [
        Job(str(case), engine, number)
        for number in range(options.rounds)
        for case, engines in options.cases
        for engine in engines
    ]

    def keep(results: dict[Job, dict[str, Any]], job: Job) -> None:
        print(
            f"{job.size:6} round {job.round + 1}/{options.rounds}  {job.engine:24} {summary(results[job])}", flush=True
        )
        save(options.out / "jobs.json", results, shared(options))

    return run_rounds(
        jobs,
        lambda job, limit_s: run_job(job, options, limit_s),
        limit_s=options.limit_s,
        time_limit_s=options.time_limit_s,
        keep=keep,
    )


def summary(outcome: dict[str, Any]) -> str:
    """One line of progress."""
    watched = outcome["host_watch"]
    host = f"host {watched['most_rss_bytes'] / GIB:5.1f} GiB (least left {watched['least_left_bytes'] / GIB:.1f})"
    end = f"(job {outcome['job_s']:.0f} s)"
    if "problem" in outcome:
        return f"{outcome['problem']}  {host}  {end}"
    return (
        f"{outcome['median_s']:.4f} s  {outcome['tokens'] / outcome['median_s']:8,.0f} tok/s  "
        f"{outcome['peak']['allocated_bytes'] / GIB:6.2f} GiB  {host}  start {outcome['start_s']:.1f} s  "
        f"loss {outcome['losses'][0]:.4f}  {end}"
    )


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """The options that belong to the results."""
    return {key: getattr(options, key) for key in SHARED}


# Modes ----------------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, str]:
    """Run the cases; the tables by name."""
    results = run_all(options)
    for job, outcome in results.items():
        if outcome.get("problem", "").startswith("exit code"):
            print(f"{job.engine} at {job.size} failed; the end of its log:\n{outcome['log']}\n", file=sys.stderr)
    return tables(results, shared(options))


def report(options: argparse.Namespace) -> dict[str, str]:
    """The tables of files that earlier runs wrote: rounds of jobs, loss curves, probes."""
    files = {path: json.loads(path.read_text()) for path in options.report}
    rounds = [path for path, found in files.items() if "jobs" in found]
    made = tables(*load(rounds)) if rounds else {}
    for found in files.values():
        if "records" in found:
            made["probe"] = probe_table(found)
        if "losses" in found:
            made[f"train {Case.parse(found['size']).size}"] = curve_table(found)
    return made


def learn(options: argparse.Namespace) -> dict[str, str]:
    """Train on text in a process of its own; the curve's table by name."""
    case = Case.parse(options.size)
    curve = options.out / f"train-{case.size}.json"
    curve.unlink(missing_ok=True)
    words = ["--train", str(options.train), "--curve", str(curve), "--lr", str(options.lr)]
    words += ["--time_limit_s", str(options.time_limit_s)]
    outcome = run_job(Job(str(case), options.engine, 0), options, options.time_limit_s, *words)
    if "problem" in outcome:
        print(f"{options.engine} at {case}: {outcome['problem']}\n{outcome['log']}", flush=True)
    if not curve.exists():
        return {}
    found = json.loads(curve.read_text()) | {"host_watch": outcome["host_watch"]}
    curve.write_text(json.dumps(found, indent=1))
    return {f"train {case.size}": curve_table(found)}


def probe(options: argparse.Namespace) -> dict[str, str]:
    """Ask the machine; the table by name."""
    path = options.out / "probe.json"
    probe_all(the_device(), options.folder, path)
    return {"probe": probe_table(json.loads(path.read_text()))}


# Main -----------------------------------------------------------------------------------------------------------------


def case_and_engines(text: str) -> tuple[Case, list[str]]:
    """`size`, `size@accumulation`, `size:engine,engine`: a case and its engines."""
    head, _, names = text.partition(":")
    case = Case.parse(head)
    engines = names.split(",") if names else [name for name, engine in ENGINES.items() if engine.standard]
    unknown = [name for name in engines if name not in ENGINES]
    if case.size not in SIZES or unknown:
        raise argparse.ArgumentTypeError(f"expected one of {list(SIZES)} and engines of {list(ENGINES)}, got {text}")
    return case, engines


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", type=case_and_engines, default=[], help="SIZE[@ACCUMULATION][:ENGINE,ENGINE,...]")
    add("--rounds", type=int, default=1)
    add("--steps", type=int, default=5, help="timed steps of a job")
    add("--warmup", type=int, default=2)
    add(
        "--init",
        choices=["fp32", "bf16"],
        help="of the weights that engines get; not given: bf16 from 10 B parameters on",
    )
    add("--lorica", type=json.loads, default={}, help="JSON laid over the configuration of Lorica's rows")
    add("--peer_env", type=json.loads, default={}, help="JSON of variables for rows of DeepSpeed and FSDP2")
    add("--folder", default=tempfile.gettempdir(), help="of the NVMe tier and the disk's probe")
    add("--host_gib", type=float, help="host memory of the machine; not given: what it says at present")
    add("--limit_s", type=float, default=180.0, help="longest time for one job")
    add("--time_limit_s", type=float, default=float("inf"), help="start no job that would end later")
    add("--trace", action="store_true", help="write a timeline of one more step in the first round")
    add("--train", type=int, metavar="STEPS", help="train on text instead")
    add("--size", default="18b", help="of --train")
    add("--engine", choices=list(ENGINES), default="lorica-auto", help="of --train")
    add("--lr", type=float, default=3e-5, help="of --train")
    add("--probe", action="store_true", help="measure PCIe, page locks, the CPU's update and the disk instead")
    add("--out", type=Path, default=ROOT / "runs" / "offload")
    add("--doc", type=Path, help="a Markdown file whose tables are replaced")
    add(
        "--report",
        type=Path,
        nargs="+",
        help="make the tables of what earlier runs wrote (JSON); run nothing",
    )
    for name in ("--curve", "--result"):
        add(name, type=Path, help=argparse.SUPPRESS)
    add("--job", choices=list(ENGINES), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    options = parse()
    if options.job is not None:
        write_and_exit(options.result, lambda device: (train if options.train else measure)(options, device))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the job that runs, too
    lift_memlock()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        f"host memory: {left_bytes() / GIB:.1f} GiB left of {total_bytes() / GIB:.1f}, {os.cpu_count()} cores",
        flush=True,
    )
    mode = report if options.report else probe if options.probe else learn if options.train else compare
    made = mode(options)
    text = "\n\n".join(f"### {name}\n\n{table}" for name, table in made.items()) + "\n"
    print("\n" + text)
    if not options.report:
        name = next(iter(made), "none").replace(" ", "-") if options.probe or options.train else "tables"
        (options.out / f"{name}.md").write_text(text)
    if options.doc is not None:
        for name, table in made.items():
            replace_between(options.doc, f"offload {name}", table)
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
