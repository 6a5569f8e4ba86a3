"""Where Triton kernels can run. Owns that question; no kernel and no choice of one.

Kernel files import Triton at their top, so they are imported only after `available()` said yes. On a machine without a
GPU they run in Triton's interpreter if TRITON_INTERPRET=1 was set before Triton was imported: for tests, on CPU
tensors; `runs_on` never offers that to an engine.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def runs_on(device: torch.device) -> bool:
    """Whether compiled kernels run on `device`: a CUDA device from Volta on, with Triton installed."""
    if device.type != "cuda" or not available() or interpreted() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)
