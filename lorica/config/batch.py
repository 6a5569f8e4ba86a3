"""The batch triad: train_batch_size = micro-batch x accumulation x data-parallel ranks. Arithmetic on three numbers."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from lorica.config.errors import MISSING, Problem

TOTAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
STEPS = "gradient_accumulation_steps"

CHECK = "Check batch related parameters"
"""DeepSpeed's opening words for a triad that does not fit; clients look for them."""
_NEEDED = f"Either {TOTAL} or {MICRO} needs to be provided"


class Batch(NamedTuple):
    """The triad; None where not known."""

    train_batch_size: int | None = None
    train_micro_batch_size_per_gpu: int | None = None
    gradient_accumulation_steps: int | None = None


class Remedy(NamedTuple):
    """A change that makes a triad fit: the batch sizes to set, or another number of ranks."""

    batch: Batch
    world_size: int


def resolve(batch: Batch, world_size: int) -> Batch:
    """The full triad. Call `problems` first: this divides without asking."""
    total, micro, steps = batch
    if total is not None:
        if micro is None and steps is None:
            steps = 1
        if steps is None:
            assert micro is not None
            steps = total // micro // world_size
        if micro is None:
            micro = total // world_size // steps
        return Batch(total, micro, steps)
    assert micro is not None
    steps = steps or 1
    return Batch(micro * steps * world_size, micro, steps)


def fits(batch: Batch, world_size: int) -> bool:
    """Whether the triad resolves to whole positive numbers whose product is the total."""
    total, micro, steps = batch
    if total is None:
        return micro is not None
    quotient = (micro or 1) * (steps or 1) * world_size
    if micro is not None and steps is not None:
        return quotient == total
    return total % quotient == 0


def problems(batch: Batch, world_size: int, source: str, auto_keys: Collection[str] = ()) -> list[Problem]:
    """Why `batch` does not fit `world_size` data-parallel ranks; empty if it does. `source` says who counted them."""
    if fits(batch, world_size):
        return []
    ranks = f"the data-parallel world size is {world_size} (from {source})"
    if batch.train_batch_size is None:
        return [_nothing_given(batch, ranks, auto_keys)]
    return [Problem(TOTAL, batch.train_batch_size, f"{_mismatch(batch, world_size)}; {ranks}", _fix(batch, world_size))]


def contradiction(batch: Batch) -> list[Problem]:
    """Why no number of ranks at all can fit `batch`; empty if some does."""
    total, micro, steps = batch
    if total is None or total % ((micro or 1) * (steps or 1)) == 0:
        return []
    divisor = (micro or 1) * (steps or 1)
    factors = " x ".join(_named(name, value) for name, value in ((MICRO, micro), (STEPS, steps)) if value is not None)
    message = f"{CHECK}: expected a multiple of {factors}, which no number of ranks makes it"
    if micro is not None and steps is not None:
        message += f" ({micro} x {steps} = {divisor})"
    choices = " or ".join(str(value) for value in _neighbours(total, divisor))
    return [Problem(TOTAL, total, message, f"set {TOTAL} to {choices}")]


def remedies(batch: Batch, world_size: int) -> list[Remedy]:
    """Single changes after which `batch` fits, smallest change of meaning first.

    Each either sets one of the given batch sizes to another value or starts another number of ranks.
    """
    total, micro, steps = batch
    if total is None:
        return [Remedy(batch._replace(train_micro_batch_size_per_gpu=1), world_size)]
    found: list[Remedy] = []
    if micro is not None and steps is not None:
        totals = [micro * steps * world_size]
    else:
        totals = _neighbours(total, (micro or 1) * (steps or 1) * world_size)
    found += [Remedy(batch._replace(train_batch_size=value), world_size) for value in totals]
    if micro is not None and total % (micro * world_size) == 0:
        found.append(Remedy(batch._replace(gradient_accumulation_steps=total // (micro * world_size)), world_size))
    if steps is not None and total % (steps * world_size) == 0:
        found.append(Remedy(batch._replace(train_micro_batch_size_per_gpu=total // (steps * world_size)), world_size))
    if total % ((micro or 1) * (steps or 1)) == 0:
        found.append(Remedy(batch, total // ((micro or 1) * (steps or 1))))
    return [remedy for remedy in found if fits(*remedy)]


def text(batch: Batch, world_size: int | None) -> str:
    """The triad as a short product."""
    total, micro, steps = batch
    if total is not None and micro is not None and steps is not None and world_size is not None:
        return f"batch {total} = {micro} x {steps} accumulated x {world_size} ranks"
    given = [
        f"{name} {value}" for name, value in zip(("batch", "micro-batch", "accumulation"), batch, strict=True) if value
    ]
    return ", ".join(given) or "batch not given"


def _neighbours(total: int, divisor: int) -> list[int]:
    """The multiples of `divisor` around `total`, positive ones only."""
    below = total // divisor * divisor
    return [value for value in (below, below + divisor) if value > 0 and value != total]


def _mismatch(batch: Batch, world_size: int) -> str:
    total, micro, steps = batch
    factors = [_named(name, value) for name, value in ((MICRO, micro), (STEPS, steps)) if value is not None]
    product = " x ".join([*factors, f"world size {world_size}"])
    if factors:
        product += f" = {(micro or 1) * (steps or 1) * world_size}"
    expected = product if len(factors) == 2 else f"a multiple of {product}"
    return f"{CHECK}: expected {expected}, got {total}"


def _fix(batch: Batch, world_size: int) -> str:
    """The remedies in words."""
    settings: dict[str, list[str]] = {}
    ranks = []
    for remedy in remedies(batch, world_size):
        if remedy.world_size != world_size:
            ranks.append(f"start {remedy.world_size} data-parallel ranks with the `lorica` launcher")
        for name, old, new in zip(Batch._fields, batch, remedy.batch, strict=True):
            if old != new:
                settings.setdefault(name, []).append(str(new))
    return ", or ".join([*(f"set {name} to {' or '.join(values)}" for name, values in settings.items()), *ranks])


def _nothing_given(batch: Batch, ranks: str, auto_keys: Collection[str]) -> Problem:
    auto = [name for name in (TOTAL, MICRO) if name in auto_keys]
    if auto:
        message = f'{_NEEDED}: expected a number, got "auto", which only a trainer fills in; {ranks}'
        return Problem(auto[0], "auto", message, f"set {MICRO} to a number, or leave this file to the trainer")
    fix = f"set {MICRO}, the samples of one forward on one rank"
    if batch.gradient_accumulation_steps is not None:
        return Problem(
            STEPS,
            batch.gradient_accumulation_steps,
            f"{_NEEDED}: this alone says nothing about their size; {ranks}",
            fix,
        )
    return Problem(MICRO, MISSING, f"{_NEEDED}; {ranks}", fix)


def _named(name: str, value: int) -> str:
    return f"{name} {value}"
