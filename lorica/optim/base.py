"""The seam between the engine and its optimizers: segments of flat planes in, updated segments out.

Owns the types that cross that seam and what all optimizers share. Owns no formula (one file per optimizer), no plane
(core/) and no communication (the caller hands in the collectives).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Granularity = Literal["element", "tensor", "matrix"]


class Slice(NamedTuple):
    """The part of one parameter that lies in a segment: elements [offset, offset + stop - start) at [start, stop)."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int


@dataclass
class Segment:
    """One contiguous range of one flat plane that belongs to one optimizer param group.

    Attributes:
        master: [n] fp32 (fp64 for fp64 parameters), updated in place; or int16: the remainders of a split master, whose
            upper halves are `out` (see [Note: split master]; only for optimizers with `takes_split`); or bf16: the
            parameter itself, which has no master (only for optimizers with `takes_compact`).
        grad: [n] any float dtype, the raw gradient (summed, still loss-scaled); never written.
        out: [n] compute dtype, receives the rounded master; None if the master is the parameter itself.
        state: one [n] view in master dtype for each name in `FlatOptimizer.moments`; in a compact format the planes of
            `plan.UnitPlan.moment_planes`, some of which have an element for every 128.
        group: the live hyper-parameters, read at every step.
        slices: the parameters in this range, in plane order; what no slice covers is padding.
        start, salt: the number of the first element in the whole plane, and 32 bits that are the plane's own: what
            stochastic rounding depends on.
    """

    master: Tensor
    grad: Tensor
    out: Tensor | None
    state: dict[str, Tensor]
    group: dict[str, Any]
    slices: tuple[Slice, ...] = field(default=())
    start: int = 0
    salt: int = 0


class Waitable(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return once the result is valid for work issued by this thread."""
        ...


class PlaneCollectives(Protocol):
    """The two collectives that optimizers coarser than one element need, over the ranks that share the plane."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_gather(self, shard: Tensor, full: Tensor) -> Waitable:
        """Gather `shard` [n] of every rank into `full` [world_size * n]; `shard` may be its own part of `full`."""
        ...

    def all_reduce(self, x: Tensor) -> Waitable:
        """Sum `x` over the ranks in place, with the same bits on all of them."""
        ...


class PlaneSlot(Protocol):
    """Where one parameter lies in the whole (unsharded) plane."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...


class PlaneLayout(Protocol):
    """The whole plane: every parameter's slot, the same on all ranks, and the padded length."""

    @property
    def slots(self) -> Sequence[PlaneSlot]: ...
    @property
    def numel(self) -> int: ...


@runtime_checkable
class FlatOptimizer(Protocol):
    """An optimizer over segments of flat planes.

    `granularity` says what one update needs to see: an element (any cut of a plane gives the same bits), a whole
    tensor (per-parameter norms: one all_reduce a plane) or a whole matrix (one all_gather a plane).
    """

    granularity: Granularity
    moments: tuple[str, ...]
    defaults: dict[str, Any]

    @property
    def takes_split(self) -> bool:
        """Whether segments may have a split master."""
        ...

    @property
    def takes_compact(self) -> bool:
        """Whether moments may be stored in few bytes and bf16 parameters do without a master: precision/compact.py."""
        ...

    @property
    def runs_in_chunks(self) -> bool:
        """Whether any cut of a plane may be updated in any order, by any thread, from `group` and `step` alone."""
        ...

    def runs_on_device(self, segment: Segment) -> bool:
        """Whether `update` of such a segment reads `coef` and `apply` on its device and never waits for them."""
        ...

    def prepare(self, groups: Sequence[dict[str, Any]], step: int, device: torch.device) -> None:
        """Before the updates of a step: bring what `groups` say to the device. `update` may then be captured in a CUDA
        graph, and replayed after another `prepare`."""
        ...

    def note_launched(self, apply: Tensor) -> None:
        """After the updates of a step that the device may have skipped. Args: apply: as in `update`."""
        ...

    def know_skipped(self, num_skipped: int) -> None:
        """The host has learnt of steps that the device skipped, and counts its steps without them from now on."""
        ...

    def init_state(self, segment: Segment) -> None:
        """Fill the moments of a new segment where they do not start at zero."""
        ...

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
        """Update all segments of this rank's shard of one flat plane.

        Args:
            segments: on one device. Coarser granularities are collective: a rank whose shard is all padding calls too.
            coef: multiplies the gradient (unscale x mean x clip); a float or a one-element tensor (no host sync).
            step: 1 for the first update; used for bias correction.
            apply: [1] int32, 0: change nothing (None: apply); read by the host unless `runs_on_device`.
            comm: the ranks that share the plane; unused (may be None) at element granularity.
            layout: the whole plane; unused (may be None) at element granularity.
        """
        ...

    def param_groups(self, groups: Sequence[dict[str, Any]], names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
        """Complete `groups` ({"params": [...], **overrides}) with the defaults, keeping the identity of the dicts.

        Muon splits a group in two; every other optimizer returns the dicts that it was given.
        """
        ...

    def state_dict(self, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What must be saved besides the moments planes: per-group scalars (nothing for the built-in optimizers)."""
        ...

    def load_state_dict(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave; `groups` in the same order."""
        ...


class FlatOptimizerBase:
    """What every built-in optimizer answers alike."""

    granularity: Granularity
    moments: tuple[str, ...]
    defaults: dict[str, Any]

    @property
    def takes_split(self) -> bool:
        """Only what updates element by element can take the master apart and put it together again as it goes."""
        return self.granularity == "element"

    @property
    def takes_compact(self) -> bool:
        """Not unless an optimizer says so."""
        return False

    @property
    def runs_in_chunks(self) -> bool:
        """Not unless an optimizer says so."""
        return False

    def runs_on_device(self, segment: Segment) -> bool:
        """Not unless an optimizer says so."""
        return False

    def prepare(self, groups: Sequence[dict[str, Any]], step: int, device: torch.device) -> None:
        """Nothing to do: hyper-parameters are read on the host."""

    def note_launched(self, apply: Tensor) -> None:
        """Nothing to do: what cannot skip on the device is not asked to."""

    def know_skipped(self, num_skipped: int) -> None:
        """Nothing to do: what cannot skip on the device has skipped nothing."""

    def init_state(self, segment: Segment) -> None:
        """Nothing to do: the moments planes are born zero."""

    def param_groups(self, groups: Sequence[dict[str, Any]], names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
        """Fill in the defaults, in place."""
        for group in groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        return list(groups)

    def state_dict(self, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Nothing besides the moments planes."""
        return {}

    def load_state_dict(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Nothing besides the moments planes."""


def require_range(optimizer: str, key: str, value: Any, low: float, high: float, *, open_end: bool = False) -> float:
    """Return `value` as a float, or raise ValueError naming optimizer, key, expected range and what came instead."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (low <= value < high if open_end else low <= value <= high):
        end = ")" if open_end else "]"
        raise ValueError(
            f"{optimizer}: {key} must be a number in [{low:g}, {high:g}{end}, got {value!r}. Fix: set {key}."
        )
    return float(value)


def require_betas(optimizer: str, betas: Any) -> tuple[float, float]:
    """Return `betas` as two floats in [0, 1), or raise ValueError."""
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ValueError(f"{optimizer}: betas must be two numbers in [0, 1), got {betas!r}. Fix: e.g. [0.9, 0.999].")
    first, second = (
        require_range(optimizer, f"betas[{index}]", beta, 0.0, 1.0, open_end=True) for index, beta in enumerate(betas)
    )
    return first, second


def require_layout(optimizer: str, segments: Sequence[Segment], layout: PlaneLayout | None) -> PlaneLayout:
    """Return `layout`; raise RuntimeError if it or the segments are missing, which element granularity would allow."""
    if layout is None or not segments:
        raise RuntimeError(
            f"{optimizer}: update() expected the plane's layout and at least one segment (an empty one where a shard "
            f"is all padding), got layout {layout is not None}, {len(segments)} segments. Fix: pass both on every rank."
        )
    return layout
