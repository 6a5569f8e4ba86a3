"""Data loaders of data-parallel ranks: which samples a rank reads, in which order. Moves nothing to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

# Whether a loader for this use shuffles.
ROUTES = {"train": True, "eval": False, "predict": False}


def route_shuffles(route: str) -> bool:
    """Whether `route` ("train", "eval", "predict") wants its samples shuffled.

    Raises:
        ValueError: for any other word.
    """
    if route not in ROUTES:
        raise ValueError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}. Fix: name one of them.")
    return ROUTES[route]


def make_loader(
    dataset: Any,
    batch_size: int,
    rank: int,
    world_size: int,
    *,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = False,
    sampler: Sampler[Any] | Iterable[Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    shuffle: bool = True,
    seed: int = 0,
) -> DataLoader[Any]:
    """A loader of one rank's share of `dataset`; its length is the number of micro-batches on this rank.

    Every rank gets the same number of samples: where they do not divide evenly, some are read twice. Every pass over
    the loader is another epoch, in another order; `loader.sampler.set_epoch(n)` goes to a certain one.

    Args:
        dataset: a map-style dataset (`__getitem__` and `__len__`), or a torch `IterableDataset`. The latter is not cut
            into shares: it must give each rank its own samples, and every rank equally many.
        batch_size: samples per micro-batch on this rank.
        rank, world_size: of the data-parallel group.
        drop_last: leave out a last micro-batch that is smaller than the others.
        sampler: decides alone which samples this rank reads, in place of `shuffle`, `seed`, `rank` and `world_size`.
        pin_memory: page-lock batches, if there is an accelerator to copy them to.
        shuffle, seed: the order of a map-style dataset; the seed must be the same on all ranks.
    Raises:
        TypeError: if `dataset` is neither kind of dataset.
        ValueError: if a number is out of range, the dataset is empty, or an iterable dataset comes with a sampler.
    """
    _check_at_least("batch_size", batch_size, 1)
    _check_at_least("num_workers", num_workers, 0)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank: expected 0 <= rank < world_size, got rank {rank} of {world_size}. "
            "Fix: pass the rank inside the data-parallel group."
        )
    if isinstance(dataset, IterableDataset):
        _refuse_sampler(sampler)
    else:
        _check_map_style(dataset)
        if sampler is None:
            sampler = EpochSampler(dataset, world_size, rank, shuffle=shuffle, seed=seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory and torch.accelerator.is_available(),
        drop_last=drop_last,
    )


class EpochSampler(DistributedSampler[Any]):
    """A distributed sampler that goes on to the next epoch by itself whenever it is iterated."""

    def __iter__(self) -> Iterator[Any]:
        order = super().__iter__()
        self.epoch += 1
        return order


class RepeatingLoader:
    """An endless iterator over a loader: a new epoch, in a new order, begins when the loader is exhausted."""

    def __init__(self, loader: Iterable[Any]) -> None:
        """Wrap `loader`; nothing is read yet.

        Args:
            loader: can be iterated again and again. Whichever of it, its sampler and its dataset has a `set_epoch`
                method is told the number of each epoch but the first, counting on from the sampler's `epoch`.
        """
        self.loader = loader
        self.epoch = int(getattr(getattr(loader, "sampler", None), "epoch", 0))
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self.loader)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            ValueError: if an epoch has no batch at all.
        """
        if self._batches is None:
            self._batches = iter(self.loader)
        try:
            return next(self._batches)
        except StopIteration:
            self._start_epoch()
        try:
            return next(self._batches)
        except StopIteration:
            raise ValueError(
                "RepeatingLoader: expected at least one batch per epoch, got none. Fix: pass a loader that can be "
                "iterated again (not an iterator), over a dataset that fills a batch."
            ) from None

    def _start_epoch(self) -> None:
        self.epoch += 1
        parts: tuple[Any, ...] = (
            self.loader,
            getattr(self.loader, "sampler", None),
            getattr(self.loader, "dataset", None),
        )
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        self._batches = iter(self.loader)


def _check_at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}. Fix: pass such a number.")


def _refuse_sampler(sampler: object) -> None:
    if sampler is not None:
        raise ValueError(
            f"sampler: expected none with an IterableDataset, which decides its own order, got {sampler!r}. "
            "Fix: remove the sampler, or pass a map-style dataset."
        )


def _check_map_style(dataset: Dataset[Any]) -> None:
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            "dataset: expected a map-style dataset (__getitem__ and __len__) or a torch IterableDataset, got "
            f"{type(dataset).__name__}. Fix: wrap it in a torch.utils.data.Dataset, or pass your own DataLoader's "
            "batches to the engine."
        )
    if len(dataset) == 0:
        raise ValueError(f"dataset: expected at least one sample, got an empty {type(dataset).__name__}. Fix: fill it.")
