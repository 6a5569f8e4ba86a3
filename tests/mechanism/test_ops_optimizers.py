"""The public optimizers: torch's numbers when they step by themselves, the native flat optimizer under the engine."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.ops import optimizers
from lorica.ops.optimizers import (
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    FusedAdam,
    FusedLAMB,
    FusedLamb,
    FusedLion,
    FusedSGD,
)
from lorica.optim import SGD, Adagrad, Adam, FlatOptimizer, Lamb, Lion, ProvidesFlatOptimizer, from_client, fused
from lorica.optim.lion import lion_formula
from tests.harness import Ranks
from tests.mechanism.optim_planes import random_params, random_steps

SHAPES = {"w": (20, 30), "b": (7,), "big": (300, 3), "scalar": (), "empty": (0, 4)}
VALUES = random_params(SHAPES)
STEPS = random_steps(VALUES, 4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2e-6  # of the largest value: the kernels multiply and add in another order than torch.optim does

Make = Callable[[Any], torch.optim.Optimizer]


def parameters(dtype: torch.dtype = torch.float32, device: str = DEVICE) -> list[nn.Parameter]:
    return [nn.Parameter(value.to(device, dtype, copy=True)) for value in VALUES.values()]


def stepped(make: Make, dtype: torch.dtype = torch.float32, skip: Callable[[int, int], bool] = lambda *_: False) -> Any:
    """(parameters, optimizer) after all steps; `skip(step, index)` leaves a parameter without gradient."""
    params = parameters(dtype)
    optimizer = make(params)
    for number, grads in enumerate(STEPS):
        for index, (param, grad) in enumerate(zip(params, grads.values(), strict=True)):
            param.grad = None if skip(number, index) else grad.to(DEVICE, dtype, copy=True)
        optimizer.step()
    return params, optimizer


def error(found: list[Any], wanted: list[Any]) -> float:
    """The largest difference, relative to the largest value."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, wanted, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# By themselves --------------------------------------------------------------------------------------------------------

SAME_AS_TORCH: dict[str, tuple[Make, Make]] = {
    "AdamW": (
        lambda ps: FusedAdam(ps, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
    "Adam": (
        lambda ps: FusedAdam(ps, lr=1e-2, adam_w_mode=False, weight_decay=0.1),
        lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    ),
    "CPU AdamW": (
        lambda ps: DeepSpeedCPUAdam(ps, lr=1e-2, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    ),
    "CPU Adam": (
        lambda ps: DeepSpeedCPUAdam(ps, lr=1e-2, weight_decay=0.1, adamw_mode=False),
        lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    ),
    "SGD": (
        lambda ps: FusedSGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    ),
    "Adagrad": (
        lambda ps: DeepSpeedCPUAdagrad(ps, lr=1e-2, weight_decay=0.1),
        lambda ps: torch.optim.Adagrad(ps, lr=1e-2, weight_decay=0.1, eps=1e-10),
    ),
}
torchs = pytest.mark.parametrize("name", SAME_AS_TORCH)


@torchs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_compute_what_torch_does(name: str, dtype: torch.dtype) -> None:
    ours, theirs = SAME_AS_TORCH[name]
    found, wanted = stepped(ours, dtype)[0], stepped(theirs, dtype)[0]
    assert error(found, wanted) <= (ROUNDING if dtype is torch.float32 else 1e-13)
    assert error(found, parameters(dtype)) > 1e-3  # something was learnt


@torchs
def test_parameters_without_a_gradient_stay_and_keep_their_own_step_number(name: str) -> None:
    def skip(step: int, index: int) -> bool:
        return index == 3 or (index == 1 and step < 2)

    ours, theirs = SAME_AS_TORCH[name]
    found, wanted = stepped(ours, skip=skip)[0], stepped(theirs, skip=skip)[0]
    assert error(found, wanted) <= ROUNDING
    assert torch.equal(found[3], parameters()[3])


def test_the_parameters_of_a_group_share_one_kernel_call(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = fused.adam_many_

    def counted(masters: list[Tensor], *rest: Any, **named: Any) -> None:
        sizes.append(len(masters))
        whole(masters, *rest, **named)

    monkeypatch.setattr(optimizers.fused, "adam_many_", counted)
    stepped(lambda ps: FusedAdam(ps, lr=1e-2))
    assert sizes == [len(SHAPES)] * len(STEPS)


def test_without_bias_correction_the_first_step_is_the_smaller_one() -> None:
    """The moments start at zero: dividing by 1 - beta ** 1 = (0.1, 0.001) makes the first step 10 / 31.6 as large."""
    moved = []
    for correction in (True, False):
        param = nn.Parameter(torch.zeros(3, device=DEVICE))
        param.grad = torch.ones_like(param)
        FusedAdam([param], lr=1e-2, eps=0.0, bias_correction=correction).step()
        moved.append(float(param.detach().abs().max()))
    assert moved == pytest.approx([1e-2, 1e-2 * 0.1 / 0.001**0.5], rel=1e-5)


def test_lion_follows_its_formula() -> None:
    found, optimizer = stepped(lambda ps: FusedLion(ps, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1))
    for index, (name, value) in enumerate(VALUES.items()):
        wanted, moment = value.clone(), torch.zeros_like(value)
        for grads in STEPS:
            lion_formula(wanted, grads[name], moment, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
        torch.testing.assert_close(found[index].detach().cpu(), wanted)
        torch.testing.assert_close(optimizer.state[found[index]]["exp_avg"].cpu(), moment)


def test_lamb_moves_every_parameter_by_its_trust_ratio() -> None:
    """Without decay the direction of the first step is the gradient's sign s: the step is lr * |p| / |s| * s."""
    param = nn.Parameter(torch.tensor([3.0, 4.0], device=DEVICE))
    before = param.detach().clone()
    param.grad = torch.tensor([1.0, -2.0], device=DEVICE)
    FusedLamb([param], lr=0.1, eps=0.0, max_coeff=100.0).step()
    step = (before - param.detach()).cpu()
    torch.testing.assert_close(step, 0.1 * 5.0 / 2**0.5 * torch.tensor([1.0, -1.0]))
    assert FusedLAMB is FusedLamb


@pytest.mark.parametrize("make", [FusedAdam, FusedLion, FusedLamb, FusedSGD, DeepSpeedCPUAdagrad])
def test_a_low_precision_parameter_is_updated_in_fp32_and_rounded_once(make: Any) -> None:
    """One step of size lr from fp32 moments; the bf16 result is the rounded fp32 result."""
    start, grad = VALUES["w"].bfloat16(), STEPS[0]["w"].bfloat16()
    low, high = nn.Parameter(start.to(DEVICE, copy=True)), nn.Parameter(start.float().to(DEVICE))
    low.grad, high.grad = grad.to(DEVICE), grad.float().to(DEVICE)
    optimizer = make([low], lr=1e-2)
    optimizer.step()
    make([high], lr=1e-2).step()
    differ = (low.detach() != high.detach().bfloat16()).sum()  # the two kernels round fp32 differently now and then
    assert int(differ) <= 2 and not torch.equal(low.detach().cpu(), start)
    assert all(value.dtype is torch.float32 for value in optimizer.state[low].values() if isinstance(value, Tensor))


def test_a_parameter_that_is_not_contiguous_is_updated_in_its_own_order() -> None:
    turned = nn.Parameter(VALUES["w"].t().to(DEVICE))
    plain = nn.Parameter(VALUES["w"].t().contiguous().to(DEVICE))
    for param in (turned, plain):
        param.grad = STEPS[0]["w"].t().contiguous().to(DEVICE)
        FusedAdam([param], lr=1e-2).step()
    assert not turned.is_contiguous()
    torch.testing.assert_close(turned, plain, rtol=1e-6, atol=1e-7)


def test_a_learning_rate_schedule_and_a_closure_work() -> None:
    param = nn.Parameter(torch.ones(2, device=DEVICE))
    optimizer = FusedSGD([param], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 2.0
    schedule.step()
    assert optimizer.step(closure) == 0.0
    assert param.detach().tolist() == pytest.approx([-0.1, -0.1])


@pytest.mark.parametrize("set_grad_none", [True, False])
def test_zero_grad_drops_or_zeroes(set_grad_none: bool) -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = FusedAdam([param], set_grad_none=set_grad_none)
    optimizer.zero_grad()
    assert param.grad is None if set_grad_none else torch.equal(param.grad, torch.zeros(2))
    optimizer.zero_grad(set_to_none=True)
    assert param.grad is None


# State ----------------------------------------------------------------------------------------------------------------

MAKERS: dict[str, Make] = {
    "FusedAdam": lambda ps: FusedAdam(ps, lr=1e-2, weight_decay=0.1),
    "FusedLamb": lambda ps: FusedLamb(ps, lr=1e-2),
    "FusedLion": lambda ps: FusedLion(ps, lr=1e-2),
    "FusedSGD": lambda ps: FusedSGD(ps, lr=1e-2, momentum=0.9),
    "DeepSpeedCPUAdam": lambda ps: DeepSpeedCPUAdam(ps, lr=1e-2),
    "DeepSpeedCPULion": lambda ps: DeepSpeedCPULion(ps, lr=1e-2),
    "DeepSpeedCPUAdagrad": lambda ps: DeepSpeedCPUAdagrad(ps, lr=1e-2),
}
makers = pytest.mark.parametrize("name", MAKERS)


@makers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_resumes_the_very_same_training(name: str, dtype: torch.dtype) -> None:
    params, optimizer = stepped(MAKERS[name], dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = MAKERS[name](others)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for param, other, grad in zip(params, others, STEPS[0].values(), strict=True):
        param.grad, other.grad = grad.to(DEVICE, dtype), grad.to(DEVICE, dtype)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(param, other) for param, other in zip(params, others, strict=True))


@makers
def test_a_copied_and_a_pickled_optimizer_go_on_alike(name: str) -> None:
    params, optimizer = stepped(MAKERS[name])
    for twin_params, twin in (copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))):
        for param, grad in zip(twin_params, STEPS[0].values(), strict=True):
            param.grad = grad.to(DEVICE)
        twin.step()
        again, once_more = copy.deepcopy((params, optimizer))
        for param, grad in zip(again, STEPS[0].values(), strict=True):
            param.grad = grad.to(DEVICE)
        once_more.step()
        assert all(torch.equal(a, b) for a, b in zip(twin_params, again, strict=True))


def test_adams_state_can_be_continued_by_torchs_adamw_and_the_other_way_round() -> None:
    params, optimizer = stepped(lambda ps: FusedAdam(ps, lr=1e-2, weight_decay=0.1))
    _, torchs_own = stepped(lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1))
    results = []
    for make, saved in (
        (lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1), optimizer.state_dict()),
        (lambda ps: FusedAdam(ps, lr=1e-2, weight_decay=0.1), torchs_own.state_dict()),
    ):
        others = [nn.Parameter(param.detach().clone()) for param in params]
        resumed = make(others)
        groups = [{**resumed.param_groups[0], "params": saved["param_groups"][0]["params"]}]
        resumed.load_state_dict({"state": copy.deepcopy(saved["state"]), "param_groups": groups})
        for other, grad in zip(others, STEPS[0].values(), strict=True):
            other.grad = grad.to(DEVICE)
        resumed.step()
        results.append(others)
    assert error(*results) <= ROUNDING


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ps: FusedAdam(ps, amsgrad=True), "amsgrad"),
        (lambda ps: FusedLamb(ps, amsgrad=True), "amsgrad"),
        (lambda ps: FusedLamb(ps, eps_inside_sqrt=True), "eps_inside_sqrt"),
        (lambda ps: FusedLamb(ps, max_grad_norm=1.0), "gradient_clipping"),
        (lambda ps: DeepSpeedCPUAdam(ps, fp32_optimizer_states=False), "fp32_optimizer_states"),
        (lambda ps: DeepSpeedCPULion(ps, fp32_optimizer_states=False), "fp32_optimizer_states"),
        (lambda ps: DeepSpeedCPUAdagrad(ps, amsgrad=True), "amsgrad"),
        (lambda ps: FusedAdam([{"params": ps, "maximize": True}]), "maximize"),
    ],
)
def test_what_the_formulas_do_not_have_is_refused(make: Make, words: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"{words}(?s:.)*Fix:|Fix:(?s:.)*{words}"):
        make(parameters())


def test_a_learning_rate_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="lr must be a number"):
        FusedAdam(parameters(), lr=-1.0)


def test_sparse_gradients_and_complex_parameters_are_refused() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        FusedAdam(embedding.parameters()).step()
    with pytest.raises(NotImplementedError, match="complex"):
        FusedAdam([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


# Under the engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (FusedAdam, Adam),
        (DeepSpeedCPUAdam, Adam),
        (FusedLamb, Lamb),
        (FusedLion, Lion),
        (DeepSpeedCPULion, Lion),
        (DeepSpeedCPUAdagrad, Adagrad),
        (FusedSGD, SGD),
    ],
)
def test_the_engine_takes_the_native_flat_optimizer_and_the_clients_groups(
    make: Any, kind: type[FlatOptimizer]
) -> None:
    group = {"params": parameters(), "lr": 0.125}
    optimizer = make([group])
    assert isinstance(optimizer, ProvidesFlatOptimizer)
    flat = from_client(optimizer)
    assert type(flat) is kind
    assert flat.param_groups(optimizer.param_groups, {})[0] is group
    assert group["lr"] == 0.125 and flat.defaults["lr"] == optimizer.defaults["lr"]


def test_the_mode_of_adam_and_the_momentum_of_sgd_reach_the_flat_optimizer() -> None:
    assert getattr(from_client(FusedAdam(parameters(), adam_w_mode=False)), "adam_w_mode") is False  # noqa: B009
    assert getattr(from_client(FusedAdam(parameters())), "adam_w_mode") is True  # noqa: B009
    assert from_client(FusedSGD(parameters(), momentum=0.9)).moments == ("momentum_buffer",)


def test_an_optimizer_that_has_been_stepped_is_refused() -> None:
    _, optimizer = stepped(MAKERS["FusedAdam"])
    with pytest.raises(ValueError, match="has not been stepped"):
        from_client(optimizer)


def _train(make: str, stage: int) -> list[float]:
    """Losses of a few steps under the engine."""
    import lorica

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    optimizer = (
        MAKERS[make](model.parameters())
        if make in MAKERS
        else torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    )
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    engine, wrapped, *_ = lorica.initialize(model=model, optimizer=optimizer, config=config)
    assert wrapped is not None and wrapped.client is optimizer
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(engine.device)
    losses = []
    for _ in range(4):
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    engine.destroy()
    return losses


@pytest.mark.parametrize("stage", [0, 2])
def test_initialize_trains_with_it_as_with_torchs(ranks: Callable[[int], Ranks], stage: int) -> None:
    (ours,) = ranks(1).run(_train, make="FusedAdam", stage=stage)
    (theirs,) = ranks(1).run(_train, make="torch", stage=stage)
    assert ours == theirs and ours[-1] < ours[0]


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "FusedAdam"])
def test_initialize_trains_with_every_one(ranks: Callable[[int], Ranks], name: str) -> None:
    (losses,) = ranks(1).run(_train, make=name, stage=1)
    assert losses[-1] < losses[0]
