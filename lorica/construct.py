"""`lorica.initialize`: from a model, a configuration and perhaps an optimizer to an engine. Trains nothing itself."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import nn

from lorica.comm import init_distributed, make_collectives
from lorica.config import Config, ConfigError, load
from lorica.core.build import Blueprint, broadcast_from_first, build_units, load_buffers, outline
from lorica.core.flat import Site
from lorica.core.grads import Reducer
from lorica.core.partition import Cut, partition
from lorica.core.prefetch import Prefetcher
from lorica.core.streams import HostStreams, make_streams
from lorica.core.unit import Unit
from lorica.engine import Engine, Parts
from lorica.init import release_init_planes
from lorica.log import logger, make_visible
from lorica.mesh import Mesh
from lorica.monitor import Monitor, Timers
from lorica.offload import place_planes
from lorica.ops.inject import inject
from lorica.ops.linear_cross_entropy import LazyHead
from lorica.optim.base import FlatOptimizer
from lorica.optim.registry import from_client, from_config
from lorica.plan import REPLICATE_AXIS, SHARD_AXIS
from lorica.precision import Precision, make_loss_scale
from lorica.schedules import schedule_from_config
from lorica.tier import make_tiers
from lorica.update.build import make_update

OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


class Initialized(NamedTuple):
    """What `initialize` returns."""

    engine: Engine
    optimizer: Any
    training_dataloader: Any
    lr_scheduler: Any


def initialize(
    args: Namespace | None = None,
    model: nn.Module | None = None,
    optimizer: OptimizerLike | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> Initialized:
    """Put `model` under ZeRO as the configuration says. Collective over all ranks of the job.

    Args:
        args: parsed command line; `args.deepspeed_config` names the configuration if `config` does not.
        model: any module; its parameters become views of flat planes and keep their identity, names and shapes.
        optimizer: a torch optimizer over the model's parameters, or a callable that makes one from them; instead of the
            configuration's.
        model_parameters: what the configured optimizer updates: parameters, (name, parameter) pairs or param-group
            dicts; default: all that require a gradient.
        training_data: a dataset to make a distributed loader of.
        lr_scheduler: an object with `step()`, or a callable that makes one from the optimizer; instead of the
            configuration's.
        distributed_port: port of the rendezvous if the environment names none.
        mpu: an object with `get_data_parallel_group()`, as Megatron has it.
        dist_init_required: False: a process group must exist already.
        collate_fn: for `training_data`.
        config: dict, path, base64 text or `Config`; `config_params` is DeepSpeed's older name.
        mesh_param: not yet.
    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler); what was not asked for is None.
    Raises:
        ConfigError: the configuration is wrong; all problems at once.
        ValueError: an argument is wrong.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"initialize: expected model to be an nn.Module, got {type(model).__name__}. Fix: pass a model."
        )
    if mesh_param is not None:
        raise NotImplementedError("initialize: mesh_param (sequence parallelism) is not there yet. Fix: leave it out.")
    make_visible()
    settings = load(_config_source(args, config, config_params))
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    site, world, source = make_site(settings, mpu)
    settings = _complete(settings, world, source)
    engine, schedule = _build(settings, model, optimizer, model_parameters, lr_scheduler, site, mpu)
    loader = None
    if training_data is not None:
        loader = engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
    return Initialized(engine, engine.optimizer, loader, schedule)


def _config_source(args: Namespace | None, config: Any, config_params: Any) -> Any:
    """The one place that names a configuration."""
    named = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
        "args.deepscale_config": getattr(args, "deepscale_config", None),
    }
    given = {name: value for name, value in named.items() if value is not None}
    if not given:
        raise ValueError(
            "initialize: expected a configuration, got none. Fix: pass config=..., or args with "
            "--deepspeed_config ds_config.json (see lorica.add_config_arguments)."
        )
    if len(given) > 1 and len({str(value) for value in given.values()}) > 1:
        raise ValueError(
            f"initialize: expected one configuration, got {len(given)}: {', '.join(given)}. Fix: pass only one of them."
        )
    return next(iter(given.values()))


def _complete(config: Config, world: int, source: str) -> Config:
    """The configuration with batch sizes resolved; what is left of "auto" is refused."""
    config = config.resolve_batch(world, source)
    problems = config.unresolved()
    if problems:
        raise ConfigError(problems)
    return config


def make_site(config: Config, mpu: Any = None) -> tuple[Site, int, str]:
    """This rank's device, groups and tiers, the number of data-parallel ranks, and where that number comes from."""
    device = _device()
    ranks, source = _data_parallel_ranks(mpu)
    zero = config.zero_optimization
    shard_size = zero.mics_shard_size if zero.mics_shard_size > 0 else len(ranks)
    if len(ranks) % shard_size:
        raise ConfigError(config.batch_problems(len(ranks), source))
    mesh = Mesh.build(len(ranks), **{REPLICATE_AXIS: len(ranks) // shard_size, SHARD_AXIS: shard_size})
    me = ranks.index(_rank())
    streams = make_streams(device)

    def group(axis: str) -> Any:
        members = [ranks[i] for i in mesh.group_of(me, axis)]
        return make_collectives(members, device, streams, transport=config.lorica.transport)

    shard = group(SHARD_AXIS)
    replicate = group(REPLICATE_AXIS) if shard_size < len(ranks) else None
    pin = zero.offload_optimizer.pin_memory or zero.offload_param.pin_memory
    return Site(device, shard, replicate, make_tiers(device, pin_memory=pin), streams), len(ranks), source


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _data_parallel_ranks(mpu: Any) -> tuple[list[int], str]:
    if mpu is not None:
        for name in ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size"):
            size = getattr(mpu, name, lambda: 1)()
            if size > 1:
                raise NotImplementedError(
                    f"initialize: mpu.{name}() is {size}; model parallelism is not there yet. Fix: use mpu with size 1."
                )
        return torch.distributed.get_process_group_ranks(mpu.get_data_parallel_group()), "mpu"
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return list(range(world)), "torch.distributed"


# -- the parts of an engine --------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The optimizer of a run: its arithmetic, its live param groups, and the client's object if there is one."""

    flat: FlatOptimizer
    groups: list[dict[str, Any]]
    client: torch.optim.Optimizer | None


def _build(
    config: Config, model: nn.Module, optimizer: Any, parameters: Any, scheduler: Any, site: Site, mpu: Any
) -> tuple[Engine, Any]:
    _log_start(config, site)
    _inject_kernels(config, model, site)
    precision = Precision.from_config(config)
    chosen = _choose_optimizer(config, model, optimizer, parameters)
    predivide = _predivide(config, precision, site)
    specs, blueprint = _units_of(config, model), _blueprint(config, precision, chosen, predivide)
    planes = outline(specs, blueprint, site.shard.world_size)
    root = next(index for index, spec in enumerate(specs) if spec.is_root)
    placed = place_planes(config, planes, blueprint, chosen.flat if chosen is not None else None, site, root)
    units = build_units(specs, planes, replace(blueprint, where=placed.where), site)
    load_buffers(model, site, precision.buffer_dtype)
    release_init_planes(model)
    _mark_for_deepspeed(config, units)
    zero = config.zero_optimization
    reducer = Reducer(
        units,
        lambda order: _agree(order, site),
        overlap=zero.overlap_comm,
        require_all=not zero.ignore_unused_parameters,
    )
    update = None
    if chosen is not None:
        streams = site.streams or HostStreams()
        first_use = sorted(units, key=lambda unit: not unit.is_root)  # the root's embedding comes before the blocks
        ordered = [grad for unit in first_use for grad in unit.grads]
        update = make_update(chosen.flat, ordered, chosen.groups, site, streams, placed.pipelines)
    engine = Engine(
        Parts(
            config=config,
            module=model,
            site=site,
            units=units,
            reducer=reducer,
            prefetcher=Prefetcher(
                ahead_numel=_or_default(zero.stage3_prefetch_bucket_size, 50_000_000),
                max_live_numel=zero.stage3_max_live_parameters,
            ),
            loss_scale=make_loss_scale(config),
            monitor=Monitor(config, rank=_rank()),
            timers=Timers(config.wall_clock_breakdown, make_event=_event_maker(site)),
            update=update,
            groups=chosen.groups if chosen is not None else [],
            defaults=dict(chosen.flat.defaults) if chosen is not None else {},
            client_optimizer=chosen.client if chosen is not None else None,
            predivide=predivide,
            mpu=mpu,
            before_update=[module.expire for module in model.modules() if isinstance(module, LazyHead)],
        )
    )
    engine.lr_scheduler = _choose_scheduler(config, scheduler, engine.optimizer)
    if _rank() == 0:
        if placed.table:
            logger.info("%s", placed.table)
        logger.info(engine.peak().line())
    return engine, engine.lr_scheduler


def _log_start(config: Config, site: Site) -> None:
    if _rank() == 0:
        for warning in config.warnings:
            logger.warning(warning)
        where = f"{site.num_replicas} ranks over {site.shard.name} on {site.device}"
        logger.info("%s | %s", config.summary_line(), where)
        if config.dump_state:
            logger.info("effective configuration: %s", config.model_dump_json(indent=2))


def _inject_kernels(config: Config, model: nn.Module, site: Site) -> None:
    """Fused kernels in place of modules of the model, where the configuration asks for them."""
    if config.kernels.inject:
        report = inject(model, config.kernels.inject, config.kernels.library, device=site.device)
        if _rank() == 0:
            logger.info("%s", report)


def _choose_optimizer(config: Config, model: nn.Module, optimizer: Any, parameters: Any) -> Chosen | None:
    groups = _param_groups(model, parameters)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(groups)
    if optimizer is not None:
        flat = from_client(optimizer)
        flat.param_groups(optimizer.param_groups, _names(model))
        return Chosen(flat, optimizer.param_groups, optimizer)
    if config.optimizer is None:
        return None
    params = {key: value for key, value in config.optimizer.params.items() if value is not None}
    flat = from_config(config.optimizer.type, params)
    return Chosen(flat, flat.param_groups(groups, _names(model)), None)


def _names(model: nn.Module) -> dict[torch.Tensor, str]:
    return {param: name for name, param in model.named_parameters()}


def _param_groups(model: nn.Module, parameters: Any) -> list[dict[str, Any]]:
    """`model_parameters` as param groups; only parameters that require a gradient are kept."""
    items: Sequence[Any] = list(model.parameters() if parameters is None else parameters)
    if items and isinstance(items[0], tuple):
        items = [param for _, param in items]
    groups = [dict(item) for item in items] if items and isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        group["params"] = [param for param in members if param.requires_grad]
    return groups


def _predivide(config: Config, precision: Precision, site: Site) -> float:
    """What gradients are divided by before they are summed: fp16 sums must stay in range."""
    if config.prescale_gradients and config.gradient_predivide_factor != 1.0:
        return config.gradient_predivide_factor
    return float(site.num_replicas) if precision.sums_in_fp16 else 1.0


def _units_of(config: Config, model: nn.Module) -> list[Any]:
    units, default = config.lorica.units, Cut()
    return partition(
        model,
        Cut(
            classes=tuple(units.classes),
            also=tuple(sorted(model.__dict__.get("_lorica_leaf_classes", ()))),
            min_numel=default.min_numel if units.min_numel is None else units.min_numel,
            max_numel=default.max_numel if units.max_numel is None else units.max_numel,
        ),
    )


def _blueprint(config: Config, precision: Precision, chosen: Chosen | None, predivide: float) -> Blueprint:
    zero = config.zero_optimization
    groups = chosen.groups if chosen is not None else []
    return Blueprint(
        stage=zero.stage,
        precision=precision,
        group_of={id(param): index for index, group in enumerate(groups) for param in group["params"]},
        overlap=config.lorica.offload.overlap,
        bucket_numel=_or_default(zero.reduce_bucket_size, 500_000_000),
        predivide=predivide,
        accumulates=config.gradient_accumulation_steps != 1,
        split_master=_splits(config, chosen),
        **_compact(config, chosen),
        persist_numel=_or_default(zero.stage3_param_persistence_threshold, 100_000),
        persist_total=zero.stage3_model_persistence_threshold,
    )


class Compact(TypedDict):
    """How states are stored: the arguments of `Blueprint`."""

    moment_format: str
    rounded_master: bool


def _compact(config: Config, chosen: Chosen | None) -> Compact:
    """The formats that the configuration asks for.

    Raises:
        ValueError: if the optimizer keeps its states in fp32 only.
    """
    wanted = config.lorica.offload
    able = chosen is None or chosen.flat.takes_compact
    if not able and chosen is not None and (wanted.moments != "fp32" or wanted.master != "exact"):
        moments: tuple[str, str, str] = ("moments", wanted.moments, "fp32")
        name, value, default = moments if wanted.moments != "fp32" else ("master", wanted.master, "exact")
        raise ValueError(
            f'lorica.offload.{name}: expected AdamW or Adam for "{value}", got '
            f'{type(chosen.client or chosen.flat).__name__}. Fix: set it to "{default}", or use one of them.'
        )
    return {"moment_format": wanted.moments, "rounded_master": wanted.master == "stochastic"}


def _splits(config: Config, chosen: Chosen | None) -> bool:
    """Whether masters are split where that is exact.

    Raises:
        ValueError: if the configuration demands it and nothing could be split.
    """
    wanted, able = config.lorica.split_master, chosen is None or chosen.flat.takes_split
    if wanted and not able and chosen is not None:
        raise ValueError(
            f"lorica.split_master: expected an optimizer that updates element by element, got "
            f"{type(chosen.flat).__name__}. Fix: leave split_master out, or use AdamW, Adam, Lion, SGD or Adagrad."
        )
    if wanted and not config.bf16.enabled:
        raise ValueError(
            f"lorica.split_master: expected bf16 parameters, got bf16.enabled {config.bf16.enabled}. Fix: leave "
            "split_master out."
        )
    return able and wanted is not False


def _or_default(value: int | None, default: int) -> int:
    """`value`, or `default` for a key that was "auto"."""
    return default if value is None else value


def _mark_for_deepspeed(config: Config, units: Sequence[Unit]) -> None:
    """The attributes by which clients recognise a ZeRO-3 parameter."""
    if config.zero_optimization.stage < 3:
        return
    number = 0
    for unit in units:
        for flat in unit.flats:
            for param, slot in zip(flat.params, flat.layout.slots, strict=True):
                marks = {"ds_id": number, "ds_numel": slot.numel, "ds_shape": torch.Size(slot.shape)}
                param.__dict__.update(marks)
                number += 1


def _agree(order: list[int], site: Site) -> list[int]:
    shared = torch.tensor(order, dtype=torch.int64, device=site.device)
    return [int(i) for i in broadcast_from_first(shared, site).tolist()]


def _event_maker(site: Site) -> Callable[[], Any] | None:
    return site.streams.timer if site.streams is not None else None


def _choose_scheduler(config: Config, scheduler: Any, optimizer: Any) -> Any:
    if scheduler is not None:
        is_factory = callable(scheduler) and not hasattr(scheduler, "step")
        return scheduler(optimizer.optimizer) if is_factory else scheduler
    if config.scheduler is None or optimizer is None:
        return None
    params = {key: value for key, value in config.scheduler.params.items() if value is not None}
    return schedule_from_config(config.scheduler.type, params, optimizer)


__all__ = ["Initialized", "initialize"]
