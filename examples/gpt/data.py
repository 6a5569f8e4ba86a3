"""Which piece of the token file goes where: batches by seed, step and process; not how the file is made.

Every sequence of a training run has a number, and its place in the file depends on the seed and this number alone.
Micro-batch m of process r out of P takes the B numbers from (m * P + r) * B on. Nothing is carried from one batch to
the next: a run that is resumed at micro-batch m, or that spreads the same global batch over more processes, sees the
same text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from text import TokenArray
from torch import Tensor


class Batch(NamedTuple):
    """Tokens and, for each of them, the one that follows: two int64 tensors [B, L]."""

    tokens_BL: Tensor
    targets_BL: Tensor


def training_batch(
    tokens: TokenArray, *, micro_step: int, rank: int, world_size: int, micro_batch: int, seq_len: int, seed: int
) -> Batch:
    """The micro-batch of one process: `micro_batch` sequences from random places of the file.

    Args:
        tokens: the corpus; longer than `seq_len`.
        micro_step: how many micro-batches came before this one on each process.
    """
    first = (micro_step * world_size + rank) * micro_batch
    places = [place(seed, number, len(tokens) - seq_len) for number in range(first, first + micro_batch)]
    return _cut(tokens, places, seq_len)


def place(seed: int, number: int, num_places: int) -> int:
    """Where the sequence with this number begins: uniform over [0, num_places), the same on every machine."""
    return int(np.random.default_rng((seed, number)).integers(num_places))


def validation_batch(
    tokens: TokenArray, *, index: int, rank: int, world_size: int, micro_batch: int, num_batches: int, seq_len: int
) -> Batch:
    """Batch `index` of the `num_batches` that each process looks at: sequences at even distances over the whole file.

    The same numbers in every call, so that one evaluation can be compared with another.
    """
    total = num_batches * world_size * micro_batch
    first = (index * world_size + rank) * micro_batch
    num_places = len(tokens) - seq_len
    return _cut(tokens, [number * num_places // total for number in range(first, first + micro_batch)], seq_len)


def check_length(tokens: TokenArray, seq_len: int, part: str) -> None:
    """Refuse a text that is too short to cut one sequence from.

    Raises:
        ValueError: names the part, its length and the remedy.
    """
    if len(tokens) <= seq_len:
        raise ValueError(
            f"The text is too short: expected more than {seq_len} tokens for {part}, got {len(tokens)}. "
            "Fix: give more text (--data_path) or a shorter --seq_len."
        )


def _cut(tokens: TokenArray, places: list[int], seq_len: int) -> Batch:
    rows = np.stack([tokens[start : start + seq_len + 1] for start in places]).astype(np.int64)
    both = torch.from_numpy(rows)
    return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous())
