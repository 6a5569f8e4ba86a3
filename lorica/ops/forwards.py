"""The forwards that modules get when a kernel takes their work, and the table of kernels per library.

A forward asks `fused` of its input first, as the modules of `modules.py` do: on a CPU, inside torch.compile and for
other tensors than a kernel takes, the module's own forward runs, with the same bits as before. Owns no kernel.

[Note: other globals] A rotary embedding is no module but a function that the attention's forward looks up in its file.
The new forward is the same code with a copy of that file's globals in which this one name means the kernel, so that
other models of the process keep theirs. What is patched into that file afterwards is not seen. The copy has no
`__name__`: torch.compile would take it for the file and guard the file's function instead of this one.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorica.log import logger
from lorica.ops.modules import RMS_NORM_AUTOCASTS, fused
from lorica.ops.recognise import ROTARY_NAME

Kernel = Callable[..., Any]
Forward = Callable[..., Any]
Original = type[nn.Module]


# Forwards: make(class, library, **options) ----------------------------------------------------------------------------


def layer_norm(original: Original, library: str, *, eps: float) -> Forward:
    """Under autocast the result is float32, as torch's is. A class without bias need not have an attribute for it."""

    def forward(self: Any, x: Tensor) -> Any:
        if not fused(x):
            return original.forward(self, x)
        return kernel(library, "layer_norm")(x, self.weight, getattr(self, "bias", None), eps, _autocast_dtype(x))

    return forward


def rms_norm(original: Original, library: str, *, eps: float, offset: float, cast_before_weight: bool) -> Forward:
    """`cast_before_weight` as in FusedRMSNorm."""
    autocasts = issubclass(original, nn.RMSNorm) and RMS_NORM_AUTOCASTS

    def forward(self: Any, x: Tensor) -> Any:
        if not fused(x):
            return original.forward(self, x)
        dtype = _autocast_dtype(x) if autocasts else None
        return kernel(library, "rms_norm")(x, self.weight, eps, offset, cast_before_weight, dtype)

    return forward


def swiglu(original: Original, library: str) -> Forward:
    """The three linear layers are called as modules: they may be LoRA's, quantised, or have hooks."""

    def forward(self: Any, x: Tensor) -> Any:
        if not fused(x):
            return original.forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if fused(gate) and gate.dtype == up.dtype:
            return self.down_proj(kernel(library, "swiglu")(gate, up))
        return self.down_proj(self.act_fn(gate) * up)

    return forward


def gelu(original: Original, library: str, *, approximate: str) -> Forward:
    """Without a bias: what is before a GELU module is another module."""

    def forward(self: Any, x: Tensor) -> Any:
        return kernel(library, "gelu")(x, approximate) if fused(x) else original.forward(self, x)

    return forward


def rotary(original: Original, library: str) -> Forward:
    """The attention's own forward, in which the rotary embedding is the kernel; see [Note: other globals]."""
    own: Any = original.forward
    scope = {name: value for name, value in own.__globals__.items() if name != "__name__"}
    scope[ROTARY_NAME] = _rotary_function(own.__globals__[ROTARY_NAME], library)
    forward = types.FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__, forward.__doc__ = own.__kwdefaults__, own.__doc__
    forward.__annotations__, forward.__qualname__ = own.__annotations__, own.__qualname__
    return forward


def _rotary_function(own: Callable[..., Any], library: str) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if not fused(q):
            return own(q, k, cos, sin, *rest, **named)
        heads_dim = named.get("unsqueeze_dim", 1)
        if rest or set(named) - {"unsqueeze_dim"} or heads_dim not in (1, 2) or not _fits(q, k, cos, sin):
            _warn_once(f"{own.__module__}.{ROTARY_NAME}: the rotary kernel does not take these arguments; not fused")
            return own(q, k, cos, sin, *rest, **named)
        if heads_dim == 1:
            return kernel(library, "rotary")(q, k, cos, sin)
        return tuple(
            x.transpose(1, 2) for x in kernel(library, "rotary")(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        )

    return apply_rotary_pos_emb


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether whole heads are turned, by one angle per position (and batch): not a part of each, not per head."""
    heads = q.dim() == k.dim() == 4 and q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.dtype == k.dtype
    return heads and cos.dim() == 3 and cos.shape == sin.shape and cos.shape[0] in (1, q.shape[0])


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else None


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


# Kernels --------------------------------------------------------------------------------------------------------------


@cache
def kernel(library: str, op: str) -> Kernel:
    """The function of `library` for `op`, imported now; its arguments are those that the forwards above pass."""
    return KERNELS[library][op]()


def _lorica_layer_norm() -> Kernel:
    from lorica.kernels.norm import layer_norm

    return lambda x, weight, bias, eps, dtype: layer_norm(x, weight, bias, eps, out_dtype=dtype)


def _lorica_rms_norm() -> Kernel:
    from lorica.kernels.norm import rms_norm

    return lambda x, weight, eps, offset, cast_before_weight, dtype: rms_norm(
        x, weight, eps, offset=offset, cast_before_weight=cast_before_weight, out_dtype=dtype
    )


def _lorica_swiglu() -> Kernel:
    from lorica.kernels.activation import swiglu

    return swiglu


def _lorica_gelu() -> Kernel:
    from lorica.kernels.activation import bias_gelu

    return lambda x, approximate: bias_gelu(x, None, approximate)


def _lorica_rotary() -> Kernel:
    from lorica.kernels.rotary import apply_rotary

    return apply_rotary


def _liger_layer_norm() -> Kernel:
    from liger_kernel.transformers.functional import liger_layer_norm

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype | None) -> Tensor:
        """Liger's wants a bias."""
        y: Tensor = liger_layer_norm(x, weight, torch.zeros_like(weight) if bias is None else bias, eps)
        return y if dtype is None else y.to(dtype)

    return layer_norm


def _liger_rms_norm() -> Kernel:
    from liger_kernel.transformers.functional import liger_rms_norm

    def rms_norm(
        x: Tensor, weight: Tensor, eps: float, offset: float, cast_before_weight: bool, dtype: torch.dtype | None
    ) -> Tensor:
        """Not in place: Liger would write the gradient of x over that of y, which autograd may still add to."""
        y: Tensor = liger_rms_norm(x, weight, eps, offset, "llama" if cast_before_weight else "gemma", False)
        return y if dtype is None else y.to(dtype)

    return rms_norm


def _liger_swiglu() -> Kernel:
    from liger_kernel.transformers.functional import liger_swiglu

    function: Kernel = liger_swiglu
    return function


def _liger_rotary() -> Kernel:
    from liger_kernel.transformers.functional import liger_rope

    return lambda q, k, cos, sin: liger_rope(q, k, cos, sin)[:2]  # some versions return cos and sin as well


KERNELS: dict[str, dict[str, Callable[[], Kernel]]] = {
    "lorica": {
        "layer_norm": _lorica_layer_norm,
        "rms_norm": _lorica_rms_norm,
        "swiglu": _lorica_swiglu,
        "gelu": _lorica_gelu,
        "rotary": _lorica_rotary,
    },
    "liger": {
        "layer_norm": _liger_layer_norm,
        "rms_norm": _liger_rms_norm,
        "swiglu": _liger_swiglu,
        "rotary": _liger_rotary,
    },
}
"""Library -> op -> what imports its kernel. `linear_cross_entropy` is not here: a head has no forward of its own."""
