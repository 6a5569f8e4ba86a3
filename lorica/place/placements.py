"""What the planner answers: every plane's placement, what each tier holds, and the table of it. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from lorica.place.demand import GIB, Budget, Executor, ParamTier, PlaneDemand, RecordTier


class PlanePlacement(NamedTuple):
    """Where one plane's parameters and record live, and what updates them (record, executor None: frozen).

    A record on the device is updated there; a record in host memory by either executor; one in files by the host's.
    """

    plane: PlaneDemand
    param: ParamTier
    record: RecordTier | None
    executor: Executor | None

    @property
    def record_bytes(self) -> int:
        """Bytes of the record on this rank."""
        return self.plane.record_bytes_at(apart=self.record != self.param)


class Traffic(NamedTuple):
    """Bytes of one step: down to the host, up to the device, read from and written to files."""

    down: int = 0
    up: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: object) -> Traffic:
        if not isinstance(other, Traffic):
            return NotImplemented
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def most(self) -> int:
        """Bytes of the busier direction between host and device."""
        return max(self.down, self.up)


@dataclass(frozen=True)
class TierUse:
    """Bytes that one rank uses of a tier: `passing` is gathered units and the like, `staging` chunks of records."""

    budget: Budget
    params: int = 0
    grads: int = 0
    records: int = 0
    passing: int = 0
    staging: int = 0

    @property
    def used(self) -> int:
        """All together."""
        return self.params + self.grads + self.records + self.passing + self.staging

    @property
    def left(self) -> int:
        """Bytes of the budget that are free; negative: missing."""
        return self.budget.usable - self.used

    @property
    def short(self) -> int:
        """Bytes that are missing."""
        return max(0, -self.left)


class Row(NamedTuple):
    """One line of the table: units with the same placement, or something that is no unit's."""

    units: str
    parameters: str
    weights: str
    gradients: str
    states: str
    updated_by: str
    device: int
    host: int
    disk: int


@dataclass(frozen=True)
class Placements:
    """Every plane's placement, in the order of the demands; `chunk_numel`: elements of a chunk of the rings.

    `traffic` is what a step moves, `update_seconds` how long the update takes if nothing hides it.
    """

    planes: tuple[PlanePlacement, ...]
    device: TierUse
    host: TierUse
    disk: TierUse
    chunk_numel: int
    traffic: Traffic
    update_seconds: float

    @property
    def staging_bytes(self) -> int:
        """Device bytes of the ring through which records stream."""
        return self.device.staging

    @property
    def tiers(self) -> dict[str, TierUse]:
        """By name: device, host, disk."""
        return {"device": self.device, "host": self.host, "disk": self.disk}

    @property
    def fits(self) -> bool:
        """Whether every tier is within its budget."""
        return all(tier.short == 0 for tier in self.tiers.values())

    @property
    def numel(self) -> int:
        """Elements of the model."""
        return sum(p.plane.numel for p in self.planes)

    # -- for people --------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """The lines of the table that add up to what each tier holds."""
        trainable = [p for p in self.planes if p.plane.trainable]
        frozen = [p for p in self.planes if not p.plane.trainable]
        rows = [*_groups(trainable), *_groups(frozen)]
        for name, uses in (("passing through", [t.passing for t in self.tiers.values()]), ("staging", self._staging)):
            if any(uses):
                rows.append(_plain(name, uses))
        return rows

    @property
    def _staging(self) -> list[int]:
        return [tier.staging for tier in self.tiers.values()]

    def table(self) -> str:
        """The placement as aligned text, a line per group of units with the same placement, totals last."""
        tiers = list(self.tiers.values())
        rows = self.rows()
        rows += [
            _plain("total", [tier.used for tier in tiers]),
            _plain("budget", [tier.budget.usable for tier in tiers]),
            _plain("left", [tier.left for tier in tiers]),
        ]
        return "\n".join(["placement of the model states on each rank:", *_aligned(rows), self.speed_line()])

    def speed_line(self) -> str:
        """What a step moves, in one line."""
        down, up, read, written = self.traffic
        parts = [f"{size_text(up)} to the device and {size_text(down)} to the host"]
        if read or written:
            parts.append(f"{size_text(read)} read from disk and {size_text(written)} written")
        return f"each step: {', '.join(parts)}; {self.update_seconds:.2g} s of update if nothing hid it"


def _groups(placed: Sequence[PlanePlacement]) -> Iterator[Row]:
    """Neighbours with the same tiers as one row."""
    for (param, record), group in groupby(placed, key=lambda p: (p.param, p.record)):
        members = list(group)
        by_tier = {"device": 0, "host": 0, "nvme": 0}
        for p in members:
            by_tier[p.param] += p.plane.param_bytes
            by_tier["device"] += p.plane.grad_bytes
            if p.record is not None:
                by_tier[p.record] += p.record_bytes
        yield Row(
            _unit_range(members),
            count_text(sum(p.plane.numel for p in members)),
            param,
            "device" if record is not None else "frozen",
            "-" if record is None else "disk" if record == "nvme" else record,
            _executors(members),
            *by_tier.values(),
        )


def _unit_range(members: Sequence[PlanePlacement]) -> str:
    """The units of some planes: 0-3,7."""
    runs: list[list[int]] = []
    for index in sorted({p.plane.unit_index for p in members}):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _executors(members: Sequence[PlanePlacement]) -> str:
    """Who updates, with the share of each if both do."""
    numel: dict[str, int] = {"host": 0, "device": 0}
    for p in members:
        if p.executor is not None:
            numel[p.executor] += p.plane.owned_numel
    active = [name for name in numel if any(p.executor == name for p in members)]
    if len(active) < 2:
        return active[0] if active else "-"
    return ", ".join(f"{name} {numel[name] / max(1, sum(numel.values())):.0%}" for name in active)


def _plain(name: str, uses: Sequence[int]) -> Row:
    return Row(name, "", "", "", "", "", *uses)


def _aligned(rows: Sequence[Row]) -> list[str]:
    cells = [["units", "parameters", "weights", "gradients", "states", "updated by", "device", "host", "disk"]]
    cells += [[*row[:6], *(size_text(count) for count in row[6:])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        words = [f"{cell:<{width}}" for cell, width in zip(line[:6], widths, strict=False)]
        numbers = [f"{cell:>{width}}" for cell, width in zip(line[6:], widths[6:], strict=True)]
        lines.append("  " + "  ".join([*words, *numbers]).rstrip())
    return lines


def size_text(count: int) -> str:
    """Bytes for people; "-" for none."""
    if count == 0:
        return "-"
    return f"{count / GIB:.2f} GiB" if abs(count) >= GIB else f"{count / 2**20:.1f} MiB"


def count_text(count: int) -> str:
    """A number of parameters for people."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
