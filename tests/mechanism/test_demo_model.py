"""The demo's GPT, its learning-rate plan and its loss table, each by itself: one process, no engine."""

from __future__ import annotations

import csv
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gpt"))
import budget
import curve
import model

SHAPE = model.GPTConfig(num_layers=2, num_heads=2, width=64, seq_len=16, vocab_size=50)


def make_gpt(**changes: object) -> model.GPT:
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(**{**SHAPE.__dict__, **changes}))


def some_tokens(batch: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def test_a_fresh_model_guesses_blindly() -> None:
    tokens = some_tokens()
    assert make_gpt()(tokens, tokens.roll(-1, dims=1)).item() == pytest.approx(math.log(SHAPE.vocab_size), abs=0.1)


def test_a_token_is_seen_by_itself_and_later_positions_only() -> None:
    gpt, tokens = make_gpt(), some_tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SHAPE.vocab_size
    differs = (gpt(tokens) != gpt(changed)).any(dim=-1).any(dim=0)
    assert differs.tolist() == [position >= 9 for position in range(16)]


def test_a_token_at_another_place_is_seen_differently() -> None:
    """Rotary positions: with the same two tokens before it, a last token still knows their order."""
    gpt = make_gpt()
    assert not torch.allclose(gpt(torch.tensor([[1, 2, 3]]))[0, -1], gpt(torch.tensor([[2, 1, 3]]))[0, -1], atol=1e-5)


def test_activation_checkpointing_changes_no_gradient() -> None:
    tokens, grads = some_tokens(), []
    for checkpointing in (False, True):
        gpt = make_gpt(activation_checkpointing=checkpointing)
        gpt(tokens, tokens.roll(-1, dims=1)).backward()
        grads.append([parameter.grad for parameter in gpt.parameters()])
    assert len(grads[0]) > 10
    assert all(torch.equal(kept, again) for kept, again in zip(*grads, strict=True))


def test_a_bf16_product_on_a_slow_cpu_is_the_fp32_product_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    linear = model.Linear(64, 8).bfloat16()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.double(), linear.weight.double()).float().bfloat16())
    y.sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_a_tied_head_shares_the_embedding_and_counts_once() -> None:
    tied, untied = make_gpt(tied=True), make_gpt(tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == SHAPE.vocab_size * SHAPE.width


@pytest.mark.parametrize(("size", "millions"), [("tiny", 1.4), ("small", 29.9), ("medium", 91.2), ("1b3", 1236.0)])
def test_a_size_has_as_many_parameters_as_its_shape_says(size: str, millions: float) -> None:
    shape = model.SIZES[size]
    with torch.device("meta"):
        num_parameters = model.GPT(shape).num_parameters()
    block = 4 * shape.width**2 + 3 * shape.width * shape.hidden + 2 * shape.width
    assert num_parameters == shape.num_layers * block + (shape.vocab_size + 1) * shape.width
    assert num_parameters / 1e6 == pytest.approx(millions, rel=0.02)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="got width 64 and num_heads 3"):
        make_gpt(num_heads=3)


def test_generation_keeps_the_prompt_draws_the_same_again_and_never_exceeds_the_window() -> None:
    gpt, prompt, lengths = make_gpt(), some_tokens(2, 5), list[int]()

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        logits: torch.Tensor = gpt(tokens)
        return logits

    first = model.generate(watched, prompt, 20, seq_len=16, seed=3)
    assert torch.equal(first[:, :5], prompt) and first.shape == (2, 25)
    assert lengths == [min(5 + i, 16) for i in range(20)]
    assert torch.equal(first, model.generate(gpt, prompt, 20, seq_len=16, seed=3))
    assert not torch.equal(first, model.generate(gpt, prompt, 20, seq_len=16, seed=4))


def test_generation_with_one_candidate_takes_the_likeliest_token() -> None:
    gpt, prompt = make_gpt(), some_tokens(2, 5)
    greedy = model.generate(gpt, prompt, 1, seq_len=16, top_k=1)
    assert torch.equal(greedy[:, -1], gpt(prompt)[:, -1].argmax(dim=-1))


def test_the_learning_rate_goes_up_stays_and_falls_over_the_last_half() -> None:
    plan = budget.Budget(steps=200, minutes=0)
    factors = [plan.factor(step) for step in range(200)]
    assert factors[0] == 1 / budget.WARMUP_STEPS
    assert factors[budget.WARMUP_STEPS - 1 : 101] == [1.0] * (102 - budget.WARMUP_STEPS)
    assert all(a > b for a, b in pairwise(factors[100:190]))
    assert factors[-1] == budget.FINAL_FACTOR


def test_minutes_become_the_steps_that_process_zero_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 127.0, 200.0])  # made; 3 steps done; 20 steps done; 70 steps done, slower than before
    monkeypatch.setattr(budget.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(budget.dist, "broadcast", lambda tensor, src: tensor.add_(1))  # process 0 counts one more
    plan = budget.Budget(steps=None, minutes=5)
    assert plan.total_steps is None and not plan.is_over(10**6)
    plan.watch(3)
    plan.plan(20, torch.device("cpu"))
    assert plan.total_steps == 20 + 273 + 1  # 17 steps took 17 s, and 273 s are left of 300
    plan.plan(70, torch.device("cpu"))
    assert plan.total_steps == 70 + 148 + 1  # 67 steps took 90 s, and 200 s are left
    assert plan.is_over(219) and not plan.is_over(218)


def test_a_wider_model_gets_a_smaller_learning_rate() -> None:
    assert budget.width_factor(2048) == 1 / 16


def test_the_table_of_losses_holds_every_step_and_the_validations(tmp_path: Path) -> None:
    losses = curve.Curve([torch.tensor(3.0), torch.tensor(2.0)], {2: 2.5})
    losses.write_table(tmp_path / "losses.csv")
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], float(row["train_loss"]), row["validation_loss"]) for row in rows] == [
        ("1", 3.0, ""),
        ("2", 2.0, "2.5"),
    ]


def test_smoothing_takes_the_mean_of_the_last_values() -> None:
    assert curve.smooth([1.0, 2.0, 3.0, 4.0], window=2) == [1.0, 1.5, 2.5, 3.5]
    assert curve.smooth([], window=2) == []
