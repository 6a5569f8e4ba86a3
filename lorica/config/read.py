"""Walks a raw configuration along the schema: names, types, "auto", statuses. Gathers every problem.

What crosses several keys is in rules.py; ranges are pydantic's and are gathered in load.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from lorica.config.coerce import Mismatch, expectation, leaf_of, read_value
from lorica.config.compat import COMMENT_PREFIXES, ELSEWHERE, IGNORED, Rewritten, rewrite
from lorica.config.errors import MISSING, Problem, show
from lorica.config.jsonc import Path
from lorica.config.keys import Block, Form, KeyInfo, Status, info_of
from lorica.config.names import Advice, advice_on_unknown, block_of, names_of, params_of
from lorica.config.optimizer import Optimizer, Scheduler
from lorica.config.schema import Config
from lorica.config.suggest import nearest

AUTO = "auto"


class Found(NamedTuple):
    """A problem and the path of its key as the user wrote it."""

    path: Path
    problem: Problem


@dataclass
class Reading:
    """What a walk over a raw configuration found: clean values, and everything to be said about them.

    `values` nests like the schema. `given` and `ignored` are those of `Provenance`. `uncertain` are dotted keys whose
    meant value is not known, because something is wrong with them. `names` and `raw` give the written path and the
    written value of a key by its path in the schema; `params_models` what keyword arguments are checked against.
    """

    rewritten: Rewritten
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Found] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    auto_keys: set[str] = field(default_factory=set)
    given: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    uncertain: set[str] = field(default_factory=set)
    names: dict[Path, Path] = field(default_factory=dict)
    raw: dict[Path, Any] = field(default_factory=dict)
    params_models: dict[Path, type[Block]] = field(default_factory=dict)

    def written(self, path: Path) -> Path:
        """The path of a key as the user wrote it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.names:
                return self.names[path[:end]] + path[end:]
        return self.rewritten.written(path)

    def problem(self, path: Path, value: Any, message: str, fix: str) -> None:
        """Note a problem with the key at `path` (its place in the schema)."""
        written = self.written(path)
        self.uncertain.add(".".join(path))
        self.problems.append(Found(written, Problem(".".join(written), value, message, fix)))

    def unfit(self, declared: FieldInfo, value: Any, path: Path, fix: str = "") -> None:
        """Note a value that its key cannot take."""
        default = "remove the key" if declared.is_required() else f"remove the key ({_default_text(declared)})"
        expected = expectation(declared, info_of(declared))
        self.problem(path, value, f"expected {expected}, got {_kind(value)}", fix or default)


def read(raw: dict[str, Any]) -> Reading:
    """Walk `raw` along the schema of `Config`."""
    rewritten = rewrite(raw)
    reading = Reading(rewritten, warnings=list(rewritten.warnings))
    reading.problems += [Found(tuple(problem.key.split(".")), problem) for problem in rewritten.problems]
    reading.values = _Walker(reading).block(Config, rewritten.root, ())
    return reading


class _Walker:
    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def block(self, model: type[Block], raw: Mapping[Any, Any], path: Path) -> dict[str, Any]:
        """The clean values of one block."""
        values: dict[str, Any] = {}
        for written, value in raw.items():
            if not isinstance(written, str):
                self.reading.problem((*path, str(written)), value, "keys are strings", f'write "{written}"')
            elif not written.startswith(COMMENT_PREFIXES):
                self.member(model, written, value, path, values)
        for name, declared in model.model_fields.items():
            dotted = ".".join((*path, name))
            seen = dotted in self.reading.given or dotted in self.reading.uncertain
            if declared.is_required() and not seen:
                expected = expectation(declared, info_of(declared))
                self.reading.problem((*path, name), MISSING, f"is required: expected {expected}", f"add {name}")
        return values

    def member(self, model: type[Block], written: str, value: Any, path: Path, values: dict[str, Any]) -> None:
        """Read one key of a block into `values`."""
        name = names_of(model).get(written)
        if name is None:
            self.unknown(model, written, value, path)
            return
        member = (*path, name)
        if written != name:
            self.reading.names[member] = (*self.reading.written(path), written)
        dotted = ".".join(member)
        if dotted in self.reading.given:
            other = self.reading.given[dotted]
            written_name = ".".join(self.reading.written(member))
            self.reading.problem(
                member, value, f"{other} and {written_name} are two names of one key", "remove one of them"
            )
            return
        self.reading.given[dotted] = ".".join(self.reading.written(member))
        self.reading.raw[member] = value
        declared = model.model_fields[name]
        if written in info_of(declared).deprecated:
            self.reading.warnings.append(f"{self.reading.given[dotted]} is deprecated, read as {dotted}")
        self.value(declared, value, member, values)

    def value(self, declared: FieldInfo, value: Any, path: Path, values: dict[str, Any]) -> None:
        """Read the value of a known key."""
        info, inner = info_of(declared), block_of(declared.annotation)
        if self.is_auto(value, declared):
            self.auto(declared, path, values)
        elif value is None:
            self.null(declared, path)
        elif inner is not None:
            self.inner_block(inner, info, value, path, values)
        elif info.form is Form.PARAMS:
            self.params(path, value, values)
        else:
            self.leaf(declared, info, value, path, values)

    def is_auto(self, value: Any, declared: FieldInfo) -> bool:
        """Whether the value leaves the choice to the engine; some keys have an "auto" of their own."""
        own = AUTO in leaf_of(declared.annotation).choices or info_of(declared).form is Form.SELECTION
        return value == AUTO and not own and declared.default != AUTO

    def auto(self, declared: FieldInfo, path: Path, values: dict[str, Any]) -> None:
        """ "auto": None where the key allows it, so that the engine sees it has to choose; else the default."""
        self.reading.auto_keys.add(".".join(path))
        if leaf_of(declared.annotation).optional:
            values[path[-1]] = None

    def null(self, declared: FieldInfo, path: Path) -> None:
        if not leaf_of(declared.annotation).optional and block_of(declared.annotation) is None:
            self.warn(path, None, f"null was read as not given ({_default_text(declared)})")

    def leaf(self, declared: FieldInfo, info: KeyInfo, value: Any, path: Path, values: dict[str, Any]) -> None:
        try:
            result = read_value(value, declared.annotation, info)
        except Mismatch as mismatch:
            self.mismatch(declared, value, path, mismatch.fix)
            return
        values[path[-1]] = result.value
        if result.remark:
            self.warn(path, value, f"{result.remark}: {show(result.value)}")
        self.status(declared, info, value, result.value, path)

    def mismatch(self, declared: FieldInfo, value: Any, path: Path, fix: str) -> None:
        choices = leaf_of(declared.annotation).choices
        if not fix and choices and isinstance(value, str):
            near = nearest(value, [choice for choice in choices if isinstance(choice, str)])
            fix = f"write {show(near)}" if near else ""
        self.reading.unfit(declared, value, path, fix)

    def inner_block(self, model: type[Block], info: KeyInfo, value: Any, path: Path, values: dict[str, Any]) -> None:
        if not isinstance(value, Mapping):
            self.reading.problem(path, value, f"expected an object, got {_kind(value)}", _block_example(model, value))
            return
        inner = self.block(model, value, path)
        if model in (Optimizer, Scheduler):
            self.typed_params(model, inner, path)
        if info.status is Status.NOT_YET:
            if not value:
                return
            self.refuse(path, value, info.note)
        values[path[-1]] = inner
        if info.status is Status.NO_EFFECT and inner:
            changed = {name: item for name, item in inner.items() if item != model.model_fields[name].get_default()}
            self.without_effect(path, value, info.note, warn=bool(changed))

    def params(self, path: Path, value: Any, values: dict[str, Any]) -> None:
        """Keep keyword arguments as they are until their type is known."""
        if isinstance(value, Mapping):
            values[path[-1]] = value
        else:
            self.reading.problem(path, value, f"expected an object, got {_kind(value)}", 'write {"lr": 0.001}')

    def status(self, declared: FieldInfo, info: KeyInfo, written: Any, value: Any, path: Path) -> None:
        """Refuse what is not there yet, note what has no effect."""
        if info.refused and value in info.refused:
            self.refuse(path, written, info.refused[value])
        elif info.part_of:
            self.reading.ignored[".".join(path)] = f"only means something with {info.part_of}"
        elif info.status is Status.NOT_YET and _is_on(value, declared, info):
            self.refuse(path, written, info.note)
        elif info.status is Status.NO_EFFECT:
            self.without_effect(path, written, info.note, warn=value != declared.get_default())

    def refuse(self, path: Path, value: Any, instead: str) -> None:
        self.reading.problem(path, value, "is not supported yet", instead)

    def without_effect(self, path: Path, value: Any, because: str, warn: bool) -> None:
        self.reading.ignored[".".join(path)] = because
        if warn:
            self.warn(path, value, f"has no effect: {because}")

    def warn(self, path: Path, value: Any, text: str) -> None:
        self.reading.warnings.append(f"{'.'.join(self.reading.written(path))} = {show(value)}: {text}")

    def unknown(self, model: type[Block], written: str, value: Any, path: Path) -> None:
        member = (*path, written)
        if member in IGNORED:
            self.without_effect(member, value, IGNORED[member], warn=True)
            return
        if member in ELSEWHERE:
            self.reading.problem(member, value, "is another key here", f"set {ELSEWHERE[member]} to {show(value)}")
            return
        if model.open_keys and nearest(written, names_of(model), within=1) is None:
            return
        advice = advice_on_unknown(written, path, model)
        self.reading.problem(member, value, advice.message, advice.fix)
        self.reading.uncertain.add(".".join((*path, advice.meant)))

    def typed_params(self, model: type[Block], inner: dict[str, Any], path: Path) -> None:
        """Read the keyword arguments of an optimizer or scheduler, whose names depend on the type beside them."""
        if not isinstance(inner.get("type"), str):
            return
        raw = inner.get("params", {})
        known = params_of(model, inner["type"], raw)
        if isinstance(known, Advice):
            self.reading.problem((*path, "type"), inner["type"], known.message, known.fix)
        elif known is None:
            self.reading.auto_keys |= {".".join((*path, "params", name)) for name in raw if raw[name] == AUTO}
            inner["params"] = {name: None if item == AUTO else item for name, item in raw.items()}
        else:
            member = (*path, "params")
            self.reading.params_models[member] = known
            given = self.block(known, raw, member)
            fields = known.model_fields
            inner["params"] = {name: given[name] for name in given if info_of(fields[name]).status is Status.SUPPORTED}


def _kind(value: Any) -> str:
    """What a value is, in JSON's words; numbers and lists as they are."""
    if value is None or (isinstance(value, int | float | list) and not isinstance(value, bool)):
        return show(value)
    for kinds, name in _KINDS:
        if isinstance(value, kinds):
            return name
    return type(value).__name__


_KINDS: tuple[tuple[Any, str], ...] = (
    (bool, "a boolean"),
    (str, "a string"),
    (Mapping, "an object"),
)


def _default_text(declared: FieldInfo) -> str:
    shown = info_of(declared).shown_default or show(declared.get_default())
    return f"default: {shown}"


def _block_example(model: type[Block], value: Any) -> str:
    for switch in ("enabled", "device", "type"):
        if switch in model.model_fields:
            return f'write {{"{switch}": {show(_example(model.model_fields[switch], value))}}}'
    return f'write {{"{next(iter(model.model_fields))}": ...}}'


def _example(switch: FieldInfo, value: Any) -> Any:
    """A value of a block's switch: the one that was given in place of the block, if the switch can take it."""
    try:
        return read_value(value, switch.annotation, info_of(switch)).value
    except Mismatch:
        return True if switch.annotation is bool else "cpu" if leaf_of(switch.annotation).choices else "..."


def _is_on(value: Any, declared: FieldInfo, info: KeyInfo) -> bool:
    """Whether the value of a not-yet key asks for the feature."""
    default = declared.get_default()
    if value == default or value in info.off:
        return False
    if isinstance(value, dict):
        switches = _switches(value)
        return any(switches) if switches else bool(value)
    return bool(value) or bool(default)


def _switches(value: Any) -> list[bool]:
    """Every "enabled" inside a nested dict."""
    if not isinstance(value, dict):
        return []
    own = [bool(value["enabled"])] if "enabled" in value else []
    return own + [switch for item in value.values() for switch in _switches(item)]
