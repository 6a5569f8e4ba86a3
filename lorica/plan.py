"""What the user wants, as data: where each plane is sharded, where it lives, in which precision. No tensors, no torch.

A ZeRO stage is a row of `STAGE`; a tier, a dtype and an update policy are fields. `LEGALITY` refuses the combinations
that make no sense, each with its reason and the nearest legal setting. `UnitPlan.bytes_per_rank` is the exact memory
arithmetic that the engine's accounting is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorica.layout import ALIGN

ITEMSIZE = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip


class Sharded(NamedTuple):
    """Which planes a ZeRO stage shards."""

    param: bool
    grad: bool
    states: bool


# An unsharded gradient is Partial: it is reduced once, at the accumulation boundary.
# Source: Rajbhandari et al. 2020 (arXiv:1910.02054), sec. 5: P_os, P_os+g, P_os+g+p.
STAGE: dict[int, Sharded] = {
    0: Sharded(False, False, False),
    1: Sharded(False, False, True),
    2: Sharded(False, True, True),
    3: Sharded(True, True, True),
}

SPLIT_DTYPE = "int16"  # of a split master's remainders: see [Note: split master] in precision/rounding.py


class MomentPlane(NamedTuple):
    """One stored plane of an optimizer's moments, which has an element for every `ratio` elements of the parameters."""

    name: str
    dtype: str
    ratio: int = 1

    def numel(self, owned: int) -> int:
        """Elements, if it belongs to `owned` elements of parameters."""
        return owned // self.ratio

    def bytes(self, owned: int) -> int:
        """Bytes, if it belongs to `owned` elements of parameters."""
        return self.numel(owned) * ITEMSIZE[self.dtype]


_SCALE = MomentPlane(".scale", "float32", ALIGN)

# What is stored of Adam's two moments; names follow that of the moment. See [Note: the 8-bit code] and
# [Note: one second moment per block] in precision/compact.py.
FORMATS: dict[str, tuple[tuple[MomentPlane, ...], ...]] = {
    "bf16": ((MomentPlane("", "bfloat16"),), (MomentPlane("", "bfloat16"),)),
    "int8": ((MomentPlane("", "int8"), _SCALE), (MomentPlane("", "uint8"), _SCALE)),
    "int8_block": ((MomentPlane("", "int8"), _SCALE), (MomentPlane("", "float32", ALIGN),)),
}

SHARD_AXIS = "dp_shard"
REPLICATE_AXIS = "dp_replicate"


@dataclass(frozen=True)
class Placement:
    """Where one plane is: sharded over `axes` (none: whole on every rank), in `tier`, as `dtype`."""

    axes: tuple[str, ...]
    tier: str
    dtype: str

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only its part."""
        return bool(self.axes)

    def numel(self, plane_numel: int, num_shards: int) -> int:
        """Elements of a plane of `plane_numel` that one rank holds."""
        return plane_numel // num_shards if self.sharded else plane_numel

    def bytes(self, plane_numel: int, num_shards: int) -> int:
        """Bytes of a plane of `plane_numel` elements that one rank holds."""
        return self.numel(plane_numel, num_shards) * ITEMSIZE[self.dtype]


class StateBytes(NamedTuple):
    """Bytes that one rank holds of each kind of model state."""

    param: int = 0
    grad: int = 0
    master: int = 0
    moments: int = 0

    def __add__(self, other: object) -> StateBytes:
        if not isinstance(other, StateBytes):
            return NotImplemented
        return StateBytes(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self)


@dataclass(frozen=True)
class UnitPlan:
    """The five choices for the planes of one unit (`wire` has one value so far).

    Attributes:
        update: "sync": inside `engine.step()`; "just_in_time": before the next use of the unit.
        executor: who runs the optimizer: "resident": whoever holds the record; "device": the compute device, through
            which the record streams; "host": the CPU.
    """

    stage: int
    param: Placement
    grad: Placement
    master: Placement
    moments: Placement
    comm_dtype: str
    wire: str = "identity"
    update: str = "sync"
    executor: str = "resident"
    moment_format: str = "fp32"

    @property
    def master_is_split(self) -> bool:
        """Whether the master is kept as the parameter's own plane and a plane of 16-bit remainders."""
        return self.master.dtype == SPLIT_DTYPE

    @property
    def master_is_param(self) -> bool:
        """Whether the parameter's own plane serves as the master: same dtype, same tier."""
        return (self.master.dtype, self.master.tier) == (self.param.dtype, self.param.tier)

    @property
    def master_is_rounded(self) -> bool:
        """Whether there is no master: the bf16 parameter itself is updated, rounded stochastically."""
        return self.master_is_param and self.master.dtype == "bfloat16"

    def moment_planes(self, names: Sequence[str]) -> list[MomentPlane]:
        """What is stored of the optimizer's moments `names`."""
        if self.moment_format == "fp32":
            return [MomentPlane(name, self.moments.dtype) for name in names]
        stored = zip(names, FORMATS[self.moment_format], strict=True)
        return [plane._replace(name=name + plane.name) for name, planes in stored for plane in planes]

    def moment_bytes(self, owned: int, num_moments: int) -> int:
        """Bytes of `num_moments` moments of `owned` elements."""
        return sum(plane.bytes(owned) for plane in self.moment_planes([""] * num_moments))

    def bytes_per_rank(
        self, plane_numel: int, num_shards: int, num_moments: int, *, trainable: bool, param_numel: int | None = None
    ) -> StateBytes:
        """Bytes that one rank holds of a plane of `plane_numel` elements while gradients exist.

        Args:
            num_moments: moment planes of the optimizer (Adam: 2).
            trainable: a frozen plane has parameters only.
            param_numel: elements without padding (None: there is none).
        """
        param = self.param.bytes(plane_numel, num_shards)
        if not trainable:
            return StateBytes(param=param)
        return StateBytes(
            param=param,
            grad=self._grad_bytes(plane_numel, num_shards, param_numel or plane_numel),
            master=0 if self.master_is_param else self.master.bytes(plane_numel, num_shards),
            moments=self.moment_bytes(self.moments.numel(plane_numel, num_shards), num_moments),
        )

    def _grad_bytes(self, plane_numel: int, num_shards: int, param_numel: int) -> int:
        in_autograd = not self.grad.sharded and self.master.sharded and self.grad.dtype == self.param.dtype
        return self.grad.bytes(param_numel if in_autograd else plane_numel, num_shards)


@dataclass(frozen=True)
class Request:
    """What the configuration asks for, before it is known to be legal."""

    stage: int
    param_dtype: str
    accum_dtype: str
    comm_dtype: str
    master_dtype: str = "float32"
    accumulates: bool = True  # several micro-steps per update
    param_tier: str = "device"
    optimizer_tier: str = "device"
    executor: str = "resident"
    overlap: bool = False  # update just in time
    split_master: bool = False  # wanted; done where it is exact, see `can_split`
    moment_format: str = "fp32"  # as in `UnitPlan`; done where the moments are fp32
    rounded_master: bool = False  # no master; done where a split one would be exact

    @property
    def can_split(self) -> bool:
        """Whether a split master is exact (and none at all may do): the parameter is bf16, its master fp32."""
        return (self.param_dtype, self.master_dtype) == ("bfloat16", "float32")


class Rule(NamedTuple):
    """One line of the legality table."""

    forbidden: Callable[[Request], bool]
    reason: str
    fix: str


LEGALITY: tuple[Rule, ...] = (
    Rule(
        lambda r: r.stage not in STAGE,
        "zero_optimization.stage: expected 0, 1, 2 or 3",
        "set stage to one of them",
    ),
    Rule(
        lambda r: r.param_tier != "device" and r.stage < 3,
        "zero_optimization.offload_param: only sharded parameters can leave the device between their uses",
        "set zero_optimization.stage to 3, or remove offload_param",
    ),
    Rule(
        lambda r: r.optimizer_tier != "device" and r.stage == 0,
        "zero_optimization.offload_optimizer: stage 0 keeps a whole optimizer on every rank, which offloading would "
        "multiply in host memory",
        "set zero_optimization.stage to 1 (or more), or remove offload_optimizer",
    ),
    Rule(
        lambda r: r.param_tier not in ("device", "host"),
        "zero_optimization.offload_param: parameters on NVMe are not there yet",
        'set offload_param.device to "cpu", or put the optimizer on NVMe instead',
    ),
    Rule(
        lambda r: r.optimizer_tier not in ("device", "host", "nvme"),
        "zero_optimization.offload_optimizer: expected the device, the host or NVMe",
        'set offload_optimizer.device to "cpu", "nvme" or "auto"',
    ),
)


def plan_unit(request: Request) -> UnitPlan:
    """The plan for a unit's trainable and frozen planes.

    Raises:
        ValueError: if the legality table refuses the request.
    """
    for rule in LEGALITY:
        if rule.forbidden(request):
            raise ValueError(f"{rule.reason} (got {request}). Fix: {rule.fix}.")
    sharded = STAGE[request.stage]

    def axes(flag: bool) -> tuple[str, ...]:
        return (SHARD_AXIS,) if flag else ()

    rounded = request.rounded_master and request.can_split
    splits = request.split_master and request.can_split and not rounded
    reduced_at_once = sharded.grad or (sharded.states and not request.accumulates)
    return UnitPlan(
        stage=request.stage,
        param=Placement(axes(sharded.param), request.param_tier, request.param_dtype),
        grad=Placement(axes(reduced_at_once), "device", request.accum_dtype),
        master=Placement(
            axes(sharded.states),
            request.param_tier if rounded else request.optimizer_tier,
            request.param_dtype if rounded else SPLIT_DTYPE if splits else request.master_dtype,
        ),
        moments=Placement(axes(sharded.states), request.optimizer_tier, request.master_dtype),
        comm_dtype=request.comm_dtype,
        update="just_in_time" if request.overlap and request.executor != "resident" else "sync",
        executor=request.executor,
        moment_format=request.moment_format if request.master_dtype == "float32" else "fp32",
    )
