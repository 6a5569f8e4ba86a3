"""Placements drawn by lot, made real in an engine, and the fingerprint of a training that must not depend on them.

`Plan` is one such draw: the tier and the executor of every record, sizes of chunks and rings, threads, and pauses at
random in every worker. `training_of` trains a `Case` under a plan, or with everything on the device.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import lorica
import lorica.offload
from lorica.core.streams import HostStreams
from lorica.place import Placements, PlanePlacement
from lorica.tier.file_io import SystemFileIO
from lorica.update.guess import Guesses
from tests.equivalence.training import Training, digest
from tests.models import RECIPES

TIERS = ("device", "host", "nvme")
EXECUTORS = ("device", "host")
DELAYS_S = (0.0, 0.0, 0.0, 0.0005, 0.002)  # a step takes some 10 ms
MIN_CHUNK = 4096


# What is trained ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A training and its optimizer.

    Attributes:
        two_groups: weights decay, everything else does not and learns at half the rate.
        schedule: the learning rate changes in every step.
        overflows: steps in which a loss is inf.
    """

    training: Training
    optimizer: str = "AdamW"
    params: tuple[tuple[str, Any], ...] = (("lr", 3e-3), ("weight_decay", 0.1))
    two_groups: bool = False
    schedule: bool = False
    overflows: tuple[int, ...] = ()

    def config(self) -> dict[str, Any]:
        """The configuration, with everything on the device."""
        config = self.training.config()
        config["optimizer"] = {"type": self.optimizer, "params": dict(self.params)}
        if self.training.precision == "fp16":
            config["fp16"].update({"initial_scale_power": 6, "loss_scale_window": 2, "hysteresis": 1})
        if self.schedule:
            warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": 4e-3, "warmup_num_steps": 4}
            config["scheduler"] = {"type": "WarmupLR", "params": warmup}
        return config

    def parameters(self, model: torch.nn.Module) -> list[Any]:
        """What is given to the optimizer."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self.two_groups:
            return [p for _, p in named]
        weights = [p for _, p in named if p.dim() > 1]
        others = [p for _, p in named if p.dim() <= 1]
        lr = dict(self.params)["lr"]
        return [{"params": weights, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0, "lr": lr / 2}]


class Result(NamedTuple):
    """Everything that a placement must not change, on one rank; `digest` is of parameters, masters and moments."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    scales: tuple[float, ...]
    rates: tuple[tuple[float, ...], ...]
    skipped: int
    digest: str

    def same(self, other: Result) -> bool:
        """Whether every bit is equal; a norm that is no number equals another one."""
        return repr(self) == repr(other)


def states(engine: Any) -> dict[str, Tensor]:
    """Parameters, masters and moments, whole. Collective."""
    found: dict[str, Tensor] = {}
    for name, param in engine.module.named_parameters():
        with lorica.zero.GatheredParameters(param):
            found[name] = param.detach().clone()
        if param.requires_grad:
            master = lorica.zero.safe_get_full_fp32_param(param)
            assert master is not None, f"{name} has no master"
            found[f"{name} master"] = master
            for key in engine._moment_names():
                moment = lorica.zero.safe_get_full_optimizer_state(param, key)
                assert moment is not None, f"{name} has no {key}"
                found[f"{name} {key}"] = moment
    return found


def start_engine(case: Case, plan: Plan | None, folder: str) -> Any:
    """An engine for the case, placed by `plan` (None: all on the device)."""
    model = RECIPES[case.training.recipe].model()
    config = case.config()
    if plan is not None:
        plan.into(config, folder)
    with placing(plan) if plan is not None else nullcontext():
        engine, *_ = lorica.initialize(model=model, model_parameters=case.parameters(model), config=config)
    return engine


def take_step(engine: Any, case: Case, number: int) -> list[float]:
    """One step of the case; returns the losses of its micro-steps."""
    losses, training = [], case.training
    for micro_step in range(training.accumulation):
        loss = engine(*training.micro_batch(number, micro_step, dist.get_rank()))
        bad = number in case.overflows and micro_step == training.accumulation - 1
        engine.backward(loss * float("inf") if bad else loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def result_of(engine: Any, case: Case) -> Result:
    """Train and say what came out; the engine is destroyed."""
    losses: list[float] = []
    norms, scales, rates = [], [], []
    for number in range(case.training.num_steps):
        losses += take_step(engine, case, number)
        norms.append(float(engine.get_global_grad_norm()))
        scales.append(float(engine.loss_scale()))
        rates.append(tuple(engine.get_lr()))
    found = Result(
        tuple(losses), tuple(norms), tuple(scales), tuple(rates), engine.skipped_steps, digest(states(engine))
    )
    engine.destroy()
    return found


def training_of(case: Case, plan: Plan | None, folder: str) -> tuple[Result, Used]:
    """The result of a training, and what the placement used."""
    with counting_guesses() as guesses, delays(plan.seed) if plan is not None and plan.delays else nullcontext():
        engine = start_engine(case, plan, folder)
        used = Used.by(engine)
        result = result_of(engine, case)
    return result, used._replace(guesses=tuple(guesses))


# Where it lives -------------------------------------------------------------------------------------------------------


class Used(NamedTuple):
    """What an engine's placement consists of, and which of the guesses were right."""

    records: frozenset[str]
    params: frozenset[str]
    executors: frozenset[str]
    guesses: tuple[bool, ...] = ()

    @classmethod
    def by(cls, engine: Any) -> Used:
        """Ask the plans of an engine's trainable planes."""
        plans = [flat.plan for unit in engine._parts.units for flat in unit.flats if flat.trainable]
        return cls(
            frozenset(plan.moments.tier for plan in plans),
            frozenset(plan.param.tier for plan in plans),
            frozenset(plan.executor for plan in plans),
        )


@dataclass(frozen=True)
class Plan:
    """One placement and how it is worked through.

    Attributes:
        seed: of the draw for each plane, and of the delays.
        records, executors: what is drawn from for each plane, where it is legal.
        params: draw the parameters' tier too (stage 3).
        staging_bytes: of the device's ring; 1: one slot.
    """

    seed: int = 0
    records: tuple[str, ...] = TIERS
    executors: tuple[str, ...] = EXECUTORS
    params: bool = True
    chunk_numel: int = MIN_CHUNK
    staging_bytes: int = 1
    num_buffers: int = 4
    threads: int = 1
    overlap: bool = True
    delays: bool = True
    keys: tuple[tuple[str, Any], ...] = field(default=())

    @classmethod
    def drawn(cls, seed: int) -> Plan:
        """Everything by lot."""
        draw = random.Random(seed)
        some_tiers = [TIERS, TIERS, ("host",), ("nvme",), ("host", "nvme"), ("device", "host")]
        return cls(
            seed,
            records=draw.choice(some_tiers),
            executors=draw.choice([EXECUTORS, EXECUTORS, ("device",), ("host",)]),
            params=draw.random() < 0.7,
            chunk_numel=draw.choice([1, 4096, 5000, 8192, 12288, 1 << 24]),
            staging_bytes=draw.choice([1, 1 << 17, 1 << 18, 1 << 19, 1 << 26]),
            num_buffers=draw.randint(3, 5),
            threads=draw.randint(1, 3),
            overlap=draw.random() < 0.75,
            delays=draw.random() < 0.75,
            keys=draw.choice([(), (("speculate", True),), (("speculate", True),)]),
        )

    def into(self, config: dict[str, Any], folder: str) -> None:
        """Ask for it in a configuration, as far as there are keys."""
        zero = config["zero_optimization"]
        optimizer: dict[str, Any] = {"device": "auto", "buffer_count": self.num_buffers}
        if "nvme" in self.records:
            optimizer["nvme_path"] = folder
        zero["offload_optimizer"] = optimizer
        if zero["stage"] == 3 and self.params:
            zero["offload_param"] = {"device": "auto"}
        offload = {"overlap": self.overlap, "threads": self.threads, **dict(self.keys)}
        config["lorica"] = {**config["lorica"], "offload": offload}
        config["aio"] = {"thread_count": 2, "block_size": 16384}

    def placed(self, placement: PlanePlacement, draw: random.Random) -> PlanePlacement:
        """Another place for one plane."""
        can_leave = self.params and placement.plane.param_can_leave
        param = draw.choice(["device", "host"]) if can_leave else placement.param
        if placement.record is None:
            return placement._replace(param=param)
        record = draw.choice(self.records)
        executor = "device" if record == "device" else "host" if record == "nvme" else draw.choice(self.executors)
        return placement._replace(param=param, record=record, executor=executor)


@contextmanager
def placing(plan: Plan) -> Iterator[list[Placements]]:
    """Let engines that are made inside be placed by `plan`; the list receives their placements."""
    real, made = lorica.offload.place, []

    def place(*arguments: Any) -> Placements:
        placements = real(*arguments)
        draw = random.Random(plan.seed)
        made.append(
            replace(
                placements,
                planes=tuple(plan.placed(placement, draw) for placement in placements.planes),
                device=replace(placements.device, staging=plan.staging_bytes),
                chunk_numel=plan.chunk_numel,
            )
        )
        return made[-1]

    with mock.patch.object(lorica.offload, "place", place):
        yield made


# Delays and faults ----------------------------------------------------------------------------------------------------


class Pauses:
    """Sleeps for a while drawn by lot; any thread may call it."""

    def __init__(self, seed: int, *, share: float = 1.0) -> None:
        self._draw, self._lock, self._share = random.Random(seed), threading.Lock(), share

    def __call__(self) -> None:
        with self._lock:
            seconds = self._draw.choice(DELAYS_S) if self._draw.random() < self._share else 0.0
        if seconds:
            time.sleep(seconds)


class SlowStreams(HostStreams):
    """The streams of a CPU, with pauses."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause

    def stream(self, name: str) -> AbstractContextManager[None]:
        self._pause()
        return super().stream(name)

    def record(self) -> None:
        self._pause()

    def wait(self, event: Any) -> None:
        self._pause()

    def synchronize(self, event: Any) -> None:
        self._pause()


class SlowIO(SystemFileIO):
    """The operating system, with pauses."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause

    def preadv(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self._pause()
        return super().preadv(descriptor, buffers, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self._pause()
        return super().pwritev(descriptor, buffers, offset)


@contextmanager
def delays(seed: int) -> Iterator[None]:
    """Let every worker of engines that are made inside pause at random."""
    seed = seed * 64 + dist.get_rank()
    pause, seldom = Pauses(seed), Pauses(seed, share=0.1)
    streams = mock.patch("lorica.construct.HostStreams", lambda: SlowStreams(seldom))
    with before_each_chunk(pause), streams, io(SlowIO(seldom)), mock.patch.object(Guesses, "take", slow(Guesses.take)):
        yield


def slow(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, so late that whoever does not wait for it is faster."""

    def later(*arguments: Any) -> Any:
        time.sleep(0.003)
        return call(*arguments)

    return later


@contextmanager
def counting_guesses() -> Iterator[list[bool]]:
    """Note of every guess that was made whether it was right."""
    real, taken = Guesses.take, list[bool]()

    def take(self: Guesses, flat: Any, actual: Any) -> Any:
        made = flat in self._made
        found = real(self, flat, actual)
        if made:
            taken.append(found is not None)
        return found

    with mock.patch.object(Guesses, "take", take):
        yield taken


@contextmanager
def before_each_chunk(call: Callable[[], None]) -> Iterator[None]:
    """Let the update threads of engines that are made inside call this before each update."""
    real = lorica.update.build.OnHost
    with mock.patch("lorica.update.build.OnHost", partial(real, before_chunk=call)):
        yield


@contextmanager
def io(calls: SystemFileIO) -> Iterator[None]:
    """Let swap files that are made inside use these system calls."""
    with mock.patch("lorica.tier.swap.SystemFileIO", lambda: calls):
        yield


# What a process holds -------------------------------------------------------------------------------------------------


def update_threads() -> list[str]:
    """Python threads of updates and swap files."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lorica-")]


def status(name: str) -> int:
    """A number in /proc/self/status: `Threads`, or `VmRSS` in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no line {name}")


def num_descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


def swap_files(folder: str | Path) -> list[Path]:
    """What lies in the folder of the NVMe tier."""
    return sorted(Path(folder).iterdir()) if Path(folder).exists() else []
