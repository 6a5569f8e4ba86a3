"""What the kernels on rows of a tensor share when they are launched: rows, tile sizes, the device. Owns no kernel."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_HERE: AbstractContextManager[None] = nullcontext()


def rows(x: Tensor) -> Tensor:
    """`x` [..., N] as [M, N] whose last stride is 1: a view where there is one, else a copy."""
    num_cols = x.shape[-1]
    x_MN = x.reshape(math.prod(x.shape[:-1]), num_cols)
    return x_MN if num_cols <= 1 or x_MN.stride(1) == 1 else x_MN.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is not smaller than `n`."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, size: int) -> int:
    """How many pieces of `size` cover `n`."""
    return -(-n // size)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; for the interpreter a few, so that every loop there has several rounds."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the device that holds `x`: Triton takes the current one, which need not be the same."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def check_dtype(name: str, x: Tensor, where: str) -> None:
    """Raise ValueError unless the kernels compute in the dtype of `x`."""
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name} has the wrong dtype: expected float32, bfloat16 or float16, got {x.dtype} ({where}). "
            "Fix: cast it, or use the formula of torch."
        )
