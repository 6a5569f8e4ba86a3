"""The schedules against tables computed by hand; the wanted value of iteration k is what update k + 1 runs with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.schedules import VALID_LR_SCHEDULES, schedule_from_config


class Groups:
    """The least that a schedule asks of an optimizer."""

    def __init__(self, *groups: dict[str, Any]) -> None:
        self.param_groups = list(groups)


# type, params, {iteration: lr}; the optimizer's own lr is 1.0; -1 is before the first update
TABLE = [
    ("WarmupLR", {"warmup_num_steps": 10}, {-1: 0, 0: 0, 1: 0.301030, 2: 0.477121, 4: 0.698970, 9: 1, 10: 1, 99: 1}),
    (
        "WarmupLR",
        {"warmup_num_steps": 4, "warmup_type": "linear", "warmup_min_lr": 0.2, "warmup_max_lr": 0.6},
        {-1: 0.2, 0: 0.2, 1: 0.3, 2: 0.4, 3: 0.5, 4: 0.6, 5: 0.6},
    ),
    ("WarmupLR", {"warmup_num_steps": 1}, {-1: 0, 0: 0, 1: 1, 2: 1}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_type": "linear"}, {-1: 0, 0: 0, 1: 0.5, 2: 1}),
    (
        "WarmupDecayLR",
        {"total_num_steps": 12, "warmup_num_steps": 4, "warmup_type": "linear", "warmup_max_lr": 2.0},
        {-1: 0, 0: 0, 1: 0.5, 3: 1.5, 4: 2, 8: 1, 11: 0.25, 12: 0, 20: 0},
    ),
    ("WarmupDecayLR", {"total_num_steps": 12, "warmup_num_steps": 4}, {1: 0.0005, 2: 0.000792481, 4: 0.001, 8: 0.0005}),
    (
        "WarmupCosineLR",
        {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_type": "linear", "cos_min_ratio": 0.1},
        {-1: 0, 0: 0, 1: 0.5, 2: 0.868198, 3: 0.55, 4: 0.231802, 5: 0.1, 9: 0.1},
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_min_ratio": 0.2, "warmup_type": "linear"},
        {-1: 0, 0: 0.2, 1: 0.6, 5: 0.0001},
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 0.5,
            "cycle_first_step_size": 4,
            "cycle_second_step_size": 2,
            "decay_step_size": 2,
            "decay_lr_rate": 1.0,
        },
        {-1: 0.1, 0: 0.2, 1: 0.3, 2: 0.4, 3: 0.5, 4: 0.3, 5: 0.1, 6: 0.0666667, 7: 0.05, 9: 0.0333333},
    ),
    (
        "OneCycle",
        {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4, "cycle_first_stair_count": 2},
        {-1: 0.1, 0: 0.1, 1: 0.3, 2: 0.3, 3: 0.5, 4: 0.3, 5: 0.3, 6: 0.1, 7: 0.1, 8: 0.1},
    ),
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 1.0},
        {-1: 0.01, 0: 0.015, 1: 0.02, 2: 0.025, 5: 0.04},
    ),
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 2, "lr_range_test_staircase": True},
        {-1: 0.01, 0: 0.01, 1: 0.02, 2: 0.02, 3: 0.03},
    ),
]


@pytest.mark.parametrize(("kind", "params", "wanted"), TABLE)
def test_the_schedule_gives_the_numbers_of_the_table(
    kind: str, params: dict[str, Any], wanted: dict[int, float]
) -> None:
    optimizer = Groups({"lr": 1.0, "betas": (0.9, 0.999)})
    schedule = schedule_from_config(kind, params, optimizer)
    got = {}
    for iteration in range(-1, max(wanted) + 1):
        got[iteration] = optimizer.param_groups[0]["lr"]
        assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        schedule.step()
    assert {k: got[k] for k in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-12)


def test_one_cycle_moves_the_momentum_against_the_learning_rate() -> None:
    optimizer = Groups({"lr": 1.0, "betas": (0.9, 0.999)}, {"lr": 1.0, "momentum": 0.95})
    params = {
        "cycle_min_lr": 0.1,
        "cycle_max_lr": 0.5,
        "cycle_first_step_size": 4,
        "cycle_second_step_size": 2,
        "decay_step_size": 2,
        "decay_mom_rate": 0.1,
    }
    schedule = schedule_from_config("OneCycle", params, optimizer)
    momenta = []
    for _ in range(8):
        momenta.append(optimizer.param_groups[0]["betas"][0])
        schedule.step()
    assert momenta == pytest.approx([0.8, 0.875, 0.85, 0.825, 0.8, 0.85, 0.9, 0.945])
    assert optimizer.param_groups[0]["betas"][1] == 0.99
    assert "betas" not in optimizer.param_groups[1]


def test_one_cycle_warns_where_there_is_no_momentum_to_cycle() -> None:
    with pytest.warns(UserWarning, match="cycle_momentum has no effect"):
        schedule_from_config("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5}, Groups({"lr": 1.0}))


def test_each_param_group_has_its_own_bounds() -> None:
    optimizer = Groups({"lr": 1.0}, {"lr": 2.0})
    params = {"warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [1.0, 0.3], "warmup_num_steps": 2, "warmup_type": "linear"}
    schedule = schedule_from_config("WarmupLR", params, optimizer)
    schedule.step(1)
    assert schedule.get_last_lr() == pytest.approx([0.5, 0.2])


def test_the_cosine_scales_each_groups_own_learning_rate() -> None:
    optimizer = Groups({"lr": 1.0}, {"lr": 2.0})
    schedule = schedule_from_config("WarmupCosineLR", {"total_num_steps": 4, "warmup_num_steps": 2}, optimizer)
    schedule.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1.0, 2.0])


@given(
    row=st.sampled_from(TABLE),
    num_before=st.integers(0, 12),
    num_after=st.integers(0, 12),
)
def test_a_resumed_schedule_goes_on_as_if_it_had_not_stopped(row: Any, num_before: int, num_after: int) -> None:
    kind, params, _ = row
    groups = [Groups({"lr": 1.0, "betas": (0.9, 0.999)}) for _ in range(2)]
    first, second = (schedule_from_config(kind, params, optimizer) for optimizer in groups)
    for _ in range(num_before):
        first.step()
    assert first.state_dict() == {"last_batch_iteration": num_before - 1}
    second.load_state_dict(first.state_dict())
    assert groups[0].param_groups == groups[1].param_groups
    for _ in range(num_after):
        first.step()
        second.step()
    assert groups[0].param_groups == groups[1].param_groups


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "auto"])
def test_the_number_of_warmup_steps_must_be_a_positive_int(value: Any) -> None:
    with pytest.raises(ValueError, match="warmup_num_steps must be an int > 0"):
        schedule_from_config("WarmupLR", {"warmup_num_steps": value}, Groups({"lr": 1.0}))


def test_an_unknown_warmup_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="warmup_type must be one of"):
        schedule_from_config("WarmupLR", {"warmup_type": "cubic"}, Groups({"lr": 1.0}))


def test_a_warmup_longer_than_the_training_warns() -> None:
    with pytest.warns(UserWarning, match="never reached"):
        schedule_from_config("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 9}, Groups({"lr": 1.0}))


def test_a_list_of_the_wrong_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="a list of 1"):
        schedule_from_config("WarmupLR", {"warmup_min_lr": [0.0, 0.1]}, Groups({"lr": 1.0}))


def test_an_unknown_type_names_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match="Did you mean 'WarmupDecayLR'"):
        schedule_from_config("WarmupDecay", {}, Groups({"lr": 1.0}))


def test_missing_and_unknown_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"missing: \['total_num_steps'\], unknown: \['total_steps'\]"):
        schedule_from_config("WarmupDecayLR", {"total_steps": 10}, Groups({"lr": 1.0}))


@pytest.mark.parametrize("prefix", ["", "torch.optim.lr_scheduler."])
def test_torch_schedules_are_found_by_name(prefix: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = schedule_from_config(prefix + "StepLR", {"step_size": 1, "gamma": 0.5}, optimizer)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.5]


def test_a_schedule_that_needs_a_metric_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="needs a metric"):
        schedule_from_config("ReduceLROnPlateau", {}, Groups({"lr": 1.0}))


def test_the_list_of_valid_schedules_is_complete() -> None:
    assert set(VALID_LR_SCHEDULES) == {"LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"}
