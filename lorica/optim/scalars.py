"""The hyper-parameters of a step on the device: one row per param group, one small copy per step. Computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NUM_HYPER = 12


class DeviceScalars:
    """A table [groups, NUM_HYPER] fp32 whose address stays the same, so that a captured launch reads the new values."""

    def __init__(self, hyper: Callable[[dict[str, Any], int], tuple[float, ...]]) -> None:
        """Remember how the scalars of a group at a step are computed."""
        self._hyper = hyper
        self._table: Tensor | None = None
        self._row_of: dict[int, int] = {}
        self._step = 0

    def write(self, groups: Sequence[dict[str, Any]], step: int, device: torch.device) -> None:
        """Bring the scalars of all `groups` at `step` to the device; does not wait for it."""
        rows = [(*values, *[0.0] * (NUM_HYPER - len(values))) for values in (self._hyper(g, step) for g in groups)]
        table = torch.tensor(rows, dtype=torch.float32, pin_memory=device.type == "cuda")
        if self._table is None or self._table.shape != table.shape or self._table.device != device:
            self._table = torch.empty_like(table, device=device, pin_memory=False)
        self._table.copy_(table, non_blocking=True)
        self._row_of, self._step = {id(group): index for index, group in enumerate(groups)}, step

    def row(self, group: dict[str, Any], step: int, device: torch.device) -> Tensor:
        """The row [NUM_HYPER] of `group`; written now if `write` has not been called for this step and group."""
        index = self._row_of.get(id(group))
        if index is None or step != self._step or self._table is None:
            self.write([group], step, device)
            index = 0
        assert self._table is not None
        return self._table[index]
