"""The precision blocks: fp16, bf16, data_types, amp, torch_autocast. Which combinations are legal: rules.py."""

from __future__ import annotations

from typing import ClassVar, Literal

from lorica.config.keys import Block, Form, block, detail, key, no_effect, not_yet

DtypeName = Literal["fp32", "fp16", "bf16"]

TORCH_DTYPE: dict[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""DeepSpeed's name of a dtype -> torch's."""

_AT_LEAST_0 = {"ge": 0}
_AT_LEAST_1 = {"ge": 1}


class FP16(Block):
    """Half precision with a loss scale."""

    enabled: bool = key(False, "Compute in fp16, with fp32 master weights.")
    loss_scale: float = key(0.0, "Fixed loss scale; 0 means dynamic.", bounds=_AT_LEAST_0)
    initial_scale_power: int = key(16, "The dynamic loss scale starts at 2 to this power.", bounds={"ge": 0, "le": 127})
    loss_scale_window: int = key(1000, "Steps without overflow after which the loss scale doubles.", bounds=_AT_LEAST_0)
    hysteresis: int = key(2, "Overflows tolerated before the loss scale is halved.", bounds=_AT_LEAST_1)
    consecutive_hysteresis: bool = key(False, "Restore the tolerated overflows after every good step.")
    min_loss_scale: float = key(
        1.0, "Smallest dynamic loss scale; what happens there: `lorica.on_min_loss_scale`.", bounds=_AT_LEAST_0
    )
    auto_cast: bool = key(False, "Cast floating-point inputs of the model to fp16.")
    fp16_master_weights_and_grads: bool = not_yet(
        False,
        "Keep master weights and gradients in fp16.",
        "leave it false (fp32 master); offload_optimizer to the CPU saves device memory",
    )


class BF16(Block):
    """bfloat16, no loss scale."""

    enabled: bool = key(False, "Compute in bf16, with fp32 master weights.")
    check_grad_overflow: bool = key(True, "Skip a step whose gradient holds inf or nan.")
    immediate_grad_update: bool = no_effect(
        False,
        "When gradients enter the fp32 accumulator.",
        "every gradient enters its accumulator as soon as it is there",
    )
    bf16_master_weights_and_grads: bool = not_yet(
        False,
        "Keep master weights and gradients in bf16.",
        "leave it false (fp32 master); offload_optimizer to the CPU saves device memory",
    )
    bf16_optimizer_states: bool = not_yet(
        False, "Keep optimizer moments in bf16.", "leave it false; offload_optimizer to the CPU saves device memory"
    )


class DataTypes(Block):
    """Precisions that do not follow from fp16 / bf16."""

    grad_accum_dtype: DtypeName | None = key(
        None, "Accumulate gradients in this type.", form=Form.DTYPE, shown_default="the compute type"
    )
    param_dtype: DtypeName | None = key(
        None, "Type of the parameters; must equal the compute type.", form=Form.DTYPE, shown_default="the compute type"
    )
    buffer_dtype: DtypeName | None = key(
        None, "Cast floating-point buffers to this type.", form=Form.DTYPE, shown_default="as the model has them"
    )


class AMP(Block):
    """Apex mixed precision."""

    open_keys: ClassVar[bool] = True
    enabled: bool = not_yet(False, "Use Apex mixed precision.", "use the bf16 or the fp16 block")
    opt_level: str = detail("O1", "Apex optimisation level.")


class TorchAutocast(Block):
    """fp32 parameters with an autocast forward."""

    enabled: bool = not_yet(
        False, "Keep parameters in fp32 and run the forward under torch.autocast.", 'use "bf16": {"enabled": true}'
    )
    dtype: DtypeName = detail("bf16", "Autocast type.", form=Form.DTYPE)
    lower_precision_safe_modules: tuple[str, ...] | None = detail(
        None, "Module classes whose weights travel in the lower precision."
    )


class PrecisionKeys(Block):
    """The precision blocks at the top level."""

    fp16: FP16 = block(FP16, "Half precision with a loss scale.")
    bf16: BF16 = block(BF16, "bfloat16.", deprecated=("bfloat16",))
    data_types: DataTypes = block(DataTypes, "Precision of accumulation, parameters and buffers.")
    amp: AMP = block(AMP, "Apex mixed precision.")
    torch_autocast: TorchAutocast = block(TorchAutocast, "fp32 parameters with an autocast forward.")
