"""The demo's corpus: which files are read, in which order, and what the BPE and the token files keep. No processes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gpt"))
import text


def write_folder(root: Path) -> Path:
    """Twenty small text files, and some that are not to be read."""
    for number in range(20):
        path = root / f"part{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file number {number}\n" + "some words, again and again\n" * (number + 1))
    for unwanted in (".hidden/a.txt", "site-packages/b.txt", "part0/__pycache__/c.txt"):
        path = root / unwanted
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not wanted")
    (root / "binary.bin").write_bytes(b"\x00\x01\x02" * 100)
    return root


def test_the_order_of_files_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "one")
    second = Path(shutil.copytree(first, tmp_path / "two" / "deeper"))
    orders = [[path.relative_to(root) for path in text.find_files(root)] for root in (first, second)]
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


def test_hidden_files_caches_installed_packages_and_binary_files_are_left_out(tmp_path: Path) -> None:
    documents = text.read_documents(text.find_files(write_folder(tmp_path)))
    assert len(documents) == 20
    assert all(document.startswith("file number") for document in documents)


def test_one_file_may_be_the_whole_corpus(tmp_path: Path) -> None:
    path = tmp_path / "book.md"
    path.write_text("words")
    assert text.find_files(path) == [path]


def test_the_default_corpus_is_the_standard_library_without_installed_packages() -> None:
    files = text.find_files(None)
    names = {path.relative_to(text.standard_library()).as_posix() for path in files}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name for name in names)


def test_an_empty_or_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"No text to train on.*{path.name}"):
            text.find_files(path)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=20))
def test_the_pieces_of_a_text_make_up_the_text(lines: list[str]) -> None:
    whole = "\n".join(lines)
    original, text.ENCODE_CHARS = text.ENCODE_CHARS, 50
    try:
        pieces = list(text._pieces(whole))
    finally:
        text.ENCODE_CHARS = original
    assert "".join(pieces) == whole
    assert all(piece.endswith("\n") for piece in pieces[:-1])


@given(st.text(min_size=1, max_size=400))
def test_a_split_loses_nothing_and_validation_is_the_last_twentieth(whole: str) -> None:
    train, validation = text.split(whole)
    assert train + validation == whole
    assert len(validation) == int(len(whole) * 0.05)


BPE = text.train_bpe("def main():\n    return the_same_thing\n" * 200, vocab_size=300)


@settings(max_examples=200)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200))
def test_any_text_survives_encoding_and_decoding(whole: str) -> None:
    assert BPE.decode(text.encode(BPE, whole).tolist(), skip_special_tokens=False) == whole


def test_the_bpe_learns_what_is_frequent() -> None:
    assert len(text.encode(BPE, "    return the_same_thing\n")) < 10  # of 26 characters
    assert BPE.get_vocab_size() <= 300


def test_a_second_run_takes_the_tokens_of_the_first(tmp_path: Path) -> None:
    folder, said = write_folder(tmp_path / "texts"), list[str]()
    first = text.prepare(folder, tmp_path / "cache", vocab_size=300, say=said.append)
    assert said
    said.clear()
    second = text.prepare(folder, tmp_path / "cache", vocab_size=300, say=said.append)
    assert not said
    assert np.array_equal(first.train, second.train) and first.train.dtype == np.uint16
    everything = text.END_OF_TEXT.join(text.read_documents(text.find_files(folder)))
    decoded = [second.tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in second[:2]]
    assert "".join(decoded) == everything


def test_a_changed_text_is_tokenised_anew(tmp_path: Path) -> None:
    folder, said = write_folder(tmp_path / "texts"), list[str]()
    text.prepare(folder, tmp_path / "cache", vocab_size=300)
    (folder / "part0" / "file0.txt").write_text("file number 0, changed\n")
    text.prepare(folder, tmp_path / "cache", vocab_size=300, say=said.append)
    assert said


@pytest.mark.parametrize("vocab_size", [256, 65537])
def test_a_vocabulary_that_sixteen_bits_cannot_hold_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"expected 257 to 65536 tokens, got {vocab_size}"):
        text.prepare(write_folder(tmp_path), tmp_path / "cache", vocab_size=vocab_size)
