"""A parameter while its values are elsewhere: the record that links it to its plane, and the guard against misuse.

A sharded parameter keeps its identity, shape, dtype and device, but owns no memory. Reading it by accident must neither
crash nor give silent nonsense, so between its uses it is

- bound to a single NaN, expanded to the logical shape (stride 0: no memory, and in-place writes are refused by torch);
- of class `ShardedParameter`, whose `__torch_function__` asks the plane's owner to gather on demand when a forward pass
  is running (weights used outside their module's forward, such as `F.linear(x, self.embedding.weight)`), and otherwise
  raises an error that says what to do.

While it is whole it is a plain `nn.Parameter`: no overhead, and nothing for `torch.compile` to trip over. Only while an
update of its plane is under way (`update/schedule.py`) it is a `PendingParameter`, which finishes that update first.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorica.core.flat import Flat

_ATTRIBUTE = "_lorica"

# What may be asked of a parameter that has no values: everything that looks at its description only.
_DESCRIPTIVE = {
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "get_device", "is_floating_point",
    "is_complex", "is_contiguous", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "__len__",
    "__hash__", "__repr__", "storage_offset", "is_shared", "is_pinned", "has_names", "__get__", "__set__", "__delete__",
    "is_inference", "is_signed", "_is_view", "dim_order", "backward", "is_same_size",
    "_has_symbolic_sizes_strides",
}  # fmt: skip


# `param.data` names the same values: they are gathered if somebody may want them now, else it is a description only.
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class OnDemand(Protocol):
    """Gathers a plane whose parameter was touched while it was sharded."""

    def touched(self, flat: Flat) -> bool:
        """Return True if `flat` is whole now; False if it must not be gathered here."""


class ParamRecord:
    """The one thing hung on a Parameter: which plane it belongs to, and where.

    The plane is held weakly: a model outlives its engine without keeping the engine's memory alive.
    """

    __slots__ = ("_flat", "index", "name")

    def __init__(self, flat: Flat, index: int, name: str) -> None:
        self._flat = weakref.ref(flat)
        self.index = index
        self.name = name

    @property
    def flat(self) -> Flat:
        """The plane that holds this parameter.

        Raises:
            RuntimeError: if its engine was destroyed.
        """
        flat = self._flat()
        if flat is None or flat.destroyed:
            raise RuntimeError(
                f"Parameter {self.name}: expected a live engine, but the one that held it was destroyed. "
                "Fix: call lorica.initialize again, or use the parameter before engine.destroy()."
            )
        return flat


def record_of(param: Tensor) -> ParamRecord | None:
    """The record of `param`, or None for a parameter that no engine manages."""
    record = param.__dict__.get(_ATTRIBUTE) if hasattr(param, "__dict__") else None
    return record if isinstance(record, ParamRecord) else None


def attach(param: Tensor, record: ParamRecord) -> None:
    """Hang `record` on `param`."""
    param.__dict__[_ATTRIBUTE] = record


def detach(param: Tensor) -> None:
    """Take the record off `param`."""
    param.__dict__.pop(_ATTRIBUTE, None)


class ShardedParameter(nn.Parameter):
    """A parameter between its uses: it has a description but no values."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        record = record_of(self)
        name = record.name if record else "?"
        return f"ShardedParameter({name}, shape={tuple(self.shape)}, dtype={self.dtype}, values are sharded)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise _no_values(self, "copy.deepcopy")

    def __reduce_ex__(self, proto: Any) -> Any:
        raise _no_values(self, "pickling")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") in _DESCRIPTIVE and func != _DATA:
                return func(*args, **kwargs)
            for param in _of_class(ShardedParameter, (args, kwargs)):
                record = record_of(param)
                if (record is None or not record.flat.touched()) and func != _DATA:
                    raise _no_values(param, getattr(func, "__name__", str(func)))
            return func(*args, **kwargs)


class PendingParameter(nn.Parameter):
    """A whole parameter whose update is under way: whoever touches its values has it finished first."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        _finish(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, proto: Any) -> Any:
        _finish(self)
        return self.__reduce_ex__(proto)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", "")
            if name not in _DESCRIPTIVE or name == "__repr__" or func == _DATA:
                for param in _of_class(PendingParameter, (args, kwargs)):
                    _finish(param)
            return func(*args, **kwargs)


def _finish(param: Tensor) -> None:
    """Finish the update of a parameter's plane; it is an ordinary parameter then."""
    record = record_of(param)
    flat = record._flat() if record is not None else None
    if flat is not None:
        flat.settle()
    mark_finished([param])  # if its engine is gone


def mark_pending(params: Iterable[Tensor]) -> None:
    """An update of these whole parameters is under way (a subclass of Parameter keeps its class)."""
    for param in params:
        if type(param) is nn.Parameter:
            param.__class__ = PendingParameter


def mark_finished(params: Iterable[Tensor]) -> None:
    """It is not any more."""
    for param in params:
        if type(param) is PendingParameter:
            param.__class__ = nn.Parameter  # type: ignore[assignment]


P = TypeVar("P", bound=nn.Parameter)


def _of_class(kind: type[P], tree: Any) -> list[P]:
    """The parameters of a class among a call's arguments."""
    if isinstance(tree, kind):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [p for item in tree for p in _of_class(kind, item)] if isinstance(tree, (tuple, list)) else []


def _no_values(param: Tensor, what: str) -> RuntimeError:
    record = record_of(param)
    name = record.name if record else "?"
    return RuntimeError(
        f"{what}: expected the values of parameter {name}, but they are sharded over the ranks (ZeRO stage 3) and no "
        f"forward pass is running. Fix: use `with lorica.zero.GatheredParameters(param):` on all ranks, or "
        "engine.save_16bit_model() / engine.consolidated_state_dict() for a whole model."
    )


_HOLES: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def fill_of(dtype: torch.dtype) -> float:
    """What a parameter without values holds."""
    return math.nan if dtype.is_floating_point else 0


def hide(param: Tensor, values: Tensor) -> None:
    """Bind `param` to a NaN like `values` and make it a `ShardedParameter` (a subclass of Parameter keeps its class).

    Args:
        values: has the shape, dtype and device that `param` will have; need not have memory.
    """
    key = (values.dtype, values.device)
    hole = _HOLES.get(key)
    if hole is None:
        hole = _HOLES[key] = torch.full((), fill_of(values.dtype), dtype=values.dtype, device=values.device)
    if values.numel() == 1:
        hole.fill_(fill_of(values.dtype))  # one element has no stride 0 that would refuse a write
    param.data = hole.expand(values.shape)
    if type(param) is nn.Parameter:
        param.__class__ = ShardedParameter


def is_rebound(param: Tensor, values: Tensor) -> bool:
    """Whether somebody gave `param` another tensor (`param.data = x`) since `hide` or `show` bound it to `values`."""
    with torch._C.DisableTorchFunctionSubclass():
        hole = _HOLES.get((values.dtype, values.device))
        own = [tensor.untyped_storage()._cdata for tensor in (values, hole) if tensor is not None]
        return param.untyped_storage()._cdata not in own


def show(param: Tensor, values: Tensor) -> None:
    """Bind `param` to `values` (a view of its plane) and make it a plain Parameter again."""
    if type(param) is ShardedParameter:
        param.__class__ = nn.Parameter  # type: ignore[assignment]
    param.data = values
