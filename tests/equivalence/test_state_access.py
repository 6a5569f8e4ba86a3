"""Reading and changing the state of a sharded model from outside, building it sharded, and letting go of it.

All on two ranks. Where a value can be said in plain PyTorch, it is; the engine's answer must be that value.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

import lorica
from lorica import zero
from lorica.core.parameter import record_of
from tests.equivalence.training import Report, Training, expected, finish, masters, outcome, record_step, start
from tests.harness import Ranks
from tests.models import MLP, RECIPES

STAGES = [pytest.param(stage, id=f"stage {stage}") for stage in range(4)]
WHOLE_STAGES = STAGES[:3]  # every rank has the whole model
PLAIN = Training(recipe="nested lists", num_steps=4, clip=0.0)
PRECISE = {"rtol": 1e-6, "atol": 1e-7}


def plain_model(training: Training) -> nn.Module:
    """The model as it is before training, in plain PyTorch."""
    return RECIPES[training.recipe].model()


def plain_gradients(training: Training, world_size: int) -> dict[str, Tensor]:
    """The mean gradient of the first step, in plain PyTorch."""
    model = plain_model(training)
    for rank in range(world_size):
        (model(*training.micro_batch(0, 0, rank)) / world_size).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(engine: Any, training: Training, number: int) -> float:
    """One ordinary step; returns this rank's loss."""
    loss = engine(*training.micro_batch(number, 0, dist.get_rank()))
    engine.backward(loss)
    engine.step()
    return float(loss.item())


# safe_get_*, safe_set_* -----------------------------------------------------------------------------------------------


def read_everything(training: Training) -> None:
    """Full gradients after backward, full optimizer state after the step, full masters at any time."""
    engine, gradients = start(training), plain_gradients(training, dist.get_world_size())
    named, wanted = dict(engine.module.named_parameters()), dict(plain_model(training).named_parameters())
    for name, parameter in named.items():
        torch.testing.assert_close(zero.safe_get_full_fp32_param(parameter), wanted[name].data, rtol=0, atol=0)
    engine.backward(engine(*training.micro_batch(0, 0, dist.get_rank())))
    for name, parameter in named.items():
        torch.testing.assert_close(zero.safe_get_full_grad(parameter), gradients[name], **PRECISE, msg=name)
    engine.step()
    for name, parameter in named.items():
        first = zero.safe_get_full_optimizer_state(parameter, "exp_avg")
        second = zero.safe_get_full_optimizer_state(parameter, "exp_avg_sq")
        torch.testing.assert_close(first, 0.1 * gradients[name], **PRECISE, msg=name)
        torch.testing.assert_close(second, 0.001 * gradients[name].square(), **PRECISE, msg=name)
    engine.destroy()


def write_everything(training: Training) -> None:
    """What was set is what is read, what computes, and what the next step starts from."""
    config = training.config() | {"optimizer": {"type": "SGD", "params": {"lr": 0.5, "momentum": 0.9}}}
    engine, plain = start(training, config), plain_model(training)
    named = dict(engine.module.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.flip(0) * 0.5
        zero.safe_set_full_fp32_param(named[name], parameter.data)
        torch.testing.assert_close(zero.safe_get_full_fp32_param(named[name]), parameter.data, rtol=0, atol=0)
    loss = engine(*training.micro_batch(0, 0, dist.get_rank()))
    assert loss.item() == plain(*training.micro_batch(0, 0, dist.get_rank())).item()
    engine.backward(loss)
    gradients = {name: torch.full_like(parameter, 0.25) for name, parameter in plain.named_parameters()}
    for name, parameter in named.items():
        zero.safe_set_full_grad(parameter, gradients[name])
        torch.testing.assert_close(zero.safe_get_full_grad(parameter), gradients[name], rtol=0, atol=0)
    engine.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(zero.safe_get_full_fp32_param(named[name]), parameter.data - 0.5 * 0.25)
        momentum = torch.full_like(parameter, -3.0)
        zero.safe_set_full_optimizer_state(named[name], momentum, "momentum_buffer")
        torch.testing.assert_close(zero.safe_get_full_optimizer_state(named[name], "momentum_buffer"), momentum)
    engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("call", [read_everything, write_everything], ids=["reading", "writing"])
def test_full_state_can_be_accessed_on_every_stage(
    ranks: Callable[[int], Ranks], call: Callable[..., None], stage: int
) -> None:
    ranks(2).run(call, training=replace(PLAIN, stage=stage))


# GatheredParameters ---------------------------------------------------------------------------------------------------


def gather_and_modify(training: Training) -> None:
    """Full values inside the context on every rank; what rank 0 writes there is what all train on afterwards."""
    engine, plain = start(training), plain_model(training)
    named, wanted = dict(engine.module.named_parameters()), dict(plain.named_parameters())
    for name, parameter in named.items():
        assert parameter.shape == wanted[name].shape, f"{name} must keep its logical shape while it is sharded"
    with zero.GatheredParameters(list(named.values())):
        for name, parameter in named.items():
            assert torch.equal(parameter.data, wanted[name].data), f"{name} is not whole"
    with zero.GatheredParameters(list(named.values()), modifier_rank=0), torch.no_grad():
        if dist.get_rank() == 0:
            for parameter in named.values():
                parameter.mul_(0.5)
    with torch.no_grad():
        for parameter in wanted.values():
            parameter.mul_(0.5)
    batch = training.micro_batch(0, 0, dist.get_rank())
    loss = engine(*batch)
    assert loss.item() == plain(*batch).item(), "forward does not see what rank 0 wrote"
    for name, value in masters(engine.module).items():
        assert torch.equal(value, wanted[name].data), f"the master of {name} does not know what rank 0 wrote"
    engine.backward(loss)
    engine.step()
    moved = [(masters(engine.module)[n] - wanted[n].data).abs().max().item() for n in wanted]
    assert 0 < max(moved) < 2 * 3e-3, f"the step did not start from the written values: it moved by {max(moved)}"
    engine.destroy()


def gather_one_of_many(training: Training) -> None:
    """One parameter, given alone, in a nested and in a repeated context."""
    engine, wanted = start(training), dict(plain_model(training).named_parameters())
    for name, parameter in list(engine.module.named_parameters())[::3]:
        for _ in range(2):
            with zero.GatheredParameters(parameter), zero.GatheredParameters([parameter]):
                assert torch.equal(parameter.data, wanted[name].data)
            with zero.GatheredParameters(parameter, enabled=False):
                assert parameter.shape == wanted[name].shape
    step(engine, training, 0)
    engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("call", [gather_and_modify, gather_one_of_many], ids=["modifying all", "reading one"])
def test_gathered_parameters_are_whole(ranks: Callable[[int], Ranks], call: Callable[..., None], stage: int) -> None:
    ranks(2).run(call, training=replace(PLAIN, stage=stage))


# zero.Init ------------------------------------------------------------------------------------------------------------


def train_model_built_sharded(training: Training) -> Report:
    """Build under `zero.Init` (other ranks draw other numbers: rank 0's count), then train as usual."""
    torch.manual_seed(7 if dist.get_rank() == 0 else 8)
    with zero.Init(config_dict_or_path=training.config()):
        model = RECIPES[training.recipe].build()
    engine, *_ = lorica.initialize(model=model, model_parameters=model.parameters(), config=training.config())
    report = Report()
    for number in range(training.num_steps):
        record_step(engine, report, [step(engine, training, number)], 1.0)
    return finish(engine, report)


@pytest.mark.parametrize("recipe", ["nested lists", "gpt", "gpt, tied head", "odd shapes", "self-initialised"])
def test_a_model_built_sharded_trains_as_the_oracle(ranks: Callable[[int], Ranks], recipe: str) -> None:
    training = replace(PLAIN, recipe=recipe, stage=3)
    run, reference = outcome(ranks(2).run(train_model_built_sharded, training=training)), expected(training)
    assert run.losses == pytest.approx(reference.losses, rel=1e-6)


def place_shards(device: str, remote_device: str | None) -> set[str]:
    """The tiers of the shards of a model built under `zero.Init`, which an engine then takes over."""
    config = Training(stage=3).config()
    config["zero_optimization"]["offload_param"] = {"device": device}
    with zero.Init(config_dict_or_path=config, remote_device=remote_device):
        model = MLP()
    tiers = {record.flat.plan.param.tier for param in model.parameters() if (record := record_of(param)) is not None}
    engine, *_ = lorica.initialize(model=model, config=config)
    engine.destroy()
    return tiers


@pytest.mark.parametrize(
    ("device", "remote_device", "tier"),
    [
        ("none", None, "device"),
        ("none", "none", "device"),
        ("none", "cpu", "host"),
        ("cpu", None, "host"),
        ("auto", None, "host"),
    ],
)
def test_a_model_built_sharded_is_in_host_memory_if_its_parameters_may_go_there(
    ranks: Callable[[int], Ranks], device: str, remote_device: str | None, tier: str
) -> None:
    assert ranks(2).run(place_shards, device=device, remote_device=remote_device) == [{tier}, {tier}]


def build_large_model_sharded(num_layers: int) -> tuple[int, int]:
    """Growth of this process by a model of 4 MiB layers built under `zero.Init`: at its peak, and afterwards."""
    reset_peak()
    before = memory_bytes("status", "VmRSS"), memory_bytes("smaps_rollup", "Pss")
    with zero.Init(config_dict_or_path=Training(stage=3).config()):
        model = MLP(dim=1024, num_layers=num_layers)
    grown = memory_bytes("status", "VmHWM") - before[0], memory_bytes("smaps_rollup", "Pss") - before[1]
    engine, *_ = lorica.initialize(model=model, config=Training(stage=3).config())
    engine.destroy()
    return grown


def memory_bytes(file: str, name: str) -> int:
    """A line `name: number kB` of a file about this process."""
    for line in Path("/proc/self", file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"/proc/self/{file} has no line {name}")


def reset_peak() -> None:
    """Let VmHWM start again from the present size."""
    Path("/proc/self/clear_refs").write_text("5")


def test_a_model_built_sharded_is_never_whole_on_a_rank(ranks: Callable[[int], Ranks]) -> None:
    model_bytes = 40 * 1024 * 1024 * 4
    for peak, afterwards in ranks(2).run(build_large_model_sharded, num_layers=40):
        # The shard, and what a transport needs to hand over one layer at a time (8 MiB of staging per rank, twice).
        # 2 MiB more are Python's: the first engine of a process loads its configuration's classes (89.8 MiB held before
        # the blocks of offloading were there, 91.1 since).
        assert afterwards < 0.5 * model_bytes + 12 * 2**20, f"{afterwards / 2**20:.0f} MiB held"
        assert peak < 0.5 * model_bytes + 30 * 2**20, f"{peak / 2**20:.0f} MiB at the peak"


# destroy --------------------------------------------------------------------------------------------------------------


def forget_engine(training: Training) -> None:
    """After `destroy` and the last name, nothing keeps the engine, the model, a parameter or a plane alive."""
    gc.collect()
    tensors_before = living_tensors()
    engine = start(training)
    for number in range(2):
        step(engine, training, number)
    watched = [weakref.ref(thing) for thing in (engine, engine.module, engine.optimizer, *engine.module.parameters())]
    engine.destroy()
    del engine
    gc.collect()
    alive = [type(ref()).__name__ for ref in watched if ref() is not None]
    assert not alive, f"still alive after destroy(): {alive}"
    left = living_tensors() - tensors_before
    assert left <= 0, f"{left} tensors of the engine are still alive after destroy()"


def living_tensors() -> int:
    """How many tensors with elements the garbage collector knows."""
    return sum(1 for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.numel())


def use_model_after_destroy(training: Training) -> None:
    """The model goes back to plain PyTorch: whole, trained, and without hooks."""
    engine = start(training)
    step(engine, training, 0)
    model, trained = engine.module, masters(engine.module)
    engine.destroy()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, trained[name]), f"{name} is not what was trained"
    loss = model(*training.micro_batch(1, 0, dist.get_rank()))
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def use_sharded_model_after_destroy(training: Training) -> None:
    """At stage 3 no rank has the whole model: using it says so instead of computing with something else."""
    engine = start(training)
    step(engine, training, 0)
    model = engine.module
    engine.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        model(*training.micro_batch(1, 0, dist.get_rank()))


@pytest.mark.parametrize("stage", STAGES)
def test_destroy_leaves_nothing_alive(ranks: Callable[[int], Ranks], stage: int) -> None:
    ranks(2).run(forget_engine, training=replace(PLAIN, stage=stage))


@pytest.mark.parametrize("stage", WHOLE_STAGES)
def test_destroy_leaves_a_plain_trained_model(ranks: Callable[[int], Ranks], stage: int) -> None:
    ranks(2).run(use_model_after_destroy, training=replace(PLAIN, stage=stage))


def test_a_model_that_was_sharded_cannot_be_used_after_destroy(ranks: Callable[[int], Ranks]) -> None:
    ranks(2).run(use_sharded_model_after_destroy, training=replace(PLAIN, stage=3))


def train_again_and_again(training: Training) -> list[float]:
    """The same model wrapped three times, destroyed in between: optimizer state starts anew each time."""
    model = MLP()
    losses = []
    for _ in range(3):
        engine, *_ = lorica.initialize(model=model, model_parameters=model.parameters(), config=training.config())
        losses.append(step(engine, training, 0))
        engine.destroy()
    return losses


@pytest.mark.parametrize("stage", WHOLE_STAGES)
def test_a_model_can_be_wrapped_again_after_destroy(ranks: Callable[[int], Ranks], stage: int) -> None:
    training = replace(PLAIN, recipe="mlp", stage=stage)
    for losses in ranks(2).run(train_again_and_again, training=training):
        assert losses[0] > losses[1] > losses[2], "each engine goes on from what the one before has trained"
