"""Several ranks on one GPU, over gloo or shared memory: streams, staging and overlap give the plain loop's losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WORKER = Path(__file__).with_name("sharing_worker.py")

# fp32 without TF32: batches of 4 and of 8 take different matmul kernels, whose sums are rounded in another order.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=[1, 2])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker found at 1 and 2 ranks."""
    out = tmp_path_factory.mktemp("sharing") / "found.json"
    command = [sys.executable, "-m", "lorica", "--share_gpu", f"--num_gpus={request.param}", str(WORKER), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_every_stage_and_tier_trains_as_the_plain_loop(found: dict[str, Any]) -> None:
    wrong = {case: result["worst"] for case, result in found.items() if not result["worst"] < TOLERANCE}
    assert not wrong


def test_stages_2_and_3_agree_to_the_bit(found: dict[str, Any]) -> None:
    assert found["stage 2"]["losses"] == found["stage 3"]["losses"]


def test_ranks_that_share_a_gpu_do_not_use_nccl(found: dict[str, Any]) -> None:
    assert {result["transport"] for result in found.values()} <= {"solo", "host-staged", "host-staged:shm"}
