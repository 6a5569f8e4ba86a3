"""Bias-GELU, SwiGLU and GEGLU: the kernels against their formulas in float64, both directions, and against torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from lorica.kernels import activation
from lorica.kernels.activation import (
    bias_gelu,
    bias_gelu_formula,
    geglu,
    geglu_formula,
    swiglu,
    swiglu_formula,
)
from tests.mechanism.kernel_checks import DEVICE, DTYPES, check, close, exact

SHAPES = [(1, 1), (7, 127), (5, 1000), (2, 3, 64), (600, 7)]
ON_GPU_TOO = [(2048, 11008), (513, 5000), (4, 512, 4096)] if DEVICE == "cuda" else []


def _leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return exact(*shape, dtype=dtype, seed=seed).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES + ON_GPU_TOO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_bias_gelu_is_its_formula(shape: tuple[int, ...], dtype: torch.dtype, approximate: str) -> None:
    kernel, formula = (partial(act, approximate=approximate) for act in (bias_gelu, bias_gelu_formula))
    x, bias = _leaf(*shape, dtype=dtype), _leaf(shape[-1], dtype=dtype, seed=1)
    check(kernel, formula, [x, bias])
    check(kernel, formula, [x, None])


@pytest.mark.parametrize("shape", SHAPES + ON_GPU_TOO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_units_are_their_formulas(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [_leaf(*shape, dtype=dtype), _leaf(*shape, dtype=dtype, seed=1)]
    check(swiglu, swiglu_formula, inputs)
    for approximate in activation.GELUS:
        check(partial(geglu, approximate=approximate), partial(geglu_formula, approximate=approximate), inputs)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_formulas_are_those_of_torch(approximate: str) -> None:
    x, bias = exact(9, 33).double(), exact(33, seed=1).double()
    gelu = partial(F.gelu, approximate=approximate)
    assert torch.allclose(bias_gelu_formula(x, bias, approximate), gelu(x + bias), rtol=1e-12)
    assert torch.allclose(geglu_formula(x, x + 1, approximate), gelu(x) * (x + 1), rtol=1e-12)
    assert torch.allclose(swiglu_formula(x, x + 1), F.silu(x) * (x + 1), rtol=1e-12)


def test_large_values_stay_finite() -> None:
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], device=DEVICE, requires_grad=True)
    for approximate in activation.GELUS:
        y = bias_gelu(x, None, approximate)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y.detach(), x.detach().clamp_min(0))
        assert torch.equal(grad, (x.detach() > 0).float())
    y = swiglu(x, torch.ones_like(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y.detach(), x.detach().clamp_min(0)) and torch.equal(grad, (x.detach() > 0).float())


def test_frozen_arguments_get_no_gradient() -> None:
    check(bias_gelu, bias_gelu_formula, [exact(9, 33), _leaf(33, seed=1)])
    check(bias_gelu, bias_gelu_formula, [_leaf(9, 33), exact(33, seed=1)])
    check(swiglu, swiglu_formula, [exact(9, 33), _leaf(9, 33, seed=1)])


def test_two_halves_of_one_tensor_and_other_strides() -> None:
    both = _leaf(2, 5, 66)
    check(lambda x: swiglu(*x.chunk(2, -1)), lambda x: swiglu_formula(*x.chunk(2, -1)), [both])
    check(swiglu, swiglu_formula, [exact(33, 5).t().requires_grad_(), _leaf(5, 33, seed=1)])
    for bias in (_leaf(33, seed=1), None):
        check(bias_gelu, bias_gelu_formula, [exact(33, 5).t().requires_grad_(), bias])
        check(bias_gelu, bias_gelu_formula, [exact(5, 99)[:, 33:66].requires_grad_(), bias])


def test_a_gradient_that_is_one_number_expanded() -> None:
    x, bias = _leaf(5, 33), _leaf(33, seed=1)
    bias_gelu(x, bias).sum().backward()
    wide, wide_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    bias_gelu_formula(wide, wide_bias).sum().backward()
    close(x.grad, wide.grad, 1e-5)
    close(bias.grad, wide_bias.grad, 1e-5)


def test_the_sum_with_a_wider_bias_is_wide_as_in_torch() -> None:
    x, bias = _leaf(9, 33, dtype=torch.bfloat16), _leaf(33, seed=1)
    assert bias_gelu(x, bias).dtype is torch.float32
    check(bias_gelu, bias_gelu_formula, [x, bias])


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (4, 0)], ids=str)
def test_empty_inputs_have_empty_results_and_zero_gradients(shape: tuple[int, ...]) -> None:
    x, up, bias = _leaf(*shape), _leaf(*shape), _leaf(shape[-1])
    y = bias_gelu(x, bias)
    (y.sum() + swiglu(x, up).sum()).backward()
    assert y.shape == shape and x.grad.shape == shape and up.grad.shape == shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_gradients_are_the_same_bits_in_every_run() -> None:
    x, bias = _leaf(3000, 16), _leaf(16, seed=1)
    runs = [torch.autograd.grad(bias_gelu(x, bias), (x, bias), exact(3000, 16, seed=5)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_inputs_are_saved() -> None:
    x, bias, up = _leaf(3, 16), _leaf(16), _leaf(3, 16)
    for result, inputs in ((bias_gelu(x, bias), (x, bias)), (swiglu(x, up), (x, up))):
        assert {saved.data_ptr() for saved in result.grad_fn.saved_tensors} == {each.data_ptr() for each in inputs}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bias_gelu(exact(3, 16).double(), None), "x has the wrong dtype"),
        (lambda: bias_gelu(exact(3, 16), exact(15)), "bias has the wrong shape"),
        (lambda: bias_gelu(exact(3, 16), None, "sigmoid"), "approximate is unknown"),
        (lambda: geglu(exact(3, 16), exact(3, 16), "erf"), "approximate is unknown"),
        (lambda: swiglu(exact(3, 16), exact(16)), "up does not fit gate"),
        (lambda: swiglu(exact(3, 16), exact(3, 16).half()), "up does not fit gate"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_nothing_waits_for_the_device() -> None:
    x, bias = _leaf(64, 512), _leaf(512)
    for checked in (False, True):  # the first round compiles
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            (bias_gelu(x, bias) + swiglu(x, x)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
