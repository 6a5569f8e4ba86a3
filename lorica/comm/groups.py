"""Process groups: joining the job (`init_distributed`) and choosing a transport (`make_collectives`). Moves no data."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from lorica.comm.base import Collectives, Streams
from lorica.comm.environment import Place, find_place
from lorica.comm.gloo import Gloo
from lorica.comm.host_staged import HostStaged
from lorica.comm.links import Listener
from lorica.comm.nccl import Nccl
from lorica.comm.shared_memory import SharedMemory
from lorica.comm.solo import Solo

logger = logging.getLogger("lorica")

BOTH = "cpu:gloo,cuda:nccl"  # objects and CPU tensors by gloo, without touching the GPU; CUDA tensors by NCCL
TRANSPORTS = ("auto", "gloo", "shm", "nccl", "host-staged")


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: object = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the job's default process group, unless this process is in one already.

    Args:
        dist_backend: a backend of torch.distributed; None chooses: NCCL with gloo beside it if every process of this
            host has a GPU of its own, else gloo.
        auto_mpi_discovery: also look at the variables of Open MPI, MVAPICH, MPICH and SLURM (and set torchrun's).
        distributed_port: port of rank 0 where the environment names none.
        verbose: log one line on rank 0 of a job of several processes.
        timeout: how long a collective may take; None: DEEPSPEED_TIMEOUT minutes, or 10.
        init_method: a URL for torch.distributed instead of the environment; needs `rank` and `world_size`.
        dist_init_required: False refuses to make a group: one must exist.
        config: accepted for DeepSpeed's signature; the process group needs nothing from it.
        rank, world_size: instead of the environment's.
    Raises:
        ValueError: if the environment or the arguments describe a job in part.
        RuntimeError: if `dist_init_required` is False and there is no group.
    """
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise RuntimeError(
            "init_distributed: dist_init_required is False, but torch.distributed has no process group. "
            "Fix: call torch.distributed.init_process_group first, or leave dist_init_required out."
        )
    place = _find(rank, world_size, init_method, discover_mpi=auto_mpi_discovery, default_port=distributed_port)
    timeout = timeout or timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "10")))
    _set_cuda_device(place)
    backend = dist_backend or default_backend(place)
    if place is None:
        _init_alone(backend, timeout)
    elif init_method is not None:
        dist.init_process_group(backend, init_method, timeout, place.world_size, place.rank)
    else:
        for name, value in place.variables().items():
            os.environ.setdefault(name, value)  # torch.distributed and clients such as transformers read them
        store = _loopback_store(place, timeout)
        dist.init_process_group(backend, store=store, timeout=timeout, rank=place.rank, world_size=place.world_size)
    atexit.register(_leave)
    if verbose and place is not None and place.world_size > 1 and place.rank == 0:
        logger.info("%d ranks (from %s) over %s", place.world_size, place.source, backend)


def default_backend(place: Place | None) -> str:
    """Return the backend for this process: gloo without CUDA or where processes share a GPU."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return "gloo"
    local_world_size = place.local_world_size if place is not None else 1
    return "gloo" if local_world_size > torch.cuda.device_count() else BOTH


def _find(
    rank: int, world_size: int, init_method: str | None, *, discover_mpi: bool, default_port: int
) -> Place | None:
    """Return the place that the arguments give this process, or else the environment."""
    if rank >= 0 or world_size >= 0:
        if not 0 <= rank < world_size:
            raise ValueError(
                f"init_distributed: expected 0 <= rank < world_size, got rank={rank}, world_size={world_size}. "
                "Fix: pass both, or neither and let the environment say."
            )
        named = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        place = find_place({**named, **os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size)})
        return place._replace(source="arguments") if place is not None else None
    place = find_place(discover_mpi=discover_mpi, default_port=default_port)
    if place is None and init_method is not None:
        raise ValueError(
            f"init_distributed: init_method={init_method!r} says where ranks meet, but nothing says which rank "
            "this is. Fix: pass rank and world_size, or set RANK and WORLD_SIZE."
        )
    return place


def _loopback_store(place: Place, timeout: timedelta) -> Store | None:
    """Rank 0's rendezvous store in a job of Lorica's launcher; None: torch.distributed makes its own.

    The launcher hands rank 0 a socket that is bound to the address it chose: the store that torch.distributed makes
    would listen on every network interface. The other ranks connect as torch.distributed does alone, which puts its
    keys under "default_pg".
    """
    bound = os.environ.pop("LORICA_STORE_FD", None)
    if bound is None or place.rank != 0:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, place.world_size, is_master=True, timeout=timeout, master_listen_fd=int(bound))
    return PrefixStore("default_pg", store)


def _leave() -> None:
    """Leave the default group at a normal exit: NCCL warns about groups that nobody left."""
    failed = getattr(sys, "last_value", None) is not None
    if dist.is_initialized() and not failed:
        dist.destroy_process_group()


def _set_cuda_device(place: Place | None) -> None:
    if place is not None and torch.cuda.is_available() and torch.cuda.device_count() > 0:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())


def _init_alone(backend: str, timeout: timedelta) -> None:
    store: Any = dist.HashStore()
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


# -- transports ------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """What one rank tells the others, so that all choose the same transport."""

    rank: int
    ranks: tuple[int, ...]  # the group that it asks for
    requested: str
    device: str  # "cpu", or "cuda" and the identity of the GPU
    host: str  # equal for ranks that can reach each other by abstract unix sockets
    address: str  # where its listener waits; empty where it has none


def make_collectives(
    ranks: Sequence[int],
    device: torch.device | str,
    streams: Streams | None = None,
    transport: str = "auto",
    timeout: timedelta | None = None,
) -> Collectives:
    """Return the collectives of this rank's group `ranks` on `device`, by the fastest transport there is.

    Collective over the default group: every rank of the job calls it at the same time, each with its own group (the
    groups of one mesh axis). One rank needs no process group.

    Args:
        ranks: global ranks of the group in ascending order, with this rank among them.
        device: where the tensors are.
        streams: needed on CUDA where ranks share a GPU.
        transport: "auto", or one of "gloo", "shm", "nccl", "host-staged"; on CUDA "gloo" and "shm" mean host-staged
            over them.
        timeout: how long a collective may take; None: that of the default group.
    Raises:
        ValueError: if the ranks of the job ask for groups that do not fit, or the transport cannot serve the group.
    """
    device = torch.device(device)
    group = tuple(ranks)
    _require_request(group, transport)
    if not dist.is_initialized():
        if group != (0,):
            raise RuntimeError(
                f"make_collectives: a group of several ranks {group} needs a process group. "
                "Fix: call lorica.init_distributed() first."
            )
        return Solo(device)
    if dist.get_world_size() == 1 and group == (0,):
        return Solo(device)
    listener = Listener() if sys.platform == "linux" and len(group) > 1 and transport != "gloo" else None
    try:
        members = _exchange(group, device, transport, listener)
        choices = {m.ranks: choose_transport([members[r] for r in m.ranks]) for m in members}
        return _build(group, members, choices, device, streams, listener, timeout or _default_timeout())
    finally:
        if listener is not None:
            listener.close()


def choose_transport(members: Sequence[Member]) -> str:
    """Return the transport of a group: "solo", "nccl", "gloo", "shm", "host-staged:gloo" or "host-staged:shm".

    Raises:
        ValueError: if the requested transport cannot serve the group.
    """
    if len(members) == 1:
        return "solo"
    requested = members[0].requested
    one_host = len({m.host for m in members}) == 1 and all(m.address for m in members)
    on_cpu = members[0].device == "cpu"
    own_gpus = not on_cpu and len({(m.host, m.device) for m in members}) == len(members)
    _require_possible(requested, members, one_host=one_host, on_cpu=on_cpu, own_gpus=own_gpus)
    if requested == "nccl" or (requested == "auto" and own_gpus):
        return "nccl"
    inner = "shm" if one_host and requested != "gloo" else "gloo"
    return inner if on_cpu else f"host-staged:{inner}"


def _require_possible(
    requested: str, members: Sequence[Member], *, one_host: bool, on_cpu: bool, own_gpus: bool
) -> None:
    ranks = members[0].ranks
    if requested == "shm" and not one_host:
        raise ValueError(
            f"make_collectives: transport 'shm' needs all ranks on one Linux host, but {ranks} are not. "
            "Fix: transport='auto' or 'gloo'."
        )
    if requested == "nccl" and not own_gpus:
        raise ValueError(
            f"make_collectives: transport 'nccl' needs a GPU of its own for each rank of {ranks}, got "
            f"{[m.device for m in members]}. Fix: transport='auto'."
        )
    if requested == "host-staged" and on_cpu:
        raise ValueError(
            f"make_collectives: transport 'host-staged' is for CUDA tensors, got device 'cpu' (ranks {ranks}). "
            "Fix: transport='auto'."
        )


def _require_request(group: tuple[int, ...], transport: str) -> None:
    if transport not in TRANSPORTS:
        raise ValueError(f"make_collectives: transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}.")
    rank = dist.get_rank() if dist.is_initialized() else 0
    if list(group) != sorted(set(group)) or rank not in group:
        raise ValueError(
            f"make_collectives: ranks must be ascending, different and contain this rank {rank}, got {group}. "
            "Fix: take them from Mesh.group_of(rank, axis)."
        )


def _exchange(group: tuple[int, ...], device: torch.device, transport: str, listener: Listener | None) -> list[Member]:
    """Tell all ranks of the job about this one; return what all of them said, by rank."""
    address = listener.address if listener is not None else ""
    mine = Member(dist.get_rank(), group, transport, _device_identity(device), _host_identity(), address)
    members: list[Member] = [mine] * dist.get_world_size()
    dist.all_gather_object(members, mine)
    for member in members:
        for other in member.ranks:
            if other >= len(members) or (members[other].ranks, members[other].requested) != (
                member.ranks,
                member.requested,
            ):
                raise ValueError(
                    f"make_collectives: rank {member.rank} asks for group {member.ranks} by {member.requested!r}, but "
                    f"rank {other} asks for {members[other].ranks if other < len(members) else 'nothing'}"
                    f"{' by ' + repr(members[other].requested) if other < len(members) else ''}. "
                    "Fix: all ranks must call it at the same time, each with its group of the same mesh axes."
                )
    return members


def _build(
    group: tuple[int, ...],
    members: list[Member],
    choices: Mapping[tuple[int, ...], str],
    device: torch.device,
    streams: Streams | None,
    listener: Listener | None,
    timeout: timedelta,
) -> Collectives:
    pg = _new_groups(group, choices, timeout)  # also where this rank's own group needs none: it is collective
    choice = choices[group]
    if choice == "solo":
        return Solo(device)
    if choice == "nccl":
        assert pg is not None
        return Nccl(pg, device)
    inner: Collectives
    if choice.endswith("shm"):
        assert listener is not None
        addresses = [members[r].address for r in group]
        inner = SharedMemory(group.index(dist.get_rank()), addresses, listener, timeout.total_seconds())
    else:
        assert pg is not None
        inner = Gloo(pg)
    if not choice.startswith("host-staged"):
        return inner
    if streams is None:
        inner.close()
        raise ValueError(
            f"make_collectives: ranks {group} share a GPU, so their tensors travel through host memory, which needs "
            "streams, got None. Fix: pass streams=lorica.core.streams.make_streams(device)."
        )
    warnings.warn(
        f"Ranks {group} share a GPU: collectives go through host memory ({choice}). For NCCL give each rank its own.",
        stacklevel=3,
    )
    return HostStaged(inner, device, streams)


def _new_groups(
    group: tuple[int, ...], choices: Mapping[tuple[int, ...], str], timeout: timedelta
) -> dist.ProcessGroup | None:
    """Make the process groups of all ranks' groups, in the same order everywhere, and return this rank's."""
    mine: dist.ProcessGroup | None = None
    for ranks in sorted(choices):
        choice = choices[ranks]
        if choice == "nccl" or choice.endswith("gloo"):
            backend = "nccl" if choice == "nccl" else "gloo"
            made = dist.new_group(list(ranks), timeout=timeout, backend=backend)
            mine = made if ranks == group else mine
    return mine


def _default_timeout() -> timedelta:
    """Return the timeout that the default group was made with, which its store keeps."""
    store: Any = dist.distributed_c10d._get_default_store()
    timeout: timedelta = store.timeout
    return timeout


def _device_identity(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    properties: Any = torch.cuda.get_device_properties(device)
    return f"cuda {properties.uuid}"


def _host_identity() -> str:
    """Name the host, the running kernel and the network namespace: abstract unix sockets reach just as far.

    A sandbox may hide the last two; then the host's name decides.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/net")
    return " ".join(
        [
            platform.node(),
            boot_id.read_text(encoding="ascii").strip() if boot_id.exists() else "",
            os.readlink(namespace) if namespace.is_symlink() else "",
        ]
    )
