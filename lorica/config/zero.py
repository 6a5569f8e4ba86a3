"""The block zero_optimization. Its offloading and aio: offload.py. Which combinations are legal: rules.py."""

from __future__ import annotations

import sys
from typing import Any, Literal

from pydantic import model_validator

from lorica.config.keys import Block, Form, Status, block, detail, key, no_effect, not_yet
from lorica.config.offload import AIO, OffloadOptimizer, OffloadParam

_POSITIVE = {"ge": 1}
_AT_LEAST_0 = {"ge": 0}
_NO_TRACE = "look-ahead does not depend on a trace, so there is no trace cache"


class ZenFlow(Block):
    """Asynchronous CPU optimizer with stale gradients."""

    topk_ratio: float = detail(0.1, "Share of gradient columns updated at once.", of="zenflow")
    select_strategy: str = detail("auto", "When the columns are chosen.", of="zenflow")
    select_interval: int | str = detail("auto", "Steps between two choices.", of="zenflow")
    update_interval: int | str = detail("auto", "Steps between two CPU updates.", of="zenflow")
    overlap_step: bool = detail(False, "Run the CPU update beside the next steps.", of="zenflow")
    offload: bool = detail(False, "Keep the chosen columns' states in host memory.", of="zenflow")
    auto_ratio: float = detail(0.99, "Threshold of the automatic interval.", of="zenflow")
    full_warm_up_rounds: int = detail(0, "Steps with full updates at the start.", of="zenflow")
    pt_reserved_cores_perc: float = detail(0.5, "Share of the cores left to PyTorch.", of="zenflow")


class LoCo(Block):
    """Error feedback of quantised gradients."""

    err_beta: float = detail(0.8, "Decay of the error.", of="zeropp_loco_param")
    reset_T: int = detail(1024, "Steps between two resets of the error.", of="zeropp_loco_param")


class LeafModule(Block):
    """Modules that ZeRO-3 handles as a whole."""

    classes: tuple[str, ...] = key((), "Class names.", shown_default="common MoE blocks")
    names: tuple[str, ...] = key((), "Module names.")
    name_suffixes: tuple[str, ...] = key((), "Endings of module names.")


class ZeroOptimization(Block):
    """What is sharded, how it travels, where it lives."""

    stage: Literal[0, 1, 2, 3] = key(
        0, "0: nothing is sharded; 1: optimizer states; 2: and gradients; 3: and parameters."
    )
    contiguous_gradients: bool = no_effect(
        True, "Pack gradients into one buffer.", "gradients are always packed into one flat plane"
    )
    reduce_scatter: bool = no_effect(
        True, "Reduce-scatter gradients instead of all-reducing them.", "sharded gradients are always reduce-scattered"
    )
    reduce_bucket_size: int | None = key(
        500_000_000,
        "Elements reduced by one collective, at most. Changes no bit of the result.",
        form=Form.SIZE,
        bounds=_POSITIVE,
    )
    allgather_partitions: bool = no_effect(
        True, "All-gather updated parameters instead of broadcasting them.", "parameters are always all-gathered"
    )
    allgather_bucket_size: int | None = no_effect(
        500_000_000,
        "Elements gathered by one collective after the step, at most (stages 1, 2).",
        "the parameters of a unit are gathered in place by one collective",
        form=Form.SIZE,
        bounds=_POSITIVE,
    )
    overlap_comm: bool = key(
        False, "Communicate beside the computation, on its own stream.", shown_default="true at stage 3, else false"
    )
    use_multi_rank_bucket_allreduce: bool = no_effect(
        True, "All-reduce buckets over all ranks.", "gradients are reduced by one reduce-scatter per unit"
    )
    round_robin_gradients: bool = no_effect(
        False, "Deal gradients to ranks in turn.", "every unit is already split evenly over the ranks"
    )
    load_from_fp32_weights: bool = no_effect(
        True, "Restore the master from fp32 weights.", "the master is always restored in fp32"
    )
    elastic_checkpoint: bool = no_effect(
        False, "Let a checkpoint be loaded by another number of ranks.", "every checkpoint can be, without this key"
    )
    ignore_unused_parameters: bool = key(
        True, "Accept parameters that took no part in the loss (zero gradient); false: raise, naming them."
    )
    legacy_stage1: bool = not_yet(False, "Old implementation of stage 1.", 'remove it and keep "stage": 1')
    sub_group_size: int = no_effect(
        1_000_000_000,
        "Elements that the optimizer updates at a time.",
        "the optimizer works unit by unit, in tiles that fit the cache",
        form=Form.SIZE,
        bounds=_POSITIVE,
    )
    offload_param: OffloadParam = block(OffloadParam, "Where parameters live between their uses (stage 3).")
    offload_optimizer: OffloadOptimizer = block(OffloadOptimizer, "Where the states of the optimizer live.")

    stage3_prefetch_bucket_size: int | None = key(
        50_000_000,
        "Elements gathered ahead of their use, at most.",
        form=Form.SIZE,
        bounds=_AT_LEAST_0,
        aliases=("prefetch_bucket_size",),
    )
    stage3_param_persistence_threshold: int | None = key(
        100_000,
        "Parameters with fewer elements stay whole on every rank.",
        form=Form.SIZE,
        bounds=_AT_LEAST_0,
        aliases=("param_persistence_threshold",),
    )
    stage3_model_persistence_threshold: int = key(
        sys.maxsize,
        "Elements that stay whole on every rank in total, at most.",
        form=Form.SIZE,
        bounds=_AT_LEAST_0,
        aliases=("model_persistence_threshold",),
        shown_default="no limit",
    )
    stage3_max_live_parameters: int | None = key(
        None,
        "Elements that are whole on a rank at one time, at most. Not given: as many as the prefetch bucket allows.",
        form=Form.SIZE,
        bounds=_AT_LEAST_0,
        aliases=("max_live_parameters",),
        shown_default="bounded by prefetch",
    )
    stage3_max_reuse_distance: int | None = key(
        None,
        "Keep a unit whole if it is needed again within this many elements. Not given: free it after its forward.",
        form=Form.SIZE,
        bounds=_AT_LEAST_0,
        aliases=("max_reuse_distance",),
        shown_default="freed after forward",
    )
    stage3_gather_16bit_weights_on_model_save: bool = key(
        False,
        "Let save_16bit_model gather whole weights.",
        aliases=("gather_16bit_weights_on_model_save",),
        deprecated=("stage3_gather_fp16_weights_on_model_save",),
    )
    stage3_module_granularity_threshold: int = no_effect(
        0,
        "Handle fine-grained modules as a whole.",
        "units are whole blocks already; `lorica.units` sets their size",
        form=Form.SIZE,
        bounds=_AT_LEAST_0,
        aliases=("module_granularity_threshold",),
    )
    stage3_use_all_reduce_for_fetch_params: bool = no_effect(
        False,
        "Gather parameters by all-reduce.",
        "a unit is always one all-gather",
        aliases=("use_all_reduce_for_fetch_params",),
    )
    stage3_allgather_sequential: bool = no_effect(
        False,
        "Gather parameters one by one.",
        "a unit is always one all-gather without copies",
        aliases=("allgather_sequential",),
    )
    mics_shard_size: int = key(
        -1,
        "Shard over groups of this many ranks and replicate across the groups (stage 3). -1: over all ranks.",
        bounds={"ge": -1},
    )
    mics_hierarchical_params_gather: bool = no_effect(
        False, "Gather in two steps across nodes.", "a shard group gathers in one step"
    )
    leaf_module: LeafModule = block(
        LeafModule,
        "Modules that ZeRO-3 handles as a whole.",
        status=Status.NO_EFFECT,
        note="units are whole blocks already; `lorica.units.classes` names further ones",
    )
    memory_efficient_linear: bool = no_effect(
        True, "Linear layers that keep no copy of the weight.", "freed weights share their storage, no copy is kept"
    )
    override_module_apply: bool = no_effect(
        True, "Gather parameters inside Module.apply.", "use lorica.zero.GatheredParameters around apply"
    )
    pipeline_loading_checkpoint: bool = no_effect(
        False, "Load checkpoints rank after rank.", "a rank reads its own part only"
    )
    log_trace_cache_warnings: bool = no_effect(False, "Report trace cache misses.", _NO_TRACE)
    enable_sanity_checks: bool = no_effect(
        False, "Check the life cycle of parameters.", "every change of state is always checked"
    )
    save_muon_momentum_buffer_in_memory: bool = no_effect(
        False, "Keep Muon's momentum in host memory.", "a unit's momentum is where its other states are"
    )

    zero_hpz_partition_size: int = not_yet(
        1,
        "Second shard of the parameters inside a node.",
        "leave it 1; mics_shard_size shards inside a group of ranks",
        off=(0,),
        bounds=_AT_LEAST_0,
    )
    zero_quantized_weights: bool = not_yet(False, "Gather weights in int8.", "leave it false")
    zero_quantized_nontrainable_weights: bool = not_yet(
        False, "Keep frozen weights in int8.", "leave it false; frozen weights may already have any dtype"
    )
    zero_quantized_gradients: bool = not_yet(False, "Reduce gradients in int4.", "leave it false")
    zeropp_loco_param: LoCo | None = not_yet(None, "Error feedback of quantised gradients.", "remove the block")
    zenflow: ZenFlow | None = not_yet(
        None,
        "Asynchronous CPU optimizer with stale gradients.",
        "remove the block: it trains with stale gradients, which is another training; lorica.offload.overlap hides the "
        "update with the same results as without",
    )

    @model_validator(mode="before")
    @classmethod
    def _overlap_follows_stage(cls, values: Any) -> Any:
        """DeepSpeed's default: overlap at stage 3 only."""
        if isinstance(values, dict) and values.get("overlap_comm") is None:
            return {**values, "overlap_comm": values.get("stage", 0) == 3}
        return values


class ZeroKeys(Block):
    """ZeRO and its I/O at the top level."""

    zero_optimization: ZeroOptimization = block(ZeroOptimization, "Sharding and offloading.")
    aio: AIO = block(AIO, "File I/O of the NVMe tier.")
    zero_allow_untested_optimizer: bool = no_effect(
        False, "Accept any client optimizer under ZeRO.", "every element-wise optimizer is accepted"
    )
    zero_force_ds_cpu_optimizer: bool = no_effect(
        True,
        "Refuse a client optimizer under offload_optimizer that is not a CPU optimizer of DeepSpeed's.",
        "every optimizer runs on the host tier",
    )
