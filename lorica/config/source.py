"""Turns what the user handed over (dict, path, base64) into a document. Reads no meaning into its keys."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from lorica.config.errors import ConfigError, Problem
from lorica.config.jsonc import Document, Duplicate, Path, SyntaxProblem, parse

_BASE64 = "<base64>"


class Source(NamedTuple):
    """One configuration as handed over: the raw dict, where it came from, lines of its keys (none for a dict)."""

    name: str
    raw: dict[str, Any]
    lines: dict[Path, int]
    duplicates: tuple[Duplicate, ...]

    def where(self, path: Path) -> str:
        """`file:line` of a key; of the nearest enclosing block if the key itself is not in the file."""
        if not self.name:
            return ""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}"
        return self.name


def open_source(source: Mapping[str, Any] | str | os.PathLike[str]) -> Source:
    """Read a configuration from a dict (copied), a path or a base64 string (standard or urlsafe alphabet).

    Raises:
        ConfigError: the file cannot be read, or the text is not a JSON object.
    """
    if isinstance(source, Mapping):
        return Source("", plain(source), {}, ())
    if isinstance(source, str | os.PathLike):
        name, text = _text(os.fspath(source))
        return _parsed(name, text)
    raise ConfigError(
        [
            Problem(
                "",
                source,
                f"expected a dict, a path or a base64 string, got {type(source).__name__}",
                "pass one of them",
            )
        ]
    )


def plain(value: Any) -> Any:
    """A copy made of dicts and lists only; leaves are kept as they are."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _parsed(name: str, text: str) -> Source:
    try:
        document: Document = parse(text)
    except SyntaxProblem as error:
        raise _refused(f"{name}:{error.line}", error.message, error.fix) from None
    if not isinstance(document.value, dict):
        kind = type(document.value).__name__
        raise _refused(f"{name}:1", f"expected a JSON object, got a {kind}", "start the text with { and end it with }")
    return Source(name, document.value, document.lines, document.duplicates)


def _text(source: str) -> tuple[str, str]:
    """The name to show and the text of a path or base64 string."""
    try:
        content = FilePath(source).read_bytes()
    except IsADirectoryError:
        raise _refused(source or "(empty path)", "is a folder", "name the JSON file in it") from None
    except (OSError, ValueError) as error:  # a base64 string is no legal file name, or names no file
        decoded = _from_base64(source)
        if decoded is None:
            raise _unreadable(source, error) from None
        return _BASE64, decoded
    try:
        return source, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(source, f"is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None


def _unreadable(source: str, error: Exception) -> ConfigError:
    shown = source if len(source) <= 80 else source[:77] + "..."
    if isinstance(error, PermissionError):
        return _refused(shown, "may not be read by this user", "change its permissions")
    if source.lstrip().startswith("{"):
        return _refused(shown, "expected a path, got JSON text", "pass json.loads(text), or the path of a file")
    message = f"expected an existing file or a base64 string, got neither (working directory {os.getcwd()})"
    return _refused(shown, message, "check the path, or pass the configuration as a dict")


def _from_base64(source: str) -> str | None:
    """The text in a base64 string; None if `source` is not one."""
    standard = source.strip().replace("-", "+").replace("_", "/").rstrip("=")
    try:
        text = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return text if text.strip() else None


def _refused(where: str, message: str, fix: str) -> ConfigError:
    return ConfigError([Problem("", None, message, fix, where)])
