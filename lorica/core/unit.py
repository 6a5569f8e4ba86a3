"""A unit: the granularity at which parameters are gathered and gradients reduced (normally one transformer block)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorica.core.flat import Flat
from lorica.core.gradient import GradPlane


class Unit:
    """The planes behind some modules, and how deep the present forward pass is inside those modules."""

    def __init__(self, index: int, name: str, modules: Sequence[nn.Module], *, is_root: bool) -> None:
        self.index, self.name, self.modules, self.is_root = index, name, list(modules), is_root
        self.flats: list[Flat] = []
        self.grads: list[GradPlane] = []
        self.depth = 0  # nested calls of this unit's modules
        self.visited = False  # ran since the last backward
        self.externals: list[Unit] = []  # units whose parameters this unit's forward uses directly

    def __repr__(self) -> str:
        return f"Unit({self.name}, {self.numel} elements, {len(self.flats)} planes)"

    @property
    def numel(self) -> int:
        """Elements of all planes, padding included."""
        return sum(flat.layout.numel for flat in self.flats)

    @property
    def sharded_numel(self) -> int:
        """Elements that exist only while the unit is gathered."""
        return sum(flat.layout.numel for flat in self.flats if flat.sharded)

    @property
    def num_trainable(self) -> int:
        """Parameters for which a gradient is expected."""
        return sum(len(grad.flat.params) for grad in self.grads)

    @property
    def is_full(self) -> bool:
        """Whether every parameter can be used now."""
        return all(flat.is_full for flat in self.flats)

    @property
    def holds_up(self) -> bool:
        """Whether using it would make the host wait for an update that is under way."""
        return any(flat.holds_up for flat in self.flats)

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part in gathering it: then timing may decide when that is."""
        return all(flat.comm.world_size == 1 for flat in self.flats)

    def unshard(self) -> None:
        """Start gathering what is sharded."""
        for flat in self.flats:
            flat.unshard()

    def wait(self) -> None:
        """Make the parameters usable."""
        for flat in self.flats:
            flat.wait()

    def reshard(self) -> None:
        """Free what can be gathered again."""
        for flat in self.flats:
            flat.wait()
            flat.reshard()
