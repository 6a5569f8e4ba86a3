"""Runs any element-wise `torch.optim.Optimizer` on flat planes. Owns the adapter; probe.py says what is element-wise.

Each tile of a segment becomes the only parameter of a throw-away copy of the client's optimizer:
  tensors shaped like the parameter   are views of the moments planes (their names come from the probe)
  everything else in `state[param]`   is a scalar (step, mu_product, ...), kept once per param group
  hyper-parameters                    are read from the client's own group dicts at every step: schedules write there
All tiles and segments of a group take the same step, so they start from the same scalars [Note: scalars].

[Note: scalars]
A group has many tiles and units, and each runs the whole `step()` of the class. The scalars from before the step must
serve all of them, whatever their order (units may be updated by worker threads): `_Scalars` keeps the values before and
after the current step and turns "after" into "before" when the step number changes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.optim.base import FlatOptimizerBase, Granularity, PlaneCollectives, PlaneLayout, Segment
from lorica.optim.tiles import Tile, run_in_tiles

# One Python-level step() a tile: larger tiles than the fused kernels take, to make its fixed cost small.
CPU_TILE_NUMEL = 1 << 20


class Scalars(NamedTuple):
    """What one step of a torch optimizer changes besides parameter-shaped tensors."""

    state: dict[str, Any]  # of `state[param]`: 0-d tensors, numbers
    group: dict[str, Any]  # keys that step() wrote into its param group


class StateShape(NamedTuple):
    """How a class keeps its state of one parameter, found out by probe.py.

    Attributes:
        moments: names of the tensors shaped like the parameter.
        scalars: the rest, after one step (to continue where only the step number is known).
        fills: values of the moments of a class that makes its state in its constructor; None: in the first step.
        first: the scalars of such a class before the first step.
    """

    moments: tuple[str, ...]
    scalars: dict[str, Any]
    fills: dict[str, float] | None = None
    first: Scalars | None = None


@dataclass
class _Record:
    """The scalars of one param group around step number `step`; None before the first step."""

    group: dict[str, Any]
    step: int
    before: Scalars | None
    after: Scalars | None


@dataclass
class _ScalarBook:
    """The records of all groups, by identity of the group dict."""

    records: dict[int, _Record] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def before(self, group: dict[str, Any], step: int) -> Scalars | None:
        """The scalars to start step number `step` from."""
        with self.lock:
            record = self.records.setdefault(id(group), _Record(group, step, None, None))
            if record.step != step:
                record.step, record.before = step, record.after
            return record.before

    def keep(self, group: dict[str, Any], scalars: Scalars) -> None:
        """Note the scalars after the current step; every tile of the group brings the same."""
        with self.lock:
            self.records[id(group)].after = scalars

    def get(self, group: dict[str, Any]) -> Scalars | None:
        """The latest scalars of a group."""
        record = self.records.get(id(group))
        return None if record is None else record.after

    def put(self, group: dict[str, Any], scalars: Scalars) -> None:
        """Start from `scalars` at the next step."""
        self.records[id(group)] = _Record(group, -1, None, scalars)


class TorchOptimizer(FlatOptimizerBase):
    """A torch optimizer as a `FlatOptimizer` of element granularity.

    Args:
        template: an instance of the class; its param groups are used as they are, its state is not touched.
        shape: how the class keeps its state.
    """

    granularity: Granularity = "element"

    def __init__(self, template: torch.optim.Optimizer, shape: StateShape) -> None:
        self.template = template
        self.shape = shape
        self.moments = shape.moments
        self.defaults: dict[str, Any] = dict(template.defaults)
        self.tile_numel: int | None = None
        self._book = _ScalarBook()

    def init_state(self, segment: Segment) -> None:
        """Fill the moments of a class that makes them in its constructor; others make them in the first step."""
        for name, value in (self.shape.fills or {}).items():
            segment.state[name].fill_(value)

    @torch.no_grad()
    def update(
        self,
        segments: Sequence[Segment],
        *,
        coef: Tensor | float,
        step: int,
        apply: Tensor | None = None,
        comm: PlaneCollectives | None = None,
        layout: PlaneLayout | None = None,
    ) -> None:
        """See `FlatOptimizer.update`; `comm` and `layout` are unused."""
        for segment in segments:
            before = self._book.before(segment.group, step) or self._start(step)
            on_cpu = segment.master.device.type == "cpu"
            tile_numel = self.tile_numel or (CPU_TILE_NUMEL if on_cpu else None)
            update_tile = partial(self._update_tile, before=before)
            run_in_tiles(segment, coef, update_tile, tile_numel=tile_numel, own_grad=True)

    def state_dict(self, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The scalars of each group, in the order of `groups`; None for a group that was never stepped."""
        latest = [self._book.get(group) for group in groups]
        return {"scalars": [None if item is None else item._asdict() for item in latest]}

    def load_state_dict(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Continue from saved scalars.

        Raises:
            ValueError: if they are of another number of groups.
        """
        saved = state["scalars"]
        if len(saved) != len(groups):
            raise ValueError(
                f"{type(self.template).__name__}: expected the saved scalars of {len(groups)} param groups, got "
                f"{len(saved)}. Fix: load them into an optimizer with the same groups."
            )
        for group, scalars in zip(groups, saved, strict=True):
            if scalars is not None:
                self._book.put(group, Scalars(dict(scalars["state"]), dict(scalars["group"])))

    def _update_tile(self, tile: Tile, *, before: Scalars | None) -> None:
        after = step_once(self.template, tile, self.moments, before)
        self._book.keep(tile.group, after)

    def _start(self, step: int) -> Scalars | None:
        """The scalars before `step`, for a group that this run has not stepped yet; None: the class makes them."""
        if step == 1:
            return self.shape.first
        unknown = sorted(set(self.shape.scalars) - {"step"})
        if unknown:
            raise RuntimeError(
                f"{type(self.template).__name__}: step {step} expected the scalars {unknown} of the steps before, got "
                "none. Fix: pass what FlatOptimizer.state_dict() saved to load_state_dict()."
            )
        return Scalars({name: _like(value, step - 1) for name, value in self.shape.scalars.items()}, {})


def step_once(template: torch.optim.Optimizer, tile: Tile, moments: tuple[str, ...], before: Scalars | None) -> Scalars:
    """Run one `step()` of the template's class on a tile; return the scalars after it.

    Args:
        moments: names in `tile.state`, in which the class's own tensors are kept from step to step.
        before: the scalars before; None for the first step, which lets the class create its state itself.
    """
    parameter = nn.Parameter(tile.master, requires_grad=not tile.group.get("differentiable", False))
    parameter.grad = tile.grad
    group = {**tile.group, **(before.group if before else {}), "params": [parameter]}
    read = dict(group)
    optimizer = copy_of(template, [group])
    if before is not None:
        scalars = {name: _placed(value, tile) for name, value in before.state.items()}
        optimizer.state[parameter] = {**scalars, **{name: tile.state[name] for name in moments}}
    type(optimizer).step(optimizer)
    after = dict(optimizer.state[parameter])
    for name in moments:
        value = after.pop(name)
        if value.data_ptr() != tile.state[name].data_ptr():
            tile.state[name].copy_(value)
    written = {key: value for key, value in group.items() if key not in read or not _same(value, read[key])}
    return Scalars(after, {**(before.group if before else {}), **written})


def copy_of(template: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """A shallow copy of `template` with other groups, no state and no hooks.

    A learning-rate schedule replaces the instance's `step` by one that counts: the copy goes back to the class's own.
    """
    optimizer = type(template).__new__(type(template))
    attributes = {key: value for key, value in vars(template).items() if key != "step"}
    hooks: dict[str, Any] = {
        key: OrderedDict() for key in attributes if key.startswith("_optimizer_") and key.endswith("_hooks")
    }
    vars(optimizer).update(attributes, **hooks, param_groups=groups, state=defaultdict(dict))
    return optimizer


def _placed(value: Any, tile: Tile) -> Any:
    """A copy of a scalar that a step may write, on the device where torch's fused and capturable variants want it."""
    if not isinstance(value, Tensor):
        return value
    on_device = tile.group.get("fused") or tile.group.get("capturable")
    return value.to(tile.master.device, copy=True) if on_device else value.clone()


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    return bool(left == right)


def _like(value: Any, count: int) -> Any:
    return torch.full_like(value, count) if isinstance(value, Tensor) else type(value)(count)
