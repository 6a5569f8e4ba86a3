"""Refuses what does not fit, with the figures and with what would fit. Places nothing itself: assign.py does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from lorica.place.assign import PARAM_WINDOW, assign
from lorica.place.demand import Budget, Budgets, Constraints, PlaneDemand, Speeds
from lorica.place.placements import Placements, TierUse, count_text, size_text

MAX_RANKS = 4096
_NAMES = {"device": "device memory", "host": "host memory", "disk": "disk space"}
_OPTIMIZER = "zero_optimization.offload_optimizer"
_PARAM = "zero_optimization.offload_param"


class Question(NamedTuple):
    """Everything that a placement depends on."""

    planes: tuple[PlaneDemand, ...]
    budgets: Budgets
    constraints: Constraints
    speeds: Speeds

    def answer(self) -> Placements:
        """The planner's placement, which may not fit."""
        return assign(*self)

    def least(self) -> Placements:
        """The placement with a device ring no longer than it must be: what is needed, not what is filled."""
        return self.wishing(overlap=False).answer()

    def wishing(self, **wishes: object) -> Question:
        """The same with other constraints."""
        return self._replace(constraints=replace(self.constraints, **wishes))  # type: ignore[arg-type]

    def at_stage_1(self) -> Question:
        """The same with the records shared by the ranks (from stage 0)."""
        planes = tuple(replace(plane, record_shards=self.constraints.ranks) for plane in self.planes)
        return self._replace(planes=planes).wishing(stage=1)

    def at_stage_3(self, ranks: int) -> Question:
        """The same at stage 3 over `ranks`, each with these budgets."""
        gathered = PARAM_WINDOW * max((p.whole_bytes for p in self.planes), default=0)
        passing = self.constraints.passing_bytes + (gathered if self.constraints.stage < 3 else 0)
        planes = tuple(plane.sharded(ranks) for plane in self.planes)
        return self._replace(planes=planes).wishing(stage=3, ranks=ranks, passing_bytes=passing)


class Alternative(NamedTuple):
    """A change that makes it fit: what to set, and what each tier then holds."""

    setting: str
    placements: Placements

    def __str__(self) -> str:
        uses = [
            f"{name} {size_text(tier.used)} of {size_text(tier.budget.usable)}"
            for name, tier in self.placements.tiers.items()
            if tier.used
        ]
        return f"{self.setting} ({', '.join(uses)})"


class DoesNotFit(ValueError):
    """The model states do not fit into the budgets; `placements` is the nearest try, `alternatives` what would fit."""

    def __init__(self, placements: Placements, alternatives: Sequence[Alternative]) -> None:
        self.placements, self.alternatives = placements, tuple(alternatives)
        lines = [f"the model states of {count_text(placements.numel)} parameters do not fit; each rank needs"]
        lines += [f"  {_need(name, tier)}" for name, tier in placements.tiers.items() if tier.used or tier.short]
        if alternatives:
            lines += ["Fix: one of these fits", *(f"  - {alternative}" for alternative in alternatives)]
        else:
            lines += ["Fix: more memory, or a smaller model; no other setting fits."]
        super().__init__("\n".join(lines))


def place(
    planes: Sequence[PlaneDemand], budgets: Budgets, constraints: Constraints, speeds: Speeds | None = None
) -> Placements:
    """Place every plane within the budgets.

    Args:
        planes: in the order in which the forward needs them first (the root unit: first).
    Raises:
        DoesNotFit: a tier is too small, with what is missing and what would fit.
    """
    question = Question(tuple(planes), budgets, constraints, speeds or Speeds())
    placements = question.answer()
    if placements.fits:
        return placements
    raise DoesNotFit(question.least(), list(_alternatives(question)))


def _need(name: str, tier: TierUse) -> str:
    budget = tier.budget
    kept = f" ({size_text(budget.size)} less a reserve of {size_text(budget.reserve)})" if budget.reserve else ""
    verdict = f"short by {size_text(tier.short)}" if tier.short else "enough"
    return f"{_NAMES[name]}: {size_text(tier.used)}, the budget is {size_text(budget.usable)}{kept}: {verdict}"


# -- what would fit ----------------------------------------------------------------------------------------------------


def _alternatives(question: Question) -> Iterator[Alternative]:
    """Everything that fits, the smallest change first."""
    for setting, other in (*_other_tiers(question), *_other_reserves(question)):
        placements = other.least()
        moves = other.constraints.params == question.constraints.params or any(
            placed.param == "host" for placed in placements.planes
        )
        if placements.fits and moves:
            yield Alternative(setting, placements)
    yield from _more_ranks(question)
    yield from _smaller_model(question)


def _other_tiers(question: Question) -> Iterator[tuple[str, Question]]:
    """Other wishes for the tiers and the executor, none of which is the present one."""
    wishes = question.constraints
    if wishes.executor != "host" and wishes.records != "device":  # without the ring of chunks on the device
        yield 'lorica.offload.executor "host"', question.wishing(executor="host")
    if wishes.ratio < 1.0 and wishes.records != "device":
        yield f"{_OPTIMIZER}.ratio 1.0", question.wishing(ratio=1.0)
    free = (question if wishes.stage else question.at_stage_1()).wishing(ratio=1.0)
    stage = "" if wishes.stage else " with stage 1"
    for records, device in (("auto", "auto"), ("host", "cpu"), ("nvme", "nvme")):
        exists = records != "nvme" or question.budgets.disk.usable > 0
        if exists and wishes.records != records:
            yield f'{_OPTIMIZER}.device "{device}"{stage}', free.wishing(records=records)
    if wishes.params == "device":
        sharded = question if wishes.stage == 3 else question.at_stage_3(wishes.ranks)
        stage = "" if wishes.stage == 3 else " and stage 3"
        both = f'{_PARAM}.device "auto" with {_OPTIMIZER}.device "auto"{stage}'
        yield both, sharded.wishing(params="auto", records="auto", ratio=1.0)


def _other_reserves(question: Question) -> Iterator[tuple[str, Question]]:
    """The largest reserve of device or host memory with which it fits."""
    for tier, budget in (("device", question.budgets.device), ("host", question.budgets.host)):
        keeping_less = partial(_keeping_less, question, tier)
        if budget.reserve and keeping_less(budget.reserve).answer().fits:
            less = _first(keeping_less, budget.reserve)
            setting = f'lorica.offload.{tier}_reserve "{_rounded_down(budget.reserve - less)}"'
            yield setting, keeping_less(less)


def _keeping_less(question: Question, tier: str, less: int) -> Question:
    """The same with a reserve that is smaller by `less` bytes."""
    budgets = question.budgets
    device, host = (Budget(budget.size, budget.reserve - less) for budget in (budgets.device, budgets.host))
    if budgets.shared:
        return question._replace(budgets=replace(budgets, device=device, host=host))
    return question._replace(
        budgets=replace(budgets, device=device) if tier == "device" else replace(budgets, host=host)
    )


def _more_ranks(question: Question) -> Iterator[Alternative]:
    """Stage 3 over the smallest number of ranks that is enough, with the present tiers and with automatic ones."""
    auto = question.wishing(records="auto", ratio=1.0)
    wishes, found = question.constraints, MAX_RANKS + 1
    start = wishes.ranks if wishes.stage < 3 and wishes.ranks > 1 else wishes.ranks + 1
    for setting, wished in (("", question), (f' and {_OPTIMIZER}.device "auto"', auto)):
        if start > MAX_RANKS or not wished.at_stage_3(MAX_RANKS).answer().fits:
            continue
        ranks = start + _first(partial(_over, wished, start), MAX_RANKS - start)
        if ranks < found:
            found = ranks
            text = f"stage 3 over {ranks} ranks with such budgets each{setting}"
            yield Alternative(text, wished.at_stage_3(ranks).least())


def _over(question: Question, start: int, extra: int) -> Question:
    return question.at_stage_3(start + extra)


def _smaller_model(question: Question) -> Iterator[Alternative]:
    """The largest model of this shape that fits, to a thousandth."""
    thousandths = 1000

    def scaled(less: int) -> Question:
        factor = (thousandths - less) / thousandths
        return question._replace(planes=tuple(plane.scaled(factor) for plane in question.planes))

    if scaled(thousandths - 1).answer().fits:
        placements = scaled(_first(scaled, thousandths - 1)).least()
        yield Alternative(f"a model of {count_text(placements.numel)} parameters", placements)


def _first(question: Callable[[int], Question], last: int) -> int:
    """The smallest number in 0 .. `last` whose question has an answer that fits; `last` must have one."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if question(middle).answer().fits:
            high = middle
        else:
            low = middle + 1
    return low


def _rounded_down(count: int) -> str:
    """Bytes as a configuration takes them, never more than `count`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{int(count / size * 10) / 10:g}{unit}"
    return f"{count}B"
