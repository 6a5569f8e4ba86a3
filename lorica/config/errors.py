"""What is wrong with a configuration, as data: one `Problem` per key, one `ConfigError` per file. Finds none itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

_SHOWN_CHARS = 60


class _Missing:
    """The value of a key that is not in the configuration."""

    def __repr__(self) -> str:
        return "(not given)"


MISSING: Final = _Missing()


def show(value: Any) -> str:
    """`value` as it would stand in a JSON file, cut to one short line."""
    if value is MISSING:
        return repr(value)
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


class Problem(NamedTuple):
    """One reason why a configuration is refused.

    `key` is the dotted name as the user wrote it, `value` what stands there (`MISSING` if nothing does), `message` what
    is wrong, `fix` what to write instead, `where` the file and line (empty for a dict).
    """

    key: str
    value: Any
    message: str
    fix: str
    where: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        subject = f"{self.key} = {show(self.value)}: " if self.key else ""
        return f"{place}{subject}{self.message}. Fix: {self.fix}."


class ConfigError(ValueError):
    """A configuration was refused; `problems` holds every reason at once, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: list[Problem] = list(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines.append(f"({len(lines)} problems in this configuration)")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem]]]:
        return type(self), (self.problems,)
