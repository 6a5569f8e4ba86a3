"""An optimizer step on a CUDA device: nothing waits for it, it can be captured, and a skipped step is taken back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.update.pieces import Work
from tests.gpu.waiting import no_host_sync

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDTH = 256


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH))


def start(precision: str, optimizer: str = "AdamW", **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        precision: {"enabled": True, **({"initial_scale_power": 8} if precision == "fp16" else {})},
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 50}},
        **more,
    }
    return lorica.initialize(model=model(), config=config).engine


def batch(number: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, WIDTH, generator=generator).to(dtype).cuda()


def take_step(engine: Any, number: int, dtype: torch.dtype, blow_up: bool = False) -> Tensor:
    loss = engine(batch(number, dtype)).float().square().mean()
    engine.backward(loss * float("inf") if blow_up else loss)
    engine.step()
    return loss.detach()


def values(engine: Any) -> list[Tensor]:
    return [lorica.zero.safe_get_full_fp32_param(p).clone() for p in engine.module.parameters()]


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "Lion", "SGD"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_waits_for_nothing(stage: int, precision: str, optimizer: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    engine = start(precision, optimizer, zero_optimization={"stage": stage})
    batches = [batch(number, dtype) for number in range(6)]
    for inputs in batches[:2]:
        engine.backward(engine(inputs).float().square().mean())
        engine.step()
    with no_host_sync():
        for inputs in batches[2:]:
            engine.backward(engine(inputs).float().square().mean())
            engine.step()
    assert engine.global_steps == 6 and engine.skipped_steps == 0
    engine.destroy()


def test_a_split_master_trains_as_an_fp32_master_does_to_the_bit() -> None:
    results = []
    for split in (True, False):
        engine = start("bf16", lorica={"split_master": split})
        losses = [take_step(engine, number, torch.bfloat16).item() for number in range(20)]
        results.append((losses, values(engine), engine.memory().allocated_bytes.master))
        engine.destroy()
    (losses, split_values, split_bytes), (other_losses, fp32_values, fp32_bytes) = results
    assert losses == other_losses
    assert all(map(torch.equal, split_values, fp32_values))
    assert 2 * split_bytes == fp32_bytes


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("looks_at", [{2, 5, 8, 11}, {11}, set(range(12))], ids=["sometimes", "never", "always"])
def test_a_skipped_step_is_as_if_it_had_not_been(
    monkeypatch: pytest.MonkeyPatch, looks_at: set[int], precision: str
) -> None:
    """Losses, scale, schedule and masters equal those of a run that waits for every norm."""
    dtype, trails = torch.bfloat16 if precision == "bf16" else torch.float16, []
    for waits in (False, True):
        engine = start(precision)
        if waits:
            monkeypatch.setattr(type(engine), "_may_assume_finite", lambda self, update: False)
        losses, trail = [], []
        for number in range(12):
            losses.append(take_step(engine, number, dtype, blow_up=number in (0, 3, 4, 5, 8)))
            if number in looks_at:
                trail.append((engine.loss_scale(), engine.get_lr(), engine.skipped_steps, engine.was_step_applied()))
        assert engine.skipped_steps == 5
        state = engine.lr_scheduler.state_dict(), engine.global_steps, engine._update_count
        trails.append((trail, [loss.item() for loss in losses], state, values(engine)))
        engine.destroy()
    assert trails[0][:3] == trails[1][:3]
    assert all(map(torch.equal, trails[0][3], trails[1][3]))


def test_a_learning_rate_that_the_user_sets_outlives_a_skipped_step() -> None:
    engine = start("bf16")
    take_step(engine, 0, torch.bfloat16, blow_up=True)
    engine.optimizer.param_groups[0]["lr"] = 0.123
    assert engine.skipped_steps == 1 and engine.get_lr() == [0.123]
    engine.destroy()


def test_a_skipped_step_is_reported_when_it_is_asked_for() -> None:
    engine = start("fp16")
    take_step(engine, 0, torch.float16)
    assert engine.was_step_applied() and not engine.optimizer.overflow
    take_step(engine, 1, torch.float16, blow_up=True)
    assert engine.optimizer.overflow and not engine.was_step_applied()
    assert not math.isfinite(engine.get_global_grad_norm())
    engine.destroy()


def test_the_update_can_be_captured_in_a_cuda_graph() -> None:
    """Captured once, replayed with the learning rate and the step number of later steps: the bits of eager steps."""
    engine, eager = start("bf16"), start("bf16")
    replayed = engine._parts.update
    planes = [grad for unit in engine._parts.units for grad in unit.grads]
    others = [grad for unit in eager._parts.units for grad in unit.grads]
    coef = torch.full((1,), 0.5, dtype=torch.float64, device="cuda")
    finite = torch.ones(1, dtype=torch.int32, device="cuda")
    for plane, other in zip(planes, others, strict=True):
        plane.reduced = torch.randn(plane.flat.layout.numel, device="cuda").to(plane.dtype)
        other.reduced = plane.reduced.clone()
    for updating in (replayed, eager._parts.update):
        updating(Work(coef, 1, finite, 0.5))  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for executor in replayed._executors:
            executor.start(Work(coef, 1, finite, 0.5))
    for step in range(2, 6):
        for one in (engine, eager):
            one._parts.groups[0]["lr"] = 1e-2 / step
        eager._parts.update(Work(coef, step, finite, 0.5))
        replayed._optimizer.prepare(replayed._groups, step, engine.device)
        graph.replay()
        assert all(map(torch.equal, values(engine), values(eager))), step
    engine.destroy()
    eager.destroy()


def test_gradients_are_given_back_between_steps() -> None:
    engine = start("bf16")
    take_step(engine, 0, torch.bfloat16)
    assert engine.memory().allocated_bytes.grad == 0
    engine.destroy()


def test_stages_agree_to_the_bit_on_one_rank() -> None:
    runs = []
    for stage in range(4):
        engine = start("bf16", zero_optimization={"stage": stage})
        runs.append([take_step(engine, number, torch.bfloat16).item() for number in range(10)])
        engine.destroy()
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_the_peak_of_model_states_is_known_before_the_first_step() -> None:
    """A wide model and a batch of eight: activations are small change."""
    torch.manual_seed(0)
    wide = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(16)))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    before = torch.cuda.memory_allocated()
    engine = lorica.initialize(model=wide, config=config).engine
    expected = engine.peak()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        loss = engine(torch.randn(8, 4096, generator=generator).bfloat16().cuda()).float().square().mean()
        engine.backward(loss)
        engine.step()
    measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(expected.device + expected.passing, rel=0.02)
    engine.destroy()
