"""The batch triad, in all seven cases."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorica.config import ConfigError, load
from lorica.config.batch import Batch, contradiction, fits, problems, remedies, resolve

SIZES = st.integers(1, 60)
MAYBE = st.none() | st.integers(1, 240)
TRIADS = st.builds(Batch, MAYBE, MAYBE, MAYBE)
WORLDS = st.integers(1, 12)


def completions(batch: Batch, world_size: int) -> list[Batch]:
    """Every whole triad that agrees with `batch`, found by trying; accumulation is 1 where DeepSpeed says so."""
    total, micro, steps = batch
    if steps is None and (total is None or micro is None):
        steps = 1
    if total is None:
        return [] if micro is None or steps is None else [Batch(micro * steps * world_size, micro, steps)]
    return [
        Batch(total, m, s)
        for m in ([micro] if micro is not None else range(1, total + 1))
        for s in ([steps] if steps is not None else range(1, total + 1))
        if m * s * world_size == total
    ]


@given(SIZES, SIZES, WORLDS, st.sets(st.sampled_from(range(3)), min_size=1, max_size=3))
def test_the_rest_of_a_triad_follows_from_any_part_of_it(micro: int, steps: int, world: int, known: set[int]) -> None:
    if known in ({0}, {1}):
        steps = 1
    whole = Batch(micro * steps * world, micro, steps)
    given_part = Batch(*(size if index in known else None for index, size in enumerate(whole)))
    assume(known != {2})
    assert problems(given_part, world, "the test") == []
    assert resolve(given_part, world) == whole


@given(TRIADS, WORLDS)
def test_a_triad_is_refused_exactly_when_no_whole_one_agrees_with_it(batch: Batch, world: int) -> None:
    assume(batch.train_batch_size is None or batch.train_batch_size <= 60)
    whole = completions(batch, world)
    assert fits(batch, world) == bool(whole)
    assert bool(problems(batch, world, "the test")) == (not whole)
    if whole:
        assert resolve(batch, world) == whole[0]


@given(TRIADS, WORLDS)
def test_every_remedy_is_one_change_that_makes_the_triad_fit(batch: Batch, world: int) -> None:
    assume(not fits(batch, world))
    found = remedies(batch, world)
    assert found
    for remedy in found:
        assert fits(*remedy)
        changed = sum(old != new for old, new in zip(batch, remedy.batch, strict=True))
        assert changed + (remedy.world_size != world) == 1
        whole = resolve(*remedy)
        assert whole.train_batch_size == (
            (whole.train_micro_batch_size_per_gpu or 0) * (whole.gradient_accumulation_steps or 0) * remedy.world_size
        )


@given(TRIADS)
def test_a_contradiction_is_one_for_every_number_of_ranks(batch: Batch) -> None:
    found = contradiction(batch)
    total = batch.train_batch_size
    if found:
        assert total is not None
        assert not any(fits(batch, world) for world in range(1, total + 1))
    elif total is not None:
        assert any(fits(batch, world) for world in range(1, total + 1))


@given(TRIADS, WORLDS)
def test_a_mismatch_says_what_was_expected_how_many_ranks_and_who_counted_them(batch: Batch, world: int) -> None:
    for problem in problems(batch, world, "WORLD_SIZE"):
        assert "Check batch related parameters" in problem.message or "needs to be provided" in problem.message
        assert f"world size is {world} (from WORLD_SIZE)" in problem.message
        assert problem.fix
        for remedy in remedies(batch, world):
            sizes = [new for old, new in zip(batch, remedy.batch, strict=True) if old != new]
            assert all(str(size) in problem.fix for size in [*sizes, *({remedy.world_size} - {world})] if batch[0])


def test_the_message_of_a_mismatch_reads_like_this() -> None:
    raw = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError) as caught:
        load(raw, world_size=2, world_size_source="the WORLD_SIZE variable")
    assert str(caught.value) == (
        "train_batch_size = 32: Check batch related parameters: expected train_micro_batch_size_per_gpu 4 x "
        "gradient_accumulation_steps 2 x world size 2 = 16, got 32; the data-parallel world size is 2 (from the "
        "WORLD_SIZE variable). Fix: set train_batch_size to 16, or set gradient_accumulation_steps to 4, or set "
        "train_micro_batch_size_per_gpu to 8, or start 4 data-parallel ranks with the `lorica` launcher."
    )


def test_accumulation_alone_or_nothing_is_refused() -> None:
    for raw in ({}, {"gradient_accumulation_steps": 4}):
        with pytest.raises(ConfigError, match="Either train_batch_size or train_micro_batch_size_per_gpu needs"):
            load(raw).resolve_batch(2, "the test")


def test_batch_sizes_left_to_a_trainer_are_refused_when_nobody_filled_them_in() -> None:
    config = load({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"})
    with pytest.raises(ConfigError, match=r'train_batch_size = "auto".*only a trainer fills in'):
        config.resolve_batch(2, "the test")


def test_auto_accumulation_follows_from_the_other_two() -> None:
    config = load({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto"})
    assert config.auto_keys == {"gradient_accumulation_steps"}
    resolved = config.resolve_batch(2, "the test")
    assert resolved.gradient_accumulation_steps == 4
    assert resolved.auto_keys == frozenset()
    assert config.gradient_accumulation_steps is None


def test_resolving_twice_for_the_same_world_changes_nothing_and_for_another_is_refused() -> None:
    config = load({"train_micro_batch_size_per_gpu": 3}, world_size=2)
    assert config.resolve_batch(2, "the test").batch == config.batch == Batch(6, 3, 1)
    with pytest.raises(ConfigError, match="Check batch related parameters"):
        config.resolve_batch(3, "the test")


def test_other_keys_that_name_a_number_of_ranks_are_checked_with_the_batch() -> None:
    raw = {
        "train_micro_batch_size_per_gpu": 1,
        "data_parallel_size": 4,
        "zero_optimization": {"stage": 3, "mics_shard_size": 4},
    }
    assert load(raw, world_size=4).train_batch_size == 4
    with pytest.raises(ConfigError) as caught:
        load(raw, world_size=6)
    assert [problem.key for problem in caught.value.problems] == [
        "data_parallel_size",
        "zero_optimization.mics_shard_size",
    ]
    assert "one of 1, 2, 3, 6" in caught.value.problems[1].fix


def test_a_batch_that_no_world_fits_is_refused_without_knowing_the_world() -> None:
    with pytest.raises(ConfigError, match="no number of ranks") as caught:
        load({"train_batch_size": 33, "train_micro_batch_size_per_gpu": 4})
    assert caught.value.problems[0].fix == "set train_batch_size to 32 or 36"


def test_a_misspelt_batch_key_is_not_reported_as_a_mismatch_too() -> None:
    raw = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_acumulation_steps": 2}
    with pytest.raises(ConfigError) as caught:
        load(raw, world_size=3)
    assert [problem.key for problem in caught.value.problems] == ["gradient_acumulation_steps"]
