"""From planes and their plans to executors. Decides nothing: where a record lives and who updates it is in its plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorica.core.flat import Site
from lorica.core.gradient import GradPlane
from lorica.core.streams import Streams
from lorica.kernels import native
from lorica.layout import chunk_size
from lorica.optim.base import FlatOptimizer
from lorica.update.executor import Executor
from lorica.update.on_host import OnHost
from lorica.update.pieces import Record, chunks_of, master_travels, record_of, segments
from lorica.update.resident import Resident
from lorica.update.schedule import Update
from lorica.update.streamed import Streamed


@dataclass(frozen=True)
class Pipelines:
    """How records travel.

    Attributes:
        chunk_numel: elements that travel together.
        staging_bytes: device memory for records on their way through the device.
        num_buffers: host buffers of the host executor.
        threads: CPU threads that update; None: as many as PyTorch uses.
        bind: keep each of them on a core of its own.
        guessed: names of planes that the host executor may update ahead of the verdict, in spare memory.
    """

    chunk_numel: int = 1 << 24
    staging_bytes: int = 1 << 30
    num_buffers: int = 4
    threads: int | None = None
    bind: bool = False
    guessed: frozenset[str] = frozenset()


def make_update(
    optimizer: FlatOptimizer,
    planes: Sequence[GradPlane],
    groups: Sequence[dict[str, Any]],
    site: Site,
    streams: Streams,
    pipelines: Pipelines,
) -> Update:
    """Allocate the moments of `planes` and make the executors that their plans name.

    Args:
        planes: in the order of their first use in a step.
    """
    for plane in planes:
        plane.flat.alloc_moments(optimizer.moments)
        _init_moments(optimizer, plane, groups)
    resident = [p for p in planes if p.flat.plan.executor == "resident" or not optimizer.runs_in_chunks]
    executors: list[Executor] = [Resident(optimizer, resident, groups, site)] if resident else []
    pool = _pool(pipelines) if any(p.flat.plan.executor == "host" for p in planes) else None
    others: dict[Any, list[GradPlane]] = {}
    for plane in planes:
        if plane not in resident:
            others.setdefault(_kind(plane), []).append(plane)
    streamed_numel = sum(_owned(alike) for kind, alike in others.items() if kind[0] == "device")
    for kind, alike in others.items():
        chunk = pipelines.chunk_numel
        if kind[0] == "host":
            executors.append(
                OnHost(
                    optimizer,
                    alike,
                    groups,
                    site,
                    streams,
                    chunk_numel=chunk,
                    num_slots=max(2, pipelines.num_buffers),
                    pool=pool,
                    guessed=[plane for plane in alike if plane.flat.name in pipelines.guessed],
                )
            )
        else:
            share = pipelines.staging_bytes * _owned(alike) // streamed_numel
            widest = max(chunk_size(plane.flat.owned.numel(), chunk) for plane in alike)
            slots = max(1, int(share // (widest * bytes_per_element(alike[0]))))
            executors.append(Streamed(optimizer, alike, groups, site, streams, chunk_numel=chunk, num_slots=slots))
    return Update(optimizer, executors, groups, site)


def _pool(pipelines: Pipelines) -> native.Pool | None:
    """Threads of their own for the updates on the CPU; None: those that PyTorch's own threads allow."""
    if pipelines.threads is None or not native.available():
        return None
    cores: list[int] | None = None
    if pipelines.bind and hasattr(os, "sched_getaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        cores = mine[-pipelines.threads :] if len(mine) >= pipelines.threads else None
    return native.Pool(pipelines.threads, cores)


def _init_moments(optimizer: FlatOptimizer, plane: GradPlane, groups: Sequence[dict[str, Any]]) -> None:
    """Values of moments that do not start at zero."""
    flat, record = plane.flat, record_of(plane.flat)
    no_grad = torch.empty(0)
    if all(isinstance(state, torch.Tensor) for state in record.state.values()):
        record = record._replace(master=flat.owned)
        for segment in segments(flat, record, no_grad, groups, 0, flat.owned.numel()):
            optimizer.init_state(segment)
        return
    for chunk in chunks_of([plane], 1 << 22):
        ranges = {name: record.range_of(each, chunk.low, chunk.high) for name, each in record.state.items()}
        state = {name: torch.zeros(b - a, dtype=record.state[name].dtype) for name, (a, b) in ranges.items()}
        here = Record(torch.empty(chunk.numel), None, state)
        for segment in segments(flat, here, no_grad, groups, chunk.low, chunk.high):
            optimizer.init_state(segment)
        for name, values in state.items():
            if values.any():  # a fresh file reads as zeros
                record.state[name].store(ranges[name][0], values)


def _kind(plane: GradPlane) -> Any:
    """What planes must share to go through one ring: who updates them, dtypes, and which tensors have to travel."""
    record = record_of(plane.flat)
    stored = [record.master, record.out, *record.state.values()]
    return plane.flat.plan.executor, plane.dtype, tuple((type(s), getattr(s, "dtype", None), _place(s)) for s in stored)


def _place(stored: Any) -> str:
    return str(getattr(stored, "device", "")) if stored is not None else ""


def _owned(planes: Sequence[GradPlane]) -> int:
    return sum(plane.flat.owned.numel() for plane in planes)


def bytes_per_element(plane: GradPlane) -> float:
    """Bytes of a record that travel for each element."""
    record = record_of(plane.flat)
    stored = [*([record.master] if master_travels(plane.flat) else []), *record.state.values()]
    if record.out is not None and record.out.device != plane.flat.site.device:
        stored.append(record.out)
    return float(sum(each.dtype.itemsize * each.numel() for each in stored)) / int(record.master.numel())
