"""The keys of offloading: DeepSpeed's two blocks and its file I/O, and Lorica's own. What fits where: place/."""

from __future__ import annotations

from typing import Any, Literal

from lorica.config.keys import Block, Form, detail, key, no_effect

_POSITIVE = {"ge": 1}
_AT_LEAST_0 = {"ge": 0}
_SHARE = {"gt": 0, "le": 1}
_PARAM_NVME: dict[Any, str] = {
    "nvme": 'use "cpu" (or "auto"), and offload_optimizer.device "nvme" for the states, which are five times as large'
}
_SPARE_CORES = 2


class OffloadParam(Block):
    """Where parameters live between their uses (stage 3)."""

    device: Literal["none", "cpu", "nvme", "auto"] = key(
        "none",
        'Tier of the sharded parameters: the device itself or host memory. `"auto"`: host memory for as many of the '
        "last units as do not fit on the device.",
        refused=_PARAM_NVME,
    )
    pin_memory: bool = key(True, "Page-lock the host memory.")
    nvme_path: str | None = detail(None, "Folder of the NVMe tier.", of="device: nvme")
    buffer_count: int = detail(5, "Buffers of the NVMe tier.", of="device: nvme", bounds=_POSITIVE)
    buffer_size: int = detail(
        100_000_000, "Elements per NVMe buffer.", of="device: nvme", form=Form.SIZE, bounds=_POSITIVE
    )
    max_in_cpu: int = detail(
        1_000_000_000, "Elements kept in host memory.", of="device: nvme", form=Form.SIZE, bounds=_AT_LEAST_0
    )


class OffloadOptimizer(Block):
    """Where the optimizer's records (what the master adds to the parameter, and the moments) live."""

    device: Literal["none", "cpu", "nvme", "auto"] = key(
        "none",
        'Tier of the optimizer states: the device itself, host memory, or files. `"auto"`: the device first, then '
        "host memory, then files if there is an nvme_path; what does not fit is refused at the start.",
    )
    pin_memory: bool = key(True, "Page-lock the host memory.")
    ratio: float = key(
        1.0,
        "Fraction of the states that may leave the device, in whole units; the first units of the model stay. With "
        "`cpu` and `nvme` just this fraction leaves, with `auto` this at most.",
        bounds={"ge": 0, "le": 1},
    )
    nvme_path: str | None = key(None, "Folder for the files of the NVMe tier, on the fastest disk.")
    buffer_count: int = key(
        4,
        "Chunks in host memory at a time for the CPU: fetched, being updated, sent. They hold gradients and parameters "
        "of the GPU, and states from files.",
        bounds={"ge": 3},
    )
    buffer_size: int | None = no_effect(
        None,
        "Elements per NVMe buffer.",
        "a buffer holds one chunk of lorica.offload.staging_numel elements",
        form=Form.SIZE,
        bounds=_POSITIVE,
    )
    fast_init: bool = no_effect(
        False, "Faster first write of the NVMe tier.", "states are written once, as the units are built"
    )
    pipeline_read: bool = no_effect(
        False, "Read ahead from NVMe.", "the next chunk is always read while one is updated"
    )
    pipeline_write: bool = no_effect(
        False, "Write behind to NVMe.", "the last chunk is always written while one is updated"
    )
    super_offload: bool = key(
        False,
        "DeepSpeed's name for an optimizer that runs beside the computation. Here that is `lorica.offload.overlap`, "
        "which is on without this key: exact, with clipping too.",
    )
    cpuadam_cores_perc: float = key(
        0.8,
        "With super_offload: share of the cores that update, unless lorica.offload.threads is given.",
        bounds=_SHARE,
    )


class AIO(Block):
    """File I/O of the NVMe tier."""

    block_size: int | None = key(None, "Bytes per request.", form=Form.SIZE, bounds={"ge": 4096}, shown_default="8 MiB")
    intra_op_parallelism: int | None = key(
        None, "Threads that read and write; so many requests are in flight.", bounds=_POSITIVE, shown_default="8"
    )
    thread_count: int | None = key(
        None,
        "Another name in use for the number of threads; the larger one counts.",
        bounds=_POSITIVE,
        shown_default="8",
    )
    queue_depth: int = no_effect(
        8, "Requests in flight.", "each thread has one request in flight; set intra_op_parallelism", bounds=_POSITIVE
    )
    single_submit: bool = no_effect(False, "Submit requests one by one.", "threads submit independently")
    overlap_events: bool = no_effect(True, "Submit while waiting.", "threads submit independently")
    use_gds: bool = no_effect(False, "GPUDirect Storage.", "states pass through host memory, where they are updated")

    @property
    def request_bytes(self) -> int:
        """Bytes per request."""
        return self.block_size or 8 * 2**20

    @property
    def num_threads(self) -> int:
        """Threads that read and write."""
        return max(self.intra_op_parallelism or 0, self.thread_count or 0) or 8


class Offload(Block):
    """How offloaded states are updated, and how much of each memory they may take. Bytes are per rank."""

    overlap: bool = key(
        True,
        "Update in the background while the next forward runs: step() returns once the norm is on its way, each unit "
        "waits for its own update only. false: everything inside step(). The results are the same bits.",
    )
    executor: Literal["auto", "device", "host"] = key(
        "auto",
        'What updates the states in host memory: `"host"` the CPU, where they are; `"device"` the GPU, through which '
        'they stream; `"auto"` both at once, each with the share that makes them finish together, where what the ring '
        "of the GPU holds costs it no time (without a GPU: the CPU). States in files are always updated by the CPU. "
        "The results are the same bits.",
    )
    speculate: bool | None = key(
        None,
        "Start updates during backward, into spare host memory, and drop them if clipping or an overflow changes the "
        "gradient after all.",
        shown_default="if host memory is left",
    )
    device_memory: int | None = key(
        None,
        "Bytes of device memory for model states and what streams past them. In the place of device_reserve.",
        form=Form.BYTES,
        bounds=_AT_LEAST_0,
        shown_default="what is free, less the reserve",
    )
    host_memory: int | None = key(
        None,
        "Bytes of host memory, of each rank. In the place of host_reserve.",
        form=Form.BYTES,
        bounds=_AT_LEAST_0,
        shown_default="this rank's part of what is free, less the reserve",
    )
    disk_space: int | None = key(
        None,
        "Bytes of files under nvme_path, of each rank.",
        form=Form.BYTES,
        bounds=_AT_LEAST_0,
        shown_default="this rank's part of what is free, less 2 %",
    )
    device_reserve: int | None = key(
        None,
        "Bytes of device memory kept for activations.",
        form=Form.BYTES,
        bounds=_AT_LEAST_0,
        shown_default="20 % of the device",
    )
    host_reserve: int | None = key(
        None,
        "Bytes of host memory kept for the rest of the machine (of all ranks on it together).",
        form=Form.BYTES,
        bounds=_AT_LEAST_0,
        shown_default="4 GiB, or 5 % of it if that is more",
    )
    staging_numel: int | None = key(
        None,
        "Elements of a chunk in which states travel, at most; each plane is cut into equal chunks of whole 4096.",
        form=Form.SIZE,
        bounds=_POSITIVE,
        shown_default="4 Mi to 64 Mi, for about 96 chunks a step",
    )
    staging_memory: int | None = key(
        None,
        "Bytes of device memory for the ring of chunks through which states stream; three of the largest at least.",
        form=Form.BYTES,
        bounds=_POSITIVE,
        shown_default="what is left, up to all that streams",
    )
    threads: int | None = key(
        None, "CPU threads that update.", bounds=_POSITIVE, shown_default=f"all cores but {_SPARE_CORES}"
    )
    activations: bool = key(
        False,
        "Keep what forward saves for backward in host memory meanwhile: with activation checkpointing the inputs of "
        "the checkpointed blocks. For long sequences; offload optimizer states first, they move fewer bytes per step.",
    )
    moments: Literal["fp32", "bf16", "int8", "int8_block"] = key(
        "fp32",
        "How Adam's two moments are stored, offloaded or not: exactly (8 bytes a parameter), in bf16 (4), in 8 bits "
        "with a scale for each block of 128 (2.06), or the first one in 8 bits and one second one per block (1.06). "
        "[States in few bytes](precision.md#states-in-few-bytes).",
    )
    master: Literal["exact", "stochastic"] = key(
        "exact",
        'What a bf16 parameter is updated by: `"exact"`: a master in fp32; `"stochastic"`: none, the parameter itself '
        "is updated and rounded stochastically, which saves 2 bytes a parameter (AdamW and Adam).",
    )


def update_threads(offload: Offload, optimizer: OffloadOptimizer, num_cores: int) -> int:
    """CPU threads that update on one rank.

    Args:
        num_cores: cores of this rank (its part of the machine's).
    """
    if offload.threads is not None:
        return offload.threads
    if optimizer.super_offload:
        return max(1, int(num_cores * optimizer.cpuadam_cores_perc))
    return max(1, num_cores - _SPARE_CORES)
