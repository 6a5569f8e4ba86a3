"""The loss scale against tables computed by hand: `.` is a good step, `X` an overflow."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from lorica.precision import DynamicScale, StaticScale, make_loss_scale

# options, steps, scale after each step
TABLE: list[tuple[dict[str, Any], str, list[float]]] = [
    # every window-th good step behind the first one
    ({"initial_scale": 8, "window": 2}, "......", [8, 8, 16, 16, 32, 32]),
    # hysteresis 1: every overflow halves; the count of good steps starts again
    ({"initial_scale": 8, "window": 2, "hysteresis": 1}, ".X..X...", [8, 4, 4, 4, 2, 2, 2, 4]),
    # hysteresis 2: the first overflow is free, then every one halves ...
    ({"initial_scale": 8, "window": 9, "hysteresis": 2}, "X.X.X", [8, 8, 4, 4, 2]),
    # ... until the scale has grown, which restores the allowance
    ({"initial_scale": 8, "window": 1, "hysteresis": 2}, "XX..XX", [8, 4, 4, 8, 8, 4]),
    # consecutive hysteresis: a good step restores it
    (
        {"initial_scale": 8, "window": 9, "hysteresis": 2, "consecutive_hysteresis": True},
        "X.X.XX",
        [8, 8, 8, 8, 8, 4],
    ),
    # the scale stops at the minimum
    (
        {"initial_scale": 5, "window": 9, "hysteresis": 1, "min_scale": 2, "at_minimum": "warn"},
        "XX",
        [2.5, 2],
    ),
]


@pytest.mark.parametrize(("options", "steps", "wanted"), TABLE)
def test_the_dynamic_scale_follows_the_table(options: dict[str, Any], steps: str, wanted: list[float]) -> None:
    scale = DynamicScale(**options)
    got = []
    for step in steps:
        scale.update(overflow=step == "X")
        got.append(scale.scale)
    assert got == wanted


def test_an_overflow_at_the_minimum_raises() -> None:
    scale = DynamicScale(2.0, hysteresis=1, min_scale=1.0)
    scale.update(overflow=True)
    with pytest.raises(FloatingPointError, match=r"min_loss_scale.*got inf or nan at 1"):
        scale.update(overflow=True)


def test_an_overflow_at_the_minimum_warns_once_if_asked_to() -> None:
    scale = DynamicScale(1.0, hysteresis=1, at_minimum="warn")
    with pytest.warns(UserWarning, match="on_min_loss_scale"):
        scale.update(overflow=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale.update(overflow=True)
    assert scale.scale == 1.0


@pytest.mark.parametrize("cut", range(10))
def test_a_resumed_scale_goes_on_as_if_it_had_not_stopped(cut: int) -> None:
    steps = "..X.XX...X."
    whole, second = (DynamicScale(64.0, window=2, hysteresis=2) for _ in range(2))
    for index, step in enumerate(steps):
        if index == cut:
            second.load_state_dict(whole.state_dict())
        whole.update(overflow=step == "X")
        if index >= cut:
            second.update(overflow=step == "X")
    assert second.state_dict() == whole.state_dict()


def test_the_state_has_the_names_that_checkpoints_know() -> None:
    assert DynamicScale().state_dict() == {
        "cur_scale": 65536.0,
        "cur_iter": 0,
        "last_overflow_iter": -1,
        "cur_hysteresis": 2,
    }


def test_a_static_scale_never_changes() -> None:
    scale = StaticScale(128.0)
    scale.update(overflow=True)
    scale.load_state_dict({"cur_scale": 4.0})
    assert (scale.scale, scale.dynamic) == (128.0, False)


@pytest.mark.parametrize("options", [{"window": 0}, {"hysteresis": 0}, {"min_scale": 0.0}, {"initial_scale": -1.0}])
def test_a_setting_out_of_range_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        DynamicScale(**options)


def _config(**fp16: Any) -> SimpleNamespace:
    defaults = {
        "enabled": True,
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1.0,
    }
    return SimpleNamespace(
        fp16=SimpleNamespace(**{**defaults, **fp16}), lorica=SimpleNamespace(on_min_loss_scale="warn")
    )


def test_zero_in_the_configuration_means_a_dynamic_scale() -> None:
    scale = make_loss_scale(_config(initial_scale_power=4, loss_scale_window=7, hysteresis=3, min_loss_scale=2.0))
    assert isinstance(scale, DynamicScale)
    assert (scale.scale, scale.window, scale.hysteresis, scale.min_scale, scale.at_minimum) == (16, 7, 3, 2, "warn")


def test_a_number_in_the_configuration_means_a_static_scale() -> None:
    scale = make_loss_scale(_config(loss_scale=128.0))
    assert (scale.scale, scale.dynamic) == (128.0, False)


def test_without_fp16_the_scale_is_one() -> None:
    scale = make_loss_scale(_config(enabled=False, loss_scale=128.0))
    assert (scale.scale, scale.dynamic) == (1.0, False)
