"""From what the user hands over to a checked `Config`: the order of the steps, and every problem in one error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lorica.config import rules
from lorica.config.batch import Batch
from lorica.config.build import build
from lorica.config.errors import ConfigError, Problem
from lorica.config.idle import idle
from lorica.config.jsonc import Path
from lorica.config.read import Found, Reading, read
from lorica.config.schema import Config, Provenance
from lorica.config.source import Source, open_source, plain


def load(
    source: Mapping[str, Any] | str | os.PathLike[str] | Config,
    *,
    world_size: int | None = None,
    world_size_source: str = "the caller",
) -> Config:
    """Read and check a configuration.

    Args:
        source: a dict (copied), the path of a JSON file (comments and trailing commas allowed), a base64 string of
            JSON, or a `Config`, which is returned as it is.
        world_size: number of data-parallel ranks; if given, the batch sizes are resolved as well.
        world_size_source: where that number comes from, for the error message.
    Raises:
        ConfigError: with every problem of the configuration at once.
    """
    if isinstance(source, Config):
        return source if world_size is None else source.resolve_batch(world_size, world_size_source)
    opened = open_source(source)
    reading = read(opened.raw)
    config = _with_provenance(build(reading), opened, reading)
    _add_combinations(reading, config, world_size, world_size_source)
    problems = _in_order(opened, [*_duplicates(opened), *reading.problems])
    if problems:
        raise ConfigError(problems)
    return config if world_size is None else config.resolve_batch(world_size, world_size_source)


def _with_provenance(config: Config, opened: Source, reading: Reading) -> Config:
    ignored = {key: reason for key in reading.given if (reason := idle(config, key))} | reading.ignored
    return config.with_provenance(
        Provenance(
            source=opened.name,
            raw=plain(opened.raw),
            given=reading.given,
            ignored=ignored,
            warnings=(*reading.warnings, *_auto_warning(reading)),
            auto_keys=frozenset(reading.auto_keys),
        )
    )


def _auto_warning(reading: Reading) -> list[str]:
    if not reading.auto_keys:
        return []
    return [f'"auto" is chosen by the engine, or the default, for {", ".join(sorted(reading.auto_keys))}']


def _add_combinations(reading: Reading, config: Config, world_size: int | None, world_size_source: str) -> None:
    """Problems of the configuration as a whole; keys that are refused already give no second problem."""
    found = list(rules.violations(config, reading.uncertain))
    certain = reading.uncertain.isdisjoint((*Batch._fields, *(problem.key for problem in found)))
    if world_size is not None and certain and not any(problem.key in Batch._fields for problem in found):
        found += config.batch_problems(world_size, world_size_source)
    for problem in found:
        reading.problem(tuple(problem.key.split(".")), problem.value, problem.message, problem.fix)


def _duplicates(opened: Source) -> list[Found]:
    return [
        Found(
            duplicate.path,
            Problem(
                ".".join(duplicate.path),
                duplicate.value,
                f"stands twice, on lines {duplicate.first_line} and {duplicate.line}",
                "keep one of them",
                f"{opened.name}:{duplicate.line}",
            ),
        )
        for duplicate in opened.duplicates
    ]


def _in_order(opened: Source, found: list[Found]) -> list[Problem]:
    """The problems in the order of the file, each with its place."""
    order: dict[Path, int] = {}

    def number(value: Any, path: Path) -> None:
        order[path] = len(order)
        if isinstance(value, dict):
            for name, item in value.items():
                number(item, (*path, str(name)))

    def position(item: Found) -> tuple[int, int]:
        for end in range(len(item.path), 0, -1):
            if item.path[:end] in order:
                return (order[item.path[:end]], len(item.path) - end)
        return (len(order), 0)

    number(opened.raw, ())
    return [
        item.problem._replace(where=item.problem.where or opened.where(item.path))
        for item in sorted(found, key=position)
    ]
