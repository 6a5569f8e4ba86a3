"""The blocks optimizer and scheduler, with the keyword arguments of every known type. Runs no optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from lorica.config.keys import Block, Form, key, no_effect, not_yet

_AT_LEAST_0 = {"ge": 0}
_POSITIVE = {"ge": 1}


NonNegative = Annotated[float, Field(ge=0)]
PerGroup = NonNegative | tuple[NonNegative, ...] | None
Beta = Annotated[float, Field(ge=0, lt=1)]


class _Params(Block):
    """Keyword arguments that every optimizer takes."""

    lr: float | None = key(1e-3, "Learning rate.", bounds=_AT_LEAST_0)
    weight_decay: float | None = key(0.0, "Weight decay.", bounds=_AT_LEAST_0)


class AdamParams(_Params):
    """Adam and AdamW: both mean AdamW unless `adam_w_mode` is false."""

    betas: tuple[Beta, Beta] | None = key((0.9, 0.999), "Decay of the two moments.")
    eps: float | None = key(1e-8, "Added to the denominator.", bounds=_AT_LEAST_0)
    bias_correction: bool = key(True, "Correct the moments' bias towards zero.")
    adam_w_mode: bool = key(True, "Decoupled weight decay (AdamW); false: L2 penalty.")
    torch_adam: bool = key(False, "Use the class of torch.optim; it takes a few further arguments.")
    amsgrad: bool = not_yet(False, "Keep the largest second moment.", 'leave it false, or set "torch_adam": true')
    fp32_optimizer_states: bool = not_yet(
        True, "Keep the moments in fp32 (CPU Adam).", "leave it true; moments are always fp32"
    )
    set_grad_none: bool = no_effect(
        True, "Free gradients in zero_grad.", "gradients live in flat planes and are freed by the engine"
    )


class AdamWParams(AdamParams):
    """AdamW."""

    adam_w_mode: bool = no_effect(True, "Decoupled weight decay.", 'AdamW always decouples; set "type": "Adam"')


class TorchAdamParams(AdamParams):
    """Adam and AdamW with `torch_adam`."""

    bias_correction: bool = no_effect(True, "Correct the moments' bias.", "torch.optim always does")
    amsgrad: bool = key(False, "Keep the largest second moment.")
    maximize: bool = key(False, "Ascend instead of descend.")
    foreach: bool | None = key(None, "torch.optim's multi-tensor implementation.", shown_default="torch decides")
    fused: bool | None = key(None, "torch.optim's fused implementation.", shown_default="torch decides")


class SGDParams(_Params):
    """Stochastic gradient descent."""

    momentum: float | None = key(0.0, "Momentum factor.", bounds=_AT_LEAST_0)
    dampening: float | None = key(0.0, "Dampening of the momentum.")
    nesterov: bool = key(False, "Nesterov momentum.")
    maximize: bool = key(False, "Ascend instead of descend.")


class LionParams(_Params):
    """Lion."""

    betas: tuple[Beta, Beta] | None = key((0.9, 0.99), "Decay of the update and of the momentum.")


class AdagradParams(_Params):
    """Adagrad."""

    lr: float | None = key(1e-2, "Learning rate.", bounds=_AT_LEAST_0)
    lr_decay: float | None = key(0.0, "Decay of the learning rate.", bounds=_AT_LEAST_0)
    eps: float | None = key(1e-10, "Added to the denominator.", bounds=_AT_LEAST_0)
    initial_accumulator_value: float | None = key(0.0, "Sum of squares at the start.", bounds=_AT_LEAST_0)


class LambParams(_Params):
    """LAMB."""

    betas: tuple[Beta, Beta] | None = key((0.9, 0.999), "Decay of the two moments.")
    eps: float | None = key(1e-8, "Added to the denominator.", bounds=_AT_LEAST_0)
    bias_correction: bool = key(True, "Correct the moments' bias towards zero.")
    max_coeff: float | None = key(10.0, "Largest trust ratio.", bounds=_AT_LEAST_0)
    min_coeff: float | None = key(0.01, "Smallest trust ratio.", bounds=_AT_LEAST_0)


class MuonParams(_Params):
    """Muon for matrices, Adam for everything else."""

    lr: float | None = key(None, "Learning rate of both parts.", bounds=_AT_LEAST_0, shown_default="0.02 and 3e-4")
    momentum: float | None = key(0.95, "Momentum of the matrices.", bounds={"ge": 0, "lt": 1})
    muon_lr: float | None = key(None, "Learning rate of the matrices.", bounds=_AT_LEAST_0, shown_default="lr")
    adam_lr: float | None = key(None, "Learning rate of the rest.", bounds=_AT_LEAST_0, shown_default="lr")
    betas: tuple[Beta, Beta] | None = key((0.9, 0.95), "Decay of Adam's two moments.")
    eps: float | None = key(1e-10, "Added to Adam's denominator.", bounds=_AT_LEAST_0)
    nesterov: bool = key(True, "Nesterov momentum of the matrices.")
    ns_method: Literal["gram", "standard"] | None = key("gram", "Which Newton-Schulz iteration.")


class OptimizerType(NamedTuple):
    """A known value of `optimizer.type`: its keyword arguments, or what to use instead if it is not there."""

    params: type[Block] | None
    instead: str = ""


_NO_1BIT = 'use "type": "AdamW"; ZeRO stages 1 to 3 reduce the traffic too'
_NO_MUP = 'use "type": "AdamW" with parameter groups made by the mup package'

OPTIMIZERS: dict[str, OptimizerType] = {
    "adam": OptimizerType(AdamParams),
    "adamw": OptimizerType(AdamWParams),
    "sgd": OptimizerType(SGDParams),
    "lion": OptimizerType(LionParams),
    "adagrad": OptimizerType(AdagradParams),
    "lamb": OptimizerType(LambParams),
    "muon": OptimizerType(MuonParams),
    "onebitadam": OptimizerType(None, _NO_1BIT),
    "zerooneadam": OptimizerType(None, _NO_1BIT),
    "onebitlamb": OptimizerType(None, 'use "type": "Lamb"'),
    "muadam": OptimizerType(None, _NO_MUP),
    "muadamw": OptimizerType(None, _NO_MUP),
    "musgd": OptimizerType(None, 'use "type": "SGD" with parameter groups made by the mup package'),
}
"""Known optimizers by lower-case type. Any other name is one of torch.optim's."""

TORCH_PREFIX = "torch.optim."
TORCH_OPTIMIZERS = ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
TORCH_OPTIMIZERS_REFUSED = {
    "LBFGS": 'use "type": "AdamW"; L-BFGS looks at all parameters at once',
    "Adafactor": 'use "type": "Lion", which has half of Adam\'s state',
    "SparseAdam": 'use "type": "Adam"; flat planes are dense',
    "torch.optim.Muon": 'use "type": "Muon", which takes all parameters',
}
"""Classes of torch.optim that are not element-wise -> what to use instead."""


class WarmupLRParams(Block):
    """Warm up, then stay."""

    warmup_min_lr: PerGroup = key(0.0, "Learning rate at the start.", form=Form.NUMBERS)
    warmup_max_lr: PerGroup = key(
        None, "Learning rate after the warm-up.", form=Form.NUMBERS, shown_default="the optimizer's"
    )
    warmup_num_steps: int | None = key(1000, "Steps of the warm-up.", bounds=_POSITIVE)
    warmup_type: Literal["log", "linear"] | None = key("log", "Shape of the warm-up.")
    last_batch_iteration: int = key(-1, "Step to start from.", bounds={"ge": -1})


class WarmupDecayLRParams(WarmupLRParams):
    """Warm up, then fall linearly to zero."""

    total_num_steps: int | None = key(..., "Steps of the whole training.", bounds=_POSITIVE)
    warmup_max_lr: PerGroup = key(1e-3, "Learning rate after the warm-up.", form=Form.NUMBERS)


class WarmupCosineLRParams(Block):
    """Warm up, then fall along a cosine."""

    total_num_steps: int | None = key(..., "Steps of the whole training.", bounds=_POSITIVE)
    warmup_min_ratio: float | None = key(0.0, "Share of the learning rate at the start.", bounds=_AT_LEAST_0)
    warmup_num_steps: int | None = key(1000, "Steps of the warm-up.", bounds=_POSITIVE)
    cos_min_ratio: float | None = key(1e-4, "Share of the learning rate at the end.", bounds=_AT_LEAST_0)
    warmup_type: Literal["log", "linear"] | None = key("log", "Shape of the warm-up.")
    last_batch_iteration: int = key(-1, "Step to start from.", bounds={"ge": -1})


class OneCycleParams(Block):
    """One cycle up and down, then decay."""

    cycle_min_lr: float | None = key(..., "Learning rate at both ends of the cycle.", bounds=_AT_LEAST_0)
    cycle_max_lr: float | None = key(..., "Learning rate in the middle of the cycle.", bounds=_AT_LEAST_0)
    decay_lr_rate: float = key(0.0, "Decay of the learning rate after the cycle.", bounds=_AT_LEAST_0)
    cycle_first_step_size: int = key(2000, "Steps of the first half.", bounds=_POSITIVE)
    cycle_second_step_size: int | None = key(
        None, "Steps of the second half.", bounds=_POSITIVE, shown_default="as the first"
    )
    cycle_first_stair_count: int = key(0, "Stairs in the first half; 0: a slope.", bounds=_AT_LEAST_0)
    cycle_second_stair_count: int | None = key(
        None, "Stairs in the second half.", bounds=_AT_LEAST_0, shown_default="as the first"
    )
    decay_step_size: int = key(0, "Steps between two decays; 0: no decay.", bounds=_AT_LEAST_0)
    cycle_momentum: bool = key(True, "Cycle the momentum the other way round.")
    cycle_min_mom: float = key(0.8, "Smallest momentum.", bounds=_AT_LEAST_0)
    cycle_max_mom: float = key(0.9, "Largest momentum.", bounds=_AT_LEAST_0)
    decay_mom_rate: float = key(0.0, "Decay of the momentum after the cycle.", bounds=_AT_LEAST_0)
    last_batch_iteration: int = key(-1, "Step to start from.", bounds={"ge": -1})


class LRRangeTestParams(Block):
    """Raise the learning rate step by step to find its useful range."""

    lr_range_test_min_lr: PerGroup = key(1e-3, "First learning rate.", form=Form.NUMBERS)
    lr_range_test_step_size: int = key(2000, "Steps between two rises.", bounds=_POSITIVE)
    lr_range_test_step_rate: float = key(1.0, "Rise per step.")
    lr_range_test_staircase: bool = key(False, "Rise in stairs instead of a slope.")
    last_batch_iteration: int = key(-1, "Step to start from.", bounds={"ge": -1})


SCHEDULERS: dict[str, type[Block]] = {
    "WarmupLR": WarmupLRParams,
    "WarmupDecayLR": WarmupDecayLRParams,
    "WarmupCosineLR": WarmupCosineLRParams,
    "OneCycle": OneCycleParams,
    "LRRangeTest": LRRangeTestParams,
}
"""Known schedulers by exact type. Any other name is one of torch.optim.lr_scheduler's."""

TORCH_SCHEDULER_PREFIX = "torch.optim.lr_scheduler."
TORCH_SCHEDULERS = (
    "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR", "LinearLR",
    "MultiStepLR", "OneCycleLR", "PolynomialLR", "StepLR",
)  # fmt: skip
_PASS_OBJECT = "make it in the script and pass it to initialize(lr_scheduler=...)"
_NEED_OBJECTS = ("ChainedScheduler", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau", "SequentialLR")
TORCH_SCHEDULERS_REFUSED = dict.fromkeys(_NEED_OBJECTS, _PASS_OBJECT)
"""Classes of torch.optim.lr_scheduler that need objects or metrics, which JSON cannot hold -> what to do."""


class Optimizer(Block):
    """Which optimizer, with which arguments."""

    type: str = key(
        ...,
        "Adam, AdamW, SGD, Lion, Adagrad, Lamb, Muon (any case), or a class of torch.optim, e.g. torch.optim.RMSprop.",
    )
    params: dict[str, Any] = key(
        {}, "Keyword arguments; the names depend on the type.", form=Form.PARAMS, shown_default="{}"
    )
    legacy_fusion: bool = no_effect(False, "Old fused optimizers.", "there is one fused update per optimizer")

    @property
    def name(self) -> str:
        """Lower-case name of a known optimizer, or the class name in torch.optim."""
        bare = self.type.removeprefix(TORCH_PREFIX)
        return bare.lower() if bare == self.type and bare.lower() in OPTIMIZERS else bare

    @property
    def explicit_params(self) -> dict[str, Any]:
        """The keyword arguments that were given a value (not "auto")."""
        return {name: value for name, value in self.params.items() if value is not None}


class Scheduler(Block):
    """Which learning-rate schedule, with which arguments."""

    type: str = key(
        ..., "WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or a class of torch.optim.lr_scheduler."
    )
    params: dict[str, Any] = key(
        {}, "Keyword arguments; the names depend on the type.", form=Form.PARAMS, shown_default="{}"
    )

    @property
    def name(self) -> str:
        """The type without the torch prefix."""
        return self.type.removeprefix(TORCH_SCHEDULER_PREFIX)

    @property
    def explicit_params(self) -> dict[str, Any]:
        """The keyword arguments that were given a value (not "auto")."""
        return {name: value for name, value in self.params.items() if value is not None}


class OptimizationKeys(Block):
    """Optimizer and schedule at the top level."""

    optimizer: Optimizer | None = key(None, "Optimizer made by the engine; not given: the client's, if any.")
    scheduler: Scheduler | None = key(None, "Schedule made by the engine, stepped once per optimizer step.")
