"""Where a process stands in a job, read from the environment: torchrun's, MPI's or SLURM's variables. Opens nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """A process's place in a job and where the ranks of the job meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    source: str  # which family of variables said so

    def variables(self) -> dict[str, str]:
        """Return the place as torchrun's environment variables, without the ones that are not known."""
        known = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }
        return {**known, "LOCAL_WORLD_SIZE": str(self.local_world_size)} if self.local_world_size else known


class _Family(NamedTuple):
    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


# SLURM: the step's variables, which only srun sets. A batch script itself sees SLURM_NTASKS, but is one process.
_LAUNCHERS = (
    _Family(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Family(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Family("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    _Family("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def find_place(
    environ: Mapping[str, str] = os.environ, *, discover_mpi: bool = True, default_port: int = 29500
) -> Place | None:
    """Return the place that the environment gives this process; None for a plain process.

    Raises:
        ValueError: if only some of the variables are set, or one is not a number.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _torchrun_place(environ, default_port)
    if discover_mpi:
        for family in _LAUNCHERS:
            if family.rank in environ and family.world_size in environ:
                return _launcher_place(environ, family, default_port)
    return None


def _torchrun_place(environ: Mapping[str, str], default_port: int) -> Place:
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in environ]
    world_size = _number(environ, "WORLD_SIZE", 1)
    if world_size > 1:
        missing += [name for name in ("MASTER_ADDR",) if name not in environ]
    if missing:
        raise ValueError(
            f"The environment describes a job in part: expected {', '.join(TORCHRUN)}, but {', '.join(missing)} "
            "is not set. Fix: start with `lorica` or `torchrun`, or set all of them (or none for one process)."
        )
    return Place(
        rank=_number(environ, "RANK", 0),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", 0),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", 0),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT", default_port),
        source="RANK and WORLD_SIZE",
    )


def _launcher_place(environ: Mapping[str, str], family: _Family, default_port: int) -> Place:
    world_size = _number(environ, family.world_size, 1)
    local_world_size = _first_count(environ.get(family.local_world_size, "0"))
    return Place(
        rank=_number(environ, family.rank, 0),
        world_size=world_size,
        local_rank=_number(environ, family.local_rank, 0),
        local_world_size=local_world_size,
        master_addr=_master_addr(environ, family, world_size, local_world_size),
        master_port=_number(environ, "MASTER_PORT", default_port),
        source=family.name,
    )


def _master_addr(environ: Mapping[str, str], family: _Family, world_size: int, local_world_size: int) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if family.name == "SLURM":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if nodes:
            return first_host(nodes)
    if world_size == local_world_size or world_size == 1:
        return "127.0.0.1"
    raise ValueError(
        f"{family.name} started {world_size} ranks on several hosts, but does not say where they meet. "
        "Fix: export MASTER_ADDR=<host of rank 0> (for mpirun: -x MASTER_ADDR=...)."
    )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list such as `gpu[03-05,9],login1`."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return prefix.split(",")[0]
    ranges, _, suffix = rest.partition("]")
    return prefix + ranges.split(",")[0].split("-")[0] + suffix.split(",")[0]


def _first_count(text: str) -> int:
    """Return 4 for "4" and for SLURM's "4(x2),3"."""
    digits = text.split(",")[0].split("(")[0]
    return int(digits) if digits.isdigit() else 0


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"Environment variable {name}: expected a whole number, got {text!r}. Fix: unset or correct it."
        ) from None
