"""The planner: which plane's record and parameters live in which tier, and what updates them. Refuses nothing itself.

[Note: placement order] The updates of the just-in-time policy run in forward order while the next forward runs, and a
unit waits for its own. The first units of the forward therefore have the least slack and the last ones the most; in
backward the last units are done first, which speaks for the same order. So, with the planes in forward order:

1. The device gets what passes through it, then all parameters, then all gradients. A byte of parameters that leaves
   costs two bytes of transfer to the device in every micro-batch, a byte of records one each way per step.
2. What is left of the device gets records from the first plane on, until one does not fit: a prefix.
3. Host memory gets the records that follow, disk the last ones: a disk is 20 times slower than the link.
4. If the parameters alone do not fit, those of the last planes live in host memory (stage 3): they are needed last in
   forward, so their update and the transfer behind it have the most time. Then no record stays on the device; otherwise
   more memory could bring parameters back at the cost of records.
5. Records in host memory are updated by the CPU and by the device, through which they stream, at the same time: plane
   by plane in forward order to the one that would be done with it first. What the device's ring holds before the
   verdict costs the device no time. Both finish within one plane of each other, unless the ring holds all that streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil

from lorica.place.demand import (
    Budgets,
    Constraints,
    Executor,
    ParamTier,
    PlaneDemand,
    RecordTier,
    Speeds,
    chunk_numel,
    num_chunks,
    slot_numel,
)
from lorica.place.placements import Placements, PlanePlacement, TierUse, Traffic

MIN_CHUNKS = 3  # one coming, one being updated, one going
PARAM_WINDOW = 3  # units with parameters on the host that are whole at a time: in use, coming, going
STAGING_MARGIN = 0.05  # of the device's budget: left to the allocator's fragments


def assign(
    planes: Sequence[PlaneDemand], budgets: Budgets, constraints: Constraints, speeds: Speeds | None = None
) -> Placements:
    """Place every plane; a tier may be over its budget afterwards (`Placements.short`): see `lorica.place.place`.

    Args:
        planes: in the order in which the forward needs them first (the root unit: first).
    Pure: the result depends on the arguments only.
    """
    return _Planner(tuple(planes), budgets, constraints, speeds or Speeds()).run()


def device_numel(planes: Sequence[PlaneDemand], ratio: float) -> int:
    """Elements of records that must stay on the device at most: the rest of what `ratio` lets go."""
    return round((1.0 - ratio) * sum(plane.owned_numel for plane in planes))


@dataclass(frozen=True)
class _Planner:
    planes: tuple[PlaneDemand, ...]
    budgets: Budgets
    constraints: Constraints
    speeds: Speeds

    def run(self) -> Placements:
        held = self._required_prefix()
        streamed = self._streamed_params(held)
        on_device = self._device_prefix(held, streamed)
        on_host = self._host_run(on_device, streamed)
        params = self._param_tiers(streamed)
        records = self._record_tiers(on_device, on_host)
        on_their_way = [plane for plane, record in zip(self.planes, records, strict=True) if record == "host"]
        near = self._num_slots(on_their_way, on_device, streamed)
        executors = _split(self.planes, params, records, self.constraints, self.speeds, near)
        placed = tuple(PlanePlacement(*row) for row in zip(self.planes, params, records, executors, strict=True))
        slots = self._num_slots([p.plane for p in placed if _streams(p)], on_device, streamed)
        staging = slots * self._chunk_bytes
        return Placements(
            planes=placed,
            device=self._device_use(placed, streamed, staging),
            host=self._host_use(placed, streamed, on_device, staging),
            disk=TierUse(self.budgets.disk, records=sum(p.record_bytes for p in placed if p.record == "nvme")),
            chunk_numel=chunk_numel(self.planes, self.constraints),
            traffic=traffic(placed, self.constraints),
            update_seconds=_update_seconds(placed, self.constraints, self.speeds),
        )

    # -- the device --------------------------------------------------------------------------------------------------

    @property
    def _trainable(self) -> tuple[PlaneDemand, ...]:
        return tuple(plane for plane in self.planes if plane.trainable)

    def _required_prefix(self) -> int:
        """Trainable planes whose record has to stay on the device."""
        if self.constraints.records == "device":
            return len(self._trainable)
        return _prefix([p.owned_numel for p in self._trainable], device_numel(self.planes, self.constraints.ratio))

    def _streamed_params(self, held: int) -> int:
        """How many of the last planes that can leave have their parameters in host memory."""
        leaving = [plane for plane in self.planes if plane.param_can_leave]
        if self.constraints.params == "device":
            return 0
        if self.constraints.params == "host":
            return len(leaving)
        rest = len(self._trainable)
        for streamed in range(len(leaving)):
            records = self._record_sums
            enough = records[held] + self._min_staging(rest - held) <= self._room(streamed, rest - held)
            if enough or (streamed == 0 and records[rest] <= self._room(0, 0)):
                return streamed
        return len(leaving)

    def _device_prefix(self, held: int, streamed: int) -> int:
        """Trainable planes whose record is on the device: the first so many."""
        forced = self.constraints.records != "auto"
        if forced or (streamed and self.constraints.params == "auto"):
            return held
        sizes = self._device_sizes
        if sum(sizes) <= self._room(streamed, 0):
            return len(sizes)
        return max(held, _prefix(sizes, self._room(streamed, 1) - self._min_staging(1)))

    def _room(self, streamed: int, num_away: int) -> int:
        """Device bytes for records and staging, if so many records are elsewhere."""
        room = self.budgets.device.usable - self._fixed(streamed)
        return room - (self._host_params(streamed) + self._ring(num_away) if self.budgets.shared else 0)

    @property
    def _record_sums(self) -> list[int]:
        return list(accumulate(self._device_sizes, initial=0))

    @property
    def _device_sizes(self) -> list[int]:
        """Bytes of each record on the device."""
        elsewhere = self.constraints.params == "host"
        return [p.record_bytes_at(apart=elsewhere and p.param_can_leave) for p in self._trainable]

    def _fixed(self, streamed: int) -> int:
        """Device bytes of everything but records and staging."""
        params = sum(plane.param_bytes for plane in self.planes) - self._host_params(streamed)
        return params + sum(plane.grad_bytes for plane in self.planes) + self._passing(streamed)

    def _passing(self, streamed: int) -> int:
        """Device bytes of what comes and goes within a step, chunks of records excepted."""
        window = max((p.whole_bytes for p in self._leaving(streamed)), default=0) * PARAM_WINDOW
        return self.constraints.passing_bytes + (window if self.constraints.on_cuda else 0)

    def _leaving(self, streamed: int) -> list[PlaneDemand]:
        leaving = [plane for plane in self.planes if plane.param_can_leave]
        return leaving[len(leaving) - streamed :]

    def _host_params(self, streamed: int) -> int:
        return sum(plane.param_bytes for plane in self._leaving(streamed))

    # -- staging: chunks of records on their way ---------------------------------------------------------------------

    @property
    def _chunk_bytes(self) -> int:
        """Device bytes of a chunk: a record, and the parameters where they may be in host memory too."""
        with_param = self.constraints.params != "device"
        items = [p.record_itemsize + (p.param_itemsize if with_param else p.apart_itemsize) for p in self._trainable]
        return ceil(slot_numel(self.planes, self.constraints) * max(items, default=0))

    def _min_slots(self, num_away: int) -> int:
        """Slots of the shortest ring, if a record may stream through the device."""
        streams = self.constraints.executor != "host" and self.constraints.records in ("host", "auto")
        if not num_away or not streams or not (self.constraints.on_cuda or self.constraints.executor == "device"):
            return 0
        return max(MIN_CHUNKS, (self.constraints.staging_bytes or 0) // max(1, self._chunk_bytes))

    def _min_staging(self, num_away: int) -> int:
        """Device bytes of the shortest ring."""
        return self._min_slots(num_away) * self._chunk_bytes

    def _num_slots(self, through: Sequence[PlaneDemand], on_device: int, streamed: int) -> int:
        """Slots of the ring: enough for all that goes `through` it, within what is left of the device.

        A long ring is filled during backward, when the link is idle: what is there already needs no transfer in the
        window between the norm and the unit's next use.
        """
        least = self._min_slots(len(self._trainable) - on_device)
        if not least or self.constraints.staging_bytes is not None or not self.constraints.overlap:
            return least
        budget = self.budgets.device.usable
        left = budget - self._fixed(streamed) - self._record_sums[on_device] - int(STAGING_MARGIN * budget)
        if self.budgets.shared:
            left = 0
        most = chunk_numel(self.planes, self.constraints)
        return max(least, min(left // max(1, self._chunk_bytes), sum(num_chunks(plane, most) for plane in through)))

    def _ring(self, num_away: int) -> int:
        """Host bytes of the ring: gradient and parameter of the CPU's chunks; records on their way to disk."""
        if not num_away:
            return 0
        on_cuda, executor = self.constraints.on_cuda, self.constraints.executor
        to_disk = self._may_use_disk
        carries = on_cuda and (executor != "device" or to_disk)
        items = [
            (p.grad_itemsize + p.param_itemsize if carries else 0)
            + (p.record_itemsize + p.apart_itemsize if to_disk else 0)
            for p in self._trainable
        ]
        return self.constraints.host_slots * ceil(slot_numel(self.planes, self.constraints) * max(items, default=0))

    @property
    def _may_use_disk(self) -> bool:
        wish = self.constraints.records
        return wish == "nvme" or (wish == "auto" and self.budgets.disk.usable > 0)

    # -- host and disk -----------------------------------------------------------------------------------------------

    def _host_run(self, on_device: int, streamed: int) -> int:
        """Trainable planes after the device's whose record is in host memory."""
        with_params = {plane.name for plane in self._leaving(streamed)}
        sizes = [p.record_bytes_at(apart=p.name not in with_params) for p in self._trainable[on_device:]]
        if not self._may_use_disk:
            return len(sizes)
        if self.constraints.records == "nvme":
            return 0
        room = self.budgets.host.usable - self._host_params(streamed) - self._ring(len(sizes))
        if self.budgets.shared:
            room -= self._fixed(streamed) + self._record_sums[on_device] + self._min_staging(len(sizes))
        return _prefix(sizes, room)

    def _param_tiers(self, streamed: int) -> list[ParamTier]:
        """One per plane."""
        stay = sum(plane.param_can_leave for plane in self.planes) - streamed
        seen = accumulate(int(plane.param_can_leave) for plane in self.planes)
        return [
            "host" if plane.param_can_leave and number > stay else "device"
            for plane, number in zip(self.planes, seen, strict=True)
        ]

    def _record_tiers(self, on_device: int, on_host: int) -> list[RecordTier | None]:
        """One per plane; None: frozen."""
        tiers: list[RecordTier | None] = []
        number = 0
        for plane in self.planes:
            if not plane.trainable:
                tiers.append(None)
                continue
            tiers.append("device" if number < on_device else "host" if number < on_device + on_host else "nvme")
            number += 1
        return tiers

    # -- what is used ------------------------------------------------------------------------------------------------

    def _device_use(self, placed: Sequence[PlanePlacement], streamed: int, staging: int) -> TierUse:
        return TierUse(
            self.budgets.device,
            params=sum(p.plane.param_bytes for p in placed if p.param == "device"),
            grads=sum(p.plane.grad_bytes for p in placed),
            records=sum(p.record_bytes for p in placed if p.record == "device"),
            passing=self._passing(streamed),
            staging=staging,
        )

    def _host_use(self, placed: Sequence[PlanePlacement], streamed: int, on_device: int, staging: int) -> TierUse:
        budget = self.budgets.host
        if self.budgets.shared:  # what the device's planes take of the one memory is no longer there
            used = self._device_use(placed, streamed, staging).used
            budget = type(budget)(max(budget.reserve, budget.size - used), budget.reserve)
        return TierUse(
            budget,
            params=sum(p.plane.param_bytes for p in placed if p.param == "host"),
            records=sum(p.record_bytes for p in placed if p.record == "host"),
            staging=self._ring(len(self._trainable) - on_device),
        )


def _streams(placed: PlanePlacement) -> bool:
    return placed.record == "host" and placed.executor == "device"


def _prefix(sizes: Sequence[int], room: int) -> int:
    """How many of the first `sizes` fit into `room` together."""
    return sum(total <= room for total in accumulate(sizes))


# -- who updates -------------------------------------------------------------------------------------------------------


def _split(
    planes: Sequence[PlaneDemand],
    params: Sequence[ParamTier],
    records: Sequence[RecordTier | None],
    constraints: Constraints,
    speeds: Speeds,
    num_slots: int,
) -> list[Executor | None]:
    """The executor of every plane (None: frozen): see [Note: placement order], 5; `num_slots`: of the device's ring."""
    rows = list(zip(planes, params, records, strict=True))
    streaming = [(plane, param) for plane, param, record in rows if record == "host"]
    host_rate, device_rate = _rates(streaming, constraints, speeds)
    most = chunk_numel(planes, constraints)
    busy, free = {"host": 0.0, "device": 0.0}, num_slots
    chosen: list[Executor | None] = []
    for plane, _param, record in rows:
        if record != "host":
            chosen.append(None if record is None else "device" if record == "device" else "host")
            continue
        chunks = num_chunks(plane, most)
        far = plane.owned_numel * max(0, chunks - free) / max(1, chunks)
        done = {
            "host": busy["host"] + plane.owned_numel / host_rate if host_rate else float("inf"),
            "device": busy["device"] + far / device_rate if device_rate else float("inf"),
        }
        executor: Executor = "device" if done["device"] <= done["host"] and device_rate else "host"
        busy[executor] = done[executor]
        free -= min(free, chunks) if executor == "device" else 0
        chosen.append(executor)
    return chosen


def _rates(
    streaming: Sequence[tuple[PlaneDemand, ParamTier]], constraints: Constraints, speeds: Speeds
) -> tuple[float, float]:
    """Parameters per second of the CPU and of the device, working at the same time; 0: does not take part.

    The CPU's share of the link comes first: it moves the fewer bytes per parameter; the device has the rest.
    """
    numel = sum(plane.owned_numel for plane, _ in streaming)
    if not numel or constraints.executor == "host" or (constraints.executor == "auto" and not constraints.on_cuda):
        return speeds.host_update, 0.0
    to_host = sum(link_bytes(plane, param, "host").most for plane, param in streaming) / numel
    to_device = sum(link_bytes(plane, param, "device").most for plane, param in streaming) / numel
    alone = speeds.link / to_device if to_device else speeds.device_memory
    if constraints.executor == "device":
        return 0.0, alone
    host_rate = min(speeds.host_beside, speeds.link / to_host if to_host else speeds.host_beside)
    left = speeds.link - host_rate * to_host
    return host_rate, left / to_device if to_device else alone


def link_bytes(plane: PlaneDemand, param: ParamTier, executor: Executor) -> Traffic:
    """Bytes over the link for one update of a plane whose record is not on the device.

    The CPU needs the gradient, and the old parameters where they are not with it; the device needs the record, and the
    parameters where they are not with it; each sends back what it has changed and does not keep.
    """
    hi = plane.owned_numel * plane.param_itemsize
    if executor == "host":
        grad = plane.owned_numel * plane.grad_itemsize
        return Traffic(down=grad + (hi if param == "device" else 0), up=hi if param == "device" else 0)
    moved = plane.record_bytes_at(apart=param == "device") + (hi if param == "host" else 0)
    return Traffic(down=moved, up=moved)


def traffic(placed: Sequence[PlanePlacement], constraints: Constraints) -> Traffic:
    """Bytes over each link in one step."""
    total = Traffic()
    for p in placed:
        if p.record in ("host", "nvme") and p.executor is not None and constraints.on_cuda:
            total += link_bytes(p.plane, p.param, p.executor)
        if p.param == "host" and constraints.on_cuda:
            total += Traffic(up=constraints.param_uses * p.plane.param_bytes)
        if p.record == "nvme":
            total += Traffic(read=p.record_bytes, written=p.record_bytes)
    return total


def _update_seconds(placed: Sequence[PlanePlacement], constraints: Constraints, speeds: Speeds) -> float:
    """The longest of what the update takes on each resource, all of them working at the same time."""
    update = traffic(placed, replace(constraints, param_uses=0))
    host_rate = speeds.host_beside if any(map(_streams, placed)) else speeds.host_update
    on_host = sum(p.plane.owned_numel for p in placed if p.executor == "host")
    on_device = sum(p.record_bytes + p.plane.grad_bytes for p in placed if p.executor == "device")
    return max(
        update.most / speeds.link,
        on_host / host_rate,
        2 * on_device / speeds.device_memory,
        (update.read + update.written) / speeds.disk,
    )
