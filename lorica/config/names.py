"""The names of the schema as tables: names of a block, where a name stands, what a type takes. Reads no values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, get_args

from pydantic.fields import FieldInfo

from lorica.config.jsonc import Path
from lorica.config.keys import Block, KeyInfo, Status, info_of
from lorica.config.optimizer import (
    OPTIMIZERS,
    SCHEDULERS,
    TORCH_OPTIMIZERS,
    TORCH_OPTIMIZERS_REFUSED,
    TORCH_PREFIX,
    TORCH_SCHEDULER_PREFIX,
    TORCH_SCHEDULERS,
    TORCH_SCHEDULERS_REFUSED,
    AdamParams,
    Scheduler,
    TorchAdamParams,
)
from lorica.config.schema import Config
from lorica.config.suggest import distance, nearest

_FEW_PLACES = 3
_TYPO = 2


class Entry(NamedTuple):
    """A key of the schema: its place, the model it belongs to, its declaration, its own model if it is a block."""

    path: Path
    owner: type[Block]
    declared: FieldInfo
    info: KeyInfo
    block: type[Block] | None


class Advice(NamedTuple):
    """What is wrong with a name, what to write instead, and the key that was probably meant, if it is in the block."""

    message: str
    fix: str
    meant: str = ""


@cache
def names_of(model: type[Block]) -> dict[str, str]:
    """Every name of a block's keys, aliases and deprecated ones included -> the key."""
    names: dict[str, str] = {}
    for name, declared in model.model_fields.items():
        info = info_of(declared)
        names |= dict.fromkeys((name, *info.aliases, *info.deprecated), name)
    return names


def block_of(annotation: Any) -> type[Block] | None:
    """The block model in a type annotation (also in `Block | None`); None for a leaf."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Block):
            return candidate
    return None


def advice_on_unknown(written: str, path: Path, model: type[Block]) -> Advice:
    """What was probably meant by a key that the block at `path` does not have."""
    block = ".".join(path) or "the top level"
    near = nearest(written, names_of(model))
    if near is not None and distance(written, near, 1) <= 1:
        return Advice(f"unknown key of {block}", f'write "{near}"', names_of(model)[near])
    places = known_places().get(written, ())
    if 0 < len(places) <= _FEW_PLACES:
        return Advice(f"not a key of {block}", f"move it to {' or '.join('.'.join(place) for place in places)}")
    if near is not None:
        return Advice(f"unknown key of {block}", f'write "{near}"', names_of(model)[near])
    far = nearest(written, known_places(), within=_TYPO) if len(written) > 2 * _TYPO else None
    if far is not None and len(known_places()[far]) <= _FEW_PLACES:
        return Advice(
            f"unknown key of {block}", f"write {' or '.join('.'.join(place) for place in known_places()[far])}"
        )
    return Advice(f"unknown key of {block}", f"remove it; {block} knows {_listing(model)}")


@cache
def known_places() -> dict[str, tuple[Path, ...]]:
    """Every known key name -> the paths where it stands, keyword arguments of optimizers and schedulers included."""
    places: dict[str, dict[Path, None]] = {}
    for entry in all_entries():
        for written in (entry.path[-1], *entry.info.aliases, *entry.info.deprecated):
            place = (*entry.path[:-1], written)
            places.setdefault(written, {})[place] = None
    return {name: tuple(found) for name, found in places.items()}


def all_entries() -> Iterator[Entry]:
    """Every key of the configuration, blocks and keyword arguments of optimizers and schedulers included."""
    yield from entries(Config)
    for params in (*(kind.params for kind in OPTIMIZERS.values()), TorchAdamParams):
        if params is not None:
            yield from entries(params, ("optimizer", "params"))
    for params in SCHEDULERS.values():
        yield from entries(params, ("scheduler", "params"))


def entries(model: type[Block], path: Path = (), outer: KeyInfo | None = None) -> Iterator[Entry]:
    """Every key of a block and of the blocks in it, in the order of the schema, each block before its keys.

    `outer` is what is known about the block itself: what has no effect or is not there yet as a whole passes that on.
    """
    for name, declared in model.model_fields.items():
        info = info_of(declared)
        if outer is not None and outer.status is not Status.SUPPORTED and info.status is Status.SUPPORTED:
            info = replace(info, status=outer.status, part_of=path[-1])
        inner = block_of(declared.annotation)
        yield Entry((*path, name), model, declared, info, inner)
        if inner is not None:
            yield from entries(inner, (*path, name), info)


def params_of(model: type[Block], type_name: str, params: Mapping[str, Any]) -> type[Block] | Advice | None:
    """The keyword arguments of an optimizer or scheduler type; None if torch knows them; advice if it cannot be had."""
    if model is Scheduler:
        known: type[Block] | Advice | None = SCHEDULERS.get(type_name)
        return known or _torch_class(type_name, _SCHEDULER_CLASSES)
    kind = OPTIMIZERS.get(type_name.lower())
    if kind is None:
        return _torch_class(type_name, _OPTIMIZER_CLASSES)
    if kind.params is None:
        return Advice("is not supported yet", kind.instead)
    if issubclass(kind.params, AdamParams) and params.get("torch_adam") is True:
        return TorchAdamParams
    return kind.params


class _Classes(NamedTuple):
    """What can be named in one `type` key besides Lorica's own types."""

    what: str
    prefix: str
    own: tuple[str, ...]
    torch: tuple[str, ...]
    refused: Mapping[str, str]


_OPTIMIZER_CLASSES = _Classes(
    "optimizer",
    TORCH_PREFIX,
    ("Adam", "AdamW", "SGD", "Lion", "Adagrad", "Lamb", "Muon"),
    TORCH_OPTIMIZERS,
    TORCH_OPTIMIZERS_REFUSED,
)
_SCHEDULER_CLASSES = _Classes(
    "scheduler", TORCH_SCHEDULER_PREFIX, tuple(SCHEDULERS), TORCH_SCHEDULERS, TORCH_SCHEDULERS_REFUSED
)


def _torch_class(type_name: str, classes: _Classes) -> Advice | None:
    """None for a class of torch that a configuration can name; a prefixed name is left to torch to know."""
    bare = type_name.removeprefix(classes.prefix)
    for name in (type_name, bare):
        if name in classes.refused:
            return Advice("cannot be named in a configuration", classes.refused[name])
    if bare in classes.torch or (bare != type_name and bare.isidentifier()):
        return None
    known = (*classes.own, *classes.torch)
    near = nearest(type_name, known)
    one_of = f'write one of {", ".join(known)}, or "{classes.prefix}<Name>" for a newer class of torch'
    return Advice(f"unknown {classes.what}", f'write "{near}"' if near else one_of)


def _listing(model: type[Block]) -> str:
    names = list(model.model_fields)
    return ", ".join(names) if len(names) <= 12 else ", ".join(names[:10]) + ", ... (docs/configuration.md lists all)"
