"""How values are read: types, the forms found in the wild, "auto", defaults."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

from lorica.config import MISSING, Config, ConfigError, Problem, load


def warnings_of(raw: dict[str, Any]) -> tuple[str, ...]:
    return load(raw).warnings


def test_defaults_are_deepspeeds() -> None:
    config = load({})
    zero = config.zero_optimization
    assert config.gradient_clipping == 1.0
    assert config.steps_per_print is None
    assert (zero.stage, zero.reduce_bucket_size, zero.allgather_bucket_size) == (0, 500_000_000, 500_000_000)
    assert (zero.stage3_prefetch_bucket_size, zero.sub_group_size) == (50_000_000, 1_000_000_000)
    assert zero.stage3_param_persistence_threshold == 100_000
    assert (zero.offload_optimizer.device, zero.offload_param.device) == ("none", "none")
    assert zero.offload_optimizer.pin_memory and zero.offload_param.pin_memory
    assert config.bf16.check_grad_overflow
    assert config.zero_force_ds_cpu_optimizer and not config.zero_allow_untested_optimizer
    assert (config.optimizer, config.scheduler) == (None, None)
    assert config.warnings == ()


def test_what_is_whole_at_one_time_is_bounded_by_prefetch_unless_the_keys_say_more() -> None:
    zero = load({"zero_optimization": {"stage": 3}}).zero_optimization
    assert (zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance) == (None, None)
    zero = load({"zero_optimization": {"stage": 3, "max_live_parameters": 1e9}}).zero_optimization
    assert zero.stage3_max_live_parameters == 1_000_000_000


@pytest.mark.parametrize(("stage", "overlap"), [(0, False), (1, False), (2, False), (3, True)])
def test_communication_overlaps_by_default_at_stage_3_only(stage: int, overlap: bool) -> None:
    assert load({"zero_optimization": {"stage": stage}}).zero_optimization.overlap_comm is overlap
    explicit = {"zero_optimization": {"stage": stage, "overlap_comm": not overlap}}
    assert load(explicit).zero_optimization.overlap_comm is not overlap


def test_whole_floats_are_read_as_integers_without_a_word() -> None:
    config = load(
        {
            "train_batch_size": 8.0,
            "zero_optimization": {"reduce_bucket_size": 5e8, "stage3_model_persistence_threshold": 1e12},
        }
    )
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert isinstance(config.zero_optimization.stage3_model_persistence_threshold, int)
    assert config.warnings == ()


def test_a_fraction_of_an_element_is_rounded_with_a_warning() -> None:
    config = load({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 15099494.4}})
    assert config.zero_optimization.stage3_prefetch_bucket_size == 15_099_494
    assert "rounded: 15099494" in config.warnings[0]


def test_a_fraction_of_a_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected an integer >= 1, got 8\.5\. Fix: write 8 or 9"):
        load({"train_batch_size": 8.5})


@pytest.mark.parametrize("never", [float("inf"), 0, None, "inf"])
def test_infinity_and_0_mean_no_progress_line(never: Any) -> None:
    assert load({"steps_per_print": never}).steps_per_print is None


@pytest.mark.parametrize(
    ("raw", "dotted", "value"),
    [
        ({"gradient_clipping": "1.0"}, "gradient_clipping", 1.0),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size", 500_000_000),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage", 2),
        ({"bf16": {"enabled": 1}}, "bf16.enabled", True),
        ({"bf16": {"enabled": "False"}}, "bf16.enabled", False),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}}, "optimizer.params.lr", 1e-4),
        ({"lorica": {"units": {"classes": "Block"}}}, "lorica.units.classes", ("Block",)),
    ],
)
def test_values_of_a_neighbouring_type_are_read_with_a_warning(raw: Any, dotted: str, value: Any) -> None:
    config = load(raw)
    found: Any = config
    for name in dotted.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value and type(found) is type(value)
    assert len(config.warnings) == 1 and config.warnings[0].startswith(f"{dotted} = ")


@pytest.mark.parametrize(
    ("written", "read"),
    [("fp32", "fp32"), ("float", "fp32"), ("bfloat16", "bf16"), ("torch.bfloat16", "bf16"), ("HALF", "fp16")],
)
def test_a_dtype_may_be_written_in_any_usual_way(written: str, read: str) -> None:
    assert load({"communication_data_type": written}).communication_data_type == read


def test_choices_may_be_written_in_any_case() -> None:
    config = load({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "CPU"}}})
    assert config.zero_optimization.offload_optimizer.device == "cpu"
    assert load({"checkpoint": {"tag_validation": "FAIL"}}).checkpoint.tag_validation == "Fail"


def test_a_path_object_is_read_as_a_string() -> None:
    assert load({"tensorboard": {"output_path": Path("runs")}}).tensorboard.output_path == "runs"


def test_null_is_the_same_as_not_given() -> None:
    config = load({"optimizer": None, "fp16": None, "gradient_clipping": None, "communication_data_type": None})
    assert (config.optimizer, config.fp16.enabled, config.gradient_clipping) == (None, False, 1.0)
    assert [warning.split(" = ")[0] for warning in config.warnings] == ["gradient_clipping"]


def test_fp16_keys_in_the_bf16_block_are_accepted_with_a_warning() -> None:
    config = load({"bf16": {"enabled": True, "loss_scale": 0, "hysteresis": 2}})
    assert config.bf16.enabled
    assert len(config.warnings) == 2 and all("no loss scale" in warning for warning in config.warnings)


def test_old_names_are_read_as_todays_with_a_warning() -> None:
    raw = {
        "bfloat16": {"enabled": True},
        "allgather_size": 7,
        "zero_optimization": {
            "stage": 3,
            "cpu_offload": True,
            "cpu_offload_param": True,
            "cpu_offload_use_pin_memory": True,
            "stage3_gather_fp16_weights_on_model_save": True,
            "grad_hooks": True,
            "aio": {"queue_depth": 8},
        },
    }
    config = load(raw)
    zero = config.zero_optimization
    assert config.bf16.enabled and zero.stage3_gather_16bit_weights_on_model_save
    assert (zero.offload_optimizer.device, zero.offload_param.device) == ("cpu", "cpu")
    assert (zero.allgather_bucket_size, config.aio.queue_depth) == (7, 8)
    assert len(config.warnings) == 9  # eight old names, and a key that has no effect
    assert load({"zero_optimization": True}).zero_optimization.stage == 1
    assert load({"zero_optimization": False}).zero_optimization.stage == 0
    assert load({"zero_optimization": {"cpu_offload": False}}).zero_optimization.offload_optimizer.device == "none"


def test_short_names_of_stage_3_keys_are_read_without_a_word() -> None:
    config = load({"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1, "param_persistence_threshold": 2}})
    zero = config.zero_optimization
    assert (zero.stage3_prefetch_bucket_size, zero.stage3_param_persistence_threshold) == (1, 2)
    assert config.warnings == ()


def test_names_that_other_programs_leave_behind_are_accepted_with_a_warning() -> None:
    assert len(warnings_of({"low_cpu_mem_usage": True, "cuda_visible_devices": "0", "msamp": {"enabled": True}})) == 3


def test_comment_keys_are_not_read() -> None:
    assert warnings_of({"_comment": "x", "//": "y", "$schema": "z", "fp16": {"_comment_2": 1}}) == ()


def test_a_key_without_effect_warns_only_when_it_asks_for_something() -> None:
    quiet = {"zero_optimization": {"contiguous_gradients": True}, "aio": {"block_size": 1048576, "thread_count": 1}}
    assert warnings_of(quiet) == ()
    assert set(load(quiet).provenance.ignored) >= {"zero_optimization.contiguous_gradients", "aio.block_size"}
    loud = {"zero_optimization": {"contiguous_gradients": False}, "aio": {"block_size": 4096, "queue_depth": 9}}
    assert [warning.split(" = ")[0] for warning in warnings_of(loud)] == [
        "zero_optimization.contiguous_gradients",
        "aio.queue_depth",
    ]


def test_auto_leaves_are_recorded_and_left_to_the_engine() -> None:
    config = load(
        {
            "train_micro_batch_size_per_gpu": "auto",
            "bf16": {"enabled": "auto"},
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6, "betas": "auto"}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto"}},
            "lorica": {"transport": "auto"},
        }
    )
    zero = config.zero_optimization
    assert (config.train_micro_batch_size_per_gpu, zero.reduce_bucket_size) == (None, None)
    assert (config.gradient_clipping, config.bf16.enabled, zero.overlap_comm) == (1.0, False, True)
    assert config.optimizer is not None and config.optimizer.params == {"lr": None, "eps": 1e-6, "betas": None}
    assert config.optimizer.explicit_params == {"eps": 1e-6}
    assert "lorica.transport" not in config.auto_keys and config.lorica.transport == "auto"
    assert {"optimizer.params.lr", "bf16.enabled", "zero_optimization.reduce_bucket_size"} <= config.auto_keys
    assert len(config.auto_keys) == 9
    assert [problem.key for problem in config.unresolved()] == [
        "optimizer.params.lr",
        "scheduler.params.total_num_steps",
        "scheduler.params.warmup_max_lr",
    ]


def test_a_value_that_replaces_auto_is_no_longer_auto() -> None:
    config = load({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "gradient_clipping": "auto"})
    filled = config.replace({"optimizer.params.lr": 0.1, "gradient_clipping": 2.0})
    assert filled.optimizer is not None and filled.optimizer.params == {"lr": 0.1}
    assert (filled.gradient_clipping, filled.auto_keys, filled.unresolved()) == (2.0, frozenset(), [])
    assert config.optimizer is not None and config.optimizer.params == {"lr": None}
    with pytest.raises(KeyError, match="no such key"):
        config.replace({"zero_optimization.stge": 1})


def test_warmup_lr_rises_to_the_optimizers_rate_so_auto_needs_no_answer() -> None:
    raw = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 5}}}
    assert load(raw).unresolved() == []


def test_the_compute_type_follows_from_the_precision_blocks() -> None:
    assert load({}).compute_dtype == "fp32"
    assert load({"bf16": {"enabled": True}}).compute_dtype == "bf16"
    assert load({"fp16": {"enabled": True}}).compute_dtype == "fp16"


def test_a_config_is_frozen_and_survives_pickling_and_copying() -> None:
    config = load({"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}}})
    with pytest.raises(ValueError, match="frozen"):
        config.train_batch_size = 4
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert isinstance(twin, Config) and twin == config and twin.raw == config.raw


def test_an_error_survives_pickling() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"scheduler": {"type": "OneCycle"}})
    twin = pickle.loads(pickle.dumps(caught.value))
    assert str(twin) == str(caught.value)
    assert "(not given)" in str(twin)


def test_a_problem_shows_long_values_cut_and_missing_ones_as_such() -> None:
    assert str(Problem("a", "z" * 99, "is long", "cut it")).count("z") == 56
    assert str(Problem("a", MISSING, "is required", "add a")) == "a = (not given): is required. Fix: add a."


@pytest.mark.parametrize(
    ("type_name", "name"), [("AdamW", "adamw"), ("LION", "lion"), ("torch.optim.SGD", "SGD"), ("RMSprop", "RMSprop")]
)
def test_an_optimizer_has_a_plain_name(type_name: str, name: str) -> None:
    config = load({"optimizer": {"type": type_name}})
    assert config.optimizer is not None and config.optimizer.name == name


def test_keyword_arguments_without_effect_are_not_passed_on() -> None:
    raw = {"optimizer": {"type": "Adam", "params": {"lr": 1, "set_grad_none": False, "amsgrad": False}}}
    config = load(raw)
    assert config.optimizer is not None and config.optimizer.params == {"lr": 1.0}
    assert [warning.split(" = ")[0] for warning in config.warnings] == ["optimizer.params.set_grad_none"]


def test_torch_classes_take_any_keyword_argument() -> None:
    raw = {"optimizer": {"type": "RMSprop", "params": {"lr": 0.1, "alpha": 0.9, "eps": "auto"}}}
    config = load(raw)
    assert config.optimizer is not None and config.optimizer.params == {"lr": 0.1, "alpha": 0.9, "eps": None}
    assert config.auto_keys == {"optimizer.params.eps"}
