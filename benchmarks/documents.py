"""Puts the tables of a benchmark into the Markdown file that shows them. Makes no table."""

from __future__ import annotations

from pathlib import Path


def replace_between(doc: Path, name: str, table: str) -> None:
    """Put a table between the two markers that a Markdown file has for it."""
    begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    text = doc.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"--doc: expected the lines {begin} and {end} in {doc}, found neither or one. Fix: add both.")
    before, after = text.split(begin)[0], text.split(end)[1]
    doc.write_text(f"{before}{begin}\n{table}\n{end}{after}")
