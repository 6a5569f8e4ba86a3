"""Where an engine's planes live: asks the machine what it offers and the planner what fits, and makes the tiers.

Owns no rule of placement (`place/`) and moves no bytes (`update/`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lorica.config import Config
from lorica.config.offload import update_threads
from lorica.core.build import Blueprint, Outline, Where, plan_of
from lorica.core.flat import Site, dtype_of
from lorica.log import logger
from lorica.mesh import BOUND_CORES
from lorica.optim.base import FlatOptimizer
from lorica.place import Budgets, Constraints, Free, Placements, PlaneDemand, Speeds, place
from lorica.plan import UnitPlan
from lorica.tier import (
    Arena,
    Commit,
    HostTier,
    NvmeTier,
    PageLock,
    SwapFile,
    device_available_bytes,
    disk_available_bytes,
    host_available_bytes,
    measure,
    padded_bytes,
)
from lorica.update.agreement import least_of_all_ranks, raise_together
from lorica.update.build import Pipelines

MIN_SLACK_BYTES = 1 << 20  # of an arena or a swap file, for planes that are rounded up to pages


class Placed(NamedTuple):
    """What was decided: by name of the plane, where it lives; how records travel; the table for people."""

    where: Mapping[str, Where]
    pipelines: Pipelines
    table: str


def place_planes(
    config: Config,
    planes: Sequence[Outline],
    blueprint: Blueprint,
    optimizer: FlatOptimizer | None,
    site: Site,
    root_index: int,
) -> Placed:
    """Place the planes of one rank and make the tiers that they need, in `site.tiers`.

    Args:
        root_index: the unit whose parameters the whole forward needs.
    Raises:
        DoesNotFit: if the states do not fit into the budgets, with figures and with what would fit.
        ValueError: if the optimizer cannot work where the configuration wants its states.
    """
    zero = config.zero_optimization
    if zero.offload_optimizer.device == zero.offload_param.device == "none" or not planes:
        return Placed({}, Pipelines(), "")
    _check_optimizer(config, optimizer)
    moments = len(optimizer.moments) if optimizer is not None else 0
    first_use = sorted(planes, key=lambda plane: plane.unit_index != root_index)
    demands = [_demand(plane, plan_of(plane, blueprint), moments, root_index) for plane in first_use]
    on_cuda = site.device.type == "cuda"
    threads = update_threads(config.lorica.offload, zero.offload_optimizer, _num_cores())
    in_chunks = optimizer is not None and optimizer.runs_in_chunks
    placements = place(
        demands, _budgets(config, planes, site, on_cuda, in_chunks), _constraints(config, demands, site),
        Speeds.with_threads(threads),
    )  # fmt: skip
    where = {
        p.plane.name: Where(p.param, p.record or "device", _executor(p.record, p.executor, in_chunks))
        for p in placements.planes
    }
    guessed = _guessed(config, placements, where, on_cuda)
    placed = replace(blueprint, where=where)
    _together(site, lambda: _make_tiers(config, [(p, plan_of(p, placed)) for p in planes], optimizer, site, guessed))
    pipelines = Pipelines(
        chunk_numel=placements.chunk_numel,
        staging_bytes=placements.staging_bytes,
        num_buffers=zero.offload_optimizer.buffer_count,
        threads=threads,
        bind=on_cuda and (_local_ranks() == 1 or _is_bound()),
        guessed=guessed,
    )
    return Placed(where, pipelines, placements.table())


def _check_optimizer(config: Config, optimizer: FlatOptimizer | None) -> None:
    device = config.zero_optimization.offload_optimizer.device
    if device == "nvme" and optimizer is not None and not optimizer.runs_in_chunks:
        raise ValueError(
            f"offload_optimizer.device: expected an optimizer that updates element by element for states on NVMe, got "
            f'{type(optimizer).__name__}. Fix: use "cpu", or AdamW, Adam, Lion, SGD or Adagrad by configuration.'
        )


def _guessed(config: Config, placements: Placements, where: Mapping[str, Where], on_cuda: bool) -> frozenset[str]:
    """Planes that the CPU may update during backward, in what host memory is left: the last ones, first in backward."""
    wish = config.lorica.offload.speculate
    if wish is False or (wish is None and not on_cuda) or not config.lorica.offload.overlap:
        return frozenset()
    if config.lorica.offload.master == "stochastic":
        return frozenset()  # the record has no parameters of its own to be written beside: see `can_guess`
    left, found = placements.host.left, set()
    for placed in reversed(placements.planes):
        if placed.record != "host" or where[placed.plane.name].executor != "host":
            continue
        left -= placed.record_bytes + placed.plane.owned_numel * placed.plane.param_itemsize
        if left < 0:
            break
        found.add(placed.plane.name)
    return frozenset(found)


def _executor(record: str | None, executor: str | None, in_chunks: bool) -> str:
    """In the words of `UnitPlan.executor`."""
    return executor if executor is not None and in_chunks and record not in (None, "device") else "resident"


def _demand(plane: Outline, plan: UnitPlan, num_moments: int, root_index: int) -> PlaneDemand:
    layout = plane.layout
    return PlaneDemand.of(
        plane.name,
        plane.unit_index,
        plan,
        layout.numel,
        layout.num_shards,
        num_moments,
        trainable=plane.key.trainable,
        param_can_leave=plan.stage == 3 and not plane.whole and plane.unit_index != root_index,
    )


def _constraints(config: Config, demands: Sequence[PlaneDemand], site: Site) -> Constraints:
    units: dict[int, int] = {}
    for demand in demands:
        fresh = demand.numel * demand.param_itemsize if demand.trainable else 0  # before they are packed
        units[demand.unit_index] = units.get(demand.unit_index, 0) + fresh
    return Constraints.of(
        config,
        on_cuda=site.device.type == "cuda",
        ranks=site.shard.world_size,
        passing_bytes=max(units.values(), default=0),
    )


def _is_bound() -> bool:
    """Whether the launcher has bound this rank to cores of its own: it says so."""
    return BOUND_CORES in os.environ


def _num_cores() -> int:
    """Cores of this rank: those to which it is bound, or its share of those that all ranks here may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if _is_bound() else max(1, cores // _local_ranks())


def _local_ranks() -> int:
    """Ranks on this machine, as the launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))


# -- what there is -----------------------------------------------------------------------------------------------------


def _budgets(config: Config, planes: Sequence[Outline], site: Site, on_cuda: bool, in_chunks: bool) -> Budgets:
    zero = config.zero_optimization
    folder = zero.offload_optimizer.nvme_path
    uses_disk = folder is not None and in_chunks  # what must see whole planes cannot work on files
    host = host_available_bytes()
    free = Free(
        device_total=torch.cuda.get_device_properties(site.device).total_memory if on_cuda else host,
        device=device_available_bytes(site.device) + _held_on(site.device, planes) if on_cuda else host,
        host_total=host,
        host=host + _held_on(torch.device("cpu"), planes) * _local_ranks() if on_cuda else host,
        disk=disk_available_bytes(folder) if folder is not None else 0,
    )
    free = Free(*least_of_all_ranks(free, site))  # all ranks place alike, and refuse alike
    return Budgets.of(free, config.lorica.offload, on_cuda=on_cuda, uses_disk=uses_disk, ranks_on_host=_local_ranks())


def _held_on(device: torch.device, planes: Sequence[Outline]) -> int:
    """Bytes of the model as it is now: they become free as units take its values over."""
    params = [p for plane in planes for p in plane.params.values()]
    return sum(p.untyped_storage().nbytes() for p in params if p.device == device)


# -- tiers -------------------------------------------------------------------------------------------------------------


def _together(site: Site, make_tiers: Callable[[], None]) -> None:
    """Make the tiers, or raise on all ranks and leave nothing."""
    problem: Exception | None = None
    try:
        make_tiers()
    except Exception as found:  # raised below, by all ranks
        problem = found
    try:
        raise_together(problem, site, "lorica.initialize: making room for offloaded states")
    except BaseException:
        for tier in site.tiers.values():
            tier.close()
        raise


def _make_tiers(
    config: Config,
    planes: Sequence[tuple[Outline, UnitPlan]],
    optimizer: FlatOptimizer | None,
    site: Site,
    guessed: frozenset[str],
) -> None:
    zero = config.zero_optimization
    wanted = [want for plane, plan in planes for want in _planes_of(plane, plan, optimizer)]
    for plane, plan in planes:
        if plane.name in guessed:
            wanted += _spare_of(plane, plan, optimizer)
    on_host = [(numel, dtype) for tier, numel, dtype in wanted if tier == "host"]
    on_disk = [(numel, dtype) for tier, numel, dtype in wanted if tier == "nvme"]
    pin = zero.offload_optimizer.pin_memory or zero.offload_param.pin_memory
    streams = site.streams
    page_lock = PageLock(streams.register, streams.unregister) if pin and streams is not None else None
    arena = Arena(sum(padded_bytes(n * d.itemsize) for n, d in on_host) + MIN_SLACK_BYTES, page_lock=page_lock)
    tier = HostTier(site.device, pin_memory=pin, arena=arena, page_lock=page_lock)
    _log_commit(tier.prepare(on_host), locked=page_lock is not None)
    site.tiers["host"] = tier
    if on_disk:
        assert zero.offload_optimizer.nvme_path is not None
        file = SwapFile(
            zero.offload_optimizer.nvme_path,
            sum(padded_bytes(n * d.itemsize) for n, d in on_disk) + MIN_SLACK_BYTES,
            rank=torch.distributed.get_rank() if torch.distributed.is_initialized() else 0,
            threads=config.aio.num_threads,
            block_bytes=config.aio.request_bytes,
        )
        site.tiers["nvme"] = NvmeTier(file)
        _log_disk(zero.offload_optimizer.nvme_path, sum(n * d.itemsize for n, d in on_disk))


def _planes_of(plane: Outline, plan: UnitPlan, optimizer: FlatOptimizer | None) -> list[tuple[str, int, torch.dtype]]:
    """Tier, elements and dtype of every plane that is allocated outside the device, in this rank's part."""
    layout, found = plane.layout, []
    owned = layout.shard_numel if plan.master.sharded else layout.numel
    if plan.param.sharded:
        found.append((plan.param.tier, layout.shard_numel, dtype_of(plan.param.dtype)))
    return found + _record_of(plan, owned, optimizer) if plane.key.trainable else found


def _record_of(plan: UnitPlan, owned: int, optimizer: FlatOptimizer | None) -> list[tuple[str, int, torch.dtype]]:
    if optimizer is None:
        return []
    master = [] if plan.master_is_param else [(plan.master.tier, owned, dtype_of(plan.master.dtype))]
    moments = plan.moment_planes(optimizer.moments)
    return master + [(plan.moments.tier, plane.numel(owned), dtype_of(plane.dtype)) for plane in moments]


def _spare_of(plane: Outline, plan: UnitPlan, optimizer: FlatOptimizer | None) -> list[tuple[str, int, torch.dtype]]:
    """The same for a spare record of the plane: master, moments, parameters."""
    owned = plane.layout.shard_numel if plan.master.sharded else plane.layout.numel
    record = _record_of(plan, owned, optimizer)
    return [("host", numel, dtype) for _, numel, dtype in record] + [("host", owned, dtype_of(plan.param.dtype))]


def _log_disk(folder: str, num_bytes: int) -> None:
    """What the disk makes of a step, where that matters: every step reads and writes all states on it."""
    if num_bytes < 1 << 30:
        return
    disk = measure(folder)
    seconds = num_bytes / disk.read + num_bytes / disk.write
    logger.info(
        "%s reads at %.1f GB/s and writes at %.1f GB/s%s: %.1f s a step for %.1f GiB of states, if nothing hides it",
        folder, disk.read / 1e9, disk.write / 1e9, "" if disk.direct else " (page cache included)",
        seconds, num_bytes / 2**30,
    )  # fmt: skip


def _log_commit(commit: Commit, *, locked: bool) -> None:
    if commit.num_bytes >= 1 << 30:
        what = "page-locked" if locked else "made"
        logger.info("%.1f GiB of host memory %s in %.1f s", commit.num_bytes / 2**30, what, commit.seconds)
