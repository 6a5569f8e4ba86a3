"""What no single key can know: combinations that are refused, each with its reason and the nearest legal setting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from lorica.config.batch import Batch, contradiction
from lorica.config.errors import Problem
from lorica.config.offload import OffloadOptimizer
from lorica.config.schema import Config

_STAGE = "zero_optimization.stage"


class Rule(NamedTuple):
    """One illegal combination: its keys (reported at the first), when it holds, why it is refused, what to do."""

    keys: tuple[str, ...]
    holds: Callable[[Config], bool]
    message: str
    fix: str


def _optimizer(config: Config) -> OffloadOptimizer:
    return config.zero_optimization.offload_optimizer


def _reduce_scatters(config: Config) -> bool:
    zero = config.zero_optimization
    return zero.stage >= 2 and zero.reduce_scatter


def _scales_dynamically(config: Config) -> bool:
    return config.fp16.enabled and config.fp16.loss_scale == 0


def _other_than_compute(config: Config) -> bool:
    wanted = config.data_types.param_dtype
    return wanted is not None and wanted != config.compute_dtype


def _nesterov_without_momentum(config: Config) -> bool:
    params = config.optimizer.explicit_params if config.optimizer and config.optimizer.name == "sgd" else {}
    return bool(params.get("nesterov")) and (not params.get("momentum") or bool(params.get("dampening")))


RULES: tuple[Rule, ...] = (
    Rule(
        ("bf16.enabled", "fp16.enabled"),
        lambda c: c.bf16.enabled and c.fp16.enabled,
        "bf16 and fp16 are both enabled",
        "set fp16.enabled or bf16.enabled to false",
    ),
    Rule(
        ("data_types.param_dtype", "fp16.enabled", "bf16.enabled"),
        _other_than_compute,
        "expected the compute type, which fp16.enabled and bf16.enabled choose",
        "remove it, or enable the block of that type",
    ),
    Rule(
        ("zero_optimization.offload_param.device", _STAGE),
        lambda c: c.zero_optimization.offload_param.device != "none" and c.zero_optimization.stage < 3,
        "only sharded parameters can leave the device, so it needs stage 3",
        'set zero_optimization.stage to 3, or the device to "none" (offload_optimizer works from stage 1 on)',
    ),
    Rule(
        ("zero_optimization.offload_optimizer.device", _STAGE),
        lambda c: c.zero_optimization.offload_optimizer.device != "none" and c.zero_optimization.stage < 1,
        "stage 0 keeps a whole optimizer on every rank, which offloading would multiply in host memory",
        'set zero_optimization.stage to 1 or more, or the device to "none"',
    ),
    Rule(
        ("zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_optimizer.device"),
        lambda c: _optimizer(c).device == "nvme" and not _optimizer(c).nvme_path,
        'expected a folder, because the device is "nvme"',
        'set it to a folder on a fast disk, or the device to "cpu"',
    ),
    Rule(
        ("zero_optimization.offload_optimizer.super_offload", "lorica.offload.overlap"),
        lambda c: _optimizer(c).super_offload and not c.lorica.offload.overlap,
        "asks for updates beside the computation, which lorica.offload.overlap = false forbids",
        "remove one of the two",
    ),
    Rule(
        ("lorica.offload.device_reserve", "lorica.offload.device_memory"),
        lambda c: c.lorica.offload.device_reserve is not None and c.lorica.offload.device_memory is not None,
        "is what to leave of the free memory, and lorica.offload.device_memory says outright how much to take",
        "remove one of the two",
    ),
    Rule(
        ("lorica.offload.host_reserve", "lorica.offload.host_memory"),
        lambda c: c.lorica.offload.host_reserve is not None and c.lorica.offload.host_memory is not None,
        "is what to leave of the free memory, and lorica.offload.host_memory says outright how much to take",
        "remove one of the two",
    ),
    Rule(
        ("lorica.offload.master", "bf16.enabled"),
        lambda c: c.lorica.offload.master == "stochastic" and not c.bf16.enabled,
        "only bf16 parameters can do without a master",
        'enable bf16, or set it to "exact"',
    ),
    Rule(
        ("lorica.offload.master", "lorica.split_master"),
        lambda c: c.lorica.offload.master == "stochastic" and c.lorica.split_master is True,
        "leaves no master to split, and lorica.split_master is true",
        "remove one of the two",
    ),
    Rule(
        ("zero_optimization.mics_shard_size", _STAGE),
        lambda c: c.zero_optimization.mics_shard_size > 0 and c.zero_optimization.stage < 3,
        "shard groups need sharded parameters, so stage 3",
        "set zero_optimization.stage to 3, or mics_shard_size to -1",
    ),
    Rule(
        ("zero_optimization.mics_shard_size", _STAGE),
        lambda c: c.zero_optimization.mics_shard_size == 0,
        "expected the number of ranks in a shard group, or -1",
        "set mics_shard_size to -1 to shard over all ranks",
    ),
    Rule(
        ("prescale_gradients", _STAGE, "zero_optimization.reduce_scatter"),
        lambda c: c.prescale_gradients and _reduce_scatters(c),
        "stages 2 and 3 divide gradients after the reduce-scatter",
        "set prescale_gradients to false, or zero_optimization.stage to 1",
    ),
    Rule(
        ("gradient_predivide_factor", _STAGE, "zero_optimization.reduce_scatter"),
        lambda c: c.gradient_predivide_factor != 1 and c.zero_optimization.stage == 2 and _reduce_scatters(c),
        "stage 2 divides gradients after the reduce-scatter",
        "set gradient_predivide_factor to 1, or zero_optimization.stage to 1 or 3",
    ),
    Rule(
        ("gradient_allreduce_op", _STAGE),
        lambda c: c.gradient_allreduce_op == "sum" and c.zero_optimization.stage == 3,
        "stage 3 averages gradients",
        'set gradient_allreduce_op to "mean" and multiply the loss, or zero_optimization.stage to 2',
    ),
    Rule(
        ("fp16.loss_scale_window", "fp16.enabled", "fp16.loss_scale"),
        lambda c: _scales_dynamically(c) and c.fp16.loss_scale_window == 0,
        "expected a positive number of steps, because the loss scale is dynamic",
        "remove it (default 1000), or set a fixed loss_scale",
    ),
    Rule(
        ("fp16.min_loss_scale", "fp16.enabled", "fp16.loss_scale"),
        lambda c: _scales_dynamically(c) and c.fp16.min_loss_scale == 0,
        "expected a positive number, because the loss scale is dynamic",
        "remove it (default 1), or set a fixed loss_scale",
    ),
    Rule(
        ("optimizer.params.nesterov", "optimizer.params.momentum"),
        _nesterov_without_momentum,
        "Nesterov momentum needs a momentum and no dampening",
        'set "momentum": 0.9, or "nesterov": false',
    ),
    Rule(
        ("lorica.units.min_numel", "lorica.units.max_numel"),
        lambda c: (c.lorica.units.min_numel or 0) > (c.lorica.units.max_numel or float("inf")),
        "is larger than lorica.units.max_numel",
        "set min_numel below max_numel",
    ),
)


def violations(config: Config, uncertain: Collection[str] = ()) -> Iterator[Problem]:
    """Problems for every rule that holds for `config`, unless one of its keys is `uncertain`."""
    for rule in RULES:
        if rule.holds(config) and not any(key in uncertain for key in rule.keys):
            yield Problem(rule.keys[0], value_at(config, rule.keys[0]), rule.message, rule.fix)
    if not any(key in uncertain for key in Batch._fields):
        yield from contradiction(config.batch)


def value_at(config: Config, dotted: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in dotted.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value
