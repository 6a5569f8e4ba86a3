"""Modules that call a fused kernel on a GPU and torch's own operation elsewhere. Owns parameters, and that choice.

The choice is by tensor, in `fused`. Inside torch.compile it is always torch's operation: the compiler fuses that with
its neighbours, which it could not do with a kernel from outside, and no graph breaks.

The kernels save the parameter itself for the backward, never a copy, so that a sharded parameter may be freed after the
forward and be gathered again; they differentiate once, and not under torch.func.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.kernels.runtime import runs_on

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)  # a subclass (DTensor, ...) has its own idea of what an operation does
_HALF = (torch.bfloat16, torch.float16)

# torch.rms_norm runs in float32 under autocast since this version (pytorch#174824), layer_norm always did.
RMS_NORM_AUTOCASTS = torch.torch_version.TorchVersion(torch.__version__) >= "2.12"


def fused(x: Tensor) -> bool:
    """Whether a kernel takes `x`, rather than torch's operation."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cuda
        and type(x) in _PLAIN
        and x.dtype in _DTYPES
        and x.dim() > 0
        and runs_on(x.device)
    )


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _flat_last(x: Tensor | None, num_dims: int) -> Tensor | None:
    """`x` with its last `num_dims` dims as one: itself, or a view."""
    return x if x is None or num_dims == 1 else x.flatten(-num_dims)


def _shaped(y: Tensor | tuple[Tensor, Tensor], shape: torch.Size) -> Tensor | tuple[Tensor, Tensor]:
    return y.view(shape) if isinstance(y, Tensor) else (y[0].view(shape), y[1].view(shape))


class FusedLayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, fused: same constructor, parameters and state dict.

    Under autocast the result is float32, as torch's is, but no float32 copy of the input is made.
    """

    def forward(  # type: ignore[override]  # with a residual it returns two tensors
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise over the last dims.

        Args:
            input: [..., *normalized_shape], any floating dtype.
            residual: like `input`; then input + residual is normalised.
        Returns: the normalised tensor; with `residual` the pair (normalised, input + residual).
        """
        num_dims = len(self.normalized_shape)
        if not fused(input) or input.shape[-num_dims:] != self.normalized_shape:
            total = input if residual is None else input + residual
            y = super().forward(total)
            return y if residual is None else (y, total)
        from lorica.kernels.norm import layer_norm

        return _shaped(
            layer_norm(
                input.flatten(-num_dims),
                _flat_last(self.weight, num_dims),
                _flat_last(self.bias, num_dims),
                self.eps,
                _flat_last(residual, num_dims),
                out_dtype=torch.float32 if _autocasts(input) else None,
            ),
            input.shape,
        )


class FusedRMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, fused: same constructor, parameters and state dict; also Hugging Face's Llama and Gemma norms.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in torch.
        offset: is added to the weight; 1.0 for Gemma's (1 + weight), whose neutral weight is then 0.
        cast_before_weight: round the normalised row to the input's dtype before the weight multiplies it, as Hugging
            Face's Llama does; the result has the dtype of that product. Torch rounds once, behind the weight.
    """

    offset: float
    cast_before_weight: bool

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
        cast_before_weight: bool = False,
    ) -> None:
        self.offset = offset  # before the constructor of torch, which calls reset_parameters
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.cast_before_weight = cast_before_weight

    def reset_parameters(self) -> None:
        """Make the weight neutral."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(  # type: ignore[override]  # with a residual it returns two tensors
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise over the last dims; arguments and results as in FusedLayerNorm."""
        num_dims = len(self.normalized_shape)
        if not fused(x) or x.shape[-num_dims:] != self.normalized_shape:
            total = x if residual is None else x + residual
            y = self._formula(total)
            return y if residual is None else (y, total)
        from lorica.kernels.norm import rms_norm

        autocast = self._is_torch and RMS_NORM_AUTOCASTS and _autocasts(x)
        return _shaped(
            rms_norm(
                x.flatten(-num_dims),
                _flat_last(self.weight, num_dims),
                torch.finfo(torch.float32).eps if self.eps is None else self.eps,
                _flat_last(residual, num_dims),
                offset=self.offset,
                cast_before_weight=self.cast_before_weight,
                out_dtype=torch.float32 if autocast else None,
            ),
            x.shape,
        )

    @property
    def _is_torch(self) -> bool:
        """Whether torch.rms_norm says what this module does."""
        return self.weight is None or (self.offset == 0 and not self.cast_before_weight)

    def _formula(self, x: Tensor) -> Tensor:
        if self._is_torch:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        wide = x.float() if x.dtype in _HALF else x
        y = F.rms_norm(wide, self.normalized_shape, None, self.eps)
        weight = self.weight.to(y.dtype) + self.offset
        if self.cast_before_weight:
            return (y.to(x.dtype) * weight).to(torch.promote_types(x.dtype, self.weight.dtype))
        return (y * weight).to(x.dtype)

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"{super().extra_repr()}, offset={self.offset}, cast_before_weight={self.cast_before_weight}"


class BiasGELU(nn.Module):
    """gelu(x + bias): the bias of the linear layer before (made with bias=False), and the activation, in one pass.

    Args:
        num_features: N; the module owns a parameter `bias` [N], zero at first. None: it owns none, and takes one as an
            argument, or goes without.
        approximate: "tanh" or "none" (exact), as in torch.nn.GELU.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int | None = None,
        approximate: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.approximate = num_features, approximate
        if num_features is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """gelu(x + bias).

        Args:
            x: [..., N].
            bias: [N]; only for a module without a parameter.
        """
        if bias is not None and self.bias is not None:
            raise ValueError(
                "bias is there twice: expected the module's parameter or an argument, got both (BiasGELU). "
                "Fix: make the module with num_features=None."
            )
        bias = self.bias if bias is None else bias
        if not fused(x):
            return F.gelu(x if bias is None else x + bias, approximate=self.approximate)
        from lorica.kernels.activation import bias_gelu

        return bias_gelu(x, bias, self.approximate)

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"{self.num_features}, approximate={self.approximate!r}"


class SwiGLU(nn.Module):
    """silu(gate) * up; owns no parameter."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """silu(gate) * up.

        Args:
            gate: [..., N]; or [..., 2 N] that holds gate and up side by side, if `up` is None.
            up: [..., N].
        """
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        if not fused(gate) or up.shape != gate.shape or up.dtype != gate.dtype:
            return F.silu(gate) * up
        from lorica.kernels.activation import swiglu

        return swiglu(gate, up)
