"""Steps that are taken for applied: what is left of host and device state when some turn out to be skipped."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.optim.scalars import DeviceScalars
from lorica.precision import StaticScale
from lorica.update.assumption import LIMIT, Assumptions, State

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")  # there is no optimizer to be called first


class Flag:
    """A flag that arrives when it is told to, or when somebody waits."""

    def __init__(self, finite: bool) -> None:
        self.finite, self.there = finite, False

    def query(self) -> bool:
        return self.there

    def wait(self) -> Tensor:
        self.there = True
        return torch.tensor([int(self.finite)])


class Host:
    """What an engine does around a step: a schedule, a counter, open steps, and a device that skips by itself."""

    def __init__(self) -> None:
        self.group: dict[str, Any] = {"params": [], "lr": 1.0}
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        optimizer.param_groups = [self.group | {"initial_lr": 1.0}]
        self.group = optimizer.param_groups[0]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        self.open, self.count = Assumptions(), 0
        self.scalars = DeviceScalars(lambda group, step: (float(group["lr"]), float(step)))
        self.used: list[tuple[float, float]] = []  # by the steps that the device applied

    def state(self) -> State:
        return State(StaticScale(), self.schedule, [self.group])

    def settle(self, *, wait: bool) -> None:
        skipped = sum(not outcome.applied for outcome in self.open.settle(wait=wait))
        if skipped:
            self.scalars.know(skipped)
            self.count -= skipped

    def step(self, flag: Flag) -> None:
        self.settle(wait=False)
        before = self.state()
        self.count += 1
        self.scalars.write([self.group], self.count, CPU)
        row = self.scalars.row(self.group, self.count, CPU)
        if flag.finite:
            self.used.append((row[0].item(), row[1].item()))
        self.scalars.note(torch.tensor([int(flag.finite)], dtype=torch.int32))
        self.schedule.step()
        self.open.add(self.count, flag, before, self.state())


def expected(num_applied: int) -> list[tuple[float, float]]:
    """Learning rate and step number of the first updates of a run in which nothing is ever skipped."""
    rates = torch.tensor([1.0 / (1 + step) for step in range(num_applied)]).tolist()
    return [(rate, float(number)) for number, rate in enumerate(rates, start=1)]


@pytest.mark.parametrize("seed", range(30))
def test_applied_steps_use_what_a_run_that_waits_would_have_used(seed: int) -> None:
    dice, host, flags = random.Random(seed), Host(), []
    for _ in range(40):
        flags.append(Flag(finite=dice.random() < 0.6))
        host.step(flags[-1])
        for flag in flags:
            flag.there = flag.there or dice.random() < 0.3
        if dice.random() < 0.1:
            host.settle(wait=True)
    host.settle(wait=True)
    num_applied = sum(flag.finite for flag in flags)
    assert host.used == expected(num_applied)
    assert host.count == num_applied == host.schedule.last_epoch
    assert host.group["lr"] == pytest.approx(1.0 / (1 + num_applied))


def test_no_more_steps_are_open_than_the_device_remembers() -> None:
    host, flags = Host(), [Flag(True) for _ in range(10)]
    for flag in flags:
        host.step(flag)
    assert len(host.open) == LIMIT + 1
    assert [flag.there for flag in flags] == [True] * (10 - LIMIT - 1) + [False] * (LIMIT + 1)


def test_the_steps_that_were_skipped_are_named() -> None:
    host = Host()
    for finite in (True, False, True, False):
        host.step(Flag(finite))
    assert [(o.number, o.applied) for o in host.open.settle(wait=True)] == [
        (1, True),
        (2, False),
        (3, True),
        (4, False),
    ]


def test_a_value_that_the_user_has_set_stays() -> None:
    host = Host()
    host.step(Flag(finite=False))
    host.group["lr"] = 0.25
    host.settle(wait=True)
    assert host.group["lr"] == 0.25 and host.schedule.last_epoch == 0
