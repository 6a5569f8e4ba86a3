"""Memory that model states will need, before anything is allocated: DeepSpeed's estimator names. Does not import torch.

The numbers are those of `plan.py` for bf16 training with Adam, in bytes per parameter, divided by the number of ranks
where the stage shards:

    parameter 2, gradient 2, master 2, Adam moments 8     the master is split: only its lower half is held apart
    stage 3: + 4 per parameter of the largest unit        its gathered weights and the gradients autograd leaves

DeepSpeed's estimators of the same names use other factors. They count 16 bytes (host) or 18 (device) where 10 and 14
are meant here: masters there are whole, and an optimizer step keeps an fp32 copy of the gradients. With offload they
count gradients as host memory; here the gradient shard stays on the device. At stage 2 they count all optimizer states
on every node; here each node holds those of its own ranks.

Not counted: activations, staging buffers of reductions (`reduce_bucket_size`), units gathered ahead, small parameters
that stay whole at stage 3, padding of planes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorica.layout import round_up
from lorica.plan import ITEMSIZE, Request, StateBytes, UnitPlan, plan_unit

if TYPE_CHECKING:
    from torch import nn

NUM_ADAM_MOMENTS = 2
INIT_DTYPE = "float32"  # in which PyTorch builds a model
GIB = 2**30


class ModelStates(NamedTuple):
    """What a stage-2 run needs: host memory of each node, device memory of each rank."""

    cpu_bytes: int
    gpu_bytes: int


class ShardedModelStates(NamedTuple):
    """What a stage-3 run needs; `largest_layer_bytes` is the part of `gpu_bytes` that exists only while a unit runs."""

    cpu_bytes: int
    gpu_bytes: int
    largest_layer_bytes: int


class ModelSize(NamedTuple):
    """Parameters of a model, and of what stage 3 gathers of it at a time."""

    total_params: int
    largest_layer_params: int


def estimate_zero2_model_states_mem_needs(
    total_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> ModelStates:
    """Memory for model states under ZeRO-2.

    Args:
        total_params: parameters of the model, all of them trained.
        cpu_offload: the masters' lower halves and the moments in host memory.
        additional_buffer_factor: multiplies host memory, as room for what is no model state; 1 gives the exact bytes.
    Raises:
        ValueError: if a number is out of range.
    """
    _check(total_params, num_gpus_per_node, num_nodes, additional_buffer_factor)
    plan = _plan(2, param_on_host=False, optimizer_on_host=cpu_offload)
    states = _bytes_per_rank(plan, total_params, num_gpus_per_node * num_nodes)
    host = num_gpus_per_node * max(_in_tier(plan, states, "host"), _init_bytes(total_params))
    return ModelStates(int(host * additional_buffer_factor), _in_tier(plan, states, "device"))


def estimate_zero3_model_states_mem_needs(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> ShardedModelStates:
    """Memory for model states under ZeRO-3.

    Args:
        total_params: parameters of the model, all of them trained.
        largest_layer_params: the most parameters that are gathered at a time (normally a transformer block and the
            root unit).
        cpu_offload: the masters' lower halves and the moments in host memory.
        cpu_offload_params: parameter shards too; means something only with `cpu_offload`, as in DeepSpeed.
        zero_init: the model is built under `zero.Init`, one module at a time, and never whole in host memory.
        additional_buffer_factor: multiplies host memory, as room for what is no model state; 1 gives the exact bytes.
    Raises:
        ValueError: if a number is out of range.
    """
    _check(total_params, num_gpus_per_node, num_nodes, additional_buffer_factor)
    if not 0 < largest_layer_params <= total_params:
        raise ValueError(
            f"largest_layer_params: expected a number from 1 to total_params ({total_params:g}), got "
            f"{largest_layer_params:g}. Fix: pass the parameters of the largest block."
        )
    plan = _plan(3, param_on_host=cpu_offload and cpu_offload_params, optimizer_on_host=cpu_offload)
    states = _bytes_per_rank(plan, total_params, num_gpus_per_node * num_nodes)
    built_at_once = largest_layer_params if zero_init else total_params
    host = num_gpus_per_node * max(_in_tier(plan, states, "host"), _init_bytes(built_at_once))
    largest = int(largest_layer_params) * (ITEMSIZE[plan.param.dtype] + ITEMSIZE[plan.grad.dtype])
    return ShardedModelStates(int(host * additional_buffer_factor), _in_tier(plan, states, "device") + largest, largest)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: float, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what ZeRO-2 needs with and without offload, for a model of a known size."""
    rows = []
    for offload in (True, False):
        need = estimate_zero2_model_states_mem_needs(
            total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor
        )
        rows.append(_row(need, f"offload_optimizer={_device(offload)}"))
    size = f"{total_params / 1e6:.0f}M parameters"
    _print_table(2, size, num_gpus_per_node, num_nodes, rows)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print what ZeRO-3 needs with each way to offload and to build the model, for a model of a known size."""
    rows = []
    for optimizer, param in ((True, True), (True, False), (False, False)):
        for init in (True, False):
            need = estimate_zero3_model_states_mem_needs(
                total_params, largest_layer_params, num_gpus_per_node, num_nodes, optimizer, param, init,
                additional_buffer_factor,
            )  # fmt: skip
            options = f"offload_param={_device(param)}, offload_optimizer={_device(optimizer)}, zero_init={int(init)}"
            rows.append(_row(need, options))
    size = f"{total_params / 1e6:.0f}M parameters, {largest_layer_params / 1e6:.0f}M gathered at a time"
    _print_table(3, size, num_gpus_per_node, num_nodes, rows)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what ZeRO-2 needs with and without offload, for `model` (which may be on the meta device)."""
    estimate_zero2_model_states_mem_needs_all_cold(
        measure(model).total_params, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print what ZeRO-3 needs with each way to offload and to build `model` (which may be on the meta device)."""
    estimate_zero3_model_states_mem_needs_all_cold(
        *measure(model), num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def measure(model: nn.Module) -> ModelSize:
    """The size of `model`: tied weights once; the root unit is gathered for all of forward, beside one other unit."""
    from lorica.core.partition import Cut, partition

    *units, root = [sum(p.numel() for p in spec.params.values()) for spec in partition(model, Cut())]
    return ModelSize(sum(units) + root, root + max(units, default=0))


def _plan(stage: int, *, param_on_host: bool, optimizer_on_host: bool) -> UnitPlan:
    tier = {True: "host", False: "device"}
    return plan_unit(
        Request(stage, "bfloat16", "bfloat16", "bfloat16", param_tier=tier[param_on_host],
                optimizer_tier=tier[optimizer_on_host], split_master=True)
    )  # fmt: skip


def _bytes_per_rank(plan: UnitPlan, total_params: float, num_ranks: int) -> StateBytes:
    numel = round_up(int(total_params), num_ranks)
    return plan.bytes_per_rank(numel, num_ranks, NUM_ADAM_MOMENTS, trainable=True)


def _in_tier(plan: UnitPlan, states: StateBytes, tier: str) -> int:
    """The part of one rank's bytes that lies in `tier`."""
    kinds = (plan.param, plan.grad, plan.master, plan.moments)
    return sum(size for size, placement in zip(states, kinds, strict=True) if placement.tier == tier)


def _init_bytes(num_params: float) -> int:
    """Host memory of one process while it builds `num_params` parameters; free once they are in their planes."""
    return int(num_params) * ITEMSIZE[INIT_DTYPE]


def _check(total_params: float, num_gpus_per_node: int, num_nodes: int, additional_buffer_factor: float) -> None:
    given = {"total_params": total_params, "num_gpus_per_node": num_gpus_per_node, "num_nodes": num_nodes}
    for name, value in given.items():
        if value < 1 or value != int(value):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}. Fix: pass such a number.")
    if additional_buffer_factor <= 0:
        raise ValueError(
            f"additional_buffer_factor: expected a positive number, got {additional_buffer_factor!r}. Fix: pass 1 for "
            "the exact bytes, more for a margin."
        )


def _device(offload: bool) -> str:
    return "cpu" if offload else "none"


def _row(need: ModelStates | ShardedModelStates, options: str) -> str:
    return f"{need.cpu_bytes / GIB:11.2f} GiB | {need.gpu_bytes / GIB:8.2f} GiB | {options}"


def _print_table(stage: int, size: str, num_gpus_per_node: int, num_nodes: int, rows: list[str]) -> None:
    print(
        f"Model states under ZeRO-{stage} (bf16, Adam): {size}; nodes: {num_nodes}, GPUs per node: {num_gpus_per_node}"
    )
    print(f"{'host per node':>15} | {'GPU':>12} | options")
    print("\n".join(rows))
