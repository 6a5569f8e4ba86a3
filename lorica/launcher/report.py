"""`lorica report`: what this machine and this installation offer, as tables. Measures nothing and changes nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lorica.launcher.cores import allowed_cpus, cpu_quota, num_cores, physical_cores
from lorica.launcher.devices import find_accelerators

GIB = 2**30

# What matters to the kernels, of the hundred flags that a CPU has.
ISA = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
    "sve2",
)

REQUIRED = ("numpy", "pydantic", "safetensors", "rich")
OPTIONAL = ("transformers", "tokenizers", "peft", "tensorboard", "wandb")


class Feature(NamedTuple):
    """A kernel or a transport: whether it works here, and a word on why, or on what it needs."""

    name: str
    available: bool
    remark: str


def report(argv: Sequence[str]) -> int:
    """Print the report; returns 0, or 1 if torch cannot be imported, which is then what the report says."""
    if argv:
        print(f"lorica report: expected no arguments, got {list(argv)}. Fix: lorica report.", file=sys.stderr)
        return 2
    console = Console()
    torch, problem = import_torch()
    console.print(table("Versions", ("what", "version"), version_rows(torch, problem)))
    console.print(table("CPU", ("what", "value"), cpu_rows(torch)))
    if torch is None:
        return 1
    console.print(table("Accelerators", ("device", "name", "memory", "free", "capability"), device_rows(torch)))
    for title, features in (("Transports", transports(torch)), ("Kernels", kernels(torch))):
        rows = [(one.name, "[green]yes[/]" if one.available else "[red]no[/]", one.remark) for one in features]
        console.print(table(title, ("name", "available", "remark"), rows))
    return 0


def import_torch() -> tuple[ModuleType | None, str]:
    """Import torch, or return why it cannot be: a broken installation is what a report is asked for."""
    try:
        return importlib.import_module("torch"), ""
    except (ImportError, OSError) as error:
        return None, f"cannot be imported: {error}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for people; empty cells where a row is short."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def version_rows(torch: Any | None, problem: str) -> list[tuple[str, str]]:
    """Versions of what training depends on, installed or not."""
    from lorica import __version__

    rows = [("lorica", __version__), ("python", f"{platform.python_version()}  {sys.executable}")]
    rows.append(("operating system", f"{platform.system()} {platform.release()} {platform.machine()}"))
    rows.append(("torch", problem if torch is None else str(torch.__version__)))
    if torch is not None:
        rows.append(("CUDA of torch", torch.version.cuda or "none: built for the CPU"))
        rows.append(("NCCL", nccl_version(torch)))
        rows.append(("Triton", installed("triton")))
    rows += [(name, installed(name)) for name in REQUIRED]
    return rows + [(name, installed(name)) for name in OPTIONAL if installed(name) != NOT_INSTALLED]


NOT_INSTALLED = "not installed"


def installed(package: str) -> str:
    """The version of an installed package, by its metadata: nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def nccl_version(torch: Any) -> str:
    """NCCL's version as torch was built with it."""
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "not in this torch"
    return ".".join(map(str, torch.cuda.nccl.version()))


def cpu_rows(torch: Any | None) -> list[tuple[str, str]]:
    """Cores, instruction sets and memory."""
    cpuinfo = _read("/proc/cpuinfo")
    cpus = allowed_cpus()
    quota = cpu_quota()
    limit = "" if quota == float("inf") else f", limited to {quota:g} by the control group"
    rows = [
        ("model", cpu_model(cpuinfo)),
        ("cores", f"{len(physical_cores(cpus))} cores, {len(cpus)} CPUs of {os.cpu_count()} allowed{limit}"),
        ("threads per process", f"{num_cores()} for one process, max(1, {num_cores()} // N) for N"),
        ("instruction sets", " ".join(instruction_sets(cpuinfo)) or "unknown"),
    ]
    if torch is not None:
        rows.append(("torch uses", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"))
    rows.append(("memory", memory(_read("/proc/meminfo"))))
    if os.path.isdir("/dev/shm"):
        shm = os.statvfs("/dev/shm")
        total, free = shm.f_frsize * shm.f_blocks, shm.f_frsize * shm.f_bavail
        rows.append(("/dev/shm", f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"))
    return rows


def cpu_model(cpuinfo: str) -> str:
    """The name of the CPU in /proc/cpuinfo, or what Python knows."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def instruction_sets(cpuinfo: str) -> list[str]:
    """Those of `ISA` that /proc/cpuinfo lists."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(match.group(1).split()) if match else set()
    return [name for name in ISA if name in flags]


def memory(meminfo: str) -> str:
    """Total and available memory in /proc/meminfo."""
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", meminfo, re.MULTILINE))
    if len(found) < 2:
        return "unknown"
    total, free = (int(found[name]) * 1024 / GIB for name in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GiB, {free:.1f} GiB available"


def device_rows(torch: Any) -> list[tuple[str, ...]]:
    """One row per CUDA device that torch sees, or one that says why there is none."""
    if not torch.cuda.is_available():
        machine = find_accelerators()
        visible = f"torch sees none of {machine.count} (CUDA_VISIBLE_DEVICES, driver)"
        return [("none", machine.reason or visible, "", "", "")]
    rows: list[tuple[str, ...]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}, {properties.multi_processor_count} SMs"
        rows.append((f"cuda:{index}", properties.name, f"{total / GIB:.1f} GiB", f"{free / GIB:.1f} GiB", capability))
    return rows


def transports(torch: Any) -> list[Feature]:
    """How ranks can exchange tensors here."""
    distributed = torch.distributed
    available: Callable[[], bool] = distributed.is_available
    gloo = available() and distributed.is_gloo_available()
    nccl = available() and distributed.is_nccl_available()
    cuda = bool(torch.cuda.is_available())
    linux = sys.platform == "linux"
    return [
        Feature("nccl", nccl and cuda, "GPU to GPU" if nccl and cuda else "needs a CUDA build of torch and a GPU"),
        Feature("gloo", gloo, "CPU processes, over sockets" if gloo else "not in this torch"),
        Feature(
            "shm", linux and gloo, "CPU processes of one machine, through shared memory" if linux else "needs Linux"
        ),
        Feature("host-staged", gloo and cuda, "ranks that share a GPU" if cuda else "needs a GPU"),
    ]


def kernels(torch: Any) -> list[Feature]:
    """Which kernels run here; a formula or torch's own operations run in place of those that do not."""
    from lorica.optim.fused import has_kernel

    features = []
    cuda = bool(torch.cuda.is_available())
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        for name in ("adamw", "adam", "sgd", "adagrad"):
            there = has_kernel(name, device)
            features.append(
                Feature(f"fused {name} ({device})", there, "of torch" if there else "the formula runs instead")
            )
    return [native_kernels(), *features, triton_kernels(torch), Feature("Liger", *_liger())]


def native_kernels() -> Feature:
    """Lorica's own optimizer kernels for the CPU, and the instruction set that they use."""
    from lorica.kernels import native

    there = native.available()
    remark = f"one-pass optimizers: {native.isa()}" if there else native.why_not()
    return Feature("native kernels (cpu)", there, remark)


def triton_kernels(torch: Any) -> Feature:
    """Lorica's own kernels."""
    from lorica.kernels import runtime

    what = "one-pass optimizers, gradient packing, norms, activations, rotary, cross-entropy"
    if not runtime.available():
        return Feature("Triton kernels", False, f"{what}: Triton is not installed; it comes with torch for CUDA")
    if not torch.cuda.is_available():
        return Feature("Triton kernels", False, f"{what}: need a GPU")
    there = runtime.runs_on(torch.device("cuda", 0))
    return Feature("Triton kernels", there, what if there else f"{what}: need an NVIDIA GPU from Volta on")


def _liger() -> tuple[bool, str]:
    """An optional second library behind the configuration's `kernels.library`."""
    version = installed("liger-kernel")
    there = version != NOT_INSTALLED
    return (
        there,
        f'{version}, for "kernels": {{"library": "liger"}}' if there else "optional: pip install liger-kernel",
    )


def _read(path: str) -> str:
    place = Path(path)
    return place.read_text(encoding="utf-8", errors="replace") if place.is_file() else ""
