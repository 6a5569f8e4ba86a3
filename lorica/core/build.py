"""Build the units of a model: allocate their planes, load them with the model's values, bind the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorica.core.flat import Flat, Site
from lorica.core.gradient import GradPlane
from lorica.core.parameter import record_of
from lorica.core.partition import UnitSpec
from lorica.core.unit import Unit
from lorica.layout import Entry, Layout, build_layout
from lorica.plan import Placement, Request, UnitPlan, plan_unit
from lorica.precision import Precision

NO_GROUP = -1


class Key(NamedTuple):
    """Parameters of a unit with equal keys share a plane."""

    dtype: torch.dtype
    trainable: bool


@dataclass(frozen=True)
class Where:
    """Where one plane lives and who updates it; the values of `plan.Request`."""

    param_tier: str = "device"
    record_tier: str = "device"
    executor: str = "resident"


@dataclass(frozen=True)
class Outline:
    """A plane before it has memory.

    Attributes:
        unit_index: the unit to which it belongs.
        params: by name. layout: their places.
        whole: stays whole on every rank, whatever the stage.
    """

    name: str
    unit_index: int
    key: Key
    params: dict[str, nn.Parameter]
    layout: Layout
    whole: bool


@dataclass(frozen=True)
class Blueprint:
    """Everything that decides the planes, besides the model.

    Attributes:
        stage, overlap: as in `plan.Request`.
        where: by name of the plane; absent: all on the device.
        precision: the dtype of each kind of plane.
        group_of: optimizer param group by id(parameter); absent: no optimizer updates it.
        bucket_numel: staging elements of one gradient reduction.
        predivide: see `GradPlane`.
        accumulates: whether an update takes several micro-steps.
        split_master: keep bf16 parameters and 16-bit remainders instead of fp32 masters, where that is exact.
        moment_format, rounded_master: as in `plan.Request`.
        persist_numel: planes whose parameters are all at most this large stay whole at stage 3 ...
        persist_total: ... up to this many elements in all.
    """

    stage: int
    precision: Precision
    group_of: Mapping[int, int]
    where: Mapping[str, Where] = field(default_factory=dict)
    overlap: bool = False
    bucket_numel: int = 500_000_000
    predivide: float = 1.0
    accumulates: bool = False
    split_master: bool = False
    moment_format: str = "fp32"
    rounded_master: bool = False
    persist_numel: int = 0
    persist_total: int = 2**62


def dtype_name(dtype: torch.dtype) -> str:
    """The plan's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def outline(specs: Sequence[UnitSpec], blueprint: Blueprint, num_shards: int) -> list[Outline]:
    """The planes that a model's units will have, in the order of the units."""
    planes, persisted = [], 0
    for index, spec in enumerate(specs):
        for key, params in _by_key(spec.params, blueprint).items():
            numel = sum(p.numel() for p in params.values())
            small = all(p.numel() <= blueprint.persist_numel for p in params.values())
            whole = small and persisted + numel <= blueprint.persist_total
            persisted += numel if whole and blueprint.stage == 3 else 0
            entries = [Entry(n, tuple(p.shape), blueprint.group_of.get(id(p), NO_GROUP)) for n, p in params.items()]
            name = f"{spec.name}/{dtype_name(key.dtype)}"
            planes.append(Outline(name, index, key, params, build_layout(entries, num_shards), whole))
    return planes


def build_units(specs: Sequence[UnitSpec], planes: Sequence[Outline], blueprint: Blueprint, site: Site) -> list[Unit]:
    """Units with planes that hold the values of rank 0's model. Collective.

    The parameters of the model are views of the planes afterwards (or hidden, at stage 3); the memory that they had
    before is freed unit by unit, so that the peak is the planes and one unit.
    """
    units = [Unit(index, spec.name, spec.modules, is_root=spec.is_root) for index, spec in enumerate(specs)]
    for plane in planes:
        unit = units[plane.unit_index]
        flat = _build_flat(plane, plan_of(plane, blueprint), site)
        unit.flats.append(flat)
        if plane.key.trainable:
            unit.grads.append(_grad_plane(flat, blueprint))
    return units


def _by_key(params: Mapping[str, nn.Parameter], blueprint: Blueprint) -> dict[Key, dict[str, nn.Parameter]]:
    planes: dict[Key, dict[str, nn.Parameter]] = {}
    for name, param in params.items():
        trainable = param.requires_grad and id(param) in blueprint.group_of
        key = Key(blueprint.precision.compute_dtype_of(param.dtype), trainable)
        planes.setdefault(key, {})[name] = param
    return planes


def plan_of(plane: Outline, blueprint: Blueprint) -> UnitPlan:
    """The plan of one plane."""
    precision, dtype = blueprint.precision, plane.key.dtype
    where = blueprint.where.get(plane.name, Where())
    plan = plan_unit(
        Request(
            stage=blueprint.stage,
            param_dtype=dtype_name(dtype),
            accum_dtype=dtype_name(precision.accum_dtype_of(dtype)),
            comm_dtype=dtype_name(precision.comm_dtype_of(dtype)),
            master_dtype=dtype_name(precision.master_dtype_of(dtype)),
            accumulates=blueprint.accumulates,
            param_tier=where.param_tier,
            optimizer_tier=where.record_tier,
            executor=where.executor,
            overlap=blueprint.overlap,
            split_master=blueprint.split_master,
            moment_format=blueprint.moment_format,
            rounded_master=blueprint.rounded_master,
        )
    )
    alone = plane.layout.num_shards == 1
    if plan.param.sharded and (plane.whole or (alone and plan.param.tier == "device")):
        plan = replace(plan, param=Placement((), "device", plan.param.dtype))
    if not plan.param.sharded and plan.master.sharded and not alone:
        plan = replace(plan, update="sync")  # its all-gather takes all ranks: see update/schedule.py
    return plan


def _build_flat(plane: Outline, plan: UnitPlan, site: Site) -> Flat:
    layout = plane.layout
    ordered = [plane.params[slot.name] for slot in layout.slots]
    flat = Flat(plane.name, ordered, layout, plan, site, trainable=plane.key.trainable)
    for index, param in enumerate(ordered):
        flat.fill(index, initial_values(param, layout.slots[index].name, site))
    flat.bind()
    return flat


def _grad_plane(flat: Flat, blueprint: Blueprint) -> GradPlane:
    # Elsewhere autograd's own gradients need the room between steps, or the activations do; a device's allocator gives
    # it back for nothing, where a CPU's would fault every page in again.
    on_cpu = flat.site.device.type == "cpu"
    keep = on_cpu and (flat.plan.grad.sharded or not blueprint.accumulates)
    return GradPlane(flat, bucket_numel=blueprint.bucket_numel, predivide=blueprint.predivide, keep=keep)


def initial_values(param: nn.Parameter, name: str, site: Site) -> Tensor:
    """The values that training starts from: those of rank 0, in the dtype in which the model holds them. Collective.

    Raises:
        ValueError: if the parameter is on the meta device.
    """
    record = record_of(param)
    if record is not None and record.flat.is_bound(record.index):
        return record.flat.collect_master(record.index)
    if param.is_meta:
        raise ValueError(
            f"Parameter {name}: expected values, but it is on the meta device. Fix: build the model under "
            "lorica.zero.Init(), or materialise it (model.to_empty + init) before lorica.initialize."
        )
    values = param.detach().to(site.device)
    return broadcast_from_first(values, site)


def broadcast_from_first(values: Tensor, site: Site) -> Tensor:
    """Rank 0's `values` on every rank: a new tensor, or `values` itself where there is one rank. Collective."""
    axes = [comm for comm in (site.shard, site.replicate) if comm is not None and comm.world_size > 1]
    if not axes or values.numel() == 0:
        return values
    flat = values.reshape(-1).contiguous()
    if flat.data_ptr() == values.data_ptr():
        flat = flat.clone()
    for comm in axes:
        comm.broadcast(flat, 0).wait()
    return flat.view(values.shape)


def load_buffers(model: nn.Module, site: Site, dtype: torch.dtype | None) -> None:
    """Move buffers to the device with rank 0's values, floating ones as `dtype` (None: as they are). Collective."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.is_meta:
                continue
            moved = buffer.detach().to(site.device)
            if dtype is not None and moved.is_floating_point():
                moved = moved.to(dtype)
            module._buffers[name] = broadcast_from_first(moved, site)
