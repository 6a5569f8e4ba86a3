"""The monitor of an engine: hands events to every writer that the configuration enables. Knows no file format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lorica.monitor.csv_files import CSVWriter
from lorica.monitor.events import Event, Writer
from lorica.monitor.tensorboard import TensorBoardWriter
from lorica.monitor.wandb import WandBWriter

if TYPE_CHECKING:
    from lorica.config.monitoring import MonitoringKeys

# One writer per block of the configuration; each is made from its block.
WRITERS: dict[str, Callable[[Any], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandBWriter,
    "csv_monitor": CSVWriter,
}


class Monitor:
    """Writes events on rank 0; the same calls do nothing on other ranks."""

    def __init__(self, config: MonitoringKeys, rank: int) -> None:
        """Open the enabled writers, on rank 0 only.

        Args:
            config: a `Config`; only its monitoring blocks are read.
            rank: of this process among all of the run.
        Raises:
            ImportError: if an enabled writer needs a package that is not installed.
        """
        names = [name for name in WRITERS if getattr(config, name).enabled]
        self.enabled = bool(names)
        self._writers = [WRITERS[name](getattr(config, name)) for name in names] if rank == 0 else []
        self._closed = False

    @property
    def writes(self) -> bool:
        """Whether this rank writes: elsewhere a value need not even be read from the device."""
        return bool(self._writers)

    def write_events(self, events: Iterable[tuple[str, Any, int]]) -> None:
        """Record events.

        Args:
            events: (tag, value, step) each; the value is a number or a tensor of one element (read here, on rank 0).
        Raises:
            ValueError: if an event is something else.
            RuntimeError: after `close`.
        """
        if self._closed:
            raise RuntimeError(
                "Monitor: expected an open monitor, got a closed one. Fix: write before engine.destroy()."
            )
        if not self._writers:
            return
        checked = [_event(item) for item in events]
        for writer in self._writers:
            writer.write(checked)

    def close(self) -> None:
        """Close all writers; a second call does nothing."""
        self._closed = True
        while self._writers:
            self._writers.pop().close()


def _event(item: tuple[str, Any, int]) -> Event:
    try:
        tag, value, step = item
        return Event(str(tag), float(value), int(step))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Event {item!r}: expected (tag, number, step), got {error}. Fix: pass one number per event."
        ) from error
