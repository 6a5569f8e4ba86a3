"""Flat planes for the optimizer tests: lay parameters out, cut them into shards, update, gather. No processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorica.layout import Entry, Layout, build_layout
from lorica.optim import FlatOptimizer, Segment, Slice

Params = Mapping[str, Tensor]


class Done:
    def wait(self) -> None:
        pass


class Board:
    """Where the threads of a `ThreadComm` put their tensors."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.parts: list[Tensor] = [torch.empty(0)] * world_size

    def exchange(self, rank: int, part: Tensor) -> list[Tensor]:
        self.parts[rank] = part.clone()
        self.barrier.wait()
        everyone = list(self.parts)
        self.barrier.wait()
        return everyone


@dataclass
class ThreadComm:
    """The two collectives of `PlaneCollectives`, among threads; counts its calls."""

    rank: int
    world_size: int
    board: Board
    calls: list[str] = field(default_factory=list)

    def all_gather(self, shard: Tensor, full: Tensor) -> Done:
        assert full.numel() == self.world_size * shard.numel()
        self.calls.append("all_gather")
        full.copy_(torch.cat(self.board.exchange(self.rank, shard)))
        return Done()

    def all_reduce(self, x: Tensor) -> Done:
        assert x.dim() == 1
        self.calls.append("all_reduce")
        x.copy_(torch.stack(self.board.exchange(self.rank, x)).sum(0))
        return Done()


@dataclass
class Plane:
    """One plane of one rank (or, with world size 1, of a run without ranks)."""

    layout: Layout
    rank: int
    master: Tensor
    grad: Tensor
    out: Tensor | None
    moments: dict[str, Tensor]
    segments: list[Segment]

    def set_grads(self, grads: Params) -> None:
        start, stop = self.layout.shard_range(self.rank)
        self.grad.copy_(flatten(self.layout, grads)[start:stop])


def make_plane(
    optimizer: FlatOptimizer,
    params: Params,
    groups: Sequence[dict[str, Any]],
    *,
    group_of: Mapping[str, int] | None = None,
    world_size: int = 1,
    rank: int = 0,
    grad_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Plane:
    """The plane of `params` as rank `rank` of `world_size` holds it, cut into the segments of the param groups."""
    entries = [Entry(name, tuple(value.shape), (group_of or {}).get(name, 0)) for name, value in params.items()]
    layout = build_layout(entries, world_size)
    start, stop = layout.shard_range(rank)
    master = flatten(layout, params)[start:stop].clone().to(device)
    grad = torch.zeros(stop - start, dtype=grad_dtype, device=device)
    out = None if out_dtype is None else torch.zeros(stop - start, dtype=out_dtype, device=device)
    moments = {name: torch.zeros_like(master) for name in optimizer.moments}
    segments = []
    for part in layout.group_parts(start, stop):
        low, high = part.start - start, part.stop - start
        slots = layout.slots
        segment = Segment(
            master=master[low:high],
            grad=grad[low:high],
            out=None if out is None else out[low:high],
            state={name: plane[low:high] for name, plane in moments.items()},
            group=groups[part.group],
            slices=tuple(
                Slice(slots[o.slot].name, slots[o.slot].shape, o.offset, o.offset + o.end - o.begin, o.begin)
                for o in layout.overlaps(part.start, part.stop)
            ),
        )
        optimizer.init_state(segment)
        segments.append(segment)
    return Plane(layout, rank, master, grad, out, moments, segments)


def flatten(layout: Layout, values: Params) -> Tensor:
    plane = torch.zeros(layout.numel)
    for slot in layout.slots:
        plane[slot.start : slot.stop] = values[slot.name].detach().reshape(-1)
    return plane


def unflatten(layout: Layout, plane: Tensor) -> dict[str, Tensor]:
    return {slot.name: plane[slot.start : slot.stop].view(slot.shape) for slot in layout.slots}


def train(
    optimizer: FlatOptimizer,
    params: Params,
    steps: Sequence[Params],
    *,
    world_size: int = 1,
    groups: Sequence[dict[str, Any]] | None = None,
    group_of: Mapping[str, int] | None = None,
    coef: Tensor | float = 1.0,
    grad_dtype: torch.dtype = torch.float32,
    before_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Tensor]:
    """Run all steps rank after rank (element granularity); return the parameters."""
    groups = groups or optimizer.param_groups([{"params": []}], {})
    planes = [
        make_plane(
            optimizer, params, groups, group_of=group_of, world_size=world_size, rank=rank, grad_dtype=grad_dtype
        )
        for rank in range(world_size)
    ]
    for number, grads in enumerate(steps, start=1):
        before_step(number)
        for plane in planes:
            plane.set_grads(grads)
            optimizer.update(plane.segments, coef=coef, step=number)
    return unflatten(planes[0].layout, torch.cat([plane.master for plane in planes]))


def on_ranks(world_size: int, body: Callable[[ThreadComm], Any]) -> list[Any]:
    """Run `body` once per rank, in threads; return the results in rank order, raise the first error."""
    board = Board(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def call(rank: int) -> None:
        try:
            results[rank] = body(ThreadComm(rank, world_size, board))
        except BaseException as error:
            errors.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def random_params(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def random_steps(params: Params, num_steps: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Gradients of all magnitudes that occur, with some zeros."""
    generator = torch.Generator().manual_seed(seed)

    def grad(value: Tensor) -> Tensor:
        scale = 10.0 ** torch.randint(-4, 2, value.shape, generator=generator)
        keep = torch.rand(value.shape, generator=generator) > 0.05
        return torch.randn(value.shape, generator=generator) * scale * keep

    return [{name: grad(value) for name, value in params.items()} for _ in range(num_steps)]


def train_torch(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], params: Params, steps: Sequence[Params]
) -> dict[str, Tensor]:
    """The oracle: the plain torch optimizer over ordinary parameters."""
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in params.items()}
    optimizer = make(list(parameters.values()))
    for grads in steps:
        for name, parameter in parameters.items():
            parameter.grad = grads[name].clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def relative_error(got: Params, wanted: Params) -> float:
    """The largest error of a parameter, relative to its norm."""
    return max(float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def same_bits(got: Params, wanted: Params) -> bool:
    return all(torch.equal(got[name], wanted[name]) for name in wanted)
