"""The whole configuration as one frozen model, `Config`, and what can be asked of it. Reads no files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import PrivateAttr

from lorica.config import batch as triad
from lorica.config.errors import ConfigError, Problem
from lorica.config.features import FeatureKeys
from lorica.config.keys import Block, Form, block, key, no_effect
from lorica.config.monitoring import MonitoringKeys
from lorica.config.offload import Offload
from lorica.config.optimizer import OptimizationKeys
from lorica.config.precision import DtypeName, PrecisionKeys
from lorica.config.source import plain
from lorica.config.zero import ZeroKeys

_POSITIVE = {"ge": 1}


class Units(Block):
    """How the model is cut into units."""

    classes: tuple[str, ...] = key(
        (), "Class names of modules that are one unit each.", shown_default="found automatically"
    )
    min_numel: int | None = key(
        None,
        "Neighbours smaller than this are merged.",
        form=Form.SIZE,
        bounds={"ge": 0},
        shown_default="chosen by the engine",
    )
    max_numel: int | None = key(
        None,
        "Units larger than this are split further, where the module tree allows.",
        form=Form.SIZE,
        bounds=_POSITIVE,
        shown_default="chosen by the engine",
    )


class Lorica(Block):
    """Lorica's own keys: with `kernels`, the only ones that DeepSpeed does not have."""

    units: Units = block(Units, "How the model is cut into units.")
    offload: Offload = block(Offload, "How offloaded states are updated, and how much memory they may take.")
    transport: Literal["auto", "gloo", "shm"] = key(
        "auto", "Transport between CPU ranks: shared memory on one host, gloo across hosts."
    )
    split_master: bool | None = key(
        None,
        "Keep the 16 low bits of the master beside a bf16 parameter, not an fp32 master: the same bits, 2 bytes less.",
        shown_default="where the optimizer updates element by element",
    )
    on_nonfinite: Literal["skip", "raise"] = key("skip", "What to do with a gradient that holds inf or nan.")
    on_min_loss_scale: Literal["raise", "warn"] = key("raise", "What to do at an overflow at fp16.min_loss_scale.")


class TrainingKeys(Block):
    """Batch sizes, gradients and reports at the top level."""

    train_batch_size: int | None = key(
        None,
        "Samples per optimizer step over all ranks = micro-batch x accumulation x data-parallel ranks.",
        bounds=_POSITIVE,
        shown_default="from the other two",
    )
    train_micro_batch_size_per_gpu: int | None = key(
        None, "Samples per forward on one rank.", bounds=_POSITIVE, shown_default="from the other two"
    )
    gradient_accumulation_steps: int | None = key(
        None, "Micro-batches per optimizer step.", bounds=_POSITIVE, shown_default="1, or from the other two"
    )
    managed_gradient_accumulation: bool = key(
        True, "The engine counts micro-batches; false: every step() updates, the caller keeps count."
    )
    gradient_clipping: float = key(1.0, "Largest global L2 norm of the gradient; 0: no clipping.", bounds={"ge": 0})
    prescale_gradients: bool = key(False, "Divide gradients before they are reduced instead of after.")
    gradient_predivide_factor: float = key(
        1.0, "With prescaled gradients: divide by this before the reduction, by the rest after.", bounds={"gt": 0}
    )
    gradient_allreduce_op: Literal["mean", "sum"] = key("mean", "How gradients of the ranks are combined.")
    communication_data_type: DtypeName | None = key(
        None, "Reduce gradients in this type.", form=Form.DTYPE, shown_default="the compute type"
    )
    seq_parallel_communication_data_type: DtypeName = no_effect(
        "fp32",
        "Reduce gradients over sequence-parallel ranks in this type.",
        "sequence parallelism is not there yet",
        form=Form.DTYPE,
    )
    steps_per_print: int | None = key(
        None,
        "Progress line every so many steps; not given, 0 or Infinity: never.",
        form=Form.STEPS,
        bounds=_POSITIVE,
        shown_default="never",
    )
    wall_clock_breakdown: bool = key(False, "Print the times of forward, backward, reduction and step.")
    memory_breakdown: bool = key(False, "Print the memory in use at every phase.")
    dump_state: bool = key(False, "Print the state of the engine after it was made.")
    dataloader_drop_last: bool = key(False, "Drop the last, incomplete batch of training_data.")
    log_level: str | None = no_effect(
        None, "Level of the log.", 'set it in the script: logging.getLogger("lorica").setLevel(...)'
    )
    disable_allgather: bool = no_effect(False, "Unused by DeepSpeed too.", "no code ever read it")
    vocabulary_size: int | None = no_effect(
        None, "Size of the vocabulary, for an alignment hint.", "planes are aligned whatever the model's sizes are"
    )


@dataclass(frozen=True)
class Provenance:
    """What reading a configuration found out besides its values.

    `given` maps the dotted name of every key that was given to the name the user wrote; `ignored` the given keys
    without effect to the reason; `auto_keys` are the dotted names of "auto" leaves that nothing has resolved so far.
    """

    source: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    auto_keys: frozenset[str] = frozenset()
    world_size: int | None = None
    world_size_source: str = ""


class Config(FeatureKeys, MonitoringKeys, ZeroKeys, OptimizationKeys, PrecisionKeys, TrainingKeys):
    """An effective configuration; attribute names are DeepSpeed's key names. Make one with `lorica.config.load`."""

    lorica: Lorica = block(Lorica, "Lorica's own keys.")
    _provenance: Provenance = PrivateAttr(default_factory=Provenance)

    @property
    def provenance(self) -> Provenance:
        """Where the values come from."""
        return self._provenance

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was coerced, renamed or ignored; the engine logs each once."""
        return self._provenance.warnings

    @property
    def auto_keys(self) -> frozenset[str]:
        """Dotted names of the "auto" leaves that are not resolved yet."""
        return self._provenance.auto_keys

    @property
    def raw(self) -> dict[str, Any]:
        """A copy of the configuration as it was handed over."""
        copy: dict[str, Any] = plain(self._provenance.raw)
        return copy

    @property
    def compute_dtype(self) -> DtypeName:
        """Type of forward and backward."""
        if self.bf16.enabled:
            return "bf16"
        return "fp16" if self.fp16.enabled else "fp32"

    def with_provenance(self, provenance: Provenance) -> Config:
        """The same values with another origin."""
        config = self.model_copy()
        config._provenance = provenance
        return config

    def replace(self, values: Mapping[str, Any]) -> Config:
        """A copy with `values` (dotted key -> value, already of the key's type) set; they are no longer "auto"."""
        config: Config = self
        for dotted, value in values.items():
            config = _with_value(config, dotted.split("."), value)
        unresolved = self.auto_keys - frozenset(values)
        return config.with_provenance(replace(self._provenance, auto_keys=unresolved))

    def resolve_batch(self, dp_world_size: int, source: str = "the caller") -> Config:
        """A copy whose three batch sizes are all set.

        Args:
            dp_world_size: number of data-parallel ranks.
            source: where that number comes from, for the error message.
        Raises:
            ConfigError: the batch sizes, `data_parallel_size` or `mics_shard_size` do not fit `dp_world_size`.
        """
        problems = self.batch_problems(dp_world_size, source)
        if problems:
            raise ConfigError(problems)
        sizes = triad.resolve(self.batch, dp_world_size)
        resolved = self.replace(sizes._asdict())
        return resolved.with_provenance(
            replace(resolved._provenance, world_size=dp_world_size, world_size_source=source)
        )

    @property
    def batch(self) -> triad.Batch:
        """The three batch sizes; None where not given."""
        return triad.Batch(self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps)

    def batch_problems(self, dp_world_size: int, source: str) -> list[Problem]:
        """Why this configuration cannot run on `dp_world_size` data-parallel ranks; empty if it can."""
        problems = triad.problems(self.batch, dp_world_size, source, self.auto_keys)
        ranks = f"the data-parallel world size is {dp_world_size} (from {source})"
        expected = self.data_parallel_size
        if expected is not None and expected != dp_world_size:
            fix = f"set it to {dp_world_size}, remove it, or start {expected} data-parallel ranks"
            problems.append(Problem("data_parallel_size", expected, f"expected the number of ranks; {ranks}", fix))
        shard = self.zero_optimization.mics_shard_size
        if shard > 0 and dp_world_size % shard:
            divisors = ", ".join(str(n) for n in range(1, dp_world_size + 1) if dp_world_size % n == 0)
            message = f"expected a divisor of the number of ranks; {ranks}"
            problems.append(
                Problem("zero_optimization.mics_shard_size", shard, message, f"set it to one of {divisors}")
            )
        return problems

    def unresolved(self) -> list[Problem]:
        """Problems for "auto" leaves that only the user or a trainer can resolve. Empty: the engine may start."""
        return [
            Problem(
                dotted,
                "auto",
                "expected a value; nothing in the model or the optimizer determines it",
                "give a number (Hugging Face Trainer and accelerate fill it in by themselves)",
            )
            for dotted in sorted(self.auto_keys)
            if dotted in _ONLY_USER_KNOWS or (dotted == _MAX_LR and not self._tops_at_optimizer_lr())
        ]

    def _tops_at_optimizer_lr(self) -> bool:
        """Whether a schedule without warmup_max_lr rises to the optimizer's learning rate."""
        return self.scheduler is not None and self.scheduler.name == "WarmupLR"

    def summary_line(self) -> str:
        """One line that says what will run, for the start of the log."""
        zero = self.zero_optimization
        parts = [f"ZeRO stage {zero.stage}", self.compute_dtype, self._optimizer_text(), self._batch_text()]
        if self.scheduler:
            parts.insert(3, self.scheduler.name)
        parts.append(f"clip {self.gradient_clipping:g}" if self.gradient_clipping else "no clipping")
        if zero.offload_optimizer.device != "none":
            parts.append(f"optimizer on {zero.offload_optimizer.device}")
        if zero.offload_param.device != "none":
            parts.append(f"parameters on {zero.offload_param.device}")
        if zero.mics_shard_size > 0:
            parts.append(f"sharded over {zero.mics_shard_size} ranks")
        if self.kernels.inject:
            parts.append("fused kernels")
        return " | ".join(parts)

    def _optimizer_text(self) -> str:
        if self.optimizer is None:
            return "client optimizer"
        lr = self.optimizer.params.get("lr")
        return f"{self.optimizer.type} lr {lr:g}" if isinstance(lr, int | float) else self.optimizer.type

    def _batch_text(self) -> str:
        return triad.text(self.batch, self._provenance.world_size)


_MAX_LR = "scheduler.params.warmup_max_lr"
_ONLY_USER_KNOWS = (
    "zero_optimization.stage",
    "optimizer.params.lr",
    "scheduler.params.total_num_steps",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.cycle_min_lr",
    "scheduler.params.cycle_max_lr",
)


def _with_value(model: Any, names: list[str], value: Any) -> Any:
    name, *rest = names
    if isinstance(model, dict):
        return {**model, name: _with_value(model.get(name), rest, value) if rest else value}
    if not isinstance(model, Block) or name not in type(model).model_fields:
        raise KeyError(f"no such key: {name}")
    return model.model_copy(update={name: _with_value(getattr(model, name), rest, value) if rest else value})


def schema_json() -> str:
    """The JSON schema of a configuration, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)
