"""AdamW on the CPU: Lorica's native kernel, torch's fused AdamW and DeepSpeedCPUAdam, beside a STREAM triad. One table.

    python benchmarks/cpu_kernel_bench.py [--numel 100000000] [--threads 1 2 4 8 16] [--doc docs/kernels.md]

Each number of threads has a process of its own, with OMP_NUM_THREADS set and as many cores allowed (hyper-threads only
where there are no more cores), the same for all contenders; its rounds go through the contenders one after another.
Medians. Bytes are those that the algorithm must move, and GB/s are of those: a read for ownership is not counted.

    split            bf16 gradient; 16 + 16 bits of the master, two fp32 moments: 2 + 12 read, 12 written = 26
    out of place     the same, into other memory
    fp32 master      fp32 gradient, master and moments, bf16 parameter out: 4 + 12 read, 12 + 2 written = 30
    update alone     fp32 gradient, master and moments: 4 + 12 read, 12 written = 28
    with casts       bf16 gradient to fp32, update, master to bf16: what one pass does in 2 + 12 + 12 + 2 = 28
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.documents import replace_between  # noqa: E402
from lorica.kernels import native  # noqa: E402
from lorica.kernels.hyper import adam_hyper  # noqa: E402
from lorica.launcher.cores import allowed_cpus, physical_cores  # noqa: E402
from lorica.launcher.report import cpu_model  # noqa: E402

MARKER = "cpu kernel table"
ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEP = 10
TRIAD = "STREAM triad"


class Contender(NamedTuple):
    """One way to do a step, and the bytes per element that it must move."""

    name: str
    bytes_per_element: int
    call: Callable[[], object]


class States(NamedTuple):
    """What all contenders work on."""

    grad: Tensor  # bf16
    grad_fp32: Tensor
    master: Tensor  # fp32
    weight: Tensor  # bf16
    low: Tensor  # int16
    m: Tensor
    v: Tensor


def make_states(numel: int) -> States:
    """Values as in training: nothing is a denormal, which would be slow."""
    grad_fp32 = torch.randn(numel).mul_(1e-3)
    master = torch.randn(numel).mul_(0.02)
    low = torch.randint(-(2**15), 2**15, (numel,), dtype=torch.int16)
    return States(grad_fp32.bfloat16(), grad_fp32, master, master.bfloat16(), low, grad_fp32 * 0.1, grad_fp32.square())


def of_lorica(states: States, pool: native.Pool) -> list[Contender]:
    """The triad and the forms of the native kernel."""
    s = states
    hyper = adam_hyper(STEP, decoupled=True, bias_correction=True, **ADAM)
    into = native.Destination(s.low.clone(), s.weight.clone(), (s.m.clone(), s.v.clone()))
    options: dict[str, Any] = {"coef": 0.5, "hyper": hyper, "pool": pool}
    a, b, c = s.grad_fp32, s.master, s.m
    rows = s.master.numel() // 16 * 16
    spare = torch.empty_like(a)[:rows]
    return [
        Contender(TRIAD, 12, lambda: native.triad(spare, b[:rows], c[:rows], 0.5, pool)),
        Contender("Lorica, split", 26, lambda: native.adam(s.low, s.weight, s.grad, s.m, s.v, **options)),
        Contender(
            "Lorica, split, out of place",
            26,
            lambda: native.adam(s.low, s.weight, s.grad, s.m, s.v, **options, into=into),
        ),
        Contender("Lorica, fp32 master", 30, lambda: native.adam(s.master, s.weight, a, s.m, s.v, **options)),
    ]


def of_torch(states: States) -> list[Contender]:
    """torch.optim.AdamW(fused=True)."""
    parameter = torch.nn.Parameter(states.master)
    return with_and_without_casts(
        "torch fused AdamW", states, parameter, torch.optim.AdamW([parameter], fused=True, **ADAM)
    )


def of_deepspeed(states: States) -> list[Contender]:
    """DeepSpeedCPUAdam, compiled by its first use.

    Raises:
        ImportError: if DeepSpeed is not installed.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(states.master)
    optimizer = DeepSpeedCPUAdam([parameter], adamw_mode=True, **ADAM)
    return with_and_without_casts("DeepSpeedCPUAdam", states, parameter, optimizer)


def with_and_without_casts(name: str, states: States, parameter: Any, optimizer: Any) -> list[Contender]:
    """An optimizer on an fp32 gradient, and with the two passes that a bf16 model adds."""
    parameter.grad = states.grad_fp32

    def whole() -> None:
        states.grad_fp32.copy_(states.grad)
        optimizer.step()
        states.weight.copy_(parameter.detach())

    return [Contender(f"{name}, update alone", 28, optimizer.step), Contender(f"{name}, with casts", 28, whole)]


def measure(numel: int, num_threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of every contender in this process: medians over interleaved rounds."""
    torch.set_num_threads(num_threads)
    states, pool = make_states(numel), native.Pool(num_threads, sorted(allowed_cpus())[:num_threads])
    contenders, missing = [*of_lorica(states, pool), *of_torch(states)], {}
    try:
        contenders += of_deepspeed(states)
    except Exception as error:  # not installed, or its compiler failed: the table says which
        missing["DeepSpeedCPUAdam"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    seconds: dict[str, list[float]] = {each.name: [] for each in contenders}
    for each in contenders:
        each.call()
    for _ in range(rounds):
        for each in contenders:
            start = time.perf_counter()
            each.call()
            seconds[each.name].append(time.perf_counter() - start)
    rows = {each.name: (statistics.median(seconds[each.name]), each.bytes_per_element) for each in contenders}
    return {"rows": rows, "missing": missing, "isa": native.isa()}


def cores_for(num_threads: int) -> list[int]:
    """One CPU of each physical core first, then their siblings."""
    cpus = allowed_cpus()
    cores = physical_cores(cpus)
    first = [group[0] for group in cores]
    return [*first, *(cpu for group in cores for cpu in group[1:])][:num_threads]


def in_a_process(arguments: argparse.Namespace, num_threads: int) -> dict[str, Any]:
    """`measure` in a fresh process that may use `num_threads` CPUs only."""
    command = [sys.executable, __file__, "--numel", str(arguments.numel), "--rounds", str(arguments.rounds)]
    command += ["--inside", str(num_threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "PYTHONUNBUFFERED": "1"}
    cores = cores_for(num_threads)
    bind = (lambda: os.sched_setaffinity(0, cores)) if hasattr(os, "sched_setaffinity") else None
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=bind)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(numel: int, results: dict[int, dict[str, Any]]) -> str:
    """The results as Markdown."""
    first = next(iter(results.values()))
    cpuinfo = Path("/proc/cpuinfo")
    model = cpu_model(cpuinfo.read_text() if cpuinfo.exists() else "")
    lines = [
        f"{model}, {first['isa']}, torch {torch.__version__}, {numel:,} parameters, medians. "
        + " ".join(f"{name}: {why}." for name, why in first["missing"].items()),
        "",
        "| threads | AdamW by | ns per parameter | bytes | GB/s | of triad |",
        "|---|---|---|---|---|---|",
    ]
    for num_threads, result in results.items():
        seconds, size = result["rows"][TRIAD]
        peak = size * numel / seconds / 1e9
        for name, (seconds, size) in result["rows"].items():
            rate = size * numel / seconds / 1e9
            lines.append(
                f"| {num_threads} | {name} | {seconds / numel * 1e9:.3f} | {size} | {rate:.1f} | {rate / peak:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print; with --doc, also put the table into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=100_000_000)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--doc", type=Path)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(measure(arguments.numel, arguments.inside, arguments.rounds)))
        return
    if not native.available():
        sys.exit(native.why_not())
    counts = [count for count in arguments.threads if count <= len(allowed_cpus())]
    text = table(arguments.numel, {count: in_a_process(arguments, count) for count in counts})
    print(text)
    if arguments.doc:
        replace_between(arguments.doc, MARKER, text)


if __name__ == "__main__":
    main()
