"""States in few bytes on a real device: the bits do not depend on who updates them and from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_offload_on_device import CPU, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FORMATS = [
    (moments, master) for moments in ("fp32", "bf16", "int8", "int8_block") for master in ("exact", "stochastic")
]
EVERYWHERE = {"stage": 3, **CPU, "offload_param": {"device": "cpu"}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "streamed": (CPU, {"executor": "device", "staging_numel": 4096}),
    "streamed, one slot": (CPU, {"executor": "device", "staging_numel": 4096, "staging_memory": 4096 * 10}),
    "streamed, all near": (CPU, {"executor": "device", "staging_memory": 1 << 28}),
    "host": (CPU, {"executor": "host", "staging_numel": 8192}),
    "both": (CPU, {"staging_numel": 4096}),
    "parameters too, streamed": (EVERYWHERE, {"executor": "device"}),
    "parameters too, host": (EVERYWHERE, {"executor": "host"}),
}


@pytest.mark.parametrize(("moments", "master"), FORMATS[1:])
def test_bits_do_not_depend_on_placement(moments: str, master: str, tmp_path: Path) -> None:
    """Losses, masters, moments and the skipped step are those of the run on the device."""
    keys = {"moments": moments, "master": master}
    resident = train({"stage": 2}, keys)
    assert resident[2] == 1
    for name, (zero, offload) in CASES.items():
        assert train(zero, offload | keys) == resident, name
    files = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    assert train(files, {"staging_numel": 8192} | keys) == resident
