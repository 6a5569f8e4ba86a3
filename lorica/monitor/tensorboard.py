"""Events as TensorBoard event files, through torch.utils.tensorboard. The package `tensorboard` is optional."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.monitor.events import Event

if TYPE_CHECKING:
    from lorica.config.monitoring import TensorBoard

DEFAULT_FOLDER = "runs"


class TensorBoardWriter:
    """Writes event files into `output_path/job_name`; a resumed run adds one more file there."""

    def __init__(self, block: TensorBoard) -> None:
        """Open the event file.

        Raises:
            ImportError: if `tensorboard` is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard.enabled: expected the package `tensorboard`, got an installation without it. "
                "Fix: pip install lorica[tensorboard], or set tensorboard.enabled to false."
            ) from error
        make: Any = SummaryWriter
        self._writer: Any = make(log_dir=str(Path(block.output_path or DEFAULT_FOLDER).expanduser() / block.job_name))

    def write(self, events: Sequence[Event]) -> None:
        """Add scalars and flush."""
        for event in events:
            self._writer.add_scalar(event.tag, event.value, event.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
