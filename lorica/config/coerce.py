"""Reads one value as the type of its key: tolerant of the forms found in the wild, and says so. Checks no ranges."""

from __future__ import annotations

import math
import operator
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from lorica.config.errors import show
from lorica.config.keys import Form, KeyInfo
from lorica.config.suggest import nearest

_DTYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
}  # fmt: skip
_UNIT_BYTES = {"": 1, "b": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in (("ib", 1024), ("b", 1000))
}
_BYTES = re.compile(r"([\d.]+(?:e\d+)?) ?([a-z]*)")
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


class Mismatch(ValueError):
    """The value cannot be read as the type of its key; `fix` is a better one, if there is a likely one."""

    def __init__(self, fix: str = "") -> None:
        self.fix = fix
        super().__init__(fix)


class Read(NamedTuple):
    """A value as its key's type, and what was done to it (empty if nothing worth saying)."""

    value: Any
    remark: str = ""


class Leaf(NamedTuple):
    """The type of a leaf key, taken apart."""

    type: Any
    optional: bool
    choices: tuple[Any, ...]


def leaf_of(annotation: Any) -> Leaf:
    """Take a type annotation apart."""
    return _leaf_of(annotation)


@cache
def _leaf_of(annotation: Any) -> Leaf:
    optional = False
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        optional = len(members) < len(get_args(annotation))
        annotation = members[0] if len(members) == 1 else Union[tuple(members)]  # noqa: UP007
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return Leaf(type(choices[0]), optional, choices)
    return Leaf(annotation, optional, ())


def read_value(value: Any, annotation: Any, info: KeyInfo) -> Read:
    """`value` as the type of a key.

    Raises:
        Mismatch: it cannot be read as that.
    """
    leaf = leaf_of(annotation)
    if info.form is Form.SELECTION:
        return _selection(value, _selectable(annotation))
    if info.form in _FORMS:
        return _FORMS[info.form](value)
    if leaf.choices:
        return _choice(value, leaf.choices)
    if leaf.type in _READERS:
        return _READERS[leaf.type](value)
    if get_origin(leaf.type) is tuple:
        return _items(value, get_args(leaf.type))
    if get_origin(leaf.type) is dict:
        return _mapping(value)
    if get_origin(leaf.type) in (Union, types.UnionType):
        return _any_of(value, get_args(leaf.type))
    return Read(value)


def expectation(declared: FieldInfo, info: KeyInfo) -> str:
    """What a key expects, in words: "an integer >= 1"."""
    leaf = leaf_of(declared.annotation)
    if leaf.choices:
        text = "one of " + ", ".join(show(choice) for choice in leaf.choices)
    elif info.form is Form.NUMBERS:
        text = "a number >= 0, or a list with one per parameter group"
    elif info.form is Form.BYTES:
        text = 'a number of bytes or a string such as "80GiB"'
    elif info.form is Form.SELECTION:
        text = 'false, "auto", or a list out of ' + ", ".join(show(name) for name in _selectable(declared.annotation))
    else:
        text = _in_words(leaf.type)
    limits = " and ".join(_limit(item) for item in declared.metadata if _limit(item))
    if info.form is Form.STEPS:
        return f"{text} {limits}, or 0 or Infinity for never"
    return f"{text} {limits}".strip()


def _boolean(value: Any) -> Read:
    if isinstance(value, bool):
        return Read(value)
    if isinstance(value, Integral) and value in (0, 1):
        return Read(bool(value), "a number was read as true or false")
    if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
        return Read(_BOOLEANS[value.strip().lower()], "a string was read as true or false")
    raise Mismatch


def _integer(value: Any) -> Read:
    number = _number(value)
    if number.value != number.value or math.isinf(number.value) or int(number.value) != number.value:
        raise Mismatch(_whole_numbers(number.value))
    return Read(int(number.value), number.remark)


def _size(value: Any) -> Read:
    number = _number(value)
    if not math.isfinite(number.value):
        raise Mismatch
    if int(number.value) != number.value:
        return Read(round(number.value), "a size must be whole, so it was rounded")
    return Read(int(number.value), number.remark)


def _bytes(value: Any) -> Read:
    """A number of bytes out of a number or a string with a unit; fractions of a byte are rounded silently."""
    if not isinstance(value, str):
        return _size(value)
    found = _BYTES.fullmatch(value.strip().lower())
    if found is None or found[2] not in _UNIT_BYTES:
        raise Mismatch('write a number of bytes, or a string such as "80GiB" or "500MB"')
    number = _float(found[1]).value
    return Read(round(number * _UNIT_BYTES[found[2]]))


def _steps(value: Any) -> Read:
    number = _number(value)
    if number.value == math.inf:
        return Read(None)
    if number.value == 0:
        return Read(None, "0 was read as never")
    return _integer(value)


def _float(value: Any) -> Read:
    number = _number(value)
    try:
        result = float(number.value)
    except OverflowError:
        raise Mismatch from None
    if not math.isfinite(result):
        raise Mismatch
    return Read(result, number.remark)


def _number(value: Any) -> Read:
    """An int or float out of any number type or a string; never a boolean."""
    if isinstance(value, bool):
        raise Mismatch
    if isinstance(value, Integral):
        return Read(operator.index(value))
    if isinstance(value, Real):
        return Read(float(value))
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise Mismatch from None
        whole = value.strip().lstrip("+-").isdecimal() and len(value) < 300
        return Read(int(value) if whole else number, "a string was read as a number")
    raise Mismatch


def _string(value: Any) -> Read:
    if isinstance(value, str):
        return Read(value)
    if isinstance(value, os.PathLike):
        return Read(os.fspath(value))
    raise Mismatch


def _dtype(value: Any) -> Read:
    name = str(value).removeprefix("torch.").lower()
    if isinstance(value, bool | int | float | list | dict) or name not in _DTYPES:
        raise Mismatch
    return Read(_DTYPES[name])


def _numbers(value: Any) -> Read:
    if isinstance(value, list | tuple):
        return _items(value, (float, ...))
    return _float(value)


def _choice(value: Any, choices: tuple[Any, ...]) -> Read:
    if isinstance(choices[0], int):
        read = _integer(value)
    elif isinstance(value, str):
        matches = [choice for choice in choices if choice.lower() == value.lower()]
        read = Read(matches[0] if matches else value)
    else:
        raise Mismatch
    if read.value not in choices:
        raise Mismatch
    return read


def _items(value: Any, members: tuple[Any, ...]) -> Read:
    """A list as a tuple of `members` types; (T, ...) takes any length."""
    if isinstance(value, str) and members[:1] == (str,):
        return Read((value,), "one name was read as a list of one")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise Mismatch
    if members[-1] is Ellipsis:
        members = members[:1] * len(value)
    if len(members) != len(value):
        raise Mismatch
    reads = [_READERS[_bare(member)](item) for member, item in zip(members, value, strict=True)]
    return Read(tuple(read.value for read in reads), next((read.remark for read in reads if read.remark), ""))


def _selection(value: Any, names: tuple[str, ...]) -> Read:
    """False, "auto", or some of `names`, each once."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word == "auto":
            return Read(word)
        if word not in _BOOLEANS:
            return Read((_name(word, names),), "one name was read as a list of one")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return Read(tuple(dict.fromkeys(_name(item, names) for item in value)))
    read = _boolean(value)
    if read.value:
        raise Mismatch('write "auto" for all that there are')
    return read


def _name(item: Any, names: tuple[str, ...]) -> str:
    """One item of a selection."""
    if not isinstance(item, str):
        raise Mismatch
    word = item.strip().lower()
    if word not in names:
        near = nearest(word, names)
        raise Mismatch(f"write {show(near)} for {show(item)}" if near else "")
    return word


def _selectable(annotation: Any) -> tuple[str, ...]:
    """What the list of a SELECTION key may hold: the literals of the tuple in its annotation."""
    (listed,) = (member for member in get_args(annotation) if get_origin(member) is tuple)
    names: tuple[str, ...] = get_args(get_args(listed)[0])
    return names


def _mapping(value: Any) -> Read:
    if not isinstance(value, Mapping):
        raise Mismatch
    return Read(deepcopy(dict(value)))


def _any_of(value: Any, members: tuple[Any, ...]) -> Read:
    for member in members:
        try:
            return read_value(value, member, KeyInfo())
        except Mismatch:
            continue
    raise Mismatch


def _whole_numbers(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"write {math.floor(value)} or {math.ceil(value)}"


def _in_words(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    if get_origin(kind) is tuple:
        members = get_args(kind)
        if members[-1] is Ellipsis:
            return f"a list of {_PLURALS[_bare(members[0])]}"
        limits = [_limit(item) for field in get_args(members[0])[1:] for item in field.metadata]
        return f"a list of {len(members)} {_PLURALS[_bare(members[0])]} {' and '.join(limits)}".strip()
    if get_origin(kind) is dict:
        return "an object"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_in_words(member) for member in get_args(kind))
    return "a value"


def _bare(kind: Any) -> Any:
    """A type without its Annotated limits."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _limit(item: Any) -> str:
    for kind, sign, name in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
        if isinstance(item, kind):
            return f"{sign} {getattr(item, name)}"
    return ""


_READERS: dict[Any, Callable[[Any], Read]] = {bool: _boolean, int: _integer, float: _float, str: _string}
_FORMS: dict[Form, Callable[[Any], Read]] = {
    Form.SIZE: _size,
    Form.BYTES: _bytes,
    Form.STEPS: _steps,
    Form.DTYPE: _dtype,
    Form.NUMBERS: _numbers,
    Form.PARAMS: _mapping,
}
_WORDS: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_PLURALS: dict[Any, str] = {int: "integers", float: "numbers", str: "strings"}
