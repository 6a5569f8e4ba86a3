"""Reading, changing and creating sharded parameters: `GatheredParameters`, `safe_get_*`, `safe_set_*`, `Init`.

Everything here is collective: all ranks make the same calls. Owns no planes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorica.core.gradient import GradPlane
from lorica.core.lifecycle import GradState
from lorica.core.parameter import ParamRecord, record_of
from lorica.estimate import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from lorica.init import Init
from lorica.precision.rounding import rounded

__all__ = [
    "GatheredParameters",
    "Init",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "get_z3_leaf_modules",
    "register_external_parameter",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "set_z3_leaf_modules",
    "unregister_external_parameter",
    "unset_z3_leaf_modules",
]


@contextmanager
def GatheredParameters(
    params: Iterable[nn.Parameter] | nn.Parameter,
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Whole parameters inside the context, at every stage.

    Args:
        params: one parameter or many; those that no engine manages are left alone.
        modifier_rank: the rank whose in-place changes become the new values on all ranks, in the parameters and in the
            optimizer's master; None: changes are lost (stage 3) or local.
        fwd_module: DeepSpeed's hint for external parameters; not needed.
        enabled: False does nothing.
    """
    records = _records(params) if enabled else []
    flats = list({id(r.flat): r.flat for r in records}.values())
    for flat in flats:
        flat.holders += 1
        flat.unshard()
    for flat in flats:
        flat.wait()
    watched = records if modifier_rank is not None else []
    masters = [_master_at_risk(record) for record in watched]
    try:
        yield
    finally:
        for record, master in zip(watched, masters, strict=True):
            adopt(record, modifier_rank or 0, master)
        for flat in flats:
            flat.holders -= 1
            if not flat.holders:
                flat.reshard()


def _records(params: Iterable[nn.Parameter] | nn.Parameter) -> list[ParamRecord]:
    """Records in an order that is the same on all ranks, each once (a set of parameters has no order of its own)."""
    items = [params] if isinstance(params, Tensor) else list(params)
    found = {id(r): r for r in map(record_of, items) if r is not None}
    return sorted(found.values(), key=lambda r: (r.flat.name, r.index))


def _master_at_risk(record: ParamRecord) -> Tensor | None:
    """The master of a parameter, if writing to the parameter writes to it (a split one of a whole plane)."""
    flat = record.flat
    return flat.collect_master(record.index) if flat.plan.master_is_split and not flat.sharded else None


def adopt(record: ParamRecord, source: int, before: Tensor | None = None) -> None:
    """Make rank `source`'s present values of one whole parameter everybody's, in every plane. Collective.

    Values that were assigned (`param.data = x`) count as values that were written in place.

    Args:
        before: the master before they were written, if it is another one by now; what was not touched keeps its full
            precision.
    Raises:
        ValueError: if a tensor of another shape was assigned.
    """
    flat = record.flat
    slot = flat.layout.slots[record.index]
    if slot.numel == 0:
        return
    values = _present_values(record)
    site = flat.site
    shard_size = site.shard.world_size
    site.shard.broadcast(values, source % shard_size).wait()
    if site.replicate is not None:
        site.replicate.broadcast(values, source // shard_size).wait()
    site.shard.fence()
    before = (flat.collect_master(record.index) if before is None else before).reshape(-1)
    changed = rounded(before, values.dtype) != values
    flat.fill(record.index, torch.where(changed, values.to(before.dtype), before))
    flat.rebind(record.index)


def _present_values(record: ParamRecord) -> Tensor:
    """A copy [numel] of what this rank's parameter holds now, in the plane's dtype."""
    flat, index = record.flat, record.index
    slot = flat.layout.slots[index]
    if flat.is_bound(index):
        return flat.full[slot.start : slot.stop].clone()
    assigned = flat.params[index].detach()
    if tuple(assigned.shape) != slot.shape:
        raise ValueError(
            f"GatheredParameters: expected values of shape {slot.shape} for {record.name}, but a tensor of shape "
            f"{tuple(assigned.shape)} was assigned. Fix: change shapes before lorica.initialize."
        )
    return assigned.to(flat.site.device, flat.dtype, copy=True).reshape(-1)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """DeepSpeed's way to announce a parameter used outside its module; Lorica notices by itself, so nothing happens.

    Raises:
        ValueError: if the arguments are not a module and a parameter.
    """
    if not isinstance(module, nn.Module) or not isinstance(parameter, nn.Parameter):
        raise ValueError(
            f"register_external_parameter: expected (module, parameter), got ({type(module).__name__}, "
            f"{type(parameter).__name__}). Fix: pass the module whose forward uses the parameter, and the parameter."
        )


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """The counterpart of `register_external_parameter`."""
    register_external_parameter(module, parameter)


# -- one parameter's values, gradient, moments -------------------------------------------------------------------------


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The master values of `param`, of its logical shape; None if no engine manages it. Collective."""
    record = record_of(param)
    return record.flat.collect_master(record.index) if record is not None else None


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set the master and the parameter to `value` (the same on all ranks, of the logical shape).

    Raises:
        ValueError: if no engine manages `param`, or the shapes differ.
    """
    record = _require(param, value, "safe_set_full_fp32_param")
    record.flat.site.shard.fence()
    record.flat.fill(record.index, value.to(record.flat.site.device))


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """A moment ("exp_avg", ...) of `param`, of its logical shape; None if there is none. Collective.

    In fp32, however it is stored.
    """
    record = record_of(param)
    if record is None or optim_state_key not in record.flat.moment_names:
        return None
    return record.flat.collect_moment(record.index, optim_state_key)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set a moment of `param` to `value` (the same on all ranks, of the logical shape).

    What is stored in few bytes is rounded to nearest; one second moment per block becomes the block's mean.

    Raises:
        ValueError: if there is no such moment, no engine manages `param`, or the shapes differ.
    """
    record = _require(param, value, "safe_set_full_optimizer_state")
    moments = record.flat.moment_names
    if optim_state_key not in moments:
        raise ValueError(
            f"safe_set_full_optimizer_state: expected one of {sorted(moments)}, got {optim_state_key!r} "
            f"({record.name}). Fix: use a state that this optimizer has."
        )
    record.flat.fill_moment(record.index, optim_state_key, value)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The averaged gradient of `param` between `backward` and `step`, unscaled and unclipped; None if there is none.

    Collective. fp32, of the logical shape. Where gradients are not reduced yet (between boundaries at stages 0 and 1,
    under `no_sync`) this is the sum over the micro-steps so far, reduced for the occasion.
    """
    found = _grad_plane(param)
    if found is None:
        return None
    record, plane = found
    return plane.collect(record.index)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set the averaged gradient of `param` (same meaning as in `safe_get_full_grad`) between `backward` and `step`.

    Raises:
        ValueError: if no engine updates `param`, or the shapes differ.
        RuntimeError: if there is no reduced gradient now.
    """
    record = _require(param, value, "safe_set_full_grad")
    found = _grad_plane(param)
    if found is None or found[1].state.state is GradState.IDLE:
        raise RuntimeError(
            f"safe_set_full_grad: expected a reduced gradient of {record.name}, got none. Fix: call it between the "
            "backward at an accumulation boundary and engine.step()."
        )
    found[1].assign(record.index, value)


def _grad_plane(param: nn.Parameter) -> tuple[ParamRecord, GradPlane] | None:
    record = record_of(param)
    plane = record.flat.grad_plane if record is not None else None
    return (record, plane) if record is not None and plane is not None else None


def _require(param: nn.Parameter, value: Tensor, what: str) -> ParamRecord:
    record = record_of(param)
    if record is None:
        raise ValueError(f"{what}: expected a parameter of a live engine, got an unmanaged one. Fix: initialize first.")
    shape = record.flat.layout.slots[record.index].shape
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{what}: expected a value of shape {shape} for {record.name}, got {tuple(value.shape)}. Fix: pass the "
            "values of the whole parameter."
        )
    return record


# -- leaf modules ------------------------------------------------------------------------------------------------------


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Declare modules that are gathered as one unit. Call it before `initialize`.

    Lorica's units are whole blocks already, so this matters only for classes that lie inside no block.

    Returns:
        The modules found.
    Raises:
        ValueError: if none is found and `raise_if_not_found`.
    """
    classes = tuple(leaf_module_classes)
    found = [m for m in model.modules() if any(_is_a(m, each) for each in classes)]
    if not found and raise_if_not_found:
        raise ValueError(
            f"set_z3_leaf_modules: expected modules of {[_class_name(c) for c in classes]} in the model, found none. "
            "Fix: name classes of the model, or pass raise_if_not_found=False."
        )
    _leaf_classes(model).update(type(m).__name__ for m in found)
    return found


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take back `set_z3_leaf_modules`."""
    found = set_z3_leaf_modules(model, leaf_module_classes, raise_if_not_found)
    _leaf_classes(model).difference_update(type(m).__name__ for m in found)
    return found


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The modules declared by `set_z3_leaf_modules`."""
    names = _leaf_classes(model)
    return [m for m in model.modules() if type(m).__name__ in names]


def _leaf_classes(model: nn.Module) -> set[str]:
    classes: set[str] = model.__dict__.setdefault("_lorica_leaf_classes", set())
    return classes


def _is_a(module: nn.Module, wanted: type | str) -> bool:
    return type(module).__name__ == wanted if isinstance(wanted, str) else isinstance(module, wanted)


_class_name: Callable[[type | str], str] = lambda c: c if isinstance(c, str) else c.__name__  # noqa: E731
