"""The engines of the offload comparison: Lorica's tiers, DeepSpeed's and PyTorch's, each as its users would set it up.

A row is a function from gpu_engines.py with a configuration, the environment that its job runs in, and the share of the
optimizer that it keeps on the host. DeepSpeed's rows are the best configurations known on the test machine; where a row
is tuned by hand, its name says so. Owns no measurement.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_engines
from benchmarks.gpu_engines import CLIP, Setup, Trainer, deepspeed_trainer, fsdp2, lorica, merged

NUM_CORES = os.cpu_count() or 1
ON_HOST = {"device": "cpu", "pin_memory": True}

# What peers are started with. Lorica binds its own threads, and SuperOffload shares the cores out between its two
# processes by what the first may run on: a bound main thread would leave it one.
OMP_BOUND = {"OMP_NUM_THREADS": str(NUM_CORES), "OMP_PROC_BIND": "close", "OMP_PLACES": "threads"}
DEEPSPEED = {"DS_SKIP_CUDA_CHECK": "1", "MAX_JOBS": str(NUM_CORES)}
SUPER_SHARE = 0.75  # of the cores, for SuperOffload's optimizer process


class Engine(NamedTuple):
    """A row of the comparison.

    Attributes:
        make: the engine of a setup.
        says: what it is.
        host_share: the part of all parameters whose optimizer state lives on the host; None: the engine decides.
        environment: of its job.
        library: imported before the clock of the start-up runs.
        grouped: whether it wants a process group of one rank. host_group: whether for tensors on the host as well.
        pinned: whether it allocates pinned memory through torch, whose allocator has options for that.
        standard: measured unless a case names its engines.
    """

    make: Callable[[Setup], Trainer]
    says: str
    host_share: float | None = 0.0
    environment: dict[str, str] = {}  # noqa: RUF012 - read only
    library: str | None = None
    grouped: bool = False
    host_group: bool = False
    pinned: bool = False
    standard: bool = True


# Lorica ---------------------------------------------------------------------------------------------------------------


def lorica_row(
    says: str,
    stage: int,
    zero: dict[str, Any],
    own: dict[str, Any] | None = None,
    *,
    host_share: float | None = 1.0,
    unit_major: bool = False,
    standard: bool = False,
) -> Engine:
    """One of Lorica's rows.

    Args:
        zero: keys of `zero_optimization`. own: keys of `lorica.offload`.
    """
    extra = {"zero_optimization": zero} | ({"lorica": {"offload": own}} if own else {})

    def make(setup: Setup) -> Trainer:
        full = extra
        if zero.get("offload_optimizer", {}).get("device") == "nvme":
            full = merged(extra, {"zero_optimization": {"offload_optimizer": {"nvme_path": setup.folder}}})
        return lorica(setup, stage=stage, extra=full, unit_major=unit_major)

    return Engine(make, says, host_share, library="lorica", standard=standard)


AUTO = {"offload_optimizer": {"device": "auto"}}
HOST = {"offload_optimizer": ON_HOST}

LORICA = {
    "lorica-auto": lorica_row("Lorica, tiers chosen by the planner", 1, AUTO, host_share=None, standard=True),
    "lorica-auto-batch": lorica_row("the same, train_batch: unit by unit", 1, AUTO, host_share=None, unit_major=True),
    "lorica-host": lorica_row("Lorica, all optimizer state in host memory", 2, HOST, standard=True),
    "lorica-host-batch": lorica_row("the same, train_batch: unit by unit", 2, HOST, unit_major=True),
    "lorica-host-sync": lorica_row("Lorica, the same without overlap", 2, HOST, {"overlap": False}, standard=True),
    "lorica-host-exec-host": lorica_row("Lorica, the CPU kernel alone", 2, HOST, {"executor": "host"}),
    "lorica-host-exec-device": lorica_row(
        "Lorica, state streamed through the GPU alone", 2, HOST, {"executor": "device"}
    ),
    "lorica-nvme": lorica_row("Lorica, optimizer state on NVMe", 2, {"offload_optimizer": {"device": "nvme"}}),
    "lorica-param": lorica_row("Lorica, optimizer and parameters in host memory", 3, HOST | {"offload_param": ON_HOST}),
}


# Peers ----------------------------------------------------------------------------------------------------------------


def deepspeed_row(
    says: str,
    stage: int,
    zero: dict[str, Any],
    *,
    clip: float = CLIP,
    environment: dict[str, str] = OMP_BOUND,
    standard: bool = False,
) -> Engine:
    """One of DeepSpeed's rows, with its CPU optimizer."""

    def make(setup: Setup) -> Trainer:
        config = merged(setup.json_config(stage), {"zero_optimization": zero, "gradient_clipping": clip})
        return deepspeed_trainer(setup, config)

    return Engine(
        make,
        says,
        host_share=zero["offload_optimizer"].get("ratio", 1.0),
        environment=DEEPSPEED | environment,
        library="deepspeed",
        grouped=True,
        pinned=True,
        standard=standard,
    )


STAGE_2 = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 200_000_000,
    "allgather_bucket_size": 500_000_000,
    "offload_optimizer": ON_HOST,
}
STAGE_3 = {
    "sub_group_size": 250_000_000,
    "reduce_bucket_size": 200_000_000,
    "stage3_prefetch_bucket_size": 200_000_000,
    "stage3_max_live_parameters": 2_000_000_000,
    "stage3_max_reuse_distance": 2_000_000_000,
    "stage3_param_persistence_threshold": 1_000_000,
    "offload_optimizer": ON_HOST,
}
SUPER = {
    "overlap_comm": False,
    "reduce_bucket_size": 400_000_000,
    "sub_group_size": 400_000_000,
    "offload_optimizer": ON_HOST | {"ratio": 0.8, "super_offload": True, "cpuadam_cores_perc": SUPER_SHARE},
}
SUPER_THREADS = {"OMP_NUM_THREADS": str(max(1, int(SUPER_SHARE * NUM_CORES)))}


def with_ratio(ratio: float) -> dict[str, Any]:
    """Stage 3 with a part of the optimizer on the host."""
    return merged(STAGE_3, {"offload_optimizer": {"ratio": ratio}})


PEERS = {
    "deepspeed-2-cpu": deepspeed_row("DeepSpeed ZeRO-2, optimizer on CPU, pinned", 2, STAGE_2, standard=True),
    "deepspeed-2-cpu-unpinned": deepspeed_row(
        "the same, not pinned", 2, merged(STAGE_2, {"offload_optimizer": {"pin_memory": False}})
    ),
    "deepspeed-3-cpu": deepspeed_row("DeepSpeed ZeRO-3, optimizer on CPU", 3, STAGE_3, standard=True),
    "deepspeed-3-cpu-all": deepspeed_row(
        "DeepSpeed ZeRO-3, optimizer and parameters on CPU", 3, STAGE_3 | {"offload_param": ON_HOST}
    ),
    **{
        f"deepspeed-3-ratio-{ratio}": deepspeed_row(
            f"DeepSpeed ZeRO-3, tuned: ratio {ratio}, sub-groups of 2.5e8", 3, with_ratio(ratio), standard=ratio == 0.4
        )
        for ratio in (0.6, 0.5, 0.4, 0.3)
    },
    "deepspeed-super": deepspeed_row("DeepSpeed SuperOffload", 3, SUPER, environment=SUPER_THREADS, standard=True),
    "deepspeed-super-no-clip": deepspeed_row(
        "DeepSpeed SuperOffload, no clipping (its fast path)", 3, SUPER, clip=0.0, environment=SUPER_THREADS
    ),
    "fsdp2-cpu": Engine(
        partial(fsdp2, reshard=True, offload=True, reduce_dtype=torch.float32),
        "FSDP2 CPUOffloadPolicy, gradients reduced in fp32",
        host_share=1.0,
        environment=OMP_BOUND,
        grouped=True,
        host_group=True,
        pinned=True,
        standard=True,
    ),
    "fsdp2-cpu-bf16": Engine(
        partial(fsdp2, reshard=True, offload=True),
        "FSDP2 CPUOffloadPolicy, gradients reduced in bf16",
        host_share=1.0,
        environment=OMP_BOUND,
        grouped=True,
        host_group=True,
        pinned=True,
        standard=False,
    ),
}

ENGINES: dict[str, Engine] = {
    "floor": Engine(gpu_engines.floor, "forward and backward only, gradients dropped"),
    "hand-written": Engine(gpu_engines.hand_written, "PyTorch loop without offload: fp32 masters, fused AdamW"),
    "lorica-1": lorica_row("Lorica, stage 1, nothing offloaded", 1, {}, host_share=0.0),
    **LORICA,
    **PEERS,
}
