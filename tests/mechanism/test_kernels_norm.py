"""Layer and RMS norm: the kernels against their formulas in float64, both directions, and what they promise besides."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lorica.kernels import norm
from lorica.kernels.norm import layer_norm, layer_norm_formula, rms_norm, rms_norm_formula
from tests.mechanism.kernel_checks import DEVICE, DTYPES, TOLERANCE, check, close, exact

SHAPES = [(1, 1), (7, 127), (5, 1000), (2, 3, 64), (300, 7)]
ON_GPU_TOO = [(4096, 4096), (513, 2560), (70, 8192), (33, 20000), (8, 40000), (3, 65536)] if DEVICE == "cuda" else []
EPS = 1e-5


def _vector(size: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return exact(size, dtype=dtype, seed=seed).requires_grad_()


def _rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return exact(*shape, dtype=dtype, seed=seed).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES + ON_GPU_TOO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_is_its_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    width = shape[-1]
    inputs = [_rows(*shape, dtype=dtype), _vector(width, 1, dtype), _vector(width, 2, dtype), EPS]
    check(layer_norm, layer_norm_formula, inputs)


@pytest.mark.parametrize("shape", SHAPES + ON_GPU_TOO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_its_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [_rows(*shape, dtype=dtype), _vector(shape[-1], 1, dtype), EPS]
    check(partial(rms_norm, cast_before_weight=False), partial(rms_norm_formula, cast_before_weight=False), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 127), *ON_GPU_TOO], ids=str)
def test_the_sum_with_a_residual_is_normalised_and_handed_out(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = _rows(*shape, dtype=dtype), _rows(*shape, dtype=dtype, seed=3)
    weight, bias = _vector(shape[-1], 1, dtype), _vector(shape[-1], 2, dtype)
    check(layer_norm, layer_norm_formula, [x, weight, bias, EPS, residual])
    check(rms_norm, rms_norm_formula, [x, weight, EPS, residual])


@pytest.mark.parametrize("which", ["normed", "total"])
def test_one_of_the_two_results_may_stay_unused(which: str) -> None:
    index = ("normed", "total").index(which)
    x, residual = _rows(5, 33), _rows(5, 33, seed=3)
    inputs = [x, _vector(33, 1), _vector(33, 2), EPS, residual]
    if which == "normed":
        check(lambda *args: layer_norm(*args)[0], lambda *args: layer_norm_formula(*args)[0], inputs)
        return
    total = layer_norm(*inputs)[index]
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, torch.ones_like(x))


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rows_wider_than_a_program_are_normalised_in_tiles(
    centre: bool, dtype: torch.dtype, with_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "WIDEST_FORWARD", 64)
    monkeypatch.setattr(norm, "WIDEST_BACKWARD", 64)
    monkeypatch.setattr(norm, "CHUNK", 32)
    for width in (65, 96):
        weight, bias = _vector(width, 1, dtype), _vector(width, 2, dtype)
        residual = _rows(5, width, dtype=dtype, seed=3) if with_residual else None
        x = _rows(5, width, dtype=dtype)
        if centre:
            check(layer_norm, layer_norm_formula, [x, weight, bias, EPS, residual])
        else:
            check(rms_norm, rms_norm_formula, [x, weight, EPS, residual])


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_may_be_missing(weight: bool, bias: bool) -> None:
    vectors = [_vector(33, 1) if weight else None, _vector(33, 2) if bias else None]
    check(layer_norm, layer_norm_formula, [_rows(5, 33), *vectors, EPS])
    check(rms_norm, rms_norm_formula, [_rows(5, 33), vectors[0], EPS])


def test_frozen_arguments_get_no_gradient_and_change_no_other() -> None:
    x, weight, bias = exact(5, 33), exact(33, seed=1), exact(33, seed=2)
    check(layer_norm, layer_norm_formula, [x, weight.requires_grad_(), bias, EPS])
    check(layer_norm, layer_norm_formula, [x, weight.detach(), bias.requires_grad_(), EPS])
    check(layer_norm, layer_norm_formula, [x.requires_grad_(), weight.detach(), bias.detach(), EPS])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_adds_one_to_the_weight(dtype: torch.dtype) -> None:
    gemma: dict[str, Any] = {"offset": 1.0, "cast_before_weight": False}
    inputs = [_rows(9, 127, dtype=dtype), _vector(127, 1, dtype), EPS]
    check(partial(rms_norm, **gemma), partial(rms_norm_formula, **gemma), inputs)


def test_llama_rounds_before_the_weight_and_torch_behind_it() -> None:
    x, weight = exact(64, 128, dtype=torch.float16), exact(128, dtype=torch.float16, seed=1)
    results = {}
    for cast in (True, False):
        got = rms_norm(x, weight, EPS, cast_before_weight=cast)
        results[cast] = got
        wanted = rms_norm_formula(x, weight, EPS, cast_before_weight=cast)
        # the last bit of rsqrt may carry a value over a rounding boundary, rarely
        assert (got == wanted).float().mean() > 0.995
        close(got, wanted, 2.0**-12)
    assert (results[True] != results[False]).float().mean() > 0.05


def test_the_product_with_a_wider_weight_is_wide_as_in_hugging_face() -> None:
    x, weight = exact(4, 32, dtype=torch.bfloat16), exact(32, seed=1)
    assert rms_norm(x, weight, EPS).dtype is torch.float32
    assert rms_norm(x, weight, EPS, cast_before_weight=False).dtype is torch.bfloat16
    assert rms_norm(x, None, EPS).dtype is torch.bfloat16


def test_mixed_dtypes_each_get_their_own_gradient() -> None:
    x, residual = _rows(9, 127, dtype=torch.bfloat16), _rows(9, 127, seed=3)
    check(layer_norm, layer_norm_formula, [x, _vector(127, 1), _vector(127, 2), EPS, residual])
    assert layer_norm(x, None, None, EPS, residual)[1].dtype is torch.float32


def test_the_result_can_be_float32_without_a_copy_of_the_input() -> None:
    x = _rows(9, 127, dtype=torch.bfloat16)
    fp32 = partial(layer_norm, out_dtype=torch.float32)
    check(fp32, layer_norm_formula, [x, _vector(127, 1), _vector(127, 2), EPS], tolerance=TOLERANCE[torch.bfloat16])
    close(fp32(x, None, None, EPS).detach(), layer_norm_formula(x.detach().double(), None, None, EPS), 1e-5)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (4, 0)], ids=str)
def test_empty_inputs_have_empty_results_and_zero_gradients(shape: tuple[int, ...]) -> None:
    x, weight, bias = _rows(*shape), _vector(shape[-1], 1), _vector(shape[-1], 2)
    y = layer_norm(x, weight, bias, EPS)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and torch.equal(bias.grad, torch.zeros_like(bias))


def test_strided_inputs_and_gradients() -> None:
    transposed = exact(33, 5).t().requires_grad_()
    columns = exact(5, 99)[:, 33:66].requires_grad_()
    heads = exact(2, 5, 3, 33).transpose(1, 2).requires_grad_()
    for x in (transposed, columns, heads):
        check(layer_norm, layer_norm_formula, [x, _vector(33, 1), _vector(33, 2), EPS, x.detach().clone()])
    x = _rows(5, 33)
    weight = _vector(33, 1)
    layer_norm(x, weight, None, EPS).sum().backward()  # the gradient is one number, expanded
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    layer_norm_formula(wide, wide_weight, None, EPS).sum().backward()
    close(x.grad, wide.grad, 1e-5)
    close(weight.grad, wide_weight.grad, 1e-5)


def test_gradients_are_the_same_bits_in_every_run() -> None:
    inputs = [_rows(200, 64), _vector(64, 1), _vector(64, 2)]
    runs = []
    for _ in range(2):
        y = layer_norm(*inputs, EPS)
        runs.append(torch.autograd.grad(y, inputs, exact(*y.shape, seed=5)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_large_mean_does_not_hurt_the_variance() -> None:
    x = exact(4, 256) + 1000.0
    close(layer_norm(x, None, None, EPS), layer_norm_formula(x.double(), None, None, EPS), 1e-5)


def test_the_parameter_itself_is_saved() -> None:
    weight = _vector(16, 1)
    y = layer_norm(_rows(3, 16), weight, None, EPS)
    assert any(saved is weight for saved in y.grad_fn.saved_tensors)


def test_a_second_derivative_is_refused() -> None:
    x = _rows(3, 16)
    (grad,) = torch.autograd.grad(layer_norm(x, None, None, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": exact(3, 16, dtype=torch.float64)}, "x has the wrong dtype"),
        ({"weight": exact(15)}, "weight has the wrong shape"),
        ({"bias": exact(16, 1)}, "bias has the wrong shape"),
        ({"residual": exact(16)}, "residual has the wrong shape"),
        ({"residual": exact(3, 16).long()}, "residual has the wrong dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": exact(3, 16), "weight": exact(16), "bias": exact(16), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        layer_norm(**arguments | change)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_nothing_waits_for_the_device() -> None:
    inputs = [_rows(64, 512), _vector(512, 1), _vector(512, 2)]
    layer_norm(*inputs, EPS).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_norm(*inputs, EPS).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
