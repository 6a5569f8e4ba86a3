"""From clean values to a `Config`: pydantic checks types and ranges, and what it refuses becomes problems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from lorica.config.jsonc import Path
from lorica.config.keys import Block
from lorica.config.names import block_of
from lorica.config.read import Reading
from lorica.config.schema import Config

AnyBlock = TypeVar("AnyBlock", bound=Block)


def build(reading: Reading) -> Config:
    """The `Config` of all values that are valid; the others are added to the problems of `reading`."""
    for path, model in reading.params_models.items():
        owner = reading.values.get(path[0])
        if owner is not None:
            given = owner["params"]
            checked = _validated(model, given, path, reading)
            owner["params"] = {name: getattr(checked, name, value) for name, value in given.items()}
    config = _validated(Config, reading.values, (), reading)
    assert config is not None  # the top level has no required key
    return config


def _validated(model: type[AnyBlock], values: dict[str, Any], path: Path, reading: Reading) -> AnyBlock | None:
    """`model` of the valid values; None if it lacks a required key, which the walk has reported."""
    remaining = _copy(values)
    while True:
        try:
            return model.model_validate(remaining)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False)
        refused = [_key_of(model, item["loc"]) for item in details if item["type"] != "missing"]
        for key in dict.fromkeys(refused):
            _block_at(remaining, key[:-1]).pop(key[-1])
            reading.unfit(_declared(model, key), reading.raw[path + key], path + key)
        for owner in {item["loc"][:-1] for item in details if item["type"] == "missing"}:
            if not owner:
                return None
            _block_at(remaining, owner[:-1]).pop(str(owner[-1]))


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts; other values are shared."""
    return {name: _copy(value) if isinstance(value, dict) else value for name, value in values.items()}


def _key_of(model: type[Block], location: Iterable[Any]) -> Path:
    """The part of a pydantic location that leads to a key; what follows are list indices and members of unions."""
    found: list[str] = []
    for step in location:
        found.append(step)
        inner = block_of(model.model_fields[step].annotation)
        if inner is None:
            break
        model = inner
    return tuple(found)


def _block_at(values: dict[str, Any], path: Iterable[Any]) -> dict[str, Any]:
    for name in path:
        values = values[name]
    return values


def _declared(model: type[Block], path: Path) -> Any:
    for name in path[:-1]:
        inner = block_of(model.model_fields[name].annotation)
        assert inner is not None
        model = inner
    return model.model_fields[path[-1]]
