"""Text in, token files out: which files are read, the BPE, the tokens on disk; not how batches are drawn from them.

    files -> one text -> BPE trained on a part of it -> train.bin and validation.bin (uint16, memory-mapped)

Everything is deterministic: the same files give the same tokens. Several processes may start at once: one prepares, the
others wait for it, and a finished folder appears in one rename, so that nobody ever reads half of it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 0.05
BPE_SAMPLE_CHARS = 10_000_000  # more text makes the training of the BPE slower, and its merges hardly better
ENCODE_CHARS = 500_000  # one call's worth of text: bounds the memory that encoding takes
FORMAT_VERSION = 1  # part of the cache key: raise it when the same text would give other tokens

TokenArray = npt.NDArray[np.uint16]


class Tokens(NamedTuple):
    """A tokenised corpus: `train` and `validation` are memory-mapped files, one uint16 a token."""

    train: TokenArray
    validation: TokenArray
    tokenizer: Tokenizer


def standard_library() -> Path:
    """The folder with the sources of the Python that runs: some 30 MB of real text that everybody already has."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(data_path: Path | None) -> list[Path]:
    """The text files to read.

    Args:
        data_path: a text file, or a folder with text files at any depth; None is the Python standard library.
    Returns: the files, in an order that depends on their names below `data_path` only, and on nothing else of the
        machine. The order is a shuffle (by hash), so that the validation text, which is the end, is of every kind.
    Raises:
        ValueError: there is nothing to read at `data_path`.
    """
    root = standard_library() if data_path is None else data_path
    if root.is_file():
        return [root]
    pattern = "*.py" if data_path is None else "*"
    files = [path for path in root.rglob(pattern) if path.is_file() and _is_wanted(path.relative_to(root))]
    if not files:
        raise ValueError(
            f"No text to train on: expected a text file, or a folder with some, got {root}. Fix: --data_path."
        )
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def _is_wanted(relative: Path) -> bool:
    """Neither installed packages, nor caches, nor hidden files."""
    return not any(
        part.startswith(".") or part in ("site-packages", "dist-packages", "__pycache__") for part in relative.parts
    )


def read_documents(files: list[Path]) -> list[str]:
    """The texts of `files` in their order; binary files (a NUL byte near the beginning) and empty ones are left out."""
    documents = []
    for path in files:
        raw = path.read_bytes()
        if raw and b"\0" not in raw[:8192]:
            documents.append(raw.decode("utf-8", errors="replace").replace("\r\n", "\n"))
    return documents


def split(text: str) -> tuple[str, str]:
    """Cut `text` into the part to train on and the last `VALIDATION_SHARE`, for validation."""
    cut = len(text) - int(len(text) * VALIDATION_SHARE)
    return text[:cut], text[cut:]


def train_bpe(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the beginning of `text`.

    Args:
        vocab_size: at most this many tokens: 256 bytes, the end-of-text mark, and merges of what occurs most often.
    Source: Sennrich et al. 2016 (arXiv:1508.07909); over bytes, so that no text is unknown: Radford et al. 2019.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(text[:BPE_SAMPLE_CHARS]), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> TokenArray:
    """Turn `text` into tokens, a piece at a time, on all cores."""
    encodings = tokenizer.encode_batch_fast(list(_pieces(text)))
    return np.concatenate([np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings])


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of about `ENCODE_CHARS` at line ends, where the BPE would cut too."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + ENCODE_CHARS)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def prepare(
    data_path: Path | None, cache: Path, *, vocab_size: int = 8192, say: Callable[[str], None] = lambda message: None
) -> Tokens:
    """Tokenise the text at `data_path`, or take the tokens that an earlier run left in `cache`.

    Args:
        data_path: see `find_files`.
        cache: a folder for finished corpora; made if missing.
        vocab_size: size of the BPE, 257 to 65536: a token is stored in 16 bits.
        say: told what takes time, by the one process that does it.
    Raises:
        ValueError: nothing to read, or a vocabulary size that 16 bits cannot hold.
    """
    if not 257 <= vocab_size <= 65536:
        raise ValueError(
            f"The vocabulary does not fit: expected 257 to 65536 tokens, got {vocab_size}. Fix: --vocab_size."
        )
    documents = read_documents(find_files(data_path))
    folder = cache / _key(documents, vocab_size)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # the system frees it when its holder dies, however it dies
        if not folder.exists():
            _write(documents, folder, vocab_size, say)
    return Tokens(
        np.memmap(folder / "train.bin", dtype=np.uint16, mode="r"),
        np.memmap(folder / "validation.bin", dtype=np.uint16, mode="r"),
        Tokenizer.from_file(str(folder / "bpe.json")),
    )


def _key(documents: list[str], vocab_size: int) -> str:
    """A folder name that changes with every byte of the text, so that a cache is never out of date."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {vocab_size} {BPE_SAMPLE_CHARS} {VALIDATION_SHARE}".encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return f"tokens-{vocab_size}-{digest.hexdigest()[:16]}"


def _write(documents: list[str], folder: Path, vocab_size: int, say: Callable[[str], None]) -> None:
    """Train the BPE, encode both parts, and put the finished folder in its place with one rename."""
    train, validation = split(END_OF_TEXT.join(documents))
    say(f"{len(documents)} files, {(len(train) + len(validation)) / 1e6:.1f} M characters: training a BPE ...")
    tokenizer = train_bpe(train, vocab_size)
    say(f"BPE with {tokenizer.get_vocab_size()} tokens trained: encoding the text ...")
    draft = folder.with_suffix(f".draft-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    tokenizer.save(str(draft / "bpe.json"))
    for name, part in (("train", train), ("validation", validation)):
        tokens = encode(tokenizer, part)
        tokens.tofile(draft / f"{name}.bin")
        say(f"{len(tokens) / 1e6:.2f} M tokens for {name}, {len(part) / len(tokens):.2f} characters each")
    draft.rename(folder)
