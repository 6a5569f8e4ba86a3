"""Reads JSON as people write it: comments, trailing commas, bare keys, Infinity. Knows lines, not the meaning of keys.

Accepted beyond RFC 8259: `//` and `#` comments to the end of the line, `/* */`, a comma before a closing bracket, keys
without quotes, `Infinity` and `NaN` (the schema refuses them where they make no sense). A key that stands twice in one
object is reported, not overwritten.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from typing import Any, NamedTuple, NoReturn

Path = tuple[str, ...]

_SPACE = re.compile(r"(?:\s+|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.])")
_WORD = re.compile(r"[A-Za-z_$][\w$.-]*|-Infinity")
_WORDS: dict[str, Any] = {
    "true": True,
    "false": False,
    "null": None,
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
    "NaN": float("nan"),
}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "inf": "Infinity", "nan": "NaN"}
_MAX_DEPTH = 64


class Duplicate(NamedTuple):
    """A key that stands twice in one object: its path, its second value and both lines."""

    path: Path
    value: Any
    first_line: int
    line: int


class Document(NamedTuple):
    """A parsed text: its value, the line of every key (first line is 1) and the keys that stand twice."""

    value: Any
    lines: dict[Path, int]
    duplicates: tuple[Duplicate, ...]


class SyntaxProblem(ValueError):
    """The text is not JSON, not even in the relaxed form; `line` is where reading stopped."""

    def __init__(self, message: str, fix: str, line: int) -> None:
        self.message, self.fix, self.line = message, fix, line
        super().__init__(f"line {line}: {message}")


def parse(text: str) -> Document:
    """Parse `text`.

    Raises:
        SyntaxProblem: at the first place that cannot be read.
    """
    return _Parser(text).document()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[Path, int] = {}
        self.duplicates: list[Duplicate] = []

    def document(self) -> Document:
        value = self.value(())
        if self.peek():
            self.fail(f"expected the end of the text, got {self.rest()}", "remove what follows the closing bracket")
        return Document(value, self.lines, tuple(self.duplicates))

    def value(self, path: Path) -> Any:
        if len(path) > _MAX_DEPTH:
            self.fail(f"nested deeper than {_MAX_DEPTH} levels", "flatten the configuration")
        char = self.peek()
        if char == "{":
            return self.object(path)
        if char == "[":
            return self.array(path)
        if char == '"':
            return self.string()
        return self.number_or_word()

    def object(self, path: Path) -> dict[str, Any]:
        self.at += 1
        members: dict[str, Any] = {}
        while self.peek() != "}":
            line = self.line()
            key = self.key()
            self.expect(":", f"after the key {json.dumps(key)}")
            member = (*path, key)
            first_line = self.lines.setdefault(member, line)
            value = self.value(member)
            if key in members:
                self.duplicates.append(Duplicate(member, value, first_line, line))
            else:
                members[key] = value
            self.separator("}")
        self.at += 1
        return members

    def array(self, path: Path) -> list[Any]:
        self.at += 1
        items: list[Any] = []
        while self.peek() != "]":
            items.append(self.value((*path, str(len(items)))))
            self.separator("]")
        self.at += 1
        return items

    def key(self) -> str:
        if self.peek() == '"':
            return self.string()
        match = _WORD.match(self.text, self.at)
        if not match:
            self.fail(f"expected a key, got {self.rest()}", "write the key in double quotes")
        self.at = match.end()
        return match.group()

    def string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if not match:
            self.fail("a string does not end on its line", "close it with a double quote")
        try:
            value = json.loads(match.group())
        except ValueError:
            self.fail(f"{match.group()} holds an escape that JSON does not know", "write a backslash as \\\\")
        self.at = match.end()
        return str(value)

    def number_or_word(self) -> Any:
        number = _NUMBER.match(self.text, self.at)
        if number:
            self.at = number.end()
            try:
                return json.loads(number.group())
            except ValueError:  # Python refuses integers of more than 4300 digits
                self.fail("a number is too long to read", "write it shorter")
        match = _WORD.match(self.text, self.at)
        word = match.group() if match else ""
        if word in _WORDS:
            self.at += len(word)
            return _WORDS[word]
        if word in _PYTHON_WORDS:
            self.fail(f"{word} is Python, not JSON", f"write {_PYTHON_WORDS[word]}")
        if not self.peek():
            self.fail("the text ends where a value is expected", "check that every bracket is closed")
        self.fail(f"expected a value, got {self.rest()}", "write strings in double quotes")

    def separator(self, closing: str) -> None:
        char = self.peek()
        if char == ",":
            self.at += 1
        elif char != closing:
            got = self.rest() if char else "the end of the text"
            self.fail(f"expected ',' or '{closing}', got {got}", "check for a missing comma or bracket just before")

    def expect(self, char: str, where: str) -> None:
        if self.peek() != char:
            self.fail(f"expected {char!r} {where}, got {self.rest() or 'the end of the text'}", f"write {char!r} there")
        self.at += 1

    def peek(self) -> str:
        """The next character that is neither space nor comment; empty at the end."""
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        if self.text.startswith("/*", self.at):
            self.fail("a comment is not closed", "end it with */")
        return self.text[self.at : self.at + 1]

    def rest(self) -> str:
        words = self.text[self.at : self.at + 40].splitlines()
        return repr(words[0].strip()[:30]) if words else ""

    def line(self) -> int:
        return bisect_right(self.newlines, self.at - 1) + 1

    def fail(self, message: str, fix: str) -> NoReturn:
        raise SyntaxProblem(message, fix, self.line())
