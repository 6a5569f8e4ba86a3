"""From a name in the configuration, or a client's optimizer object, to a `FlatOptimizer`. Owns the two tables."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lorica.optim.adagrad import Adagrad
from lorica.optim.adam import Adam, AdamW
from lorica.optim.base import FlatOptimizer
from lorica.optim.lamb import Lamb
from lorica.optim.lion import Lion
from lorica.optim.muon import Muon
from lorica.optim.probe import INSTEAD, SIDE, probe, refused, require_fresh
from lorica.optim.sgd import SGD
from lorica.optim.torch_optim import TorchOptimizer

OPTIMIZERS: dict[str, Callable[..., FlatOptimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": SGD,
    "lion": Lion,
    "adagrad": Adagrad,
    "lamb": Lamb,
    "muon": Muon,
}
REFUSED = {
    "onebitadam": '"AdamW": ZeRO reduces the traffic on every step',
    "zerooneadam": '"AdamW": ZeRO reduces the traffic on every step',
    "onebitlamb": '"Lamb"',
    "muadam": '"Adam" with param groups made by the mup package',
    "muadamw": '"AdamW" with param groups made by the mup package',
    "musgd": '"SGD" with param groups made by the mup package',
}
TORCH_PREFIX = "torch.optim."

# Options of a torch class that our optimizer of the same name has no equal for; any other value goes to the adapter.
_OFF = {"amsgrad": False, "maximize": False, "differentiable": False, "capturable": False}


@runtime_checkable
class ProvidesFlatOptimizer(Protocol):
    """A client optimizer object that knows its own `FlatOptimizer`, e.g. DeepSpeed's classes in the compat package."""

    def flat_optimizer(self) -> FlatOptimizer: ...


def from_config(type: str, params: Mapping[str, Any]) -> FlatOptimizer:
    """Make the optimizer that `optimizer.type` and `optimizer.params` of a configuration describe.

    Adam, AdamW, SGD, Lion, Adagrad, Lamb and Muon are found in any case; other names, and names with the prefix
    "torch.optim.", are classes of torch.optim. "Adam" is AdamW unless `adam_w_mode` is false.

    Raises:
        ValueError: for an unknown name or parameter.
        NotImplementedError: for an optimizer that is refused; says what works instead.
    """
    options = dict(params)
    if "max_grad_norm" in options:
        raise ValueError(
            f"optimizer.params.max_grad_norm: expected no such parameter, got {options['max_grad_norm']!r}. "
            "Fix: set gradient_clipping at the top level."
        )
    key = type.lower()
    if key in REFUSED:
        raise NotImplementedError(f"optimizer.type: {type!r} is not supported. Fix: use {REFUSED[key]}.")
    if type.startswith(TORCH_PREFIX) or key not in OPTIMIZERS:
        return _from_torch_name(type.removeprefix(TORCH_PREFIX), options)
    if key in ("adam", "adamw"):
        return _adam_from_config(key, options)
    if options.get("maximize"):
        return _from_torch_name({"sgd": "SGD", "adagrad": "Adagrad"}.get(key, type), options)
    options.pop("maximize", None)
    _require_known(type, options, OPTIMIZERS[key])
    return OPTIMIZERS[key](**options)


def from_client(optimizer: Any) -> FlatOptimizer:
    """Make the `FlatOptimizer` that does what the client's optimizer object does.

    torch's Adam, AdamW, SGD and Adagrad become the fused element-wise ones; anything else that the probe finds
    element-wise runs through the adapter. Hyper-parameters stay in the client's param group dicts.

    Raises:
        TypeError: if it is no torch.optim.Optimizer.
        NotImplementedError: if it is not element-wise.
        ValueError: if it has already been stepped.
    """
    if isinstance(optimizer, ProvidesFlatOptimizer):
        return optimizer.flat_optimizer()
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {optimizer.__class__.__name__}. Fix: derive its class "
            "from torch.optim.Optimizer, or name an optimizer in the configuration."
        )
    native = _NATIVE.get(optimizer.__class__)
    if native is None or any(
        group.get(key, off) != off for group in optimizer.param_groups for key, off in _OFF.items()
    ):
        return TorchOptimizer(optimizer, probe(optimizer))
    require_fresh(optimizer)
    return native(optimizer)


def _adam_from_config(key: str, options: dict[str, Any]) -> FlatOptimizer:
    """Adam's extra parameters: which formula (`adam_w_mode`), torch's defaults (`torch_adam`), no effect (the rest)."""
    decoupled = bool(options.pop("adam_w_mode", True)) or key == "adamw"
    options.pop("set_grad_none", None)
    if not options.pop("fp32_optimizer_states", True):
        raise NotImplementedError(
            "optimizer.params.fp32_optimizer_states: expected true, got false; moments are fp32. Fix: leave it out."
        )
    if options.pop("torch_adam", False):
        return _from_torch_name("AdamW" if decoupled else "Adam", options)
    maker: Callable[..., FlatOptimizer] = AdamW if decoupled else Adam
    _require_known("AdamW" if decoupled else "Adam", options, Adam)
    return maker(**options) if decoupled else maker(**options, adam_w_mode=False)


def _from_torch_name(name: str, options: dict[str, Any]) -> FlatOptimizer:
    """Make an instance over a dummy parameter and treat it like a client's."""
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name not in classes:
        near = difflib.get_close_matches(name.lower(), [*OPTIMIZERS, *(known.lower() for known in classes)], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"optimizer.type: expected one of {sorted(OPTIMIZERS)} or a class of torch.optim, got {name!r}.{hint} "
            "Fix: correct the name, or pass an optimizer object to initialize()."
        )
    if classes[name] in INSTEAD:
        raise refused(f"torch.optim.{name}", *INSTEAD[classes[name]])
    _require_known(f"torch.optim.{name}", options, classes[name])
    return from_client(classes[name]([nn.Parameter(torch.zeros(SIDE, SIDE))], **options))


def _require_known(name: str, options: Mapping[str, Any], maker: Callable[..., Any]) -> None:
    known = [key for key in inspect.signature(maker).parameters if key not in ("self", "params")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"optimizer.params: {name} takes {known}, got {unknown} as well. Fix: remove or rename them.")


def _native_adam(optimizer: torch.optim.Optimizer) -> FlatOptimizer:
    modes = {bool(group.get("decoupled_weight_decay", False)) for group in optimizer.param_groups}
    if len(modes) > 1:
        return TorchOptimizer(optimizer, probe(optimizer))
    return _with_defaults(Adam(adam_w_mode=modes == {True}), optimizer)


def _native_sgd(optimizer: torch.optim.Optimizer) -> FlatOptimizer:
    momentum = max(float(group["momentum"]) for group in optimizer.param_groups)
    return _with_defaults(SGD(momentum=momentum), optimizer)


def _native_adagrad(optimizer: torch.optim.Optimizer) -> FlatOptimizer:
    return _with_defaults(Adagrad(), optimizer)


def _with_defaults(flat: FlatOptimizer, optimizer: torch.optim.Optimizer) -> FlatOptimizer:
    """The client's defaults instead of ours (the keys are the same)."""
    flat.defaults = {key: optimizer.defaults.get(key, value) for key, value in flat.defaults.items()}
    return flat


_NATIVE: dict[type[torch.optim.Optimizer], Callable[[torch.optim.Optimizer], FlatOptimizer]] = {
    torch.optim.Adam: _native_adam,
    torch.optim.AdamW: _native_adam,
    torch.optim.SGD: _native_sgd,
    torch.optim.Adagrad: _native_adagrad,
}
