"""Whoever does not call `engine.destroy()`, or writes into what an update under way reads: nothing breaks or leaks."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorica
from tests.equivalence.offloading import Case, Plan, before_each_chunk, start_engine, states, take_step, update_threads
from tests.equivalence.training import Training, digest
from tests.harness import Ranks
from tests.models import RECIPES

ON_HOST = Plan(1, ("host",), ("host",), delays=False)
CASE = Case(Training("gpt", 2, "bf16", 1, clip=0.0))

SCRIPT = """
import torch
import lorica

model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(16)))
config = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW"},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "DEVICE", "nvme_path": "FOLDER"}},
    "lorica": {"offload": {"executor": "host", "staging_numel": 4096}},
}
engine, *_ = lorica.initialize(model=model, config=config)
for _ in range(2):
    engine.backward(engine(torch.randn(2, 512).bfloat16()).float().square().mean())
    engine.step()
"""


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_a_script_may_end_straight_after_a_step(tmp_path: Any, device: str) -> None:
    """Its update thread is in the middle of a kernel then."""
    script = textwrap.dedent(SCRIPT).replace("DEVICE", device).replace("FOLDER", str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, "Error" in ended.stderr) == (0, False), ended.stderr
    assert not list(tmp_path.iterdir())


def drop_engines() -> list[str]:
    """Threads that are left of engines that nobody has destroyed."""
    for _ in range(3):
        engine = start_engine(CASE, ON_HOST, "")
        take_step(engine, CASE, 0)
        engine.synchronize()
        del engine
        gc.collect()
    end = time.monotonic() + 5
    while update_threads() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.02)
    return update_threads()


def test_an_engine_that_is_dropped_leaves_no_thread(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(1).run(drop_engines) == [[]]


def train_with_a_rate_that_is_a_tensor(device: str) -> str:
    """torch's schedulers write into such a rate in place, straight after each step."""
    model = RECIPES["gpt"].model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
    config = CASE.training.config()
    config["zero_optimization"]["offload_optimizer"] = {"device": device}
    config["lorica"]["offload"] = {"executor": "host", "speculate": True}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with before_each_chunk(lambda: time.sleep(0.002)):
        engine, *_ = lorica.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    for number in range(3):
        take_step(engine, CASE, number)
    found = digest(states(engine))
    engine.destroy()
    return found


def test_an_update_keeps_the_rate_that_it_was_given(ranks: Callable[[int], Ranks]) -> None:
    world = ranks(1)
    wanted, found = (world.run(train_with_a_rate_that_is_a_tensor, device=device) for device in ("none", "cpu"))
    assert found == wanted
