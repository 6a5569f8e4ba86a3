"""One job as data: command, environment and place for the output of each rank. Starts nothing; reserves the port."""

from __future__ import annotations

import difflib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorica.launcher.cores import Share
from lorica.launcher.flags import LaunchError, Options
from lorica.launcher.reaper import JOB_ID
from lorica.launcher.slots import VISIBLE, Slots
from lorica.mesh import BOUND_CORES

Kind = Literal["script", "module", "command"]
LOOPBACK = "127.0.0.1"
STORE_FD = (
    "LORICA_STORE_FD"  # rank 0: the number of an inherited socket, bound to MASTER_ADDR:MASTER_PORT, not listening
)
BOOTSTRAP = Path(__file__).with_name("bootstrap.py")


@dataclass(frozen=True)
class RankCommand:
    """How one rank is started. `report` is where it writes why it failed; `log` None: it writes to the terminal."""

    rank: int
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    report: Path
    log: Path | None


@dataclass(frozen=True)
class Job:
    """All ranks of this node. `folder` is temporary and holds the reports; `store` is the reserved port's socket."""

    job_id: str
    folder: Path
    ranks: tuple[RankCommand, ...]
    store: socket.socket


def target_kind(options: Options) -> Kind:
    """What the script argument names."""
    if options.module:
        return "module"
    return "command" if options.no_python else "script"


def require_target(kind: Kind, name: str) -> None:
    """Raise LaunchError unless the script or program exists; modules are looked up by the ranks themselves."""
    if kind == "command" and shutil.which(name) is None:
        raise LaunchError(f"program {name!r} was not found, or may not be executed. Fix: give its path.")
    if kind != "script" or os.path.exists(name):
        return
    path = Path(name)
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    hint = f"did you mean {folder / near[0]}?" if near else f"look at the spelling; this folder is {os.getcwd()}."
    raise LaunchError(f"script {name!r} does not exist. Fix: {hint}")


def reserve_port(addr: str, port: int) -> socket.socket:
    """Bind `addr`:`port` (0: any free one) without listening, so that nobody else is given the port meanwhile.

    Two sockets with SO_REUSEADDR may share an address while neither listens: rank 0 can listen on this very socket
    (LORICA_STORE_FD), as `lorica.init_distributed` does, or bind the port again, as torch.distributed does alone.

    Raises:
        LaunchError: if the port is taken, or the address is not one of this machine.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((addr, port))
    except OSError as error:
        sock.close()
        raise LaunchError(
            f"ranks cannot meet at {addr}:{port} ({error.strerror or error}). "
            "Fix: leave --master_port out to get a free port, and --master_addr for the loopback address."
        ) from None
    return sock


def log_paths(folder: str, num_procs: int) -> tuple[Path | None, ...]:
    """The log file of each rank in `folder`, which is made if need be; all None without a folder."""
    if not folder:
        return (None,) * num_procs
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise LaunchError(
            f"--enable_each_rank_log={folder} is no folder that can be made ({reason}). Fix: DIR."
        ) from None
    stamp = time.strftime("%Y%m%d%H%M%S")
    return tuple(Path(folder, f"{stamp}_rank{rank}.log").absolute() for rank in range(num_procs))


def make_job(
    options: Options,
    target: Sequence[str],
    slots: Slots,
    shares: Sequence[Share],
    environ: Mapping[str, str],
    folder: Path,
) -> Job:
    """Put the job together: reserves the port and makes the log folder.

    Args:
        target: the script and its arguments.
        shares: the CPU cores of each rank.
        environ: the launcher's environment, which the ranks inherit.
        folder: an empty temporary folder of this job.
    """
    store = reserve_port(options.master_addr or LOOPBACK, options.master_port)
    job_id = f"{os.getpid()}-{secrets.token_hex(8)}"
    outer = environ.get(JOB_ID)
    inherited = {name: value for name, value in environ.items() if name not in _NOT_INHERITED}
    common = inherited | _job_environ(store, slots, job_id, f"{outer}/{job_id}" if outer else job_id)
    if options.master_addr in ("", LOOPBACK) and _LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        common.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)  # else gloo asks the host name's resolver
    logs = log_paths(options.enable_each_rank_log, slots.num_procs)
    ranks = []
    for rank, (share, log) in enumerate(zip(shares, logs, strict=True)):
        threads = {"OMP_NUM_THREADS": str(share.num_threads)}  # torch would take every core in every rank
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank)}
        if share.cpus is not None:
            own[BOUND_CORES] = str(len(share.cpus))
        if rank == 0:
            own[STORE_FD] = str(store.fileno())
        report = folder / f"rank{rank}.json"
        local_rank = () if options.no_local_rank else (f"--local_rank={rank}",)  # where DeepSpeed puts it
        argv = (*_bootstrap(target_kind(options), rank, report, share), target[0], *local_rank, *target[1:])
        ranks.append(RankCommand(rank, argv, threads | common | own, report, log))
    return Job(job_id, folder, tuple(ranks), store)


_NOT_INHERITED = frozenset({"TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE", STORE_FD, BOUND_CORES})
_LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"


def _job_environ(store: socket.socket, slots: Slots, run_id: str, job_id: str) -> dict[str, str]:
    """The variables that all ranks share: torchrun's names and DeepSpeed's."""
    addr, port = store.getsockname()
    world_size = str(slots.num_procs)
    environ = {
        JOB_ID: job_id,
        "MASTER_ADDR": addr,
        "MASTER_PORT": str(port),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "ROLE_WORLD_SIZE"), world_size),
        **dict.fromkeys(("CROSS_SIZE", "GROUP_WORLD_SIZE"), "1"),
        **dict.fromkeys(("CROSS_RANK", "GROUP_RANK"), "0"),
        "TORCHELASTIC_RUN_ID": run_id,  # clients ask torch.distributed.is_torchelastic_launched()
        **dict.fromkeys(("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"), "0"),
    }
    return environ | ({VISIBLE: ",".join(slots.devices)} if slots.devices else {})


def _bootstrap(kind: Kind, rank: int, report: Path, share: Share) -> tuple[str, ...]:
    """The interpreter and our first code in the rank, with what it needs to know as JSON."""
    spec = {"kind": kind, "rank": rank, "launcher_pid": os.getpid(), "report": str(report), "cpus": share.cpus}
    return (sys.executable, "-u", str(BOOTSTRAP), json.dumps(spec))
