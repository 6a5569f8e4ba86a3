"""`param.data = x` inside `GatheredParameters` counts like a change in place, on every rank and at every stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from lorica import zero
from tests.equivalence.training import Training, start
from tests.harness import Ranks


def assign_on_rank_0(training: Training) -> None:
    """Rank 0 assigns a tensor; every rank reads it back, in the parameter and in the master, and trains on."""
    engine = start(training)
    param = engine.module.layers[1].weight
    wanted = torch.full(param.shape, 0.25)
    with zero.GatheredParameters(param, modifier_rank=0):
        if dist.get_rank() == 0:
            param.data = wanted.clone()
    with zero.GatheredParameters(param):
        assert torch.equal(param.float(), wanted)
    master = zero.safe_get_full_fp32_param(param)
    assert master is not None and torch.equal(master, wanted)
    loss = engine(*training.micro_batch(0, 0, dist.get_rank()))
    engine.backward(loss)
    engine.step()
    after = zero.safe_get_full_fp32_param(param)
    assert after is not None and not torch.equal(after, wanted), "the assigned parameter does not train"
    engine.destroy()


@pytest.mark.parametrize("stage", [pytest.param(stage, id=f"stage {stage}") for stage in range(4)])
def test_an_assigned_tensor_becomes_the_value_on_all_ranks(ranks: Callable[[int], Ranks], stage: int) -> None:
    ranks(2).run(assign_on_rank_0, training=Training(recipe="mlp", stage=stage))
