"""What a forward saves for its backward, in host memory meanwhile. Owns buffers and transfers; decides nothing else.

Autograd hands every tensor that it saves to `_park` and asks for it again in backward. Large ones go to host memory on
a stream of their own, and come back one ahead of their use: backward asks in the reverse order. Under activation
checkpointing only the inputs of checkpointed blocks are saved outside of them: those are what travels then.

[Note: what stays] Parameters, and views of them that a layer saves, stay where they are: their memory is a plane's,
which is freed and gathered again under the same storage (`core/flat.py`).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lorica.core.streams import Streams

MIN_BYTES = 1 << 20  # smaller tensors are not worth a transfer
MAX_LEAVING = 3  # tensors on their way to the host that still hold device memory
AWAY, BACK = "activations down", "activations up"

Free = list[tuple[Tensor, Any]]  # buffers, and the event behind which each is free


class _Parked:
    """One saved tensor in host memory, laid out as it was: compiled code insists on strides."""

    def __init__(self, original: Tensor, host: Tensor, left: Any) -> None:
        self.device = original.device
        self.host, self.left = host, left  # of its shape and strides; the event behind which it is there
        self.back: tuple[Tensor, Any] | None = None  # on its way back, and the event behind which it is there
        self.changed = False  # the original was written to before it had left
        self.before: weakref.ref[_Parked] | None = None  # saved before this one


class HostActivations:
    """The saved tensors of one engine's forwards.

    Attributes:
        moved_bytes: sent to host memory since the start.
    """

    def __init__(
        self,
        streams: Streams,
        alloc: Callable[[int, torch.dtype], Tensor],
        stays: Callable[[Tensor], bool],
        *,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        """Start with no buffers.

        Args:
            alloc: host memory of so many bytes (page-locked for an accelerator).
            stays: whether a tensor must stay where it is. See [Note: what stays].
        """
        self._streams, self._alloc, self._stays, self._min_bytes = streams, alloc, stays, min_bytes
        self._free: Free = []
        self._leaving: deque[tuple[_Parked, Tensor, int]] = deque()
        self._last: weakref.ref[_Parked] | None = None
        self.moved_bytes = 0

    def saving(self) -> AbstractContextManager[None]:
        """Whatever is saved inside goes to host memory."""
        return saved_tensors_hooks(self._park, self._bring_back)

    # -- to the host ---------------------------------------------------------------------------------------------------

    def _park(self, tensor: Tensor) -> Tensor | _Parked:
        size = tensor.numel() * tensor.element_size()
        if size < self._min_bytes or tensor.layout is not torch.strided or self._stays(tensor):
            return tensor
        buffer, free = self._buffer(size)
        host = buffer[:size].view(tensor.dtype).as_strided(tensor.shape, _strides(tensor))
        ready = self._streams.record()
        with self._streams.stream(AWAY):
            self._streams.wait(ready)
            self._streams.wait(free)
            host.copy_(tensor, non_blocking=True)
            left = self._streams.record()
        parked = _Parked(tensor, host, left)
        weakref.finalize(parked, _give_back, self._streams, self._free, buffer, parked.__dict__).atexit = False
        parked.before, self._last = self._last, weakref.ref(parked)
        self._leaving.append((parked, tensor, tensor._version))
        while len(self._leaving) > MAX_LEAVING:
            self._let_go()
        self.moved_bytes += size
        return parked

    def _buffer(self, num_bytes: int) -> tuple[Tensor, Any]:
        """The smallest free buffer that holds so much, or a new one in the place of the largest of those that do not.

        So there are never more of them than were in use at a time, whatever the lengths of sequences.
        """
        sizes = [buffer.numel() for buffer, _ in self._free]
        if fitting := [index for index, size in enumerate(sizes) if size >= num_bytes]:
            return self._free.pop(min(fitting, key=sizes.__getitem__))
        if sizes:
            self._streams.synchronize(self._free.pop(sizes.index(max(sizes)))[1])
            num_bytes += num_bytes // 8  # lengths vary: the next one may be a little longer
        return self._alloc(num_bytes, torch.uint8), None

    def _let_go(self) -> None:
        """Give the device memory of the oldest tensor that is leaving free, behind its departure."""
        parked, tensor, version = self._leaving.popleft()
        self._streams.wait(parked.left)
        parked.changed = tensor._version != version

    # -- back ----------------------------------------------------------------------------------------------------------

    def _bring_back(self, saved: Tensor | _Parked) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        while self._leaving:
            self._let_go()
        if saved.changed:
            raise RuntimeError(
                "A tensor that backward needs was modified by an in-place operation after it was saved: expected its "
                f"values at the time of saving (shape {tuple(saved.host.shape)}). Fix: use the out-of-place operation, "
                "or set lorica.offload.activations to false."
            )
        tensor, there = self._start_back(saved)
        saved.back = None
        self._streams.wait(there)
        following = saved.before() if saved.before is not None else None
        if following is not None:
            following.back = self._start_back(following)
        return tensor

    def _start_back(self, parked: _Parked) -> tuple[Tensor, Any]:
        if parked.back is not None:
            return parked.back
        tensor = torch.empty_strided(
            parked.host.shape, parked.host.stride(), dtype=parked.host.dtype, device=parked.device
        )
        ready = self._streams.record()
        with self._streams.stream(BACK):
            self._streams.wait(ready)
            self._streams.wait(parked.left)
            tensor.copy_(parked.host, non_blocking=True)
            parked.left = self._streams.record()  # the buffer is free behind this too
            return tensor, parked.left


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of the tensor, if it fills its memory; else those of a contiguous one."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()


def _give_back(streams: Streams, free: Free, buffer: Tensor, state: dict[str, Any]) -> None:
    """A saved tensor is gone: its buffer can hold another, behind its last transfer."""
    if state["back"] is not None:  # fetched in vain: device memory is given back behind its arrival
        streams.wait(state["back"][1])
    free.append((buffer, state["left"]))
