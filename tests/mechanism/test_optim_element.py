"""The element-wise optimizers: against torch, against their own formula, and however a plane is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.kernels import native
from lorica.optim import SGD, Adagrad, Adam, AdamW, FlatOptimizer, Lion, fused
from lorica.optim.element import ElementOptimizer
from tests.mechanism.optim_planes import (
    make_plane,
    random_params,
    random_steps,
    relative_error,
    same_bits,
    train,
    train_torch,
)

SHAPES = {"w": (40, 30), "b": (7,), "big": (1000, 3), "scalar": (), "empty": (0,)}
PARAMS = random_params(SHAPES)
STEPS = random_steps(PARAMS, 20)

# Two ways to compute a step round differently: in 20 steps each rounds a master 20 times by up to 2^-24 of it, in
# random directions: sqrt(2 * 20) * 6e-8 = 4e-7 at most.
ROUNDING = 3e-7
WAYS = ("native", "torch", "formula")

Make = Callable[[], FlatOptimizer]
OURS: dict[str, Make] = {
    "adamw": lambda: AdamW(lr=1e-2, weight_decay=0.1),
    "adam": lambda: Adam(lr=1e-2, weight_decay=0.1, adam_w_mode=False),
    "adam without decay": lambda: Adam(lr=1e-2, betas=(0.8, 0.95), eps=1e-6),
    "sgd": lambda: SGD(lr=1e-2, weight_decay=0.1),
    "momentum": lambda: SGD(lr=1e-2, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "nesterov": lambda: SGD(lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda: Adagrad(lr=1e-2, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5),
    "lion": lambda: Lion(lr=1e-2, weight_decay=0.1),
}
TORCH: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "adam without decay": lambda ps: torch.optim.Adam(ps, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, foreach=False),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.2, weight_decay=0.1, foreach=False),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True, foreach=False),
    "adagrad": lambda ps: torch.optim.Adagrad(
        ps, lr=1e-2, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5, foreach=False
    ),
}


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let updates run by the native library, by torch's fused kernels, or by the formulas."""
    if way == "native":
        if not native.available():
            pytest.skip(native.why_not())
        return
    monkeypatch.setattr(native, "fits", lambda master, grad, out: False)
    if way == "formula":
        monkeypatch.setattr(fused, "has_kernel", lambda name, device_type: False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TORCH)
def test_twenty_steps_equal_torch(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    # With no empty parameter: its norm is 0.
    params = {key: value for key, value in PARAMS.items() if value.numel()}
    error = relative_error(train(OURS[name](), params, STEPS), train_torch(TORCH[name], params, STEPS))
    assert error < ROUNDING


@pytest.mark.parametrize("name", OURS)
def test_double_precision_planes_are_updated_in_double_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def master(dtype: torch.dtype) -> Tensor:
        optimizer = OURS[name]()
        (segment,) = make_plane(optimizer, PARAMS, optimizer.param_groups([{}], {})).segments
        state = {key: plane[:2048].to(dtype) for key, plane in segment.state.items()}
        grad = STEPS[0]["big"].view(-1)[:2048].to(dtype)
        segment = replace(segment, master=segment.master[:2048].to(dtype), grad=grad, state=state)
        optimizer.update([segment], coef=0.1, step=1)
        return segment.master

    kernel = master(torch.float64)
    assert 1e-10 < float((master(torch.float32) - kernel).norm()) < 1e-4
    monkeypatch.setattr(fused, "has_kernel", lambda name, device_type: False)
    assert torch.allclose(master(torch.float64), kernel, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("way", ["native", "torch"])
@pytest.mark.parametrize("name", OURS)
def test_a_kernel_equals_the_formula(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {key: value for key, value in PARAMS.items() if value.numel()}
    go(way, monkeypatch)
    with_kernel = train(OURS[name](), params, STEPS)
    go("formula", monkeypatch)
    assert relative_error(train(OURS[name](), params, STEPS), with_kernel) < ROUNDING


def test_torch_has_a_fused_kernel_of_all_four_on_a_cpu() -> None:
    assert all(fused.has_kernel(name, "cpu") for name in ("adam", "adamw", "sgd", "adagrad"))


@pytest.mark.parametrize("way", ["torch", "formula"])
@pytest.mark.parametrize("name", OURS)
def test_the_tile_size_changes_no_bit(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    whole = train(OURS[name](), PARAMS, STEPS[:3])
    for tile_numel in (128, 384, 4096):
        optimizer = OURS[name]()
        assert isinstance(optimizer, ElementOptimizer)
        optimizer.tile_numel = tile_numel
        assert same_bits(train(optimizer, PARAMS, STEPS[:3]), whole), tile_numel


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(num_threads: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    params = random_params({"w": (300_000,)})
    steps = random_steps(params, 2)
    one = {name: train(make(), params, steps) for name, make in OURS.items()}
    torch.set_num_threads(num_threads)
    try:
        for name, make in OURS.items():
            assert same_bits(train(make(), params, steps), one[name]), name
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", OURS)
def test_cutting_a_plane_into_shards_changes_no_bit(
    name: str, world_size: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(way, monkeypatch)
    whole = train(OURS[name](), PARAMS, STEPS[:4])
    assert same_bits(train(OURS[name](), PARAMS, STEPS[:4], world_size=world_size), whole)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_is_the_rounded_master(name: str, dtype: torch.dtype) -> None:
    optimizer = OURS[name]()
    plane = make_plane(optimizer, PARAMS, optimizer.param_groups([{}], {}), out_dtype=dtype)
    plane.set_grads(STEPS[0])
    optimizer.update(plane.segments, coef=1.0, step=1)
    assert plane.out is not None
    assert plane.out.abs().sum() > 0
    assert torch.equal(plane.out, plane.master.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_coefficient_multiplies_the_gradient_in_full_precision(dtype: torch.dtype, as_tensor: bool) -> None:
    coef = 0.3217
    rounded = [{name: grad.to(dtype) for name, grad in grads.items()} for grads in STEPS[:3]]
    scaled = [{name: grad.float() * coef for name, grad in grads.items()} for grads in rounded]
    wanted = train(AdamW(lr=1e-2), PARAMS, scaled)
    given = torch.tensor(coef) if as_tensor else coef
    assert same_bits(train(AdamW(lr=1e-2), PARAMS, rounded, coef=given, grad_dtype=dtype), wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OURS)
def test_the_gradient_plane_is_not_written(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    optimizer = OURS[name]()
    plane = make_plane(optimizer, PARAMS, optimizer.param_groups([{}], {}))
    plane.set_grads(STEPS[0])
    before = plane.grad.clone()
    optimizer.update(plane.segments, coef=1.0, step=1)
    optimizer.update(plane.segments, coef=0.5, step=2)
    assert torch.equal(plane.grad, before)


@pytest.mark.parametrize("way", WAYS)
def test_without_bias_correction_the_first_adam_step_is_small(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    params, grads = {"w": torch.zeros(128)}, {"w": torch.full((128,), 2.0)}
    got = train(Adam(lr=1.0, bias_correction=False, eps=0.0), params, [grads])
    # m / sqrt(v) = 0.1 g / sqrt(0.001 g^2)
    assert torch.allclose(got["w"], torch.full((128,), -0.1 / 0.001**0.5))


def test_lion_takes_the_sign_of_the_interpolated_momentum() -> None:
    optimizer = Lion(lr=0.5, betas=(0.75, 0.5), weight_decay=0.1)
    grads = [{"w": torch.tensor([4.0, -4.0, 0.0])}, {"w": torch.tensor([-1.0, -1.0, 0.0])}]
    got = train(optimizer, {"w": torch.tensor([1.0, 1.0, 1.0])}, grads)
    # step 1: c = .25 g = (1, -1, 0); w = .95 - .5 sign(c) = (.45, 1.45, .95); m = .5 g = (2, -2, 0)
    # step 2: c = .75 m + .25 g = (1.25, -1.75, 0); w = .95 w - .5 sign(c)
    assert torch.allclose(got["w"], torch.tensor([-0.0725, 1.8775, 0.9025]))


def test_hyper_parameters_are_read_at_every_step() -> None:
    optimizer = AdamW(lr=1.0)
    groups = optimizer.param_groups([{"params": []}], {})

    def before_step(step: int) -> None:
        groups[0]["lr"] = 0.1 if step == 1 else 0.0

    once = train(AdamW(lr=0.1), PARAMS, STEPS[:1])
    assert same_bits(train(optimizer, PARAMS, STEPS[:3], groups=groups, before_step=before_step), once)


def test_each_param_group_has_its_own_hyper_parameters() -> None:
    optimizer = AdamW(lr=1e-2)
    groups = optimizer.param_groups([{"params": []}, {"params": [], "lr": 0.5, "weight_decay": 0.3}], {})
    got = train(optimizer, PARAMS, STEPS[:3], groups=groups, group_of={"b": 1}, world_size=2)
    assert torch.equal(got["w"], train(AdamW(lr=1e-2), PARAMS, STEPS[:3])["w"])
    assert torch.equal(got["b"], train(AdamW(lr=0.5, weight_decay=0.3), PARAMS, STEPS[:3])["b"])


def test_defaults_fill_a_group_without_replacing_it() -> None:
    group = {"params": [], "lr": 0.5}
    (completed,) = AdamW(lr=0.1, weight_decay=0.2).param_groups([group], {})
    assert completed is group
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.2)


def test_plain_sgd_keeps_no_plane() -> None:
    assert SGD(lr=0.1).moments == ()
    assert SGD(lr=0.1, momentum=0.9).moments == ("momentum_buffer",)


def test_momentum_without_a_plane_is_an_error() -> None:
    optimizer = SGD(lr=0.1)
    groups = optimizer.param_groups([{"params": [], "momentum": 0.9}], {})
    with pytest.raises(ValueError, match="expected momentum 0"):
        train(optimizer, PARAMS, STEPS[:1], groups=groups)


def test_an_empty_segment_is_fine() -> None:
    optimizer = AdamW()
    plane = make_plane(optimizer, {"empty": torch.zeros(0)}, optimizer.param_groups([{}], {}))
    optimizer.update([], coef=1.0, step=1)
    optimizer.update(plane.segments, coef=torch.tensor(0.5), step=1)
    assert torch.equal(plane.master, torch.zeros_like(plane.master))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(betas=(0.9, 1.0)), r"Adam: betas\[1\] must be a number in \[0, 1\), got 1.0"),
        (lambda: Adam(betas=(0.9,)), "betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: AdamW(lr=-1.0), r"AdamW: lr must be a number in \[0, inf\], got -1.0"),
        (lambda: AdamW(lr="auto"), "lr must be a number"),  # type: ignore[arg-type]
        (lambda: Lion(weight_decay=-0.1), "Lion: weight_decay"),
        (lambda: SGD(nesterov=True), "nesterov needs momentum > 0"),
        (lambda: Adagrad(eps=-1.0), "Adagrad: eps"),
    ],
)
def test_a_hyper_parameter_out_of_range_is_an_error(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_amsgrad_is_refused_with_what_works_instead() -> None:
    with pytest.raises(NotImplementedError, match="torch_adam"):
        AdamW(amsgrad=True)
