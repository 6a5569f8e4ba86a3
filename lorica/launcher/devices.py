"""How many accelerators torch would find on this machine, without importing torch. Chooses none of them."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Accelerators:
    """`count` devices can be used; if there are none, `reason` says why, as the end of a sentence."""

    count: int
    reason: str = ""


def find_accelerators() -> Accelerators:
    """Count the CUDA devices of this machine, ignoring CUDA_VISIBLE_DEVICES."""
    count = nvml_count()
    if count == 0:
        return Accelerators(0, "no NVIDIA GPU was found on this machine")
    if torch_without_cuda():
        return Accelerators(0, f"this torch is built for the CPU only, though the machine has {count} GPU(s)")
    return Accelerators(count)


def nvml_count() -> int:
    """Ask the driver's management library for the number of GPUs; 0 if there is no driver or it does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    status: int = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return count.value if status == 0 else 0


def torch_without_cuda() -> bool:
    """Whether the installed torch says in its version file that it was built without CUDA."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.is_file() and built_without_cuda(version.read_text(encoding="utf-8"))


def built_without_cuda(version_file: str) -> bool:
    """Read torch/version.py: `cuda: Optional[str] = None` says that there is no CUDA in this build."""
    return re.search(r"^cuda\b[^=\n]*=\s*None\b", version_file, re.MULTILINE) is not None
