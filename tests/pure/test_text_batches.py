"""The demo's batches: the same text for the same seed, however many processes share it. No processes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gpt"))
import data

TOKENS = np.arange(5000, dtype=np.uint16)


def global_batch(step: int, world_size: int, micro_batch: int, accumulation: int, seed: int) -> set[tuple[int, ...]]:
    """The sequences of one optimizer step, over all processes and micro-batches; TOKENS makes each one unique."""
    rows = set()
    for micro_step in range(step * accumulation, (step + 1) * accumulation):
        for rank in range(world_size):
            batch = data.training_batch(
                TOKENS,
                micro_step=micro_step,
                rank=rank,
                world_size=world_size,
                micro_batch=micro_batch,
                seq_len=8,
                seed=seed,
            )
            rows |= {tuple(row) for row in batch.tokens_BL.tolist()}
    return rows


@given(
    st.integers(0, 1000), st.integers(0, 5), st.sampled_from([(1, 8, 3), (2, 4, 3), (4, 2, 3), (4, 6, 1), (2, 1, 12)])
)
def test_a_step_sees_the_same_text_on_any_number_of_processes(seed: int, step: int, grid: tuple[int, int, int]) -> None:
    assert global_batch(step, *grid, seed) == global_batch(step, 1, 24, 1, seed)


def test_other_seeds_and_other_steps_see_other_text() -> None:
    batches = [global_batch(step, 2, 4, 1, seed) for step, seed in ((0, 0), (1, 0), (0, 1))]
    assert all(a != b for i, a in enumerate(batches) for b in batches[:i])


@given(st.integers(0, 2**31), st.integers(0, 2**40), st.integers(1, 10**9))
def test_a_place_lies_in_the_file(seed: int, number: int, num_places: int) -> None:
    assert 0 <= data.place(seed, number, num_places) < num_places


def test_the_places_spread_over_the_whole_file() -> None:
    places = [data.place(0, number, 1000) for number in range(4000)]
    counts = np.histogram(places, bins=10, range=(0, 1000))[0]
    assert counts.min() > 300 and counts.max() < 500


def test_each_target_is_the_token_after() -> None:
    batch = data.training_batch(TOKENS, micro_step=3, rank=1, world_size=2, micro_batch=4, seq_len=16, seed=0)
    assert batch.tokens_BL.shape == batch.targets_BL.shape == (4, 16)
    assert batch.tokens_BL.dtype == torch.int64
    assert torch.equal(batch.tokens_BL + 1, batch.targets_BL)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_is_the_same_text_shared_out_over_the_processes(world_size: int) -> None:
    rows = [
        row
        for index in range(8 // world_size)
        for rank in range(world_size)
        for row in data.validation_batch(
            TOKENS,
            index=index,
            rank=rank,
            world_size=world_size,
            micro_batch=4,
            num_batches=8 // world_size,
            seq_len=8,
        ).tokens_BL[:, 0]
    ]
    assert rows == [number * 4992 // 32 for number in range(32)]


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    data.check_length(TOKENS, 4999, "training")
    with pytest.raises(ValueError, match="expected more than 5000 tokens for training, got 5000"):
        data.check_length(TOKENS, 5000, "training")
