"""Events as a Weights & Biases run. The package `wandb` is optional; account and server come from its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lorica.monitor.events import Event

if TYPE_CHECKING:
    from lorica.config.monitoring import WandB


class WandBWriter:
    """Logs into a run of its own, or into the run that the script has started already."""

    def __init__(self, block: WandB) -> None:
        """Start the run.

        Raises:
            ImportError: if `wandb` is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "wandb.enabled: expected the package `wandb`, got an installation without it. "
                "Fix: pip install wandb, or set wandb.enabled to false."
            ) from error
        self._owned = wandb.run is None  # otherwise init() returns the script's run, which is the script's to finish
        self._run: Any = wandb.init(project=block.project, group=block.group, entity=block.team)

    def write(self, events: Sequence[Event]) -> None:
        """Log neighbours of one step in one call."""
        for step, same_step in groupby(events, key=lambda event: event.step):
            self._run.log({event.tag: event.value for event in same_step}, step=step)

    def close(self) -> None:
        """Finish the run, if this writer started it."""
        if self._owned:
            self._run.finish()
