"""Where each parameter lies in a flat plane, and which part of it each shard holds. Arithmetic only: no tensors.

    plane    |<- slot 0 ->|pad|<- slot 1 ->|pad|<---- slot 2 ---->|pad ... pad|
    shards   |<------ shard 0 ------>|<------ shard 1 ------>|<-- shard 2 --->|

Every slot starts at a multiple of `ALIGN` elements and every shard holds the same multiple of `ALIGN`, so a vectorised
kernel never meets a ragged end and a plane cut anywhere at a multiple of `ALIGN` gives the same bits. Parameters of one
optimizer param group are neighbours: an optimizer call is one contiguous range per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

ALIGN = 128


class Entry(NamedTuple):
    """A parameter to be laid out: its name, shape, and the index of its optimizer param group (-1: no optimizer)."""

    name: str
    shape: tuple[int, ...]
    group: int


class Slot(NamedTuple):
    """A parameter's place in a plane: elements [start, stop)."""

    name: str
    shape: tuple[int, ...]
    group: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Overlap(NamedTuple):
    """Elements [begin, end) of slot number `slot`, which lie at `offset` of the range that was asked for."""

    slot: int
    begin: int
    end: int
    offset: int

    @property
    def place(self) -> slice:
        """Where it lies in the range that was asked for."""
        return slice(self.offset, self.offset + self.end - self.begin)


class GroupRange(NamedTuple):
    """A contiguous range [start, stop) of a plane that belongs to one optimizer param group."""

    group: int
    start: int
    stop: int


def round_up(numel: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `numel`."""
    return -(-numel // multiple) * multiple


CHUNK_ALIGN = 4096  # elements: whole blocks of a file for every dtype, whole cache lines for every thread


def chunk_size(numel: int, most: int) -> int:
    """Elements of the chunks in which `numel` elements travel: as few as have at most `most` each, and of equal size.

    A multiple of `CHUNK_ALIGN`, but for the last chunk, which is what remains.
    """
    most = max(CHUNK_ALIGN, most // CHUNK_ALIGN * CHUNK_ALIGN)
    return round_up(-(-numel // max(1, -(-numel // most))), CHUNK_ALIGN) if numel else CHUNK_ALIGN


@dataclass(frozen=True)
class Layout:
    """The slots of one plane of `numel` elements, cut into `num_shards` equal shards."""

    slots: tuple[Slot, ...]
    numel: int
    num_shards: int

    @property
    def shard_numel(self) -> int:
        """Elements in each shard."""
        return self.numel // self.num_shards

    def shard_range(self, rank: int) -> tuple[int, int]:
        """The plane elements [start, stop) that shard `rank` holds."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def overlaps(self, start: int, stop: int) -> Iterator[Overlap]:
        """What the plane range [start, stop) holds of each parameter, in order."""
        for index, slot in enumerate(self.slots):
            low, high = max(start, slot.start), min(stop, slot.stop)
            if low < high:
                yield Overlap(index, low - slot.start, high - slot.start, low - start)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The ranges that belong to no parameter (alignment and the end of the plane)."""
        gaps, position = [], 0
        for slot in self.slots:
            if slot.start > position:
                gaps.append((position, slot.start))
            position = max(position, slot.stop)
        if position < self.numel:
            gaps.append((position, self.numel))
        return tuple(gaps)

    @cached_property
    def group_ranges(self) -> tuple[GroupRange, ...]:
        """The plane as one range per optimizer param group; each range includes the padding behind its slots."""
        ranges: list[GroupRange] = []
        for slot in self.slots:
            if not ranges or ranges[-1].group != slot.group:
                if ranges:
                    ranges[-1] = ranges[-1]._replace(stop=slot.start)
                ranges.append(GroupRange(slot.group, slot.start, self.numel))
        return tuple(part for part in ranges if part.start < part.stop)

    def group_parts(self, start: int, stop: int) -> list[GroupRange]:
        """`group_ranges` cut to the plane range [start, stop)."""
        parts = (GroupRange(r.group, max(start, r.start), min(stop, r.stop)) for r in self.group_ranges)
        return [part for part in parts if part.start < part.stop]


def build_layout(entries: Sequence[Entry], num_shards: int, align: int = ALIGN) -> Layout:
    """Lay `entries` out one after the other, sorted (stably) by param group.

    Args:
        entries: the parameters of one plane.
        num_shards: number of equal shards; the plane is padded at its end to a multiple of `num_shards * align`.
        align: elements; every slot and every shard starts at a multiple of it.
    """
    slots, position = [], 0
    for entry in sorted(entries, key=lambda e: e.group):
        numel = prod(entry.shape)
        slots.append(Slot(entry.name, entry.shape, entry.group, position, position + numel))
        position += round_up(numel, align)
    return Layout(tuple(slots), round_up(max(position, 1), num_shards * align), num_shards)
