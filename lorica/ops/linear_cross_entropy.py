"""Modules for linear + cross-entropy: one to build models with, one that an existing head becomes. Owns no arithmetic.

`LinearCrossEntropy` returns the loss. `LazyHead` is for models that are not to be changed:
`LazyHead.attach(model.lm_head)` changes the class of that `nn.Linear` and nothing else, so parameters, their names,
hooks and state_dict stay, and the model's own call of `cross_entropy` then runs over chunks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorica.kernels.lazy_logits import Source, lazy_linear
from lorica.kernels.linear_cross_entropy import CHUNK_BYTES, Reduction, linear_cross_entropy

Whole = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
_ATTRIBUTE = "_lorica_promises"


class LinearCrossEntropy(nn.Linear):
    """An output projection and its cross-entropy, without the logits: a linear layer that is called with targets."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `nn.Linear`; the other arguments are those of `linear_cross_entropy`."""
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction
        self.z_loss, self.softcap, self.chunk_bytes = z_loss, softcap, chunk_bytes

    def forward(self, x: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """The loss.

        Args:
            x: [*, in_features]. target: [*], class indices.
        Returns:
            [], or [*] for reduction "none".
        """
        loss = linear_cross_entropy(
            x.reshape(-1, x.shape[-1]),
            self.weight,
            target.reshape(-1),
            bias=self.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            z_loss=self.z_loss,
            softcap=self.softcap,
            chunk_bytes=self.chunk_bytes,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss

    def logits(self, x: Tensor) -> Tensor:
        """The logits [*, out_features], capped if there is a softcap."""
        logits = functional.linear(x, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Promises:
    """What a head and the lazy logits that it has returned share: how to reach the parameters, and until when."""

    def __init__(self, whole: Whole | None) -> None:
        self.whole, self.generation = whole, 0

    def source(self, params: Sequence[nn.Parameter]) -> Source:
        """For the logits of one call."""
        whole = nullcontext if self.whole is None else partial(self.whole, params)
        return Source(whole, partial(self._is_over, self.generation))

    def _is_over(self, generation: int) -> bool:
        return generation != self.generation


class LazyHead(nn.Linear):
    """An `nn.Linear` whose logits are lazy while the model trains; elsewhere it is what it was."""

    _lorica_promises: Promises

    @staticmethod
    def attach(linear: nn.Linear, whole: Whole | None = None) -> LazyHead:
        """Make `linear` a lazy head, in place.

        Args:
            whole: a context inside which the given parameters have their values, for an engine that shards them. It is
                used when the loss or the logits are computed, which may be outside of the forward: if it communicates,
                all ranks must do so.
        Returns:
            `linear`, by its new class.
        Raises:
            TypeError: for anything but a plain `nn.Linear`, whose forward would be lost.
        """
        if type(linear) is not nn.Linear or "forward" in vars(linear):
            raise TypeError(
                f"LazyHead.attach: expected a plain torch.nn.Linear, got {type(linear).__module__}."
                f"{type(linear).__qualname__}. Fix: attach the nn.Linear itself, once, before it is wrapped."
            )
        linear.__class__ = LazyHead
        assert isinstance(linear, LazyHead)
        vars(linear)[_ATTRIBUTE] = Promises(whole)
        return linear

    @staticmethod
    def detach(head: nn.Linear) -> None:
        """Make a lazy head a plain `nn.Linear` again; logits that it has returned stay lazy.

        Raises:
            TypeError: for a module that is none.
        """
        if not isinstance(head, LazyHead):
            raise TypeError(
                f"LazyHead.detach: expected a lazy head, got {type(head).__qualname__}. Fix: attach it first."
            )
        head.__class__ = nn.Linear  # type: ignore[assignment]
        del vars(head)[_ATTRIBUTE]

    def expire(self) -> None:
        """Logits that were returned so far must not be computed any more: the weight is about to change.

        For an engine that changes weights where autograd does not see it; torch's own optimizers are noticed.
        """
        self._lorica_promises.generation += 1

    def forward(self, input: Tensor) -> Tensor:
        """Lazy logits if a gradient is to flow through them; the logits otherwise, and inside compiled code."""
        if not self.training or not torch.is_grad_enabled() or not self._can_wait(input):
            return super().forward(input)
        return lazy_linear(input, self.weight, self.bias, self._lorica_promises.source(list(self.parameters())))

    def _get_name(self) -> str:
        """The name in `print(model)`."""
        return "LazyHead"

    def _can_wait(self, input: Tensor) -> bool:
        """Ordinary tensors of one dtype, and no transformation that needs to see what is computed."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        params = list(self.parameters())
        fits = torch.is_autocast_enabled(input.device.type) or all(param.dtype == input.dtype for param in params)
        fits = fits and input.shape[-1] == self.in_features and input.device == self.weight.device
        plain = type(input) in (Tensor, nn.Parameter) and not any(map(is_traceable_wrapper_subclass, params))
        return plain and fits and any(t.requires_grad for t in (input, *params))


LazyHead.__name__ = nn.Linear.__name__  # units may be named by class; pickle goes by __qualname__
