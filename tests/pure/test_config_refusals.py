"""What is refused: unknown keys, wrong types and ranges, features that are not there yet, illegal combinations."""

from __future__ import annotations

from typing import Any

import pytest

from lorica.config import ConfigError, Problem, load
from lorica.config.keys import KeyInfo, Status
from lorica.config.names import Entry, all_entries, entries, names_of
from lorica.config.optimizer import OPTIMIZERS, SCHEDULERS, TorchAdamParams
from lorica.config.rules import RULES
from lorica.config.schema import Config
from lorica.config.suggest import distance, nearest


def problems_of(raw: dict[str, Any]) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(raw)
    return caught.value.problems


def only_problem(raw: dict[str, Any]) -> Problem:
    (problem,) = problems_of(raw)
    return problem


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A configuration with `value` at `path`."""
    for name in reversed(path):
        value = {name: value}
    raw: dict[str, Any] = value
    return raw


def misspelt(entry: Entry, typo: str) -> dict[str, Any]:
    """A configuration that has `typo` instead of a key."""
    raw = nested((*entry.path[:-1], typo), None)
    if entry.path[1:-1] == ("params",):  # which names are known there depends on the type beside them
        raw[entry.path[0]]["type"] = TYPE_OF[entry.owner]
        raw[entry.path[0]]["params"] |= {"torch_adam": True} if entry.owner is TorchAdamParams else {}
    return raw


TYPE_OF = (
    {kind.params: name for name, kind in OPTIMIZERS.items()}
    | {params: name for name, params in SCHEDULERS.items()}
    | {TorchAdamParams: "adam"}
)


def single_edits(name: str) -> set[str]:
    """Every deletion, every swap of neighbours, every doubled letter, and one wrong letter at every place."""
    places = range(len(name))
    edits = {name[:i] + name[i + 1 :] for i in places}
    edits |= {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in places[:-1]}
    edits |= {name[: i + 1] + name[i] + name[i + 1 :] for i in places}
    edits |= {name[:i] + ("q" if name[i] != "q" else "w") + name[i + 1 :] for i in places}
    return edits - {name, ""}


def every_name() -> list[tuple[Entry, str]]:
    return [
        (entry, name)
        for entry in all_entries()
        for name in (entry.path[-1], *entry.info.aliases, *entry.info.deprecated)
    ]


def test_single_edit_typos_of_every_key_get_the_right_suggestion_in_98_of_100_cases() -> None:
    right, wrong = 0, []
    for entry, name in every_name():
        typos = sorted(single_edits(name) - set(names_of(entry.owner)))
        for typo in typos[:: max(1, len(typos) // 3)]:
            dotted = ".".join((*entry.path[:-1], typo))
            found = [problem for problem in problems_of(misspelt(entry, typo)) if problem.key == dotted]
            if found and f'"{name}"' in found[0].fix:
                right += 1
            else:
                wrong.append((typo, name, found[0].fix if found else None))
    assert right + len(wrong) > 1000
    assert len(wrong) <= 0.02 * (right + len(wrong)), wrong


@pytest.mark.parametrize(
    ("raw", "key", "fix"),
    [
        ({"stage": 2}, "stage", "move it to zero_optimization.stage"),
        ({"zero_optimization": {"train_batch_size": 8}}, "zero_optimization.train_batch_size", "to train_batch_size"),
        ({"lr": 1e-3}, "lr", "move it to optimizer.params.lr"),
        ({"grad_accum_dtype": "fp32"}, "grad_accum_dtype", "move it to data_types.grad_accum_dtype"),
        ({"optimizer": {"type": "Adam", "lr": 1}}, "optimizer.lr", "move it to optimizer.params.lr"),
        ({"on_nonfinite": "skip"}, "on_nonfinite", "move it to lorica.on_nonfinite"),
        ({"gradient_accumulation": 4}, "gradient_accumulation", '"gradient_accumulation_steps"'),
        ({"Train-Batch-Size": 4}, "Train-Batch-Size", '"train_batch_size"'),
        ({"zero_optimization": {"bucket_size": 4}}, "zero_optimization.bucket_size", "remove it"),
        ({"fp16": {"zzz": 1}}, "fp16.zzz", "fp16 knows enabled, loss_scale"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 2}}}, "optimizer.params.max_grad_norm",
         "set gradient_clipping to 2"),
    ],
)  # fmt: skip
def test_a_key_in_the_wrong_place_or_with_a_wrong_name_is_told_where_it_belongs(raw: Any, key: str, fix: str) -> None:
    problem = only_problem(raw)
    assert problem.key == key and fix in problem.fix


@pytest.mark.parametrize(
    ("left", "right", "edits"),
    [("stage", "stage", 0), ("stge", "stage", 1), ("satge", "stage", 1), ("sttage", "stage", 1), ("", "ab", 2),
     ("ca", "abc", 3), ("kitten", "sitting", 3)],
)  # fmt: skip
def test_the_distance_of_two_names_is_the_number_of_edits(left: str, right: str, edits: int) -> None:
    assert distance(left, right, 9) == distance(right, left, 9) == edits
    assert distance(left, right, edits) == edits
    assert edits == 0 or distance(left, right, edits - 1) == edits


def test_nothing_is_suggested_for_a_name_that_resembles_none() -> None:
    assert nearest("banana", ["stage", "reduce_scatter"]) is None
    assert nearest("scatter", ["stage", "reduce_scatter"]) == "reduce_scatter"


def test_two_names_of_one_key_are_refused() -> None:
    for first, second in (("stage3_max_live_parameters", "max_live_parameters"),):
        problem = only_problem({"zero_optimization": {first: 1, second: 2}})
        assert problem.key == f"zero_optimization.{second}" and first in problem.message
    assert "bf16" in only_problem({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}).message


@pytest.mark.parametrize(("old", "new"), [("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")])
def test_an_old_place_and_todays_place_together_are_refused(old: str, new: str) -> None:
    problem = only_problem({"zero_optimization": {"stage": 3, old: True, new: {"device": "cpu"}}})
    assert problem.key == f"zero_optimization.{old}" and f"zero_optimization.{new}" in problem.message


def test_a_block_that_is_no_object_shows_how_to_write_it() -> None:
    assert only_problem({"bf16": True}).fix == 'write {"enabled": true}'
    assert only_problem({"zero_optimization": {"offload_optimizer": "cpu"}}).fix == 'write {"device": "cpu"}'
    assert only_problem({"optimizer": "AdamW"}).fix == 'write {"type": "AdamW"}'
    assert "object" in only_problem({"zero_optimization": 2}).message
    assert "object" in only_problem({"optimizer": {"type": "Adam", "params": [1]}}).message


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"zero_optimization": {"stage": 4}}, "expected one of 0, 1, 2, 3, got 4"),
        ({"zero_optimization": {"stage": True}}, "expected one of 0, 1, 2, 3, got a boolean"),
        ({"train_batch_size": 0}, "expected an integer >= 1, got 0"),
        ({"train_batch_size": "many"}, "expected an integer >= 1, got a string"),
        ({"train_batch_size": float("inf")}, "expected an integer >= 1, got Infinity"),
        ({"gradient_clipping": float("nan")}, "expected a number >= 0, got NaN"),
        ({"gradient_clipping": True}, "expected a number >= 0, got a boolean"),
        ({"steps_per_print": -1}, "expected an integer >= 1, or 0 or Infinity for never, got -1"),
        ({"bf16": {"enabled": 2}}, "expected true or false, got 2"),
        ({"communication_data_type": "int8"}, 'expected one of "fp32", "fp16", "bf16", got a string'),
        ({"communication_data_type": 16}, 'expected one of "fp32", "fp16", "bf16", got 16'),
        ({"tensorboard": {"output_path": 3}}, "expected a string, got 3"),
        ({"lorica": {"units": {"classes": {"a": 1}}}}, "expected a list of strings, got an object"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, "expected a list of 2 numbers >= 0 and < 1"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.5]}}}, "got [0.9, 1.5]"),
        ({"optimizer": {"type": "Adam", "params": {"lr": -1}}}, "expected a number >= 0, got -1"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0, -1]}}}, "one per parameter group"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, "expected an integer >= 1, got 0"),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {}}}, "is required: expected an integer >= 1"),
        ({"optimizer": {"params": {"lr": 1}}}, "is required: expected a string"),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_is_expected_and_what_is_there(raw: Any, expected: str) -> None:
    assert expected in only_problem(raw).message


def test_a_misspelt_choice_gets_the_nearest_one() -> None:
    raw = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpuu"}}}
    assert only_problem(raw).fix == 'write "cpu"'
    assert only_problem({"optimizer": {"type": "AdmW"}}).fix == 'write "AdamW"'
    assert only_problem({"scheduler": {"type": "warmuplr"}}).fix == 'write "WarmupLR"'


def test_all_problems_are_reported_at_once_and_the_first_line_names_a_key() -> None:
    raw = {
        "gradient_clipping": -1,
        "zero_optimization": {"stage": 9, "reduce_bucket_sze": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": "x", "eps": -1, "lrr": 2}},
        "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": -1, "cycle_step": 3}},
        "flops_profiler": {"enabled": True},
    }
    with pytest.raises(ConfigError) as caught:
        load(raw)
    assert [problem.key for problem in caught.value.problems] == [
        "gradient_clipping",
        "zero_optimization.stage",
        "zero_optimization.reduce_bucket_sze",
        "optimizer.params.lr",
        "optimizer.params.eps",
        "optimizer.params.lrr",
        "scheduler.params.cycle_max_lr",
        "scheduler.params.cycle_min_lr",
        "scheduler.params.cycle_step",
        "flops_profiler.enabled",
    ]
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("gradient_clipping = -1: ")
    assert lines[-1] == "(10 problems in this configuration)"


NOT_YET: dict[str, Any] = {
    "fp16.fp16_master_weights_and_grads": True,
    "bf16.bf16_master_weights_and_grads": True,
    "bf16.bf16_optimizer_states": True,
    "amp.enabled": True,
    "torch_autocast.enabled": True,
    "zero_optimization.legacy_stage1": True,
    "zero_optimization.zero_hpz_partition_size": 8,
    "zero_optimization.zero_quantized_weights": True,
    "zero_optimization.zero_quantized_nontrainable_weights": True,
    "zero_optimization.zero_quantized_gradients": True,
    "zero_optimization.zeropp_loco_param": {"err_beta": 0.8},
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "comet.enabled": True,
    "flops_profiler.enabled": True,
    "comms_logger.enabled": True,
    "autotuning.enabled": True,
    "checkpoint.writer": {"type": "FAST"},
    "datastates_ckpt": {"host_cache_size": 16},
    "nebula.enabled": True,
    "pipeline.stages": 4,
    "pipeline.partition": "uniform",
    "pipeline.seed_layers": True,
    "pipeline.activation_checkpoint_interval": 1,
    "tensor_parallel.autotp_size": 4,
    "tensor_parallel.tp.tp_size": 2,
    "expert_parallel.enabled": True,
    "sequence_parallel_size": 2,
    "compile.deepcompile": True,
    "hybrid_engine.enabled": True,
    "elasticity.enabled": True,
    "curriculum_learning.enabled": True,
    "data_efficiency.enabled": True,
    "progressive_layer_drop.enabled": True,
    "eigenvalue.enabled": True,
    "quantize_training.enabled": True,
    "compression_training": {"sparse_pruning": {"shared_parameters": {"enabled": True}}},
    "weight_quantization": {"weight_quantization": {"num_bits": 8}},
    "sparse_attention": {"mode": "fixed"},
    "sparse_gradients": True,
    "graph_harvesting": True,
    "use_data_before_expert_parallelism": True,
}


def not_yet_entries() -> dict[str, KeyInfo]:
    return {
        ".".join(entry.path): entry.info
        for entry in entries(Config)
        if entry.info.status is Status.NOT_YET and not entry.info.part_of
    }


def test_every_key_that_is_not_there_yet_is_in_the_list_above() -> None:
    assert set(not_yet_entries()) == set(NOT_YET)


@pytest.mark.parametrize("dotted", NOT_YET)
def test_a_feature_that_is_not_there_yet_is_refused_by_name_with_what_works_instead(dotted: str) -> None:
    problem = only_problem(nested(tuple(dotted.split(".")), NOT_YET[dotted]))
    assert problem.key == dotted
    assert problem.message == "is not supported yet"
    assert problem.fix == not_yet_entries()[dotted].note


def test_every_feature_that_is_not_there_yet_is_accepted_when_switched_off() -> None:
    for entry in entries(Config):
        if ".".join(entry.path) in NOT_YET:
            off = entry.declared.get_default()
            assert load(nested(entry.path, off)).warnings == () or off is None
    for dotted, off in {
        "zero_optimization.zenflow": {},
        "pipeline.stages": 1,
        "tensor_parallel.autotp_size": 1,
    }.items():
        load(nested(tuple(dotted.split(".")), off))


def test_parameters_in_files_are_refused_with_the_cpu_tier_as_the_way_out() -> None:
    problem = only_problem({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}})
    assert problem.key == "zero_optimization.offload_param.device" and '"cpu"' in problem.fix


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8", "int8_block"])
def test_every_format_of_moments_is_taken_and_no_other(moments: str) -> None:
    assert load({"lorica": {"offload": {"moments": moments}}}).lorica.offload.moments == moments
    problem = only_problem({"lorica": {"offload": {"moments": f"{moments}x"}}})
    assert problem.key == "lorica.offload.moments"


def test_zenflow_is_refused_because_it_is_another_training() -> None:
    problem = only_problem({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}})
    assert "stale gradients" in problem.fix and "lorica.offload.overlap" in problem.fix


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_ratio_is_a_fraction(ratio: float) -> None:
    raw = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": ratio}}}
    assert f"expected a number >= 0 and <= 1, got {ratio}" in only_problem(raw).message


@pytest.mark.parametrize("written", ["80 gigabytes", "GiB", "1.2.3GB", "-5GiB", -5, "", [1], True])
def test_a_budget_that_is_no_number_of_bytes_is_refused(written: Any) -> None:
    problem = only_problem({"lorica": {"offload": {"device_memory": written}}})
    assert problem.key == "lorica.offload.device_memory" and '"80GiB"' in problem.message


@pytest.mark.parametrize(
    "raw",
    [
        {"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 4}}},
        {"optimizer": {"type": "muadamw"}},
        {"optimizer": {"type": "LBFGS"}},
        {"optimizer": {"type": "torch.optim.Muon"}},
        {"scheduler": {"type": "LambdaLR"}},
        {"scheduler": {"type": "torch.optim.lr_scheduler.ReduceLROnPlateau"}},
    ],
)
def test_types_that_cannot_be_had_are_refused_with_what_to_use_instead(raw: Any) -> None:
    problem = only_problem(raw)
    assert problem.key.endswith(".type") and problem.fix


ILLEGAL: list[tuple[dict[str, Any], str]] = [
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled"),
    ({"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype"),
    ({"lorica": {"offload": {"master": "stochastic"}}}, "lorica.offload.master"),
    (
        {"bf16": {"enabled": True}, "lorica": {"split_master": True, "offload": {"master": "stochastic"}}},
        "lorica.offload.master",
    ),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param.device"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer.device"),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.nvme_path",
    ),
    (
        {
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            "lorica": {"offload": {"overlap": False}},
        },
        "zero_optimization.offload_optimizer.super_offload",
    ),
    ({"lorica": {"offload": {"device_memory": 9, "device_reserve": 1}}}, "lorica.offload.device_reserve"),
    ({"lorica": {"offload": {"host_memory": 9, "host_reserve": 1}}}, "lorica.offload.host_reserve"),
    ({"zero_optimization": {"stage": 2, "mics_shard_size": 2}}, "zero_optimization.mics_shard_size"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 0}}, "zero_optimization.mics_shard_size"),
    ({"zero_optimization": {"stage": 2}, "prescale_gradients": True}, "prescale_gradients"),
    ({"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2}, "gradient_predivide_factor"),
    ({"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
    ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "fp16.loss_scale_window"),
    ({"fp16": {"enabled": True, "min_loss_scale": 0}}, "fp16.min_loss_scale"),
    ({"optimizer": {"type": "SGD", "params": {"nesterov": True}}}, "optimizer.params.nesterov"),
    ({"lorica": {"units": {"min_numel": 5, "max_numel": 4}}}, "lorica.units.min_numel"),
]


@pytest.mark.parametrize(("raw", "key"), ILLEGAL)
def test_an_illegal_combination_is_refused_with_a_legal_one_nearby(raw: dict[str, Any], key: str) -> None:
    problem = only_problem(raw)
    assert problem.key == key and problem.fix


def test_every_rule_has_an_example_above() -> None:
    broken = {(problem.key, problem.message) for raw, _ in ILLEGAL for problem in problems_of(raw)}
    assert {(rule.keys[0], rule.message) for rule in RULES} == broken


@pytest.mark.parametrize(
    "raw",
    [
        {"zero_optimization": {"stage": 1}, "prescale_gradients": True},
        {"zero_optimization": {"stage": 2, "reduce_scatter": False}, "prescale_gradients": True},
        {"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2},
        {"zero_optimization": {"stage": 2}, "gradient_allreduce_op": "sum"},
        {"fp16": {"enabled": True, "loss_scale": 128, "loss_scale_window": 0, "min_loss_scale": 0}},
        {"fp16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}},
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}},
    ],
)
def test_a_combination_next_to_an_illegal_one_is_accepted(raw: dict[str, Any]) -> None:
    load(raw)


def test_a_combination_is_not_judged_while_one_of_its_keys_is_misspelt() -> None:
    raw = {"zero_optimization": {"stge": 3, "offload_param": {"device": "cpu"}}}
    assert [problem.key for problem in problems_of(raw)] == ["zero_optimization.stge"]
