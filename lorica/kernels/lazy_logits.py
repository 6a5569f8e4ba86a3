"""What an output projection returns instead of logits: a promise that `cross_entropy` redeems without forming them.

Owns `lazy_linear`, `LazyLogits` and `LazyGradient`. What a deferred tensor is, is in `deferred.py`; how the loss is
computed over chunks, in `linear_cross_entropy.py`; which module returns lazy logits, in
`lorica/ops/linear_cross_entropy.py`.

Between projection and loss, models cast to fp32, drop the last position and flatten the rows: that stays lazy. So
`torch.nn.functional.cross_entropy` (and everything that calls it) meets lazy logits, and computes the loss from hidden
states and weight. Any other operation forms the logits, by the same matmul that the projection would have done.

[Note: lazy gradients] In backward the loss hands its logits a `LazyGradient`: it carries the gradients of hidden
states, weight and bias, which are known already, back through casts and views to the projection. Hooks on the logits
see it; one that looks at its values gets them, computed for the occasion, and one that returns another gradient is
obeyed.

[Note: promises end] Logits that are formed late must be those of the forward. A hidden state or a weight that was
changed in place in between is noticed by its version, and a step of an engine, which changes weights behind autograd's
back, by `expired`: an error instead of other logits.

Shape suffixes: N rows, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lorica.kernels.cross_entropy_formula import LossOptions
from lorica.kernels.deferred import Deferred, Values, description
from lorica.kernels.linear_cross_entropy import (
    NOTHING,
    Gradients,
    Problem,
    Reduction,
    Wanted,
    cross_entropy_,
    finished,
    losses_and_gradients,
    reduced,
)


@dataclass(frozen=True)
class Source:
    """Where the parameters of a projection are.

    Attributes:
        whole: a context inside which they have their values.
        expired: whether they may have changed since the projection was called.
    """

    whole: Callable[[], AbstractContextManager[Any]] = nullcontext
    expired: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Head:
    """The parameters of an output projection, at one call of it."""

    weight_VD: Tensor
    bias_V: Tensor | None
    wanted: Wanted
    source: Source
    versions: tuple[int, ...]

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype | None]:
        """Of weight and bias."""
        return self.weight_VD.dtype, None if self.bias_V is None else self.bias_V.dtype


class Projection(NamedTuple):
    """One call of an output projection: all that the logits depend on.

    Attributes:
        hidden: [*, D], without a graph.
        version: how often it had been changed in place.
    """

    hidden: Tensor
    version: int
    head: Head

    @contextmanager
    def parameters(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias, with their values, without a graph.

        Raises:
            RuntimeError: if the logits would not be those of the forward; see [Note: promises end].
        """
        self.check()
        weight_VD, bias_V = self.head.weight_VD, self.head.bias_V
        with self.head.source.whole():
            yield weight_VD.detach(), None if bias_V is None else bias_V.detach()

    def check(self) -> None:
        """Refuse to go on with other values than those of the forward."""
        head = self.head
        same = self.hidden._version == self.version and head.versions == versions(head.weight_VD, head.bias_V)
        if not same or head.source.expired():
            raise RuntimeError(
                "Logits: expected to compute them from the values of the forward pass, but its hidden states or the "
                "weight have changed since. Fix: read the logits before the optimizer step, or LazyHead.detach(head)."
            )

    def logits(self) -> Tensor:
        """The logits [*, V], as the projection itself would compute them."""
        with self.parameters() as (weight_VD, bias_V), torch.autocast(self.hidden.device.type, enabled=False):
            dtype = self.hidden.dtype
            return functional.linear(self.hidden, weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))

    @contextmanager
    def problem(self, target: Tensor, options: LossOptions) -> Iterator[Problem]:
        """Predicting `target` from these logits."""
        with self.parameters() as (weight_VD, bias_V):
            yield Problem(
                self.hidden.reshape(-1, self.hidden.shape[-1]), weight_VD, bias_V, target.reshape(-1), options
            )

    def of(self, hidden: Tensor) -> Projection:
        """The same call with a view or a copy of the hidden states, or of a part of them."""
        self.check()
        return Projection(hidden, hidden._version, self.head)


def versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """How often each was changed in place."""
    return tuple(-1 if tensor is None else tensor._version for tensor in tensors)


def lazy_linear(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None, source: Source) -> Tensor:
    """`linear(x, weight, bias)` as lazy logits; under autocast x is cast as a linear layer casts it.

    Args:
        x: [*, D]; x or a parameter requires a gradient.
        source: how to reach the parameters later.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    logits = _Project.apply(x, weight_VD, bias_V, source)
    assert isinstance(logits, Tensor)
    return logits


# The tensors ----------------------------------------------------------------------------------------------------------


class LazyLogits(Deferred):
    """Logits that are known as hidden states and a weight."""

    rules: ClassVar[dict[Any, Callable[..., Any]]] = {}  # filled at the end of this file
    projection: Projection


def _logits(
    like: Tensor, projection: Projection, values: Values | None = None, view: Callable[[Tensor], Tensor] | None = None
) -> LazyLogits:
    """Lazy logits that look like `like` (on the meta device); without `values`, they have their own."""
    values = values or Values(lambda: projection.logits().to(like.dtype))
    logits = LazyLogits(like, projection.hidden.device, values, view)
    assert isinstance(logits, LazyLogits)
    logits.projection = projection
    return logits


class LazyGradient(Deferred):
    """The gradient of logits, known as the gradients of what they were computed from; see [Note: lazy gradients]."""

    parts: Callable[[], Gradients]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The sum of two lazy gradients is one."""
        both = func is torch.ops.aten.add.Tensor and len(args) == 2 and not kwargs
        if both and all(isinstance(each, LazyGradient) and not each.is_formed for each in args):
            return _sum(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _gradient(
    like: Tensor, device: torch.device, parts: Callable[[], Gradients], form: Callable[[], Tensor]
) -> LazyGradient:
    gradient = LazyGradient(like, device, Values(form))
    assert isinstance(gradient, LazyGradient)
    gradient.parts = parts
    return gradient


def _sum(first: LazyGradient, second: LazyGradient) -> LazyGradient:
    def parts() -> Gradients:
        pairs = zip(first.parts(), second.parts(), strict=True)
        return Gradients(*(None if one is None or other is None else one + other for one, other in pairs))

    return _gradient(description(first), first.device, parts, lambda: first.formed() + second.formed())


# Autograd -------------------------------------------------------------------------------------------------------------


class _Project(torch.autograd.Function):
    """From hidden states to lazy logits; with a gradient that has values, the backward of a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor, bias_V: Tensor | None, source: Source) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight_VD)
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        wanted = Wanted(*ctx.needs_input_grad[:3])
        head = Head(weight_VD, bias_V, wanted, source, versions(weight_VD, bias_V))
        like = torch.empty(*x.shape[:-1], weight_VD.shape[0], dtype=x.dtype, device="meta")
        return _logits(like, Projection(x.detach(), x._version, head))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return None, None, None, None
        if isinstance(grad, LazyGradient) and not grad.is_formed:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "The loss of lazy logits: expected to be differentiated once, got create_graph=True. Fix: "
                    "LazyHead.detach(head), whose logits can be differentiated any number of times."
                )
            return *grad.parts(), None
        x, weight_VD = ctx.saved_tensors
        grad_NV = (grad.formed() if isinstance(grad, Deferred) else grad).reshape(-1, weight_VD.shape[0]).to(x.dtype)
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        return (
            (grad_NV @ weight_VD.to(x.dtype)).view(x.shape) if for_x else None,
            (grad_NV.t() @ x.reshape(-1, x.shape[-1])).to(weight_VD.dtype) if for_weight else None,
            grad_NV.sum(0).to(ctx.bias_dtype) if for_bias else None,
            None,
        )


class Derivation(NamedTuple):
    """Lazy logits made from others: the result, and how a gradient of its rows becomes one of theirs."""

    result: LazyLogits
    adjoint: Callable[[Tensor], Tensor]


class _Derive(torch.autograd.Function):
    """From lazy logits to a view or a cast of them."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, derivation: Derivation) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.adjoint, ctx.like, ctx.device = derivation.adjoint, description(logits), logits.device
        return derivation.result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return None, None
        adjoint, dtype = ctx.adjoint, ctx.like.dtype
        if not isinstance(grad, Deferred):
            return adjoint(grad).to(dtype), None
        if not isinstance(grad, LazyGradient) or grad.is_formed:
            return adjoint(grad.formed()).to(dtype), None

        def parts() -> Gradients:
            own = grad.parts()
            return own._replace(x=None if own.x is None else adjoint(own.x))

        return _gradient(ctx.like, ctx.device, parts, lambda: adjoint(grad.formed()).to(dtype)), None


class Loss(NamedTuple):
    """What `cross_entropy` was asked for."""

    options: LossOptions
    reduction: Reduction
    wants_gradient: bool


class _Loss(torch.autograd.Function):
    """The loss of lazy logits [N, V] or [V]."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits, target: Tensor, loss: Loss) -> Tensor:
        projection = logits.projection
        ctx.head, ctx.version, ctx.loss, ctx.like = projection.head, projection.version, loss, description(logits)
        wanted = projection.head.wanted if loss.wants_gradient else NOTHING
        with projection.problem(target, loss.options) as problem:
            if loss.reduction == "none":
                losses_N, gradients = losses_and_gradients(problem, scale=None, wanted=NOTHING)
                value, factor = losses_N.view(target.shape), None
            else:
                value, gradients, factor = reduced(problem, loss.reduction, wanted)
        ctx.save_for_backward(projection.hidden, target, *gradients, factor)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        hidden, target, *saved, factor = ctx.saved_tensors
        projection, loss = Projection(hidden, ctx.version, ctx.head), ctx.loss
        if loss.reduction == "none":
            parts = partial(_gradients_of_rows, projection, target, loss.options, grad_output)
        else:
            gradients = finished(Gradients(*saved), (hidden.dtype, *projection.head.dtypes), grad_output, factor)
            parts = partial(_shaped_like, hidden, gradients)
        form = partial(_gradient_of_logits, projection, target, loss, grad_output, ctx.like.dtype)
        return _gradient(ctx.like, hidden.device, parts, form), None, None


def _shaped_like(hidden: Tensor, gradients: Gradients) -> Gradients:
    return gradients._replace(x=None if gradients.x is None else gradients.x.view(hidden.shape))


def _gradients_of_rows(projection: Projection, target: Tensor, options: LossOptions, scale: Tensor) -> Gradients:
    """The gradients of hidden states, weight and bias for a gradient of each row's loss."""
    with projection.problem(target, options) as problem:
        wanted = projection.head.wanted
        _, gradients = losses_and_gradients(problem, scale=scale.reshape(-1), wanted=wanted)
    return _shaped_like(projection.hidden, gradients)


def _gradient_of_logits(
    projection: Projection, target: Tensor, loss: Loss, grad_output: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradient of the logits themselves, for who wants to see it."""
    logits = projection.logits().to(dtype)
    scale, target_N = grad_output.reshape(-1), target.reshape(-1)
    if loss.reduction == "mean":
        scale = scale / (target_N != loss.options.ignore_index).sum().clamp_min(1)
    cross_entropy_(logits.view(-1, logits.shape[-1]), target_N, loss.options, scale)
    return logits


# The operations that stay lazy ----------------------------------------------------------------------------------------


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`torch.nn.functional.cross_entropy` of class indices; everything else that it can do needs the logits."""
    if not _is_lazy(input) or not _are_classes_of(target, input):
        return NotImplemented
    if weight is not None or size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    grad = torch.is_grad_enabled() and input.requires_grad
    loss = _Loss.apply(input, target, Loss(LossOptions(ignore_index, label_smoothing), reduction, grad))
    assert isinstance(loss, Tensor)
    return loss.to(torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype)


def _are_classes_of(target: Any, logits: LazyLogits) -> bool:
    """Whether `target` holds one class for each row; more dims would put the classes second, not last."""
    indices = isinstance(target, Tensor) and not isinstance(target, Deferred) and target.dtype == torch.int64
    return indices and logits.dim() <= 2 and target.shape == logits.shape[:-1] and target.device == logits.device


def _is_lazy(logits: Any) -> bool:
    return isinstance(logits, LazyLogits) and not logits.is_formed


def _derived(logits: LazyLogits, derivation: Derivation) -> Any:
    return _Derive.apply(logits, derivation)


def _float(logits: Any, *args: Any, **kwargs: Any) -> Any:
    """`logits.float()`."""
    if args or kwargs or not _is_lazy(logits):
        return NotImplemented
    return _cast(logits, torch.float32)


def _to(logits: Any, *args: Any, **kwargs: Any) -> Any:
    """`logits.to(...)`, as long as it stays on its device."""
    if not _is_lazy(logits) or "copy" in kwargs:
        return NotImplemented
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return NotImplemented  # torch says what is wrong with them
    here = device is None or torch.empty(0, device=device).device == logits.device
    if not here or memory_format is not None:
        return NotImplemented
    return logits if dtype is None else _cast(logits, dtype)


def _cast(logits: LazyLogits, dtype: torch.dtype) -> Any:
    """To the same dtype, or to fp32, which holds every value of a narrower one; other casts round."""
    if dtype == logits.dtype:
        return logits
    if dtype != torch.float32 or logits.dtype not in (torch.bfloat16, torch.float16):
        return NotImplemented
    like = description(logits).to(dtype)
    return _derived(logits, Derivation(_logits(like, logits.projection), lambda rows: rows))


def _reshape(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A rule for a function that changes leading dims only."""

    def rule(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_lazy(logits):
            return NotImplemented
        own = description(logits)
        like = function(
            own, *args, **kwargs
        )  # on the meta device: torch finds the shape, or says what is wrong with it
        if like.dtype != own.dtype or like.dim() == 0 or like.shape[-1] != own.shape[-1] or own.shape[-1] == 0:
            return NotImplemented
        lead = own.shape[:-1]
        hidden = logits.projection.hidden
        projection = logits.projection.of(hidden.reshape(*like.shape[:-1], hidden.shape[-1]))
        view = lambda values: function(values, *args, **kwargs)  # noqa: E731
        result = _view_or_copy(logits, own, like, projection, view)
        return _derived(logits, Derivation(result, lambda rows: rows.reshape(*lead, rows.shape[-1])))

    return rule


def _view_as(logits: Any, other: Any) -> Any:
    """`logits.view_as(other)`."""
    return _reshape(Tensor.view)(logits, other.shape)


def _contiguous(logits: Any, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """`logits.contiguous()`."""
    if not _is_lazy(logits) or memory_format is not torch.contiguous_format:
        return NotImplemented
    return logits if logits.is_contiguous() else _reshape(Tensor.contiguous)(logits)


def _getitem(logits: Any, index: Any) -> Any:
    """`logits[index]` with numbers, slices and one ellipsis, as long as every class stays."""
    index = index if isinstance(index, tuple) else (index,)
    if not _is_lazy(logits) or not _keeps_classes(index, logits.dim()):
        return NotImplemented
    own = description(logits)
    lead = own.shape[:-1]
    projection = logits.projection.of(logits.projection.hidden[index])

    def adjoint(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(*lead, rows.shape[-1])
        whole[index] = rows
        return whole

    result = _view_or_copy(logits, own, own[index], projection, lambda values: values[index])
    return _derived(logits, Derivation(result, adjoint))


def _keeps_classes(index: tuple[Any, ...], num_dims: int) -> bool:
    """Whether `index` has basic parts only, and none that chooses among the classes."""
    parts = [each for each in index if each is not Ellipsis]
    if not all(isinstance(each, (int, slice)) and not isinstance(each, bool) for each in parts):
        return False
    one_ellipsis = len(index) - len(parts) == 1
    if len(index) - len(parts) > 1 or len(parts) > num_dims or not parts:
        return False
    reaches_classes = len(parts) == num_dims or (one_ellipsis and index[-1] is not Ellipsis)
    return not reaches_classes or parts[-1] == slice(None)


def _view_or_copy(
    logits: LazyLogits, own: Tensor, like: Tensor, projection: Projection, view: Callable[[Tensor], Tensor]
) -> LazyLogits:
    """A view shares the values of `logits`, a copy has its own; the meta device tells which one torch makes."""
    if like.untyped_storage()._cdata != own.untyped_storage()._cdata:
        return _logits(like, projection)
    before = logits._shows
    return _logits(like, projection, logits._shared, view if before is None else lambda values: view(before(values)))


LazyLogits.rules.update(
    {
        functional.cross_entropy: _cross_entropy,
        Tensor.float: _float,
        Tensor.to: _to,
        Tensor.contiguous: _contiguous,
        Tensor.view: _reshape(Tensor.view),
        Tensor.view_as: _view_as,
        Tensor.reshape: _reshape(Tensor.reshape),
        Tensor.flatten: _reshape(Tensor.flatten),
        torch.reshape: _reshape(torch.reshape),
        torch.flatten: _reshape(torch.flatten),
        Tensor.__getitem__: _getitem,
    }
)
