"""The documentation against the code: links, pictures, names of keys and files, messages, examples, layers."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

import lorica
from lorica.config import Config, load
from lorica.config.jsonc import parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
OUTSIDE_FENCES = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
pages = pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return OUTSIDE_FENCES.sub("", page.read_text(encoding="utf-8"))


def in_backticks(page: Path) -> list[str]:
    """What stands in code type in the prose of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# Links and pictures ---------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}, but {target.name} has no such heading"


def test_every_page_can_be_reached_from_the_index() -> None:
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked


def drawn() -> dict[str, str]:
    """The SVG text of every picture, drawn now."""
    draw = runpy.run_path(str(DOCS / "pictures" / "draw.py"))
    return {name: make().svg() for name, make in draw["PICTURES"].items()}


MEASURED = {"timeline.svg"}  # drawn by benchmarks/gpu_timeline.py from what a GPU did


def test_the_pictures_are_what_draw_py_draws() -> None:
    pictures = [path for path in (DOCS / "pictures").glob("*.svg") if path.name not in MEASURED]
    files = {path.name: path.read_text(encoding="utf-8") for path in pictures}
    expected = drawn()
    assert files.keys() == expected.keys()
    stale = [name for name in files if files[name] != expected[name]]
    assert not stale, f"{stale} are not up to date. Fix: python docs/pictures/draw.py"


def test_the_staging_buffer_in_the_pictures_has_the_states_of_the_code() -> None:
    from lorica.comm.slots import SlotState

    draw = runpy.run_path(str(DOCS / "pictures" / "draw.py"))
    assert set(draw["BUFFER_MOVES"]) == {state.name for state in SlotState}


# Names ----------------------------------------------------------------------------------------------------------------


def has_key(block: Any, dotted: list[str]) -> bool:
    """Whether the schema below `block` (a model or a type annotation) has this key, by any of its names."""
    if not dotted:
        return True
    if not hasattr(block, "model_fields"):
        return get_origin(block) is dict or any(has_key(part, dotted) for part in get_args(block))
    for name, declared in block.model_fields.items():
        info = declared.json_schema_extra
        names = {name, *getattr(info, "aliases", ()), *getattr(info, "deprecated", ())}
        if dotted[0] in names and has_key(declared.annotation, dotted[1:]):
            return True
    return False


def is_key(word: str) -> bool:
    """Whether `word` looks like a dotted key of the configuration (and not like a module or name of the package)."""
    first, _, rest = word.partition(".")
    if not re.fullmatch(r"[a-z]\w*(\.\w+)+", word) or first not in Config.model_fields or word.endswith(".py"):
        return False
    name = rest.split(".")[0]
    return first != "lorica" or not (name in lorica.__all__ or find_spec(f"lorica.{name}"))


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "configuration.md"], ids=lambda page: page.name)
def test_every_configuration_key_that_is_named_exists(page: Path) -> None:
    """Not in configuration.md: it is made from the schema, old names included (test_config_check)."""
    for word in filter(is_key, in_backticks(page)):
        assert has_key(Config, word.split(".")), f"{page.name} names the key {word}, which the configuration lacks"


def test_a_key_that_does_not_exist_is_noticed() -> None:
    assert has_key(Config, ["zero_optimization", "stage"])
    assert has_key(Config, ["zero_optimization", "offload_optimizer", "device"])
    assert has_key(Config, ["optimizer", "params", "lr"])
    assert is_key("lorica.units.clases") and not is_key("lorica.zero.Init") and not is_key("optimizer.py")
    assert not has_key(Config, ["lorica", "units", "clases"])
    assert not has_key(Config, ["zero_optimization", "stagee"])
    assert not has_key(Config, ["zero_optimization", "stage", "device"])


@pages
def test_every_file_that_is_named_exists(page: Path) -> None:
    for word in in_backticks(page):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|md|json|svg)", word):
            assert (ROOT / word).exists() or (ROOT / "lorica" / word).exists(), f"{page.name} names {word}"


@pytest.mark.parametrize("name", ["architecture.md", "zero.md", "memory.md", "units.md", "gradients.md", "offload.md"])
def test_every_python_name_of_the_concept_pages_exists(name: str) -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lorica").rglob("*.py"))
    for word in in_backticks(DOCS / name):
        called = re.fullmatch(r"(?:lorica\.zero\.|engine\.|lorica\.)?(\w+)\(.*\)", word)
        if called and not hasattr(__builtins__, called[1]):
            known = re.search(rf"\b{called[1]}\b", code)
            assert known, f"{name} names {word}, which the code does not have"


# Examples -------------------------------------------------------------------------------------------------------------


@pages
def test_every_configuration_that_is_shown_is_accepted(page: Path) -> None:
    for text in blocks(page, "json"):
        shown = parse(text if text.startswith("{") else f"{{{text}}}").value
        load({"train_micro_batch_size_per_gpu": 1, **shown}).resolve_batch(8)


def examples() -> Iterator[tuple[str, str]]:
    """The code of memory.md that is followed by its output, and that output."""
    found = re.findall(
        r"^```python\n((?:(?!^```).)*?)^```\n\n```text\n(.*?)^```$",
        (DOCS / "memory.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    yield from found


def test_the_worked_example_prints_what_the_page_says() -> None:
    shown = list(examples())
    assert shown
    for code, output in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue() == output


# Messages -------------------------------------------------------------------------------------------------------------


def text_of(node: ast.expr) -> str:
    """A string in the source, with `...` for each field of an f-string; empty for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)  # type: ignore[misc]
    return ""


def test_every_message_of_troubleshooting_is_one_of_the_code() -> None:
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "lorica").rglob("*.py")]
    strings = {text_of(node) for tree in sources for node in ast.walk(tree) if isinstance(node, ast.expr)}
    headings = re.findall(r"^### `(.+)`$", prose(DOCS / "troubleshooting.md"), re.MULTILINE)
    assert headings
    unknown = [heading for heading in headings if not any(heading in string for string in strings)]
    assert not unknown, f"no message of the code contains {unknown}"


# Layers ---------------------------------------------------------------------------------------------------------------


def layers() -> dict[str, tuple[str, int]]:
    """Layer and place, from left to right, of every package and top-level module that architecture.md lists."""
    rows = re.findall(r"^\| (L\d) \|[^|]*\|([^|]*)\|$", prose(DOCS / "architecture.md"), re.MULTILINE)
    return {
        name.removesuffix("/").removesuffix(".py"): (layer, place)
        for layer, names in rows
        for place, name in enumerate(re.findall(r"`([^`]+)`", names))
    }


def imports() -> Iterator[tuple[str, str]]:
    """(importing, imported) package or module of Lorica, for every import at the top of a file."""
    for path in (ROOT / "lorica").rglob("*.py"):
        importing = path.relative_to(ROOT / "lorica").parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lorica":
                parts = node.module.split(".")
                for imported in parts[1:2] or [alias.name for alias in node.names]:
                    yield importing, imported


def test_imports_go_downwards_through_the_layers_of_architecture_md() -> None:
    known = layers()
    entrances = ("__init__", "__main__")
    wrong = []
    for importing, imported in imports():
        if importing in entrances or importing == imported:
            continue
        assert importing in known, f"architecture.md has no layer for {importing}"
        assert imported in known, f"architecture.md has no layer for {imported}"
        (layer, place), (lower, left) = known[importing], known[imported]
        if not (lower < layer or (lower == layer and left < place)):
            wrong.append(f"{importing} ({layer}) imports {imported} ({lower})")
    assert not wrong
