"""Whoever does not call `engine.destroy()`, or writes into what an update under way reads: nothing breaks or is left."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.equivalence.offloading import Case, Plan, before_each_chunk, start_engine, states, take_step, update_threads
from tests.equivalence.training import Training, digest
from tests.harness import Ranks

ON_HOST = Plan(1, ("host",), ("host",), delays=False)
GUESSING = Plan(2, ("host",), ("host",), delays=False, keys=(("speculate", True),))
CASE = Case(Training("gpt", 2, "bf16", 1, clip=0.0), params=(("lr", 3e-3), ("betas", [0.9, 0.99])))

SCRIPT = """
import torch
import lorica

model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
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
    for _ in range(3):
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


def write_betas(plan: Plan | None) -> str:
    """Train, and write into the list of betas straight after each step and after each backward."""
    with before_each_chunk(lambda: time.sleep(0.002)):
        engine = start_engine(CASE, plan, "")
    group = engine.optimizer.param_groups[0]
    for number in range(3):
        engine.backward(engine(*CASE.training.micro_batch(number, 0, 0)))
        group["betas"][1] -= 0.01  # what guesses were made with is no longer so
        engine.step()
        group["betas"][0] -= 0.1  # the update under way goes on with the old one
    found = digest(states(engine))
    engine.destroy()
    return found


def test_an_update_keeps_the_hyper_parameters_that_it_was_given(ranks: Callable[[int], Ranks]) -> None:
    world = ranks(1)
    wanted = world.run(write_betas, plan=None)
    assert world.run(write_betas, plan=ON_HOST) == wanted
    assert world.run(write_betas, plan=GUESSING) == wanted
