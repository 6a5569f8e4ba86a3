"""One training run, said once: as a configuration for the engine, as a call for the oracle, and as a sentence.

`Training` is what a test asks for. `train` runs on every rank of the harness and returns a `Report`; `expected` is what
the oracle says; `Trained` remembers both, so that tests which compare the same runs share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import lorica
from tests import oracle
from tests.harness import Ranks
from tests.models import RECIPES

PrecisionName = Literal["fp32", "bf16", "fp16"]
DTYPE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
SCALE_POWER, SCALE_WINDOW = 8, 20  # the dynamic fp16 scale doubles twice within 50 steps
LARGE_BUCKET, SMALL_BUCKET = 500_000_000, 4_000


@dataclass(frozen=True)
class Training:
    """What is trained and how; hashable, so that a finished run can be looked up."""

    recipe: str = "gpt"
    stage: int = 2
    precision: PrecisionName = "fp32"
    world_size: int = 2
    accumulation: int = 1
    clip: float = 1.0
    bucket: int = LARGE_BUCKET
    num_steps: int = 50

    def __str__(self) -> str:
        clip = f"clipping {self.clip:g}" if self.clip else "no clipping"
        where = f"{self.world_size} ranks" if self.world_size > 1 else "1 rank"
        buckets = f"buckets of {self.bucket:.0e}"
        return f"stage {self.stage}, {self.precision}, {where}, accumulation {self.accumulation}, {clip}, {buckets}"

    def config(self) -> dict[str, Any]:
        """The engine's configuration, in DeepSpeed's language."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "optimizer": {"type": "AdamW", "params": dict(ADAMW)},
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": self.bucket,
                "allgather_bucket_size": self.bucket,
                "stage3_prefetch_bucket_size": self.bucket,
                "stage3_param_persistence_threshold": 0,
            },
            "lorica": {"units": {"min_numel": 1}},  # every block is a unit of its own, however tiny
        }
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if self.precision == "fp16":
            config["fp16"] = {
                "enabled": True,
                "loss_scale": 0,
                "initial_scale_power": SCALE_POWER,
                "loss_scale_window": SCALE_WINDOW,
            }
        return config

    def micro_batch(self, step: int, micro_step: int, rank: int) -> tuple[Tensor, ...]:
        """What `rank` sees in this micro-step."""
        index = (step * self.accumulation + micro_step) * self.world_size + rank
        return RECIPES[self.recipe].batch(index)


@dataclass
class Report:
    """What one rank saw; `parameters` (fp32 masters) come from rank 0, the other ranks send their digest."""

    losses: list[list[float]] = field(default_factory=list)  # per step, per micro-step of this rank
    norms: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    digest: str = ""


@dataclass
class Outcome:
    """A run of all ranks, put together: per-step mean losses, and rank 0's norms, scales and parameters."""

    losses: list[float]
    norms: list[float]
    scales: list[float]
    parameters: dict[str, Tensor]
    digest: str


def digest(tensors: dict[str, Tensor]) -> str:
    """A fingerprint of names, shapes, dtypes and every bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def masters(model: torch.nn.Module) -> dict[str, Tensor]:
    """The full fp32 value of every trainable parameter; collective."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = lorica.zero.safe_get_full_fp32_param(parameter)
            assert value is not None, f"{name} has no master"
            assert value.shape == parameter.shape, f"{name}: {tuple(value.shape)}, not {tuple(parameter.shape)}"
            found[name] = value.detach().clone()
    return found


def finish(engine: Any, report: Report) -> Report:
    """Add the final parameters to the report and destroy the engine."""
    parameters = masters(engine.module)
    report.digest = digest(parameters)
    report.parameters = parameters if dist.get_rank() == 0 else {}
    engine.destroy()
    return report


def start(training: Training, config: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """A fresh engine for the training's model; further arguments go to `lorica.initialize`."""
    model = RECIPES[training.recipe].model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    arguments = {"model": model, "model_parameters": trainable, "config": config or training.config()} | arguments
    engine, *_ = lorica.initialize(**arguments)
    return engine


def record_step(engine: Any, report: Report, losses: list[float], scale: float) -> None:
    """Note one optimizer step that has just been taken."""
    report.losses.append(losses)
    report.scales.append(scale)
    norm = engine.get_global_grad_norm()
    report.norms.append(float(norm) if norm is not None else float("nan"))


def train(training: Training, config: dict[str, Any] | None = None) -> Report:
    """The loop of the README, on this rank."""
    return train_engine(start(training, config), training)


def train_engine(engine: Any, training: Training) -> Report:
    """The loop of the README with an engine that is there; the engine is destroyed."""
    report, rank = Report(), dist.get_rank()
    for step in range(training.num_steps):
        losses, scale = [], float(engine.loss_scale())
        for micro_step in range(training.accumulation):
            loss = engine(*training.micro_batch(step, micro_step, rank))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        record_step(engine, report, losses, scale)
    return finish(engine, report)


def outcome(reports: list[Report]) -> Outcome:
    """Put the ranks' reports together, after checking that all ranks hold the same model."""
    first = reports[0]
    assert len({report.digest for report in reports}) == 1, "the ranks' parameters differ"
    for report in reports:
        assert report.norms == first.norms or any(n != n for n in first.norms), "the ranks' gradient norms differ"
    by_step = zip(*(report.losses for report in reports), strict=True)
    losses = [torch.tensor(step, dtype=torch.float64).mean().item() for step in by_step]
    return Outcome(losses, first.norms, first.scales, first.parameters, first.digest)


def adamw(parameters: dict[str, Tensor], **changes: Any) -> torch.optim.Optimizer:
    """The optimizer of `Training.config`, on the oracle's masters."""
    return torch.optim.AdamW(list(parameters.values()), **(ADAMW | changes))


def expected(training: Training, **changes: Any) -> oracle.Run:
    """The oracle's run of the same training; `changes` are arguments of `oracle.train`."""
    steps = [
        [
            training.micro_batch(step, micro_step, rank)
            for micro_step in range(training.accumulation)
            for rank in range(training.world_size)
        ]
        for step in range(training.num_steps)
    ]
    dynamic = oracle.LossScale(2.0**SCALE_POWER, dynamic=True, window=SCALE_WINDOW)
    arguments: dict[str, Any] = {
        "optimizer": adamw,
        "accumulation": training.accumulation,
        "dtype": DTYPE[training.precision],
        "scale": dynamic if training.precision == "fp16" else None,
        "clip": training.clip,
    }
    return oracle.train(RECIPES[training.recipe].model(), steps, **(arguments | changes))


class Trained:
    """Runs and oracle runs of this session, each computed once."""

    def __init__(self, ranks: Callable[[int], Ranks]) -> None:
        self.ranks = ranks
        self.runs: dict[Training, Outcome] = {}
        self.oracles: dict[Training, oracle.Run] = {}

    def run(self, training: Training) -> Outcome:
        """What the engine makes of it."""
        if training not in self.runs:
            self.runs[training] = outcome(self.ranks(training.world_size).run(train, training=training))
        return self.runs[training]

    def oracle(self, training: Training) -> oracle.Run:
        """What the oracle makes of it; stage and bucket size mean nothing to the oracle."""
        key = replace(training, stage=0, bucket=0)
        if key not in self.oracles:
            self.oracles[key] = expected(training)
        return self.oracles[key]


def relative_difference(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference of two equally long lists; nan matches nan only."""
    a, b = torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan()), f"{found} and {wanted} do not match"
    return ((a - b).abs() / b.abs().clamp_min(1e-30)).nan_to_num(0.0).max().item()


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest absolute difference of two models with the same names and shapes."""
    assert found.keys() == wanted.keys()
    return max((found[n] - wanted[n]).abs().max().item() for n in wanted if wanted[n].numel())


def rms_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The root mean square of the difference over all parameters."""
    assert found.keys() == wanted.keys()
    squares = sum((found[n] - wanted[n]).double().square().sum().item() for n in wanted)
    numel = sum(w.numel() for w in wanted.values())
    return float((squares / numel) ** 0.5)
