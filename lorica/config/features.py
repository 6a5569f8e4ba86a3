"""Blocks of features around the core: checkpoints, parallelism, compilation, data. Most are not there yet."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from lorica.config.keys import Block, Form, Status, block, detail, key, no_effect, not_yet
from lorica.config.precision import DtypeName

_POSITIVE = {"ge": 1}
_AT_LEAST_0 = {"ge": 0}
_LEAVE_OFF = "leave it off"
_CUDA_GRAPHS = dict.fromkeys(("reduce-overhead", "max-autotune"), 'use "max-autotune-no-cudagraphs", or leave it out')


class ActivationCheckpointing(Block):
    """Settings of the activation checkpointing function."""

    partition_activations: bool = key(False, "Split saved activations over tensor-parallel ranks.")
    cpu_checkpointing: bool = key(False, "Keep saved activations in host memory.")
    contiguous_memory_optimization: bool = key(False, "Copy saved activations into one buffer.")
    number_checkpoints: int | None = key(None, "Number of checkpointed layers.", bounds=_POSITIVE)
    synchronize_checkpoint_boundary: bool = key(False, "Synchronise the device at every checkpoint.")
    profile: bool = key(False, "Time every checkpoint.")


class ParallelWrite(Block):
    """Who writes a checkpoint."""

    pipeline_stage: bool = no_effect(
        False, "Pipeline stages write side by side.", "every rank writes its own part anyway"
    )


class CheckpointWriter(Block):
    """Writer of checkpoint files."""

    type: Literal["FAST", "PYTHON", "MOCK"] = detail("FAST", "Which writer.", of="writer")
    io_buffer_size: int = detail(
        67_108_864, "Bytes of the write buffer.", of="writer", form=Form.SIZE, bounds=_POSITIVE
    )
    io_buffer_double: bool = detail(True, "Two buffers in turn.", of="writer")
    show_statistics: bool = detail(False, "Print the rate.", of="writer")
    data_parallel: Literal["replica", "socket", "machine"] | None = detail(None, "Which ranks write.", of="writer")
    decoupled: bool = detail(False, "Write beside the training.", of="writer")
    io_multiplier: int = detail(1, "Writers per rank.", of="writer", bounds=_POSITIVE)


class Checkpoint(Block):
    """How checkpoints are saved and loaded."""

    tag_validation: Literal["Ignore", "Warn", "Fail"] = no_effect(
        "Warn", "What to do when ranks save under different tags.", "all ranks must save under the same tag"
    )
    load_universal: bool = no_effect(
        False, "Load a checkpoint saved by another number of ranks.", "every Lorica checkpoint can be"
    )
    use_node_local_storage: bool = no_effect(
        False, "Every node has its own checkpoint folder.", "every rank writes its own part to the folder it is given"
    )
    parallel_write: ParallelWrite = block(ParallelWrite, "Who writes a checkpoint.")
    checkpoint_serialization: bool = no_effect(
        True, "Pickle checkpoint files in the new zip format.", "tensors are saved as safetensors"
    )
    writer: CheckpointWriter | None = not_yet(None, "Writer of checkpoint files.", "remove the block")


class DataStates(Block):
    """Lazy asynchronous checkpoints."""

    open_keys: ClassVar[bool] = True
    host_cache_size: int | None = detail(None, "GB of host memory for them.", of="datastates_ckpt")


class Nebula(Block):
    """Asynchronous checkpoints of a cloud service."""

    open_keys: ClassVar[bool] = True
    enabled: bool = not_yet(False, "Asynchronous checkpoints of a cloud service.", _LEAVE_OFF)


class Pipeline(Block):
    """Pipeline parallelism."""

    stages: int | str = not_yet("auto", "Number of pipeline stages.", 'leave it "auto", or 1', off=(1,))
    partition: str = not_yet("best", "How layers are dealt to stages.", 'leave it "best"')
    seed_layers: bool = not_yet(False, "Seed every layer by its own.", "leave it false")
    activation_checkpoint_interval: int = not_yet(
        0, "Layers between two checkpoints.", "leave it 0 and checkpoint in the model", bounds=_AT_LEAST_0
    )
    pipe_partitioned: bool = detail(True, "Split activations between stages.", of="pipeline.stages")
    grad_partitioned: bool = detail(True, "Split activation gradients between stages.", of="pipeline.stages")


class TensorParallelGroup(Block):
    """The group of tensor-parallel ranks."""

    tp_size: int = not_yet(1, "Tensor-parallel ranks.", "leave it 1; ZeRO stage 3 shards the weights", bounds=_POSITIVE)
    tp_grain_size: int = detail(64, "Smallest split.", of="autotp_size", bounds=_POSITIVE)
    mpu: Any = detail(None, "Model-parallel unit.", of="autotp_size")
    tp_group: Any = detail(None, "Process group.", of="autotp_size")


class TensorParallel(Block):
    """Automatic tensor parallelism."""

    autotp_size: int = not_yet(
        0, "Tensor-parallel ranks.", "leave it 0; ZeRO stage 3 shards the weights", off=(1,), bounds=_AT_LEAST_0
    )
    tp: TensorParallelGroup = block(TensorParallelGroup, "The group of tensor-parallel ranks.")
    tp_overlap_comm: bool = detail(False, "Communicate beside the computation.", of="autotp_size")
    preset_model: str | None = detail(None, "Known model family.", of="autotp_size")
    partition_config: dict[str, Any] | None = detail(None, "How weights are split.", of="autotp_size")
    dtype: DtypeName | None = detail(None, "Type of the weights.", of="autotp_size", form=Form.DTYPE)
    keep_module_on_host: bool = detail(False, "Load weights in host memory first.", of="autotp_size")


class ExpertParallel(Block):
    """Automatic expert parallelism."""

    open_keys: ClassVar[bool] = True
    enabled: bool = not_yet(False, "Automatic expert parallelism.", _LEAVE_OFF)
    autoep_size: int = detail(1, "Expert-parallel ranks.")
    preset_model: str | None = detail(None, "Known model family.")


class Compile(Block):
    """torch.compile of blocks, and graph passes of DeepCompile."""

    enabled: bool = key(False, "Compile the forward of every block with torch.compile; gathering stays outside of it.")
    backend: str = key("inductor", "Backend of torch.compile.")
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = key(
        None, "Mode of torch.compile.", shown_default="the backend's own", refused=_CUDA_GRAPHS
    )
    dynamic: bool | None = key(
        None, "Compile for changing sizes from the start, or never.", shown_default="once a size has changed"
    )
    fullgraph: bool = key(True, "A block that torch.compile would cut into pieces is an error that says where.")
    deepcompile: bool = not_yet(
        False, "Compile the model together with ZeRO.", "leave it false; torch.compile of blocks works"
    )
    passes: tuple[str, ...] | None = detail(None, "Which passes.", of="deepcompile")
    free_activation: bool = detail(False, "Free activations early.", of="deepcompile")
    offload_activation: bool = detail(False, "Move activations to host memory.", of="deepcompile")
    offload_opt_states: bool = detail(False, "Move optimizer states to host memory.", of="deepcompile")
    offload_parameters: bool = detail(False, "Move parameters to host memory.", of="deepcompile")
    double_buffer: bool = detail(True, "Two communication buffers.", of="deepcompile")
    symmetric_memory: bool = detail(False, "Communicate through symmetric memory.", of="deepcompile")
    debug_log: bool = detail(False, "Log the passes.", of="deepcompile")
    sync_before_reduce: bool = detail(False, "Synchronise before a reduction.", of="deepcompile")
    sync_after_reduce: bool = detail(False, "Synchronise after a reduction.", of="deepcompile")
    sync_before_allgather: bool = detail(False, "Synchronise before a gather.", of="deepcompile")
    sync_after_allgather: bool = detail(False, "Synchronise after a gather.", of="deepcompile")


KernelOp = Literal["layer_norm", "rms_norm", "swiglu", "gelu", "rotary", "linear_cross_entropy"]


class Kernels(Block):
    """Fused kernels in place of modules of the model (lorica.ops.inject)."""

    inject: Literal[False, "auto"] | tuple[KernelOp, ...] = key(
        False,
        'Replace modules of the model by fused kernels, which round in another order: `"auto"` every one that has a '
        "kernel, a list only these: " + ", ".join(f"`{name}`" for name in get_args(KernelOp)) + ".",
        form=Form.SELECTION,
    )
    library: Literal["auto", "lorica", "liger"] = key(
        "auto", 'Whose kernels: `"auto"` the best of the installed ones for each; `liger` needs liger-kernel.'
    )


class HybridEngine(Block):
    """One engine for training and generation."""

    enabled: bool = not_yet(
        False,
        "Generate with inference kernels between training steps.",
        "leave it false; generate() works on any stage",
    )
    max_out_tokens: int = detail(512, "Tokens to generate, at most.", bounds=_POSITIVE)
    inference_tp_size: int = detail(1, "Tensor-parallel ranks of the generation.", bounds=_POSITIVE)
    release_inference_cache: bool = detail(False, "Free the cache after a generation.")
    pin_parameters: bool = detail(True, "Keep the gathered parameters.")
    tp_gather_partition_size: int = detail(8, "Layers gathered at once.", bounds=_POSITIVE)
    enable_cuda_graph: bool = detail(False, "Generate by a CUDA graph.")


class Elasticity(Block):
    """Batch sizes that fit many world sizes."""

    enabled: bool = not_yet(
        False, "Choose batch sizes by the world size.", "give train_batch_size; the rest follows from the world size"
    )
    max_train_batch_size: int = detail(2000, "Largest global batch.", bounds=_POSITIVE)
    micro_batch_sizes: tuple[int, ...] = detail((2, 4, 6), "Micro-batches to choose from.")
    min_gpus: int = detail(1, "Fewest ranks.", bounds=_POSITIVE)
    max_gpus: int = detail(10000, "Most ranks.", bounds=_POSITIVE)
    min_time: int = detail(0, "Minutes between two changes.", bounds=_AT_LEAST_0)
    prefer_larger_batch: bool = detail(True, "Largest batch that fits.")
    ignore_non_elastic_batch_info: bool = detail(False, "Ignore the batch keys.")
    version: float = detail(0.2, "Version of the rules.")
    num_gpus_per_node: int = detail(1, "Ranks per node.", bounds=_POSITIVE)
    model_parallel_size: int = detail(1, "Model-parallel ranks.", bounds=_POSITIVE)


class CurriculumLearning(Block):
    """Sequence lengths that grow."""

    open_keys: ClassVar[bool] = True
    enabled: bool = not_yet(False, "Let the sequence length grow.", "leave it false; the data loader can do it")


class DataEfficiency(Block):
    """Curricula, dynamic batches, random layer-token dropping."""

    open_keys: ClassVar[bool] = True
    enabled: bool = not_yet(False, "Curricula and random layer-token dropping.", _LEAVE_OFF)
    seed: int = detail(1234, "Seed of the sampling.")
    data_sampling: dict[str, Any] | None = detail(None, "Curricula and dynamic batches.")
    data_routing: dict[str, Any] | None = detail(None, "Random layer-token dropping.")


class ProgressiveLayerDrop(Block):
    """Skips layers at random."""

    enabled: bool = not_yet(False, "Skip layers at random.", _LEAVE_OFF)
    theta: float = detail(1.0, "Share of layers kept in the end.")
    gamma: float = detail(0.001, "Speed of the change.")


class Eigenvalue(Block):
    """Curvature of the layers, for quantisation."""

    open_keys: ClassVar[bool] = True
    enabled: bool = not_yet(False, "Estimate the curvature of the layers.", _LEAVE_OFF)


class QuantizeTraining(Block):
    """Quantisation during training."""

    open_keys: ClassVar[bool] = True
    enabled: bool = not_yet(False, "Quantise weights during training.", _LEAVE_OFF)


class FeatureKeys(Block):
    """Features around the core, at the top level."""

    activation_checkpointing: ActivationCheckpointing = block(
        ActivationCheckpointing,
        "Settings of the activation checkpointing function.",
        status=Status.NO_EFFECT,
        note="checkpoint in the model (torch.utils.checkpoint, gradient_checkpointing_enable)",
    )
    checkpoint: Checkpoint = block(Checkpoint, "How checkpoints are saved and loaded.")
    datastates_ckpt: DataStates | None = not_yet(None, "Lazy asynchronous checkpoints.", "remove the block")
    nebula: Nebula = block(Nebula, "Asynchronous checkpoints of a cloud service.")
    pipeline: Pipeline = block(Pipeline, "Pipeline parallelism.")
    tensor_parallel: TensorParallel = block(TensorParallel, "Automatic tensor parallelism.")
    expert_parallel: ExpertParallel = block(ExpertParallel, "Automatic expert parallelism.")
    sequence_parallel_size: int = not_yet(
        1,
        "Ranks that share one sequence.",
        "leave it 1; checkpoint activations to save memory",
        bounds=_POSITIVE,
    )
    data_parallel_size: int | None = key(
        None, "Data-parallel ranks; checked against the world size.", bounds=_POSITIVE, shown_default="all ranks"
    )
    compile: Compile = block(Compile, "torch.compile of blocks, and graph passes of DeepCompile.")
    kernels: Kernels = block(Kernels, "Fused kernels in place of modules of the model; DeepSpeed has no such block.")
    hybrid_engine: HybridEngine = block(HybridEngine, "One engine for training and generation.")
    elasticity: Elasticity = block(Elasticity, "Batch sizes that fit many world sizes.")
    curriculum_learning: CurriculumLearning = block(CurriculumLearning, "Sequence lengths that grow.")
    data_efficiency: DataEfficiency = block(DataEfficiency, "Curricula and random layer-token dropping.")
    progressive_layer_drop: ProgressiveLayerDrop = block(ProgressiveLayerDrop, "Skips layers at random.")
    eigenvalue: Eigenvalue = block(Eigenvalue, "Curvature of the layers.")
    quantize_training: QuantizeTraining = block(QuantizeTraining, "Quantisation during training.")
    compression_training: dict[str, Any] | None = not_yet(
        None, "Pruning, quantisation and distillation.", "remove the block, or disable every method in it"
    )
    weight_quantization: dict[str, Any] | None = not_yet(None, "Quantised weights.", "remove the block")
    sparse_attention: dict[str, Any] | None = not_yet(
        None, "Block-sparse attention.", "remove the block; torch's flex_attention does it in the model"
    )
    sparse_gradients: bool = not_yet(
        False, "Reduce embedding gradients as sparse tensors.", "leave it false; dense gradients are reduce-scattered"
    )
    graph_harvesting: bool = not_yet(
        False, "Capture the optimizer step as a CUDA graph.", "leave it false; the fused update is one kernel per unit"
    )
    use_data_before_expert_parallelism: bool = not_yet(
        False, "Order of ranks with experts.", "leave it false; expert parallelism is not there yet"
    )
