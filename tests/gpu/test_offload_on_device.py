"""Offloaded optimizer states on a real device: the bits do not depend on who updates them, from where, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from tests.equivalence.training import digest
from tests.models import RECIPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = 8


def train(zero: dict[str, Any], offload: dict[str, Any] | None = None, **keys: Any) -> tuple[list[float], str, int]:
    """Train a small GPT on one rank; returns losses, a fingerprint of all masters and moments, and skipped steps."""
    torch.manual_seed(0)
    model = RECIPES["gpt"].model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "stage3_param_persistence_threshold": 0, **zero},
        "lorica": {"units": {"min_numel": 1}, "offload": offload or {}},
        **keys,
    }
    engine, *_ = lorica.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    losses = []
    for step in range(STEPS):
        batch = [x.to(engine.device) for x in RECIPES["gpt"].batch(step)]
        loss = engine(*batch)
        engine.backward(loss * float("inf") if step == 3 else loss)
        engine.step()
        losses.append(loss.detach())
    state = {}
    for name, param in engine.module.named_parameters():
        state[name] = lorica.zero.safe_get_full_fp32_param(param)
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{name}.{key}"] = lorica.zero.safe_get_full_optimizer_state(param, key)
    result = [float(x) for x in losses], digest(state), engine.skipped_steps
    engine.destroy()
    return result


@pytest.fixture(scope="module")
def resident() -> tuple[list[float], str, int]:
    """Everything on the device."""
    found = train({"stage": 2})
    assert found[2] == 1
    return found


CPU = {"offload_optimizer": {"device": "cpu"}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "streamed": (CPU, {"executor": "device", "staging_numel": 4096}),
    "streamed, one slot": (CPU, {"executor": "device", "staging_numel": 4096, "staging_memory": 4096 * 10}),
    "streamed, all near": (CPU, {"executor": "device", "staging_memory": 1 << 28}),
    "streamed, sync": (CPU, {"executor": "device", "overlap": False}),
    "host": (CPU, {"executor": "host", "staging_numel": 8192}),
    "host, sync": (CPU, {"executor": "host", "overlap": False}),
    "both": (CPU, {"staging_numel": 4096}),
    "half": ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}),
    "auto": ({"offload_optimizer": {"device": "auto"}}, {}),
    "parameters too, streamed": ({"stage": 3, **CPU, "offload_param": {"device": "cpu"}}, {"executor": "device"}),
    "parameters too, host": ({"stage": 3, **CPU, "offload_param": {"device": "cpu"}}, {"executor": "host"}),
    "parameters only": ({"stage": 3, "offload_param": {"device": "cpu"}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_placement(case: str, resident: tuple[list[float], str, int]) -> None:
    """Losses, masters, moments and the skipped step are those of the run on the device."""
    zero, offload = CASES[case]
    assert train(zero, offload) == resident


def test_bits_do_not_depend_on_files(tmp_path: Path, resident: tuple[list[float], str, int]) -> None:
    """States on NVMe train the same."""
    nvme = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    assert train(nvme, {"staging_numel": 8192}) == resident


FORMATS = {
    "bf16 moments": {"moments": "bf16"},
    "8-bit moments": {"moments": "int8"},
    "4 bytes": {"moments": "int8", "master": "stochastic"},
    "3 bytes": {"moments": "int8_block", "master": "stochastic"},
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("executor", ["device", "host"])
def test_compact_states_do_not_depend_on_placement(executor: str, format: str) -> None:
    """The kernels of the device and of the CPU round alike, at random but from the same numbers."""
    states = FORMATS[format]
    assert train(CPU, {"executor": executor, "staging_numel": 4096, **states}) == train({"stage": 2}, dict(states))


def test_activations_in_host_memory_change_no_bit(resident: tuple[list[float], str, int]) -> None:
    """Saved tensors travel beside the computation."""
    assert train({"stage": 2}, {"activations": True}) == resident
