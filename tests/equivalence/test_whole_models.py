"""Whole state dicts go out of the planes and into them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from lorica import zero
from tests.equivalence.training import Training, digest, masters, start
from tests.harness import Ranks

STAGES = [pytest.param(stage, id=f"stage {stage}") for stage in range(4)]


def load_what_was_saved(training: Training) -> str:
    """Train, consolidate, train on, load back: parameters and masters are those of the first stop."""
    engine = start(training)

    def step(number: int) -> None:
        engine.backward(engine(*training.micro_batch(number, 0, dist.get_rank())))
        engine.step()

    step(0)
    before = digest(masters(engine.module))
    whole = [engine.consolidated_state_dict()]
    dist.broadcast_object_list(whole)
    step(1)
    assert digest(masters(engine.module)) != before
    engine.load_module_state_dict(whole[0])
    assert digest(masters(engine.module)) == before
    for name, param in engine.module.named_parameters():
        with zero.GatheredParameters(param):
            assert torch.equal(param.cpu(), whole[0][name])
    step(1)
    engine.destroy()
    return before


@pytest.mark.parametrize("stage", STAGES)
def test_a_consolidated_state_dict_can_be_loaded_again(ranks: Callable[[int], Ranks], stage: int) -> None:
    ranks(2).run(load_what_was_saved, training=Training(recipe="gpt, tied head", stage=stage))


def load_what_does_not_fit(training: Training) -> None:
    """Wrong names and shapes are named, and nothing is changed."""
    engine = start(training)
    before = digest(masters(engine.module))
    state = {name: torch.zeros_like(param, device="cpu") for name, param in engine.module.named_parameters()}
    first, second = list(state)[:2]
    state["surplus"] = state.pop(first)
    state[second] = torch.zeros(7)
    with pytest.raises(ValueError, match=rf"missing \['{first}'\], unknown \['surplus'\], other shapes \['{second}"):
        engine.load_module_state_dict(state)
    assert digest(masters(engine.module)) == before
    engine.destroy()


def test_a_state_dict_that_does_not_fit_is_refused_by_name(ranks: Callable[[int], Ranks]) -> None:
    ranks(2).run(load_what_does_not_fit, training=Training(recipe="mlp", stage=2))
