"""Events as CSV files, one per metric: a header, then `step,value` rows. A resumed run appends to the same files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lorica.monitor.events import Event

if TYPE_CHECKING:
    from lorica.config.monitoring import CSVMonitor

DEFAULT_FOLDER = "csv_monitor"


class CSVWriter:
    """Writes `output_path/job_name/<tag with / as _>.csv`."""

    def __init__(self, block: CSVMonitor) -> None:
        self._folder = Path(block.output_path or DEFAULT_FOLDER).expanduser() / block.job_name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[str]] = {}

    def write(self, events: Sequence[Event]) -> None:
        """Append one row per event; the rows are with the operating system when this returns."""
        touched = {}
        for event in events:
            file = touched[event.tag] = self._files.get(event.tag) or self._open(event.tag)
            csv.writer(file, lineterminator="\n").writerow([event.step, event.value])
        for file in touched.values():
            file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, tag: str) -> IO[str]:
        path = self._folder / f"{tag.replace('/', '_').replace(' ', '_')}.csv"
        for other, file in self._files.items():
            if file.name == str(path):
                raise ValueError(
                    f"CSV monitor: expected one metric per file, got {other!r} and {tag!r} for {path}. Fix: rename one."
                )
        start = _missing_start(path, tag)
        file = self._files[tag] = path.open("a", newline="", encoding="utf-8")
        file.write(start)
        return file


def _missing_start(path: Path, tag: str) -> str:
    """What must be written before the next row: a header, or the end of a line that a killed run left unfinished."""
    if not path.exists() or path.stat().st_size == 0:
        return f"step,{tag.rpartition('/')[2]}\n"
    with path.open("rb") as file:
        file.seek(-1, 2)
        return "" if file.read(1) == b"\n" else "\n"
