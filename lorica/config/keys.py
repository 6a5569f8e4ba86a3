"""How a key is declared: default, meaning, status, names. The keys themselves are in the block files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Status(str, Enum):
    """What Lorica does with a key."""

    SUPPORTED = "supported"
    NO_EFFECT = "no effect"
    NOT_YET = "not yet"


class Form(str, Enum):
    """How a value is read where its Python type does not say enough."""

    PLAIN = "plain"
    SIZE = "size"  # a number of elements or bytes: a fraction is rounded with a warning
    BYTES = "bytes"  # a size in bytes, also as a string with a unit: "80GiB"
    STEPS = "steps"  # an interval in steps: infinity and 0 mean never
    DTYPE = "dtype"  # fp32, fp16, bf16 and their other names
    NUMBERS = "numbers"  # one number, or one per parameter group
    PARAMS = "params"  # keyword arguments whose names depend on the `type` beside them
    SELECTION = "selection"  # false: none; "auto": all that there are; or a list of names


@dataclass(frozen=True)
class KeyInfo:
    """What is known about a key beyond its type and default.

    `note` says why a key has no effect, or what works instead of one that is not there yet. `aliases` are other good
    names, `deprecated` names that warn. `off` are values that switch a not-yet key off, besides its default and the
    empty ones; `refused` are single values of a supported key that are not there yet, with what works instead.
    `part_of` names the switch without which the key means nothing: such a key neither warns nor is refused itself.
    """

    status: Status = Status.SUPPORTED
    note: str = ""
    form: Form = Form.PLAIN
    aliases: tuple[str, ...] = ()
    deprecated: tuple[str, ...] = ()
    off: tuple[Any, ...] = ()
    refused: Mapping[Any, str] = field(default_factory=dict)
    part_of: str = ""
    shown_default: str = ""

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add the status to a key's JSON schema (pydantic calls this)."""
        schema["x-status"] = self.status.value
        if self.note:
            schema["x-note"] = self.note


class Block(BaseModel):
    """A block of a configuration: frozen, strict, no unknown keys.

    `open_keys` marks a block of a feature that is refused when switched on: its lesser keys are not all listed here and
    pass unread while it is off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    open_keys: ClassVar[bool] = False


def key(default: Any, description: str, *, bounds: Mapping[str, float] | None = None, **info: Any) -> Any:
    """Declare a key. `info` are fields of `KeyInfo`, `bounds` are pydantic's ge, gt, le, lt."""
    limits: dict[str, Any] = dict(bounds or {})
    return Field(default, description=description, json_schema_extra=KeyInfo(**info), **limits)


def block(model: type[Block], description: str, **info: Any) -> Any:
    """Declare a nested block that is always present, with its own defaults."""
    return Field(default_factory=model, description=description, json_schema_extra=KeyInfo(**info))


def no_effect(default: Any, description: str, because: str, **info: Any) -> Any:
    """Declare a key that is accepted, does nothing, and warns when it is set to something else than its default."""
    return key(default, description, status=Status.NO_EFFECT, note=because, **info)


def not_yet(default: Any, description: str, instead: str, **info: Any) -> Any:
    """Declare a key that is refused unless it is switched off; `instead` says what to write."""
    return key(default, description, status=Status.NOT_YET, note=instead, **info)


def detail(default: Any, description: str, of: str = "enabled", **info: Any) -> Any:
    """Declare a key that means nothing without the not-yet (or idle) key `of`."""
    return key(default, description, status=Status.NOT_YET, part_of=of, **info)


def info_of(declared: FieldInfo) -> KeyInfo:
    """The `KeyInfo` of a pydantic field made by one of the functions above."""
    info = declared.json_schema_extra
    return info if isinstance(info, KeyInfo) else KeyInfo()
