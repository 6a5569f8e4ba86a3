"""Data loaders: shares of the ranks, order, length, epochs, and what is refused."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, SequentialSampler

from lorica.data import RepeatingLoader, make_loader, route_shuffles


class Squares(Dataset):
    """Sample i is i * i."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> int:
        return index * index


class Countdown(IterableDataset):
    def __iter__(self):
        return iter([3, 2, 1])


class SizedCountdown(Countdown):
    def __len__(self) -> int:
        return 3


def samples(loader) -> list[int]:
    return [int(value) for batch in loader for value in batch]


def test_ranks_share_every_sample_once_where_they_divide_evenly():
    shares = [samples(make_loader(Squares(12), 2, rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert sorted(chain(*shares)) == [i * i for i in range(12)]


def test_ranks_get_equally_many_samples_where_they_do_not_divide_evenly():
    shares = [samples(make_loader(Squares(10), 2, rank, 4)) for rank in range(4)]
    assert [len(share) for share in shares] == [3, 3, 3, 3]
    assert set(chain(*shares)) == {i * i for i in range(10)}


def test_a_dataset_smaller_than_the_number_of_ranks_feeds_all_of_them():
    assert [len(samples(make_loader(Squares(1), 1, rank, 4))) for rank in range(4)] == [1, 1, 1, 1]


def test_shuffled_order_depends_on_seed_and_epoch_and_nothing_else():
    def order(seed: int, epoch: int) -> list[int]:
        loader = make_loader(Squares(50), 5, 0, 1, seed=seed)
        loader.sampler.set_epoch(epoch)
        return samples(loader)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_without_shuffling_ranks_take_turns_in_order():
    assert samples(make_loader(Squares(6), 2, 1, 2, shuffle=False)) == [1, 9, 25]


def test_routes_say_whether_to_shuffle():
    assert [route_shuffles(route) for route in ("train", "eval", "predict")] == [True, False, False]
    with pytest.raises(ValueError, match=r"route: expected one of train, eval, predict, got 'test'.*Fix"):
        route_shuffles("test")


@pytest.mark.parametrize("drop_last", [False, True])
def test_length_is_the_number_of_batches_of_this_rank(drop_last):
    loader = make_loader(Squares(11), 4, 0, 2, drop_last=drop_last)  # 6 samples per rank
    assert len(loader) == len(list(loader)) == (1 if drop_last else 2)


def test_collate_fn_makes_the_batches():
    loader = make_loader(Squares(4), 2, 0, 1, shuffle=False, collate_fn=lambda items: {"sum": sum(items)})
    assert list(loader) == [{"sum": 1}, {"sum": 13}]


def test_a_sampler_decides_alone_which_samples_are_read():
    dataset = Squares(4)
    loader = make_loader(dataset, 4, 1, 2, sampler=SequentialSampler(dataset))
    assert samples(loader) == [0, 1, 4, 9]


def test_an_iterable_dataset_is_batched_as_it_comes():
    loader = make_loader(Countdown(), 2, 1, 2)
    assert [batch.tolist() for batch in loader] == [[3, 2], [1]]
    assert len(make_loader(SizedCountdown(), 2, 0, 1)) == 2


def test_a_list_is_a_dataset():
    batch = next(iter(make_loader([torch.ones(2), torch.zeros(2)], 2, 0, 1, shuffle=False)))
    assert batch.tolist() == [[1, 1], [0, 0]]


def test_asking_for_pinned_memory_without_an_accelerator_does_not_warn(recwarn):
    list(make_loader(Squares(2), 1, 0, 1, pin_memory=True))
    assert not [str(w.message) for w in recwarn if "pin_memory" in str(w.message)]


def test_workers_read_the_same_samples():
    assert samples(make_loader(Squares(6), 2, 0, 2, num_workers=1)) == samples(make_loader(Squares(6), 2, 0, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Squares(4), 0, 0, 1), {}, ValueError, "batch_size: expected an integer of at least 1, got 0"),
        ((Squares(4), None, 0, 1), {}, ValueError, "batch_size: .* got None"),
        ((Squares(4), 2, 2, 2), {}, ValueError, "rank: .* got rank 2 of 2"),
        ((Squares(4), 2, 0, 1), {"num_workers": -1}, ValueError, "num_workers: .* got -1"),
        ((Squares(0), 2, 0, 1), {}, ValueError, "dataset: expected at least one sample"),
        ((iter([1]), 2, 0, 1), {}, TypeError, "dataset: expected a map-style dataset .* got list_iterator"),
        ((Countdown(), 2, 0, 1), {"sampler": [0]}, ValueError, r"sampler: expected none .* got \[0\]"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_fix(arguments, options, error, message):
    with pytest.raises(error, match=message + r"[\s\S]*Fix: "):
        make_loader(*arguments, **options)


def test_a_repeating_loader_reads_every_sample_in_every_epoch_in_a_new_order():
    loader = RepeatingLoader(make_loader(Squares(20), 5, 0, 1))
    assert len(loader) == 4
    epochs = [samples(next(loader) for _ in range(4)) for _ in range(3)]
    assert all(sorted(epoch) == [i * i for i in range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert loader.epoch == 2


def test_a_repeating_loader_counts_epochs_on_from_that_of_the_sampler():
    inner = make_loader(Squares(20), 20, 0, 1)
    inner.sampler.set_epoch(7)
    loader = RepeatingLoader(inner)
    next(loader)
    second = samples([next(loader)])
    inner.sampler.set_epoch(8)
    assert second == samples(inner)


def test_a_repeating_loader_tells_an_iterable_dataset_its_epoch():
    class Epochs(Countdown):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.seen.append(epoch)

    dataset = Epochs()
    loader = RepeatingLoader(make_loader(dataset, 3, 0, 1))
    assert [next(loader).tolist() for _ in range(3)] == [[3, 2, 1]] * 3
    assert dataset.seen == [1, 2]


@pytest.mark.parametrize("empty", [[], iter([1])])
def test_a_repeating_loader_over_nothing_says_so_instead_of_waiting_for_ever(empty):
    loader = RepeatingLoader(empty)
    with pytest.raises(ValueError, match="at least one batch per epoch"):
        for _ in range(3):
            next(loader)
