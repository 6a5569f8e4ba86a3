"""fp32 arithmetic of which every bit is known, in numpy: a correctly rounded multiply-add; random bit patterns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def fma(x: Any, y: Any, z: Any) -> Any:
    """x * y + z of fp32 arrays, rounded once.

    The product is exact in fp64. The sum is rounded there to odd (to that neighbour whose last bit is 1, if inexact),
    after which rounding to fp32 is as if the sum had been exact: fp64 has more than two bits to spare.
    Source: Boldo & Melquiond 2008, "Emulation of a FMA and correctly rounded sums", theorem 1.
    """
    with np.errstate(all="ignore"):
        product, z = np.float64(x) * np.float64(y), np.float64(z)
        total = np.asarray(product + z)
        back = total - product
        left_out = (product - (total - back)) + (z - back)  # exactly what the sum lacks: Knuth's TwoSum
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (left_out != 0)
        odd = np.nextafter(total, np.where(left_out > 0, np.inf, -np.inf))
        return np.where(inexact & even, odd, total).astype(np.float32)


def random_bits(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random bit patterns as floats: every exponent, denormals, zeros, infinities; NaN becomes 1."""
    generator = torch.Generator().manual_seed(seed)
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    bits = torch.randint(-(2**31), 2**31, (numel,), generator=generator, dtype=torch.int64)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-42, -1e-45, 3.4e38, 1.0], dtype=dtype)
    values = bits.to(integer).view(dtype)  # keeps the low bits
    values[: special.numel()] = special[: min(numel, special.numel())]
    return torch.where(values.isnan(), torch.ones_like(values), values)


def usual(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers as training has them, of many magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-8, 2, (numel,), generator=generator)
    keep = torch.rand(numel, generator=generator) > 0.05
    return (torch.randn(numel, generator=generator) * 10.0**exponents * keep).to(dtype)


def same_values(got: Tensor, wanted: Tensor) -> bool:
    """Whether all bits agree, of NaNs only that they are some: their payload depends on the processor."""
    integer = torch.int32 if got.dtype is torch.float32 else torch.int16
    if not got.dtype.is_floating_point:
        return torch.equal(got, wanted)
    agree = got.view(integer) == wanted.view(integer)
    return bool((agree | (got.isnan() & wanted.isnan())).all())
