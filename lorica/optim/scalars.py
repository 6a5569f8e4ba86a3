"""The hyper-parameters of a step on the device: one small copy per step, and the right row of it whatever was skipped.

    table   [ROWS, groups, NUM_HYPER]   what the host thought the last steps to be, in a ring
    lag     [1]                         steps that were skipped on the device and that the host does not know of yet
    now     [groups, NUM_HYPER]         the row that the kernels read: the host's present one, `lag` rows back

The host goes on as if every step were applied (`update/assumption.py`). After a skipped step it is one ahead: its
learning rate and bias correction are those of the step after. The device then takes the row before, which is what a
host that had waited would have sent. Computes no hyper-parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NUM_HYPER = 12
ROWS = 8  # more than the steps that may be open


class DeviceScalars:
    """Scalars at addresses that stay the same, so that a captured launch reads the new values."""

    def __init__(self, hyper: Callable[[dict[str, Any], int], tuple[float, ...]]) -> None:
        """Remember how the scalars of a group at a step are computed."""
        self._hyper = hyper
        self._table: Tensor | None = None
        self._row_of: dict[int, int] = {}
        self._step = self._place = 0

    def write(self, groups: Sequence[dict[str, Any]], step: int, device: torch.device) -> None:
        """Bring the scalars of all `groups` at `step` to the device; does not wait for it."""
        values = (self._hyper(group, step) for group in groups)
        rows = [(*row, *[0.0] * (NUM_HYPER - len(row))) for row in values]
        fresh = torch.tensor(rows, dtype=torch.float32, pin_memory=device.type == "cuda")
        if self._table is None or self._table.shape[1:] != fresh.shape or self._table.device != device:
            self._table = fresh.to(device, non_blocking=True).repeat(ROWS, 1, 1)
            self._now = torch.empty(1, *fresh.shape, device=device)
            self._lag = torch.zeros(1, dtype=torch.int64, device=device)
        self._place = (self._place + step - self._step) % ROWS  # back, if the host has learnt of a skipped step
        self._table[self._place].copy_(fresh, non_blocking=True)
        torch.index_select(self._table, 0, (self._place - self._lag) % ROWS, out=self._now)
        self._row_of, self._step = {id(group): index for index, group in enumerate(groups)}, step

    def row(self, group: dict[str, Any], step: int, device: torch.device) -> Tensor:
        """The row [NUM_HYPER] of `group`; written now if `write` has not been called for this step and group."""
        index = self._row_of.get(id(group))
        if index is None or step != self._step or self._table is None:
            self.write([group], step, device)
            index = 0
        return self._now[0, index]

    def note(self, apply: Tensor) -> None:
        """A step has been launched that the device may have skipped. Args: apply: [1] int32."""
        self._lag += 1 - apply

    def know(self, num_skipped: int) -> None:
        """The host has learnt of skipped steps: the steps that it sends from now on are counted without them."""
        self._lag -= num_skipped
