"""Which dtype each kind of value has, resolved from the configuration. Owns no tensor and casts nothing.

parameters, activations   compute     fp16 or bf16 if that block is enabled, else what the model has
master, moments           master      fp32 (fp64 for parameters that stay fp64)
gradient planes           accumulate  data_types.grad_accum_dtype, else compute
gradients on the wire     communicate communication_data_type, else compute
buffers                   buffer      data_types.buffer_dtype, else what the model has
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# The configuration's names, and those that other entry points may pass.
DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "float64": torch.float64,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfp16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
_CAST = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dtype_from_name(name: str) -> torch.dtype:
    """The torch dtype called `name` ("bf16", "float32", "torch.float16", ...).

    Raises:
        ValueError: for an unknown name.
    """
    dtype = DTYPES.get(name.lower().removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"dtype: expected one of {sorted(DTYPES)}, got {name!r}. Fix: correct the name.")
    return dtype


@dataclass(frozen=True)
class Precision:
    """The dtypes of one run; None means "as the compute dtype" for gradients and "as in the model" otherwise."""

    compute_dtype: torch.dtype | None = None
    accum_dtype: torch.dtype | None = None
    comm_dtype: torch.dtype | None = None
    buffer_dtype: torch.dtype | None = None

    @classmethod
    def from_config(cls, config: Any) -> Precision:
        """Resolve the blocks fp16, bf16, data_types and the key communication_data_type.

        Args:
            config: a `lorica.config.Config`, or anything with those attributes.
        """
        compute = torch.bfloat16 if config.bf16.enabled else torch.float16 if config.fp16.enabled else None
        return cls(
            compute_dtype=compute,
            accum_dtype=_optional(config.data_types.grad_accum_dtype),
            comm_dtype=_optional(config.communication_data_type),
            buffer_dtype=_optional(config.data_types.buffer_dtype),
        )

    def compute_dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a parameter of `dtype` computes; integers and 8-bit floats stay what they are."""
        return self.compute_dtype if self.compute_dtype is not None and dtype in _CAST else dtype

    def master_dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the master and the moments of a parameter of `dtype`."""
        return torch.float64 if self.compute_dtype_of(dtype) is torch.float64 else torch.float32

    def accum_dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the gradient plane of a parameter of `dtype`."""
        return self._of_gradient(self.accum_dtype, dtype)

    def comm_dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the gradient of a parameter of `dtype` is reduced over ranks."""
        return self._of_gradient(self.comm_dtype, dtype)

    @property
    def sums_in_fp16(self) -> bool:
        """Whether gradients of several ranks add up in fp16, so that they are divided before, to stay in its range."""
        return any((dtype or self.compute_dtype) is torch.float16 for dtype in (self.accum_dtype, self.comm_dtype))

    def _of_gradient(self, chosen: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
        compute = self.compute_dtype_of(dtype)
        return compute if chosen is None or compute is torch.float64 else chosen


def _optional(name: str | None) -> torch.dtype | None:
    return None if name is None else dtype_from_name(name)
