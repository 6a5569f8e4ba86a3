"""Optimizers by DeepSpeed's names over ordinary parameters: a training loop of its own may step them, and
`lorica.initialize` takes them as client optimizers and runs them on flat planes.

Owns signatures and the loop over parameters; the formulas are those of `lorica.optim`. Moments are fp32 (fp64 for fp64
parameters) whatever the parameters are: a low-precision parameter is updated in fp32 and rounded once a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorica.optim import SGD, Adagrad, Adam, FlatOptimizer, Lamb, Lion, Segment, Slice, fused
from lorica.optim.adam import NO_CORRECTION_STEP
from lorica.optim.probe import require_fresh

_NAME = "parameter"  # of the only slot of a plane that is one parameter


class _Slot(NamedTuple):
    """A parameter as the whole of its plane."""

    name: str
    shape: tuple[int, ...]
    start: int


class _Whole(NamedTuple):
    """The plane of one parameter."""

    slots: tuple[_Slot, ...]
    numel: int


class _Ready(NamedTuple):
    """A parameter that has a gradient, its moments, and the number of the step that is about to be made."""

    param: Tensor
    grad: Tensor
    moments: dict[str, Tensor]
    step: int


class StandaloneOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose arithmetic is that of a `FlatOptimizer`, one parameter after the other.

    Args:
        params: parameters, or param-group dicts, which keep their identity.
        make: makes the `FlatOptimizer`; picklable, because a pickled optimizer makes its own anew.
        set_grad_none: whether `zero_grad()` drops gradients instead of zeroing them.
    Raises:
        NotImplementedError: for a group with `amsgrad` or `maximize`, and for complex parameters.
    """

    def __init__(self, params: ParamsT, make: Callable[[], FlatOptimizer], set_grad_none: bool = True) -> None:
        self.make = make
        self.flat = make()
        self.set_grad_none = set_grad_none
        super().__init__(params, dict(self.flat.defaults))

    def flat_optimizer(self) -> FlatOptimizer:
        """What the engine runs instead of `step`; hyper-parameters stay in the group dicts of this object.

        Raises:
            ValueError: if this object has been stepped: its moments would be lost.
        """
        require_fresh(self)
        return self.make()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; refuse what the formulas do not have."""
        name = type(self).__name__
        for key in ("amsgrad", "maximize"):
            if param_group.get(key):
                raise NotImplementedError(
                    f"{name}: expected no param group with {key}, got {param_group[key]!r}. "
                    "Fix: use the class of torch.optim, which initialize() takes as well."
                )
        super().add_param_group(param_group)
        if any(param.is_complex() for param in self.param_groups[-1]["params"]):
            raise NotImplementedError(
                f"{name}: expected real parameters, got complex ones. Fix: use the class of torch.optim for them."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure`, if given, makes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group, [self._ready(param, group) for param in group["params"] if param.grad is not None])
        return loss

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop or zero all gradients; by default as `set_grad_none` said."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, the moments in their own dtype (torch rounds them to the parameter's)."""
        super().load_state_dict(dict(state_dict))
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            moments = state_dict["state"].get(index, {})
            for name in self.flat.moments:
                if name in moments:
                    self.state[param][name] = moments[name].to(param.device, _master_dtype(param), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps its own attributes only."""
        return {**super().__getstate__(), "make": self.make, "set_grad_none": self.set_grad_none}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`, with a part of the attributes."""
        super().__setstate__(state)
        self.flat = self.make()

    def _ready(self, param: Tensor, group: dict[str, Any]) -> _Ready:
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__}: expected dense gradients, got a sparse one (parameter of shape "
                f"{tuple(param.shape)}). Fix: make the embedding with sparse=False."
            )
        if not state:
            state.update(
                {
                    name: torch.zeros(param.shape, dtype=_master_dtype(param), device=param.device)
                    for name in self.flat.moments
                }
            )
            self.flat.init_state(_segment(_Ready(param, grad, state, 0), _master(param), group, self.flat.moments))
        state["step"] = int(state.get("step", 0)) + 1
        return _Ready(param, grad, {name: state[name] for name in self.flat.moments}, state["step"])

    def _update(self, group: dict[str, Any], ready: Sequence[_Ready]) -> None:
        """Update the parameters of one group."""
        prepared = None
        for each in ready:
            if (each.step, each.param.device) != prepared:
                prepared = (each.step, each.param.device)
                self.flat.prepare([group], *prepared)
            master = _master(each.param)
            shape, numel = tuple(each.param.shape), each.param.numel()
            self.flat.update(
                [_segment(each, master, group, self.flat.moments)],
                coef=1.0,
                step=each.step,
                layout=_Whole((_Slot(_NAME, shape, 0),), numel),
            )
            if master.data_ptr() != each.param.data_ptr():
                each.param.copy_(master.view(shape))


def _master_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype is torch.float64 else torch.float32


def _master(param: Tensor) -> Tensor:
    """The parameter as a flat fp32 (fp64) tensor: a view where that is possible, else a copy."""
    return param.detach().to(_master_dtype(param)).reshape(-1)


def _segment(ready: _Ready, master: Tensor, group: dict[str, Any], moments: Sequence[str]) -> Segment:
    return Segment(
        master=master,
        grad=ready.grad.reshape(-1),
        out=None,
        state={name: ready.moments[name].view(-1) for name in moments},
        group=group,
        slices=(Slice(_NAME, tuple(ready.param.shape), 0, master.numel(), 0),),
    )


# Adam -----------------------------------------------------------------------------------------------------------------


class FusedAdam(StandaloneOptimizer):
    """Adam, with decoupled weight decay unless `adam_w_mode` is false; many parameters by one multi-tensor kernel.

    Args:
        bias_correction: divide the moments by 1 - beta ** step.
        adam_w_mode: decoupled weight decay (AdamW); False adds weight_decay * parameter to the gradient.
        amsgrad: only False.
        set_grad_none: whether `zero_grad()` drops gradients instead of zeroing them.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        make = partial(
            Adam,
            lr,
            betas,
            eps,
            weight_decay,
            bias_correction=bias_correction,
            adam_w_mode=adam_w_mode,
            amsgrad=amsgrad,
        )
        super().__init__(params, make, set_grad_none)

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps its own attributes only."""
        return {**super().__getstate__(), "adam_w_mode": self.adam_w_mode}

    def _update(self, group: dict[str, Any], ready: Sequence[_Ready]) -> None:
        """One kernel call for all parameters of a device and dtype that can be updated as they are."""
        together: dict[tuple[torch.device, torch.dtype], list[_Ready]] = defaultdict(list)
        others = []
        for each in ready:
            if _can_go_together(each, "adamw" if self.adam_w_mode else "adam"):
                together[each.param.device, each.param.dtype].append(each)
            else:
                others.append(each)
        for members in together.values():
            _adam_many(group, members, decoupled=self.adam_w_mode)
        super()._update(group, others)


def _can_go_together(ready: _Ready, kernel: str) -> bool:
    """Whether torch's multi-tensor kernel takes a parameter: all its tensors of one dtype, and contiguous."""
    param, grad = ready.param, ready.grad
    same = param.dtype == grad.dtype == _master_dtype(param)
    return same and param.is_contiguous() and grad.is_contiguous() and fused.has_kernel(kernel, param.device.type)


def _adam_many(group: dict[str, Any], members: Sequence[_Ready], *, decoupled: bool) -> None:
    corrected = bool(group["bias_correction"])
    numbers = {each.step: float(each.step) if corrected else NO_CORRECTION_STEP for each in members}
    steps = {step: fused.step_tensor(number, members[0].param) for step, number in numbers.items()}
    fused.adam_many_(
        [each.param for each in members],
        [each.grad for each in members],
        [each.moments["exp_avg"] for each in members],
        [each.moments["exp_avg_sq"] for each in members],
        [steps[each.step] for each in members],
        lr=float(group["lr"]),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=decoupled,
    )


class DeepSpeedCPUAdam(FusedAdam):
    """`FusedAdam` with the arguments of DeepSpeed's optimizer for offloading; where the state lives is the engine's
    choice (`zero_optimization.offload_optimizer`)."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _require(self, "fp32_optimizer_states", fp32_optimizer_states, True)
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


# The others -----------------------------------------------------------------------------------------------------------


class FusedLamb(StandaloneOptimizer):
    """LAMB: Adam's direction, scaled per parameter by a trust ratio between `min_coeff` and `max_coeff`.

    Raises:
        NotImplementedError: for another value than the default of `eps_inside_sqrt`, `max_grad_norm` or `amsgrad`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        _require(self, "eps_inside_sqrt", eps_inside_sqrt, False)
        _require(self, "amsgrad", amsgrad, False)
        _require(self, "max_grad_norm", max_grad_norm, 0.0, "set gradient_clipping, or call clip_grad_norm_ yourself")
        make = partial(
            Lamb,
            lr,
            betas,
            eps,
            weight_decay,
            bias_correction=bias_correction,
            max_coeff=max_coeff,
            min_coeff=min_coeff,
        )
        super().__init__(params, make)


FusedLAMB = FusedLamb


class FusedLion(StandaloneOptimizer):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay; one moment."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, partial(Lion, lr, betas, weight_decay), set_grad_none)


class DeepSpeedCPULion(FusedLion):
    """`FusedLion` with the arguments and defaults of DeepSpeed's optimizer for offloading."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _require(self, "fp32_optimizer_states", fp32_optimizer_states, True)
        super().__init__(model_params, lr, betas, weight_decay)


class DeepSpeedCPUAdagrad(StandaloneOptimizer):
    """Adagrad with the arguments of DeepSpeed's optimizer for offloading."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _require(self, "amsgrad", amsgrad, False)
        _require(self, "fp32_optimizer_states", fp32_optimizer_states, True)
        super().__init__(model_params, partial(Adagrad, lr, eps, weight_decay))


class FusedSGD(StandaloneOptimizer):
    """Stochastic gradient descent with momentum, as torch.optim.SGD computes it."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, partial(SGD, lr, momentum, dampening, weight_decay, nesterov))


def _require(optimizer: object, name: str, value: Any, only: Any, fix: str = "leave it out") -> None:
    """Refuse an argument of DeepSpeed's signature that has another value than the one that is there."""
    if value != only:
        raise NotImplementedError(f"{type(optimizer).__name__}: expected {name}={only!r}, got {value!r}. Fix: {fix}.")
