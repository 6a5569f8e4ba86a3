"""What the planner is asked: planes, budgets, wishes, speeds. Plain numbers; decides nothing and asks no machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, NamedTuple, cast

from lorica.config import Config
from lorica.config.offload import Offload
from lorica.layout import ALIGN, chunk_size
from lorica.plan import ITEMSIZE, UnitPlan

RecordTier = Literal["device", "host", "nvme"]
RecordWish = Literal["device", "host", "nvme", "auto"]
ParamTier = Literal["device", "host"]
ParamWish = Literal["device", "host", "auto"]
Executor = Literal["device", "host"]

GIB = 2**30
DEVICE_RESERVE = 0.2  # of the device's memory, for activations
HOST_RESERVE = 0.05
MIN_HOST_RESERVE = 4 * GIB
DISK_RESERVE = 0.02

_TIER_OF: dict[str, str] = {"none": "device", "cpu": "host", "nvme": "nvme", "auto": "auto"}


@dataclass(frozen=True)
class PlaneDemand:
    """One parameter plane and its record (what the master adds to the parameter, and the moments).

    Attributes:
        name, unit_index: for people; `unit_index` also joins rows of the table.
        numel: elements of the whole plane, padding included.
        param_itemsize, grad_itemsize, record_itemsize: bytes per element; of records in few bytes no whole number.
        apart_itemsize: bytes per element that a record takes besides, where it lives in another tier than the
            parameters: a master that is the parameter itself otherwise (fp32).
        param_shards, grad_shards, record_shards: ranks that share each; 1: whole on every rank.
        trainable: False: frozen, parameters only.
        param_can_leave: whether the parameters may live in host memory between their uses at stage 3 (not the root
            unit's, which the whole forward needs, nor those that stay whole).
    """

    name: str
    unit_index: int
    numel: int
    param_itemsize: int = 2
    grad_itemsize: int = 2
    record_itemsize: float = 10
    apart_itemsize: float = 0
    param_shards: int = 1
    grad_shards: int = 1
    record_shards: int = 1
    trainable: bool = True
    param_can_leave: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        unit_index: int,
        plan: UnitPlan,
        numel: int,
        num_shards: int,
        num_moments: int,
        *,
        trainable: bool,
        param_can_leave: bool = False,
    ) -> PlaneDemand:
        """The demand of a plane whose `plan` has everything on the device.

        Args:
            numel: elements of the whole plane, padding included.
            num_shards: ranks over which the plan's sharded planes are sharded.
            num_moments: moment planes of the optimizer (Adam: 2).
        """
        master = 0 if plan.master_is_param else ITEMSIZE[plan.master.dtype]
        return cls(
            name,
            unit_index,
            numel,
            param_itemsize=ITEMSIZE[plan.param.dtype],
            grad_itemsize=ITEMSIZE[plan.grad.dtype],
            record_itemsize=master + plan.moment_bytes(ALIGN, num_moments) / ALIGN,
            apart_itemsize=ITEMSIZE[plan.master.dtype] if plan.master_is_param and not plan.master_is_rounded else 0,
            param_shards=num_shards if plan.param.sharded else 1,
            grad_shards=num_shards if plan.grad.sharded else 1,
            record_shards=num_shards if plan.master.sharded else 1,
            trainable=trainable,
            param_can_leave=param_can_leave,
        )

    @property
    def owned_numel(self) -> int:
        """Elements that this rank's optimizer updates."""
        return -(-self.numel // self.record_shards) if self.trainable else 0

    @property
    def param_bytes(self) -> int:
        """Bytes of the parameters that this rank keeps between their uses."""
        return -(-self.numel // self.param_shards) * self.param_itemsize

    @property
    def whole_bytes(self) -> int:
        """Bytes of the parameters while they are whole."""
        return self.numel * self.param_itemsize

    @property
    def grad_bytes(self) -> int:
        """Bytes of the gradient that this rank keeps until the update."""
        return -(-self.numel // self.grad_shards) * self.grad_itemsize if self.trainable else 0

    @property
    def record_bytes(self) -> int:
        """Bytes of the record."""
        return self.record_bytes_at(apart=False)

    def record_bytes_at(self, *, apart: bool) -> int:
        """Bytes of the record, which lives apart from the parameters or with them."""
        return ceil(self.owned_numel * (self.record_itemsize + (self.apart_itemsize if apart else 0)))

    def sharded(self, ranks: int) -> PlaneDemand:
        """The same plane at stage 3 over `ranks`."""
        return replace(self, param_shards=ranks, grad_shards=ranks, record_shards=ranks)

    def scaled(self, factor: float) -> PlaneDemand:
        """The same plane of a model `factor` times as large."""
        return replace(self, numel=int(self.numel * factor))


@dataclass(frozen=True)
class Budget:
    """Bytes of one tier for one rank, of which `reserve` stay untouched."""

    size: int
    reserve: int = 0

    @property
    def usable(self) -> int:
        """Bytes that may be planned."""
        return max(0, self.size - self.reserve)


class Free(NamedTuple):
    """Bytes that a machine has before model states are allocated; the host's and the disk's are all ranks' together."""

    device_total: int
    device: int
    host_total: int
    host: int
    disk: int


@dataclass(frozen=True)
class Budgets:
    """The three tiers of one rank. `shared`: device and host are the same memory, counted once (no accelerator)."""

    device: Budget
    host: Budget
    disk: Budget = Budget(0)
    shared: bool = False

    @classmethod
    def of(cls, free: Free, wishes: Offload, *, on_cuda: bool, uses_disk: bool, ranks_on_host: int = 1) -> Budgets:
        """Budgets out of what is free and the block `lorica.offload`.

        Args:
            uses_disk: whether there is a folder for the NVMe tier.
            ranks_on_host: ranks that share this machine's host memory and disk.
        Raises:
            ValueError: a budget of the configuration is larger than what is free.
        """
        kept = wishes.host_reserve
        kept = max(MIN_HOST_RESERVE, int(HOST_RESERVE * free.host_total)) if kept is None else kept
        disk = _budget("disk_space", wishes.disk_space, free.disk // ranks_on_host, DISK_RESERVE)
        disk = disk if uses_disk else Budget(0)
        host_share = Budget(free.host // ranks_on_host, kept // ranks_on_host)
        if not on_cuda:
            device, host = _one_memory(wishes, host_share)
            return cls(device, host, disk, shared=wishes.device_memory is None and wishes.host_memory is None)
        host = host_share
        if wishes.host_memory is not None:
            host = _budget("host_memory", wishes.host_memory, host_share.size)
        reserve = wishes.device_reserve
        reserve = int(DEVICE_RESERVE * free.device_total) if reserve is None else reserve
        device = Budget(free.device, reserve)
        if wishes.device_memory is not None:
            device = _budget("device_memory", wishes.device_memory, free.device)
        return cls(device, host, disk)


def _budget(key: str, wanted: int | None, free: int, reserve: float = 0.0) -> Budget:
    """`wanted` bytes, or all that is `free` less a reserve."""
    if wanted is None:
        return Budget(free, int(reserve * free))
    if wanted > free:
        raise ValueError(
            f"lorica.offload.{key}: expected at most what is free for this rank ({free / GIB:.1f} GiB), got "
            f"{wanted / GIB:.1f} GiB. Fix: lower it, or leave it out."
        )
    return Budget(wanted)


def _one_memory(wishes: Offload, both: Budget) -> tuple[Budget, Budget]:
    """Device and host budget where both are the host's memory: what one is given, the other does not have."""
    device, host = wishes.device_memory, wishes.host_memory
    if device is not None and host is not None:
        _budget("device_memory and host_memory together", device + host, both.size)
        return Budget(device), Budget(host)
    if device is not None:
        _budget("device_memory", device, both.size)
        return Budget(device), Budget(both.size - device, both.reserve)
    reserve = both.reserve + (wishes.device_reserve or 0)
    if host is not None:
        _budget("host_memory", host, both.size)
        return Budget(both.size - host, reserve), Budget(host)
    return Budget(both.size, reserve), Budget(both.size, reserve)


@dataclass(frozen=True)
class Constraints:
    """What the configuration leaves to the planner, and what it does not.

    Attributes:
        records, params: the tier of records and parameters; "auto": the planner's choice.
        ratio: fraction of the elements whose record may leave the device ("host", "nvme": does leave it).
        executor: what updates records in host memory.
        overlap: updates run beside the computation; without, staging is no longer than a pipeline needs.
        on_cuda: whether the device is an accelerator with memory of its own.
        stage, ranks: the ZeRO stage and the ranks that share what it shards; for advice only.
        staging_numel: elements of a chunk at most; None: chosen.
        staging_bytes: bytes of the device ring; None: chosen.
        host_slots: chunks of the host ring.
        param_uses: times a step that a unit's parameters are needed (forward and backward of every micro-batch).
        passing_bytes: device bytes of what passes through besides (gathered units, gradients before they are packed).
    """

    records: RecordWish = "auto"
    params: ParamWish = "device"
    ratio: float = 1.0
    executor: Literal["auto", "device", "host"] = "auto"
    overlap: bool = True
    on_cuda: bool = True
    stage: int = 3
    ranks: int = 1
    staging_numel: int | None = None
    staging_bytes: int | None = None
    host_slots: int = 4
    param_uses: int = 2
    passing_bytes: int = 0

    @classmethod
    def of(cls, config: Config, *, on_cuda: bool, ranks: int = 1, passing_bytes: int = 0) -> Constraints:
        """The wishes of a configuration (the other arguments: see the class)."""
        zero, wishes = config.zero_optimization, config.lorica.offload
        return cls(
            records=cast(RecordWish, _TIER_OF[zero.offload_optimizer.device]),
            params=cast(ParamWish, _TIER_OF[zero.offload_param.device]),
            ratio=zero.offload_optimizer.ratio,
            executor=wishes.executor,
            overlap=wishes.overlap,
            on_cuda=on_cuda,
            stage=zero.stage,
            ranks=ranks,
            staging_numel=wishes.staging_numel,
            staging_bytes=wishes.staging_memory,
            host_slots=zero.offload_optimizer.buffer_count,
            param_uses=2 * (config.gradient_accumulation_steps or 1),
            passing_bytes=passing_bytes,
        )


# One H200 box: PCIe 5 with both directions busy, 16 hardware threads on 8 cores, a virtual disk with O_DIRECT.
# Memory bandwidth (160 GB/s) is what the CPU and the copy engines share: records that stream at the link's speed take
# 100 of it, an update on the CPU 34 bytes a parameter. With a larger share for the CPU than this both get slower, and
# together they were slower than the link alone. Source: docs/benchmarks-offload.md.
_HOST_UPDATE, _HOST_BESIDE, _HOST_CORES = 3.2e9, 1.2e9, 8


@dataclass(frozen=True)
class Speeds:
    """What the links and the host can do: bytes per second, `host_*` in parameters per second.

    `host_update` is the CPU's rate alone, `host_beside` while records stream through the device.
    `link` is one direction between host and device while the other is busy too; `disk` is reading or writing alone.
    """

    link: float = 50e9
    host_update: float = _HOST_UPDATE
    host_beside: float = _HOST_BESIDE
    device_memory: float = 4.3e12
    disk: float = 2.6e9

    @classmethod
    def with_threads(cls, threads: int) -> Speeds:
        """The default speeds with an update on `threads` CPU threads."""
        share = min(threads, _HOST_CORES) / _HOST_CORES
        return cls(host_update=_HOST_UPDATE * share, host_beside=_HOST_BESIDE * share)


def chunk_numel(planes: Sequence[PlaneDemand], constraints: Constraints) -> int:
    """Elements of a chunk at most: as configured, or so many that a step has about `NUM_CHUNKS` of them.

    A driver queues about a thousand operations on a stream and then lets the host wait; with more chunks than this a
    step's transfers fill that queue, and the forward behind them is launched late (6.7 B parameters in chunks of 16 Mi:
    a third more time per step on an H200).
    """
    if constraints.staging_numel is not None:
        return constraints.staging_numel
    numels = [plane.owned_numel for plane in planes]
    most = min(MAX_CHUNK_NUMEL, max(MIN_CHUNK_NUMEL, sum(numels) // NUM_CHUNKS))
    common = max(set(numels), key=lambda numel: (numel * numels.count(numel), numel), default=0)
    return chunk_size(common, most)  # what the blocks are cut into: their chunks fill a slot


def slot_numel(planes: Sequence[PlaneDemand], constraints: Constraints) -> int:
    """Elements that a slot of a ring holds: the largest chunk of any plane."""
    most = chunk_numel(planes, constraints)
    return max((chunk_size(plane.owned_numel, most) for plane in planes if plane.owned_numel), default=0)


def num_chunks(plane: PlaneDemand, most: int) -> int:
    """Chunks of at most `most` elements in which a plane travels."""
    return -(-plane.owned_numel // chunk_size(plane.owned_numel, most))


NUM_CHUNKS = 96
MIN_CHUNK_NUMEL, MAX_CHUNK_NUMEL = 4 * 2**20, 64 * 2**20
