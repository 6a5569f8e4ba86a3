"""Overlap and host waits as the profiler sees them: two ranks on one GPU at stages 2 and 3, one rank at all stages.

The two ranks are those of `benchmarks/gpu_timeline.py`, which also draws such a trace. They exchange everything through
host memory: the transport's own thread must wait until a copy to the host has arrived (`cudaEventSynchronize`), and the
training thread waits for that thread, without a call into CUDA. Nothing else may wait for the device.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lorica
from benchmarks.trace import Trace
from tests.gpu.sharing_worker import GPT, VOCAB
from tests.gpu.waiting import no_host_sync

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).parents[2]
DEVICE_WIDE = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")
AT_ONCE_US = 100.0
ANY_WAIT = (*DEVICE_WIDE, "cudaEventSynchronize", "cuEventSynchronize")


# Two ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3], ids=["stage 2", "stage 3"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """One step of rank 0 of two."""
    folder = tmp_path_factory.mktemp("overlap")
    command = [sys.executable, "-m", "lorica", "--share_gpu", "--num_gpus=2", str(ROOT / "benchmarks/gpu_timeline.py")]
    options = [f"--stage={request.param}", f"--save={folder / 'trace.json'}", f"--out={folder / 'timeline.svg'}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert (folder / "timeline.svg").read_text(encoding="utf-8").startswith("<svg")
    return Trace.read(folder / "trace.json")


def test_copies_run_on_side_streams_to_the_host_and_back(trace: Trace) -> None:
    side = trace.launched_in(trace.side_work(), "whole step")
    out, back = ({w.stream for w in side if way in w.name} for way in ("DtoH", "HtoD"))
    assert len(out) == len(back) == 1
    assert out != back and trace.compute_stream not in out | back


def test_most_of_the_copying_in_forward_and_backward_lies_under_kernels(trace: Trace) -> None:
    """Not all: nothing is computed beside the first gather and the last reduction."""
    assert trace.hidden_share() > 0.5


def test_a_step_never_waits_for_the_device_or_for_a_stream(trace: Trace) -> None:
    assert trace.calls_in("synchronize", *DEVICE_WIDE), "the trace would not show a wait"
    assert trace.calls_in("whole step", *DEVICE_WIDE) == []


def test_only_the_transport_s_thread_waits_for_copies(trace: Trace) -> None:
    """The engine looks once, before backward, whether its last step was applied: that has long been known."""
    training, calls = trace.phase("whole step").thread, trace.calls_in("whole step", *ANY_WAIT)
    blocked = [c for c in calls if c.thread != training or c.span.stop - c.span.start > AT_ONCE_US]
    waiting = {call.thread for call in blocked}
    assert len(waiting) == 1 and training not in waiting


# One rank -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one rank."""
    lorica.init_distributed()
    yield
    dist.destroy_process_group()


def config_of(stage: int, accumulation: int, **more: Any) -> dict[str, Any]:
    """bf16 with fp32 masters, AdamW, clipping that clips."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.01,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
        "lorica": {"units": {"min_numel": 1}},
        **more,
    }


def take_step(engine: Any, batches: list[Tensor]) -> Tensor:
    """Forward, backward and step for every micro-batch; the loss of the last one stays on the device."""
    for batch in batches:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
    result: Tensor = loss.detach()
    return result


@pytest.mark.parametrize("stage", [pytest.param(stage, id=f"stage {stage}") for stage in range(4)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_step_never_waits_for_the_device(alone: None, accumulation: int, stage: int) -> None:
    """After the first step, which agrees with the other ranks on the order of units and allocates."""
    torch.manual_seed(3)
    engine, *_ = lorica.initialize(model=GPT(), config=config_of(stage, accumulation))
    batches = list(torch.randint(VOCAB, (accumulation, 4, 65), device="cuda"))
    first = take_step(engine, batches)
    torch.cuda.synchronize()
    with no_host_sync():
        losses = [take_step(engine, batches) for _ in range(3)]
    norm = engine.get_global_grad_norm()
    assert norm is not None and math.isfinite(norm) and norm > 0.01, "nothing was clipped"
    assert losses[-1].item() < first.item()
    engine.destroy()


def test_a_wait_for_the_device_would_be_noticed() -> None:
    with no_host_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device="cuda").sum().item()
