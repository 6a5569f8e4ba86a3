"""The keys of offloading: forms of byte budgets, what maps to what, which keys mean nothing without which others."""

from __future__ import annotations

from typing import Any

import pytest

from lorica.config import Config, load
from lorica.config.offload import update_threads


def offloading(optimizer: dict[str, Any], **rest: Any) -> Config:
    """A configuration at stage 3 with this block offload_optimizer; `rest` are further top-level keys."""
    return load({"zero_optimization": {"stage": 3, "offload_optimizer": optimizer}, **rest})


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1000, 1000),
        (2.5e9, 2_500_000_000),
        ("7", 7),
        ("80GiB", 80 * 2**30),
        ("80 gib", 80 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("500MB", 500_000_000),
        ("64KiB", 65536),
        ("12B", 12),
        ("2e3 kB", 2_000_000),
        (None, None),
        ("auto", None),
    ],
)
def test_a_budget_is_a_number_of_bytes_or_a_string_with_a_unit(written: Any, expected: int | None) -> None:
    config = load({"lorica": {"offload": {"host_memory": written}}})
    assert config.lorica.offload.host_memory == expected


def test_every_tier_of_the_optimizer_is_accepted() -> None:
    for device in ("none", "cpu", "auto"):
        assert offloading({"device": device}).zero_optimization.offload_optimizer.device == device
    config = offloading({"device": "nvme", "nvme_path": "/scratch"})
    assert config.zero_optimization.offload_optimizer.nvme_path == "/scratch" and config.warnings == ()


def test_auto_of_a_device_is_the_planners_choice_and_no_open_question() -> None:
    config = load({"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}})
    assert config.zero_optimization.offload_param.device == "auto"
    assert config.warnings == () and not config.auto_keys


def test_threads_of_file_io_come_from_either_of_their_two_names() -> None:
    assert load({}).aio.num_threads == 8 and load({}).aio.request_bytes == 8 * 2**20
    assert load({"aio": {"thread_count": 3}}).aio.num_threads == 3
    assert load({"aio": {"thread_count": 1, "intra_op_parallelism": 4, "block_size": 4096}}).aio.num_threads == 4
    assert load({"aio": {"block_size": 4096}}).aio.request_bytes == 4096


@pytest.mark.parametrize(
    ("key", "value"),
    [("buffer_size", 100), ("fast_init", True), ("pipeline_read", True), ("pipeline_write", True)],
)
def test_what_the_nvme_tier_always_does_warns_when_it_is_asked_for(key: str, value: Any) -> None:
    (warning,) = offloading({"device": "nvme", "nvme_path": "/x", key: value}).warnings
    assert f"{key} = " in warning and "has no effect: " in warning


def test_super_offload_is_the_overlap_that_is_on_anyway() -> None:
    config = offloading({"device": "cpu", "super_offload": True})
    assert config.lorica.offload.overlap and config.warnings == ()


@pytest.mark.parametrize(
    ("offload", "optimizer", "expected"),
    [
        ({}, {}, 14),
        ({"threads": 5}, {"super_offload": True}, 5),
        ({}, {"super_offload": True}, 12),
        ({}, {"super_offload": True, "cpuadam_cores_perc": 0.01}, 1),
    ],
)
def test_update_threads_are_given_or_a_share_of_the_cores_or_all_but_two(
    offload: dict[str, Any], optimizer: dict[str, Any], expected: int
) -> None:
    config = offloading({"device": "cpu", **optimizer}, lorica={"offload": offload})
    assert update_threads(config.lorica.offload, config.zero_optimization.offload_optimizer, 16) == expected


def test_one_core_still_updates() -> None:
    config = load({})
    assert update_threads(config.lorica.offload, config.zero_optimization.offload_optimizer, 1) == 1


IDLE: list[tuple[dict[str, Any], str, bool]] = [
    ({}, "zero_optimization.offload_optimizer.ratio", True),
    ({"device": "cpu"}, "zero_optimization.offload_optimizer.ratio", False),
    ({"device": "cpu"}, "zero_optimization.offload_optimizer.nvme_path", True),
    ({"device": "auto"}, "zero_optimization.offload_optimizer.nvme_path", False),
    ({"device": "cpu"}, "aio.thread_count", True),
    ({"device": "nvme"}, "aio.thread_count", False),
    ({}, "lorica.offload.threads", True),
    ({"device": "cpu"}, "lorica.offload.threads", False),
    ({"device": "cpu"}, "lorica.offload.disk_space", True),
    ({"device": "nvme"}, "lorica.offload.disk_space", False),
]


@pytest.mark.parametrize(("optimizer", "key", "means_nothing"), IDLE)
def test_a_key_that_means_nothing_without_another_is_listed_as_ignored(
    optimizer: dict[str, Any], key: str, means_nothing: bool
) -> None:
    given = {"ratio": 0.5, "nvme_path": "/x", **optimizer}
    own = {"offload": {"threads": 2, "disk_space": "1GiB"}}
    config = offloading(given, aio={"thread_count": 2}, lorica=own)
    assert (key in config.provenance.ignored) == means_nothing
