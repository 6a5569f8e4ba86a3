"""What process 0 shows while it trains: a bar with loss, tokens/s, memory and remaining time. Decides nothing.

Where the output is no terminal (a log file) there is no bar, but a line every `LINE_SECONDS`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

REFRESH_SECONDS = 0.5  # reading a loss waits for the device: not at every step
LINE_SECONDS = 15.0
RATE_WINDOW = 40  # refreshes that tokens/s is taken over


class Display:
    """Progress of one run. Use it as a context manager; on processes other than 0 it does nothing."""

    def __init__(self, *, is_shown: bool, tokens_per_step: int, device: torch.device) -> None:
        self.console = Console()
        self.validation_loss: float | None = None
        self.peak_bytes = 0
        self._is_shown = is_shown
        self._tokens_per_step = tokens_per_step
        self._device = device
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)
        self._last_refresh = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not (is_shown and self.console.is_terminal),
            expand=True,
        )
        self._task = self._bar.add_task("pretraining", total=None, text="first steps ...")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._is_shown:
            self._bar.print(message, highlight=False)

    def update(self, step: int, total_steps: int | None, loss: Tensor) -> None:
        """Show that `step` steps are done, if it is time to show something."""
        now = time.monotonic()
        is_last = step == total_steps
        if not self._is_shown or (now - self._last_refresh < REFRESH_SECONDS and not is_last):
            return
        value = float(loss)  # waits for the device: take the time after it
        self._last_refresh = time.monotonic()
        self._marks.append((self._last_refresh, step))
        text = self._text(step, total_steps, value)
        self._bar.update(self._task, completed=step, total=total_steps, text=text)
        if self._bar.disable and (now - self._last_line > LINE_SECONDS or is_last):
            self._last_line = now
            print(text, flush=True)

    def _text(self, step: int, total_steps: int | None, loss: float) -> str:
        parts = [f"step {step}/{total_steps or '?'}", f"loss {loss:.3f}"]
        if self.validation_loss is not None:
            parts.append(f"validation {self.validation_loss:.3f}")
        (since, first), (now, last) = self._marks[0], self._marks[-1]
        if last > first:
            steps_per_second = (last - first) / (now - since)
            parts.append(f"{steps_per_second * self._tokens_per_step:,.0f} tokens/s")
        self.peak_bytes = max(self.peak_bytes, memory_bytes(self._device))
        parts.append(f"memory {self.peak_bytes / 2**30:.2f} GiB")
        if last > first and total_steps is not None:
            minutes, seconds = divmod(round((total_steps - step) / steps_per_second), 60)
            parts.append(f"ETA {minutes}:{seconds:02d}")
        return "  ".join(parts)


def memory_bytes(device: torch.device) -> int:
    """Memory of this process: on a GPU, the most that PyTorch has allocated; on the CPU, what is resident now.

    (Where the system does not say what is resident now: the most that ever was, tokenising the text included.)
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
