"""The one-pass optimizer kernels against their formulas in float64; split and fp32 masters agree to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lorica.kernels import update
from lorica.precision.rounding import join, round_into, rounded, split_into

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1, 127, 128, 5000]
STEPS = 4
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False}
LION = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}

# name: (hyper-parameters of a step, formula, kernel, number of moments)
Case = tuple[Callable[[int], tuple[float, ...]], Callable[..., None], Callable[..., None], int]
CASES: dict[str, Case] = {
    "adamw": (lambda t: update.adam_hyper(t, decoupled=True, **ADAM), update.adam_formula, update.adam, 2),
    "adam with L2": (lambda t: update.adam_hyper(t, decoupled=False, **ADAM), update.adam_formula, update.adam, 2),
    "lion": (lambda t: update.lion_hyper(**LION), update.lion_formula, update.lion, 1),
    "sgd, momentum": (lambda t: update.sgd_hyper(t, **SGD), update.sgd_formula, update.sgd, 1),
    "sgd, nesterov": (
        lambda t: update.sgd_hyper(t, **{**SGD, "nesterov": True, "dampening": 0.0}),
        update.sgd_formula,
        update.sgd,
        1,
    ),
}


def random(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of many magnitudes, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-6, 2, (numel,), generator=generator)
    return (torch.randn(numel, generator=generator) * 10.0**exponents).to(dtype).to(DEVICE)


def on_device(values: tuple[float, ...]) -> Tensor:
    return torch.tensor([*values, *[0.0] * (12 - len(values))], dtype=torch.float32, device=DEVICE)


def scalars(coef: float = 0.5, apply: int = 1) -> dict[str, Tensor]:
    return {
        "coef": torch.tensor([coef], dtype=torch.float64, device=DEVICE),
        "apply": torch.tensor([apply], dtype=torch.int32, device=DEVICE),
    }


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_its_formula(name: str, grad_dtype: torch.dtype, numel: int) -> None:
    hyper, formula, kernel, num_moments = CASES[name]
    master = random(numel, 0)
    moments = [torch.zeros_like(master) for _ in range(num_moments)]
    exact = [tensor.double() for tensor in (master, *moments)]
    for step in range(1, STEPS + 1):
        grad = random(numel, step, grad_dtype)
        kernel(master, None, grad, *moments, **scalars(), hyper=on_device(hyper(step)))
        formula(exact[0], grad.double() * 0.5, *exact[1:], hyper(step))
    for got, wanted in zip((master, *moments), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=1e-7)


def test_sgd_without_momentum_needs_no_buffer() -> None:
    master, grad = random(1000, 0), random(1000, 1)
    exact = master.double()
    hyper = update.sgd_hyper(1, **{**SGD, "momentum": 0.0})
    update.sgd(master, None, grad, None, **scalars(), hyper=on_device(hyper))
    update.sgd_formula(exact, grad.double() * 0.5, None, hyper)
    torch.testing.assert_close(master.double(), exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_a_split_master_trains_as_the_fp32_master_does_to_the_bit(name: str) -> None:
    hyper, _, kernel, num_moments = CASES[name]
    numel = 5000
    master = random(numel, 0)
    upper, lower = (
        torch.empty(numel, dtype=torch.bfloat16, device=DEVICE),
        torch.empty(numel, dtype=torch.int16, device=DEVICE),
    )
    split_into(master, upper, lower)
    out = torch.empty_like(upper)
    moments = [torch.zeros_like(master) for _ in range(num_moments)]
    split_moments = [moment.clone() for moment in moments]
    for step in range(1, STEPS + 1):
        grad, hypers = random(numel, step, torch.bfloat16), on_device(hyper(step))
        kernel(master, out, grad, *moments, **scalars(), hyper=hypers)
        kernel(lower, upper, grad, *split_moments, **scalars(), hyper=hypers)
        assert torch.equal(join(upper, lower), master)
        assert torch.equal(upper, out)
        assert all(map(torch.equal, moments, split_moments))


@pytest.mark.parametrize("split", [False, True])
def test_nothing_changes_where_the_gradient_was_not_finite(split: bool) -> None:
    numel = 300
    master, out = random(numel, 0), random(numel, 3, torch.bfloat16)
    if split:
        master = random(numel, 0).view(torch.int32).to(torch.int16)
    planes = [master, out, *(random(numel, seed) for seed in (1, 2))]
    before = [plane.clone() for plane in planes]
    grad = torch.full((numel,), float("nan"), device=DEVICE)
    hyper = on_device(update.adam_hyper(1, decoupled=True, **ADAM))
    update.adam(master, out, grad, *planes[2:], **scalars(apply=0), hyper=hyper)
    assert all(map(torch.equal, planes, before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_parameter_is_the_rounded_master(dtype: torch.dtype) -> None:
    numel = 4096
    bits = torch.arange(numel, dtype=torch.int32) * 0x8000 + 0x3F000000  # every second one is a tie of bf16
    master = bits.view(torch.float32).to(DEVICE)
    out, still = torch.empty(numel, dtype=dtype, device=DEVICE), torch.zeros(numel, device=DEVICE)
    hyper = on_device(update.sgd_hyper(1, **{**SGD, "lr": 0.0, "weight_decay": 0.0}))
    update.sgd(master, out, still, None, **scalars(), hyper=hyper)
    assert torch.equal(master.cpu(), bits.view(torch.float32))
    assert torch.equal(out, rounded(master, dtype))


def test_a_nan_reaches_the_parameter() -> None:
    master = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32).to(DEVICE)
    out = torch.zeros(3, dtype=torch.bfloat16, device=DEVICE)
    hyper = on_device(update.sgd_hyper(1, **SGD))
    update.sgd(master, out, torch.zeros(3, device=DEVICE), None, **scalars(), hyper=hyper)
    assert out.isnan().all()


# The two bit formulas ------------------------------------------------------------------------------------------------


def all_kinds() -> Tensor:
    """Random bit patterns: every exponent, denormals, infinities, ties; no NaN."""
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator, dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0, -(2**31), 0x7F800000, 0x7F7FFFFF, 0x7F7F8000, 1, 0x8000, 0x18000, 0x7FFF, 0x17FFF])
    values = torch.cat([bits, special.to(torch.int32)]).view(torch.float32)
    return values[~values.isnan()]


def test_split_and_join_lose_no_bit() -> None:
    master = all_kinds()
    upper, lower = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_into(master, upper, lower)
    assert torch.equal(join(upper, lower).view(torch.int32), master.view(torch.int32))


def test_rounding_is_to_nearest_and_ties_go_away_from_zero() -> None:
    master = all_kinds()
    master = master[master.abs() < 3e38].double()
    got = rounded(master.float(), torch.bfloat16).double()
    even = master.float().bfloat16().double()
    assert ((got - master).abs() <= (even - master).abs()).all()  # as near as torch's own rounding
    ties = got != even
    assert ties.any()
    assert (got[ties].abs() > even[ties].abs()).all()


def test_a_nan_stays_a_nan() -> None:
    master = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F808000], dtype=torch.int32).view(torch.float32)
    upper, lower = torch.empty(4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int16)
    split_into(master, upper, lower)
    assert upper.isnan().all()
    assert join(upper, lower).isnan().all()


def test_a_parameter_overwritten_with_zeros_is_zero() -> None:
    lower = torch.tensor([-1, 5, -32768], dtype=torch.int16)
    for zero in (0.0, -0.0):
        got = join(torch.full((3,), zero, dtype=torch.bfloat16), lower)
        assert (got.abs() < 1e-38).all()


def test_fp16_and_fp32_are_rounded_as_torch_does() -> None:
    master = torch.randn(1000)
    for dtype in (torch.float16, torch.float32, torch.float64):
        out: Any = torch.empty(1000, dtype=dtype)
        round_into(master, out)
        assert torch.equal(out, master.to(dtype))
