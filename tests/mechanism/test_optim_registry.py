"""From a name and parameters in a configuration to an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorica.optim import SGD, Adagrad, Adam, FlatOptimizer, Lamb, Lion, Muon, TorchOptimizer, from_config
from tests.mechanism.optim_planes import random_params, random_steps, relative_error, train, train_torch

PARAMS = random_params({"w": (20, 30), "b": (7,)})
STEPS = random_steps(PARAMS, 3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Adam", Adam),
        ("ADAMW", Adam),
        ("sgd", SGD),
        ("Lion", Lion),
        ("adagrad", Adagrad),
        ("LAMB", Lamb),
        ("muon", Muon),
        ("RMSprop", TorchOptimizer),
        ("torch.optim.NAdam", TorchOptimizer),
    ],
)
def test_the_name_chooses_the_optimizer(name: str, kind: type[FlatOptimizer]) -> None:
    flat = from_config(name, {"lr": 0.125})
    assert isinstance(flat, kind)
    assert isinstance(flat, FlatOptimizer)
    assert flat.defaults["lr"] == 0.125


@pytest.mark.parametrize(
    ("name", "params", "decoupled"),
    [
        ("Adam", {}, True),
        ("Adam", {"adam_w_mode": False}, False),
        ("AdamW", {"adam_w_mode": False}, True),
        ("Adam", {"torch_adam": True}, True),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, False),
        ("torch.optim.Adam", {}, False),
        ("torch.optim.AdamW", {}, True),
    ],
)
def test_adam_means_adamw_unless_told_otherwise(name: str, params: dict[str, Any], decoupled: bool) -> None:
    flat = from_config(name, params)
    assert isinstance(flat, Adam)
    assert flat.adam_w_mode is decoupled


def test_torch_adam_takes_torchs_default_decay() -> None:
    assert from_config("AdamW", {}).defaults["weight_decay"] == 0.0
    assert from_config("AdamW", {"torch_adam": True}).defaults["weight_decay"] == 0.01


def test_torch_adam_with_amsgrad_goes_through_the_adapter() -> None:
    assert from_config("AdamW", {"torch_adam": True, "amsgrad": True}).moments[-1] == "max_exp_avg_sq"


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_maximize_goes_through_the_adapter(name: str) -> None:
    flat = from_config(name, {"lr": 0.1, "maximize": True})
    assert isinstance(flat, TorchOptimizer)
    assert not isinstance(from_config(name, {"lr": 0.1, "maximize": False}), TorchOptimizer)


def test_an_optimizer_by_torchs_name_gives_torchs_numbers() -> None:
    flat = from_config("RMSprop", {"lr": 0.1, "centered": True})
    groups = flat.param_groups([{"params": []}], {})
    wanted = train_torch(lambda ps: torch.optim.RMSprop(ps, lr=0.1, centered=True), PARAMS, STEPS)
    assert relative_error(train(flat, PARAMS, STEPS, groups=groups), wanted) == 0.0


@pytest.mark.parametrize("name", ["OneBitAdam", "ZeroOneAdam", "OneBitLamb", "MuAdam", "MuAdamW", "MuSGD"])
def test_optimizers_that_are_not_there_are_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"'{name}' is not supported. Fix: use"):
        from_config(name, {})


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "SparseAdam", "torch.optim.Muon"])
def test_torch_optimizers_that_are_not_element_wise_are_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"cannot run on flat planes.*Fix: use"):
        from_config(name, {"lr": 0.1})


def test_an_unknown_name_is_an_error_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match="Did you mean 'adamw'"):
        from_config("AdmW", {})


@pytest.mark.parametrize("name", ["Adam", "Lion", "Muon", "torch.optim.RMSprop"])
def test_an_unknown_parameter_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"got \['learning_rate'\] as well"):
        from_config(name, {"learning_rate": 0.1})


def test_max_grad_norm_points_to_gradient_clipping() -> None:
    with pytest.raises(ValueError, match="Fix: set gradient_clipping"):
        from_config("AdamW", {"max_grad_norm": 1.0})


def test_moments_in_another_precision_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="fp32_optimizer_states"):
        from_config("AdamW", {"fp32_optimizer_states": False})
