"""What people read about a configuration: `lorica check`. Plain text; finds no problems itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lorica.config import batch
from lorica.config.errors import ConfigError, show
from lorica.config.idle import idle
from lorica.config.jsonc import Path
from lorica.config.keys import Block, KeyInfo, Status
from lorica.config.load import load
from lorica.config.names import Entry, entries
from lorica.config.schema import Config

EXIT_OK = 0
EXIT_REFUSED = 2
_NAME_WIDTH = 46
_VALUE_WIDTH = 12


class Setting(NamedTuple):
    """One key of an effective configuration."""

    path: Path
    value: Any
    default: str
    changed: bool
    info: KeyInfo


def check(argv: Sequence[str]) -> int:
    """`lorica check CONFIG [--world_size N] [--all]`: print the problems of a configuration, or what it means.

    Returns: 0 if the configuration is legal, 2 if it is not.
    """
    arguments = _parser().parse_args(argv)
    try:
        config = load(arguments.config, world_size=arguments.world_size, world_size_source="--world_size")
    except ConfigError as error:
        print(error)
        return EXIT_REFUSED
    print("\n".join(report(config, everything=arguments.all)))
    return EXIT_OK


def report(config: Config, everything: bool = False) -> list[str]:
    """The lines that describe an effective configuration; `everything` lists blocks that are off, too."""
    name = config.provenance.source or "the configuration"
    lines = [f"{name} is valid.", config.summary_line(), "", "Batch sizes", *_indented(_batch_lines(config))]
    lines += ["", "Effective settings (* differs from the default)", *_setting_lines(config, everything)]
    if config.auto_keys:
        lines += ["", '"auto": chosen by the engine or filled in by the trainer', *_indented(sorted(config.auto_keys))]
    if config.provenance.ignored:
        ignored = sorted(config.provenance.ignored.items())
        lines += ["", "Accepted without effect", *_indented(f"{key}: {reason}" for key, reason in ignored)]
    if config.warnings:
        lines += ["", "Warnings", *_indented(config.warnings)]
    return lines


def settings(config: Config) -> Iterator[Setting]:
    """Every supported leaf of an effective configuration."""
    for entry in entries(Config):
        if entry.block is None and entry.info.status is Status.SUPPORTED:
            owner = _at(config, entry.path[:-1])
            if owner is not None:
                yield _setting(entry, owner, config)


def default_text(entry: Entry) -> str:
    """The default of a key as it is shown to people."""
    if entry.declared.is_required():
        return "required"
    return entry.info.shown_default or show(_jsonable(entry.declared.get_default()))


def _setting(entry: Entry, owner: Block, config: Config) -> Setting:
    value = getattr(owner, entry.path[-1])
    default = entry.declared.get_default()
    if entry.path == ("zero_optimization", "overlap_comm"):  # its default follows the stage
        default = config.zero_optimization.stage == 3
    changed = entry.declared.is_required() or value != default
    return Setting(entry.path, value, default_text(entry), changed, entry.info)


def _setting_lines(config: Config, everything: bool) -> Iterator[str]:
    """A tree: one line per setting, one per block; a block that is off is one line."""
    shown: set[Path] = set()
    for setting in settings(config):
        if not everything and not setting.changed and idle(config, ".".join(setting.path)):
            continue
        block = setting.path[:-1]
        off = "" if everything else _off(config, block)
        for end in range(1, len(block) + 1):
            if block[:end] not in shown:
                shown.add(block[:end])
                yield _line(block[:end], off if end == len(block) else "")
        if not off:
            yield from _leaf_lines(setting, config)


def _leaf_lines(setting: Setting, config: Config) -> Iterator[str]:
    """The line of a setting; keyword arguments are one line each."""
    if isinstance(setting.value, dict):
        yield _line(setting.path, "" if setting.value else "{}")
        for name, value in setting.value.items():
            yield _line((*setting.path, name), _value_text((*setting.path, name), value, config), changed=True)
        return
    note = f"default: {setting.default}" if setting.changed and setting.default != "required" else ""
    if setting.value is None:
        note = setting.default
    yield _line(setting.path, _value_text(setting.path, setting.value, config), note, setting.changed)


def _line(path: Path, value: str, note: str = "", changed: bool = False) -> str:
    name = "  " * (len(path) - 1) + path[-1]
    return f"  {'*' if changed else ' '} {name:<{_NAME_WIDTH}} {value:<{_VALUE_WIDTH}} {note}".rstrip()


def _value_text(path: Path, value: Any, config: Config) -> str:
    if ".".join(path) in config.auto_keys:
        return '"auto"'
    return "-" if value is None else show(_jsonable(value))


def _off(config: Config, path: Path) -> str:
    """How a block is switched off ("off", "none"); empty if it is on or has no switch."""
    owner = _at(config, path)
    if getattr(owner, "enabled", True) is False:
        return "off"
    if getattr(owner, "device", "") == "none":
        return "none"
    return ""


def _batch_lines(config: Config) -> list[str]:
    total, micro, steps = config.batch
    ranks = config.provenance.world_size
    if ranks is not None:
        return [f"{batch.TOTAL} {total} = {batch.MICRO} {micro} x {batch.STEPS} {steps} x {ranks} data-parallel ranks"]
    if total is None and micro is None:
        return [f"not given; training needs {batch.TOTAL} or {batch.MICRO}"]
    if total is None:
        product = (micro or 1) * (steps or 1)
        return [f"{batch.TOTAL} = {micro} x {steps or 1} x ranks = {product} x ranks (try --world_size N)"]
    if micro is not None and steps is not None:
        return [f"{batch.TOTAL} {total} = {micro} x {steps} x ranks: needs {total // (micro * steps)} ranks"]
    return [f"{batch.text(config.batch, None)}; the rest follows from the number of ranks (try --world_size N)"]


def _at(config: Config, path: Path) -> Block | None:
    value: Any = config
    for name in path:
        value = getattr(value, name, None)
    return value if isinstance(value, Block) else None


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _indented(lines: Any) -> list[str]:
    return [f"    {line}" for line in lines]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorica check", description="Check a configuration and show what it means.")
    parser.add_argument("config", help="a JSON file, or its content in base64")
    parser.add_argument(
        "--world_size", type=_positive, help="number of data-parallel ranks, to resolve the batch sizes"
    )
    parser.add_argument("--all", action="store_true", help="show the settings of blocks that are off, too")
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number of ranks, got {text!r}")
    return number
