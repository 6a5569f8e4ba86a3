"""Recycled buffers: who holds which, and which one to reuse next. It neither reads nor sends what is in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

MAX_SLOTS = 2  # one being reduced while the next is packed


class SlotState(Enum):
    """FREE -> GIVEN (the caller packs it) -> FLYING (a collective reads it) -> FREE."""

    FREE = "free"
    GIVEN = "given"
    FLYING = "flying"


@dataclass(eq=False)
class Slot:
    """One buffer and the tensor that was last handed out on it."""

    memory: Tensor  # uint8
    given: Tensor
    state: SlotState

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.memory.numel()


class SlotPool:
    """Hands out buffers of any dtype and takes them back; at most `MAX_SLOTS` are kept.

    Args:
        allocate: makes uint8 memory of that many bytes.
        reclaim: completes the collective that reads this flying slot and calls `retire`; used when all slots are busy.
    """

    def __init__(self, allocate: Callable[[int], Tensor], reclaim: Callable[[Slot], None]) -> None:
        self._allocate = allocate
        self._reclaim = reclaim
        self._slots: list[Slot] = []  # in the order in which they were last handed out

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor [numel] on a recycled buffer where there is one."""
        num_bytes = numel * dtype.itemsize
        slot = self._choose(num_bytes)
        if slot is None:
            slot = Slot(self._allocate(num_bytes), torch.empty(0), SlotState.FREE)
        elif slot in self._slots:
            self._slots.remove(slot)
        self._slots.append(slot)
        slot.state = SlotState.GIVEN
        slot.given = slot.memory[:num_bytes].view(dtype)
        return slot.given

    def launch(self, tensor: Tensor) -> Slot | None:
        """Mark the slot that `tensor` was handed out on as flying; None if `tensor` is not from this pool.

        Raises:
            ValueError: if `tensor` is only a part of what was handed out.
            RuntimeError: if the buffer was launched before.
        """
        slot = self._find(tensor)
        if slot is None:
            return None
        if slot.state is not SlotState.GIVEN:
            raise RuntimeError(
                f"reduce_scatter: the staging buffer was given back before (it is {slot.state.value}). "
                "Fix: call staging() anew for every reduce_scatter."
            )
        if tensor.numel() != slot.given.numel() or tensor.dtype != slot.given.dtype:
            raise ValueError(
                f"reduce_scatter: full must be the whole tensor that staging() returned, {slot.given.numel()} x "
                f"{slot.given.dtype}, got {tensor.numel()} x {tensor.dtype}. Fix: call staging() once for each call."
            )
        slot.state = SlotState.FLYING
        return slot

    def retire(self, slot: Slot) -> None:
        """Take a slot back: nobody reads it any more."""
        slot.state = SlotState.FREE
        if len(self._slots) > MAX_SLOTS:
            self._slots.remove(slot)

    def clear(self) -> None:
        """Drop all buffers."""
        self._slots.clear()

    def _find(self, tensor: Tensor) -> Slot | None:
        address = tensor.data_ptr()
        for slot in self._slots:
            start = slot.memory.data_ptr()
            if start <= address < start + slot.capacity_bytes:
                return slot
        return None

    def _choose(self, num_bytes: int) -> Slot | None:
        """Pick a slot to reuse, waiting for one rather than growing; None: make a new one."""
        fitting = [slot for slot in self._slots if slot.capacity_bytes >= num_bytes]
        free = [slot for slot in fitting if slot.state is SlotState.FREE]
        if free:
            return min(free, key=lambda slot: slot.capacity_bytes)
        if len(self._slots) < MAX_SLOTS:
            return None
        for slot in fitting:
            if slot.state is SlotState.FLYING:
                self._reclaim(slot)
                return slot
        self._drop_one()
        return None

    def _drop_one(self) -> None:
        """Make room for a larger buffer by dropping one that is too small, unless the caller holds them all."""
        small = next((slot for slot in self._slots if slot.state is SlotState.FREE), None)
        if small is None:
            small = next((slot for slot in self._slots if slot.state is SlotState.FLYING), None)
            if small is None:
                return
            self._reclaim(small)
        if small in self._slots:
            self._slots.remove(small)
