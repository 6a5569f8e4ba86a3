"""The grid of ranks and its named axes: which ranks form a group. It imports no torch and communicates nothing."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

# Outermost first: the last axis varies fastest, so tensor-parallel ranks are neighbours on one host, where links are
# fast, while pipeline stages, which exchange least, lie farthest apart. Data parallelism is between them, its replicas
# outside of its shards. This is the order of DeepSpeed's topology (pipe, data, model).
AXES = ("pp", "dp_replicate", "dp_shard", "ep", "sp", "tp")

# Names for several axes at once.
UNIONS = {"dp": ("dp_replicate", "dp_shard")}

BOUND_CORES = "LORICA_BOUND_CORES"  # set by the launcher for a rank that it binds to CPUs of its own: how many


class Axis(NamedTuple):
    """One axis of the grid."""

    name: str
    size: int


class Mesh(NamedTuple):
    """All ranks of a job as a grid: rank = the row-major index of its coordinate along `axes`."""

    axes: tuple[Axis, ...]

    @classmethod
    def build(cls, world_size: int, **sizes: int) -> Mesh:
        """Lay out `world_size` ranks; sizes that are not given are 1, and data parallelism takes what is left.

        `Mesh.build(8)` shards over all 8 ranks. `Mesh.build(8, dp_shard=4)` keeps 2 replicas of 4 shards each (MiCS,
        HSDP). `Mesh.build(8, tp=2, dp_replicate=2)` has 2 replicas of 2 shards, each split over 2 ranks.

        Args:
            world_size: number of ranks.
            sizes: by axis name, one of `AXES`; "dp" is the product of dp_replicate and dp_shard.
        Raises:
            ValueError: if the sizes do not fit the world size.
        """
        _require_sizes(world_size, sizes)
        rest = _left_for_data(world_size, sizes)
        replicate, shard = sizes.get("dp_replicate"), sizes.get("dp_shard")
        if replicate is None:
            replicate = _divide(rest, shard, "dp_shard", world_size, sizes) if shard is not None else 1
        if shard is None:
            shard = _divide(rest, replicate, "dp_replicate", world_size, sizes)
        if replicate * shard != rest:
            raise ValueError(
                f"Mesh: {_shown(sizes)} use {world_size // rest * replicate * shard} ranks, "
                f"got world_size={world_size}. "
                "Fix: leave out dp_replicate or dp_shard: it is derived."
            )
        sizes = {**sizes, "dp_replicate": replicate, "dp_shard": shard}
        return cls(tuple(Axis(name, sizes.get(name, 1)) for name in AXES))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(axis.size for axis in self.axes)

    def size(self, *axes: str) -> int:
        """Number of ranks of a group over `axes`."""
        names = _expand(axes)
        return prod(axis.size for axis in self.axes if axis.name in names)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the position of `rank` along every axis."""
        self._require_rank(rank)
        position: dict[str, int] = {}
        for axis in reversed(self.axes):
            rank, position[axis.name] = divmod(rank, axis.size)
        return dict(reversed(position.items()))

    def rank_at(self, **position: int) -> int:
        """Return the rank at a coordinate; axes that are not given are at 0."""
        _expand(tuple(position))
        rank = 0
        for axis in self.axes:
            index = position.get(axis.name, 0)
            if not 0 <= index < axis.size:
                raise ValueError(f"Mesh: axis {axis.name} has positions 0 to {axis.size - 1}, got {index}.")
            rank = rank * axis.size + index
        return rank

    def group_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Return the ranks, ascending, that differ from `rank` along `axes` only."""
        names = _expand(axes)
        position = self.coordinate(rank)
        first = self.rank_at(**{name: index for name, index in position.items() if name not in names})
        return tuple(first + step for step in self._steps(names))

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """Return all groups over `axes`; every rank is in exactly one. Ascending by first rank."""
        names = _expand(axes)
        steps = self._steps(names)
        return tuple(tuple(first + step for step in steps) for first in self._steps(frozenset(AXES) - names))

    def _steps(self, names: frozenset[str]) -> list[int]:
        """Return the ranks that are at 0 on all axes but `names`, ascending."""
        ranges = [range(axis.size if axis.name in names else 1) for axis in self.axes]
        strides = [prod(axis.size for axis in self.axes[i + 1 :]) for i in range(len(self.axes))]
        return [sum(i * stride for i, stride in zip(indices, strides, strict=True)) for indices in product(*ranges)]

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"Mesh: expected a rank from 0 to {self.world_size - 1}, got {rank} ({self}).")

    def __str__(self) -> str:
        large = [f"{axis.name}={axis.size}" for axis in self.axes if axis.size > 1]
        return f"Mesh({', '.join(large) or 'one rank'})"


def _expand(axes: tuple[str, ...]) -> frozenset[str]:
    names = frozenset(name for axis in axes for name in UNIONS.get(axis, (axis,)))
    unknown = sorted(names - set(AXES))
    if unknown:
        raise ValueError(f"Mesh: unknown axis {', '.join(unknown)}. Fix: use one of {', '.join((*AXES, *UNIONS))}.")
    return names


def _require_sizes(world_size: int, sizes: dict[str, int]) -> None:
    _expand(tuple(sizes))
    for name, size in {"world_size": world_size, **sizes}.items():
        if size < 1:
            raise ValueError(f"Mesh: {name} must be at least 1, got {size}.")


def _left_for_data(world_size: int, sizes: dict[str, int]) -> int:
    """Return how many ranks are left for data parallelism; checks "dp" if it was given, and removes it."""
    others = {name: size for name, size in sizes.items() if name not in (*UNIONS, *UNIONS["dp"])}
    model = prod(others.values())
    rest, remainder = divmod(world_size, model)
    if remainder:
        raise ValueError(
            f"Mesh: world_size={world_size} is not a multiple of {_shown(others)} = {model}. "
            "Fix: start a multiple of that many ranks, or make one of the axes smaller."
        )
    dp = sizes.pop("dp", rest)
    if dp != rest:
        raise ValueError(
            f"Mesh: dp={dp} does not fit world_size={world_size}"
            f"{' with ' + _shown(others) if others else ''}, which leaves dp={rest}. Fix: leave dp out: it is derived."
        )
    return rest


def _divide(rest: int, size: int, name: str, world_size: int, sizes: dict[str, int]) -> int:
    quotient, remainder = divmod(rest, size)
    if remainder or quotient == 0:
        raise ValueError(
            f"Mesh: {name}={size} does not divide the {rest} data-parallel ranks "
            f"(world_size={world_size}, {_shown(sizes)}). Fix: choose a divisor of {rest}."
        )
    return quotient


def _shown(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items())
