"""The only place that makes CUDA streams and events. Owns no buffer: who launches work on a stream keeps its tensors.

[Note: lifetimes] Collectives through `torch.distributed` run on NCCL's own stream, which waits for the current stream
at launch; `handle.wait()` makes the current stream wait for them. A buffer that a collective uses is therefore safe to
free on the current stream after `wait()`, and every transport keeps a reference until then. Copies between device and
host run on the side streams made here ("d2h", "h2d"); an event behind each copy is what its consumer waits for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class Arrival:
    """A small tensor on its way to the host."""

    def __init__(self, host: Tensor, event: torch.cuda.Event) -> None:
        self._host, self._event = host, event

    def query(self) -> bool:
        """Whether it is there."""
        return bool(self._event.query())

    def wait(self) -> Tensor:
        """Wait for it, if it is not there."""
        if not self.query():
            self._event.synchronize()
        return self._host


class Behind:
    """Work on a side stream as a handle: whoever waits for it goes on behind it."""

    def __init__(self, streams: Streams, event: Any) -> None:
        self._streams, self._event = streams, event

    def wait(self) -> None:
        """Let the current stream wait."""
        self._streams.wait(self._event)


class Streams(Protocol):
    """What transfers need of a device: side streams, and events that order work between them."""

    def stream(self, name: str) -> AbstractContextManager[None]:
        """Run the body's device work on the side stream `name`."""
        ...

    def record(self) -> Any:
        """An event behind what the current stream has been given so far."""
        ...

    def wait(self, event: Any) -> None:
        """Let the current stream wait for `event`; the host goes on."""
        ...

    def synchronize(self, event: Any) -> None:
        """Let the host wait for `event`."""
        ...


class HostStreams:
    """The streams of a CPU: there, a call that returns has done its work."""

    def stream(self, name: str) -> AbstractContextManager[None]:
        """Nothing to switch."""
        return nullcontext()

    def record(self) -> None:
        """Everything before is done."""

    def wait(self, event: Any) -> None:
        """It is done."""

    def synchronize(self, event: Any) -> None:
        """It is done."""


class CudaStreams:
    """Side streams of one device, made at first use, and events on whatever stream is current."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Run the body's device work on the side stream `name`; works from any thread."""
        with torch.cuda.device(self._device):
            side = self._streams.get(name)
            if side is None:
                side = self._streams.setdefault(name, torch.cuda.Stream(self._device))
            with torch.cuda.stream(side):
                yield

    def record(self) -> torch.cuda.Event:
        """An event behind what the current stream has been given so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream wait for `event` (None: for nothing); the host goes on."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def synchronize(self, event: torch.cuda.Event | None) -> None:
        """Let the host wait for `event`; other Python threads run meanwhile."""
        if event is not None:
            event.synchronize()

    def fetch(self, value: Tensor) -> Arrival:
        """Start bringing a small tensor to the host."""
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        return Arrival(host, self.record())

    def timer(self) -> torch.cuda.Event:
        """An event that can tell the time; the caller records it."""
        return torch.cuda.Event(enable_timing=True)

    def pin(self, host: Tensor) -> None:
        """Page-lock the memory of `host`.

        Raises:
            RuntimeError: if CUDA refuses (usually: more locked memory than the system allows).
        """
        self.register(host.data_ptr(), host.numel() * host.element_size())

    def unpin(self, host: Tensor) -> None:
        """Undo `pin`."""
        self.unregister(host.data_ptr())

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock host memory; works from any thread. Errors as in `pin`."""
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
        if code:
            raise RuntimeError(
                f"cudaHostRegister of {num_bytes} bytes: expected success, got error {code}. "
                "Fix: raise `ulimit -l`, or free host memory."
            )

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)


def make_streams(device: torch.device) -> CudaStreams | None:
    """The streams of a CUDA device; None on the CPU, where nothing is asynchronous."""
    return CudaStreams(device) if device.type == "cuda" else None
