"""Which dtype each kind of value has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lorica.precision import Precision, dtype_from_name

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def _config(
    *,
    bf16: bool = False,
    fp16: bool = False,
    accum: str | None = None,
    comm: str | None = None,
    buffer: str | None = None,
) -> SimpleNamespace:
    return SimpleNamespace(
        bf16=SimpleNamespace(enabled=bf16),
        fp16=SimpleNamespace(enabled=fp16),
        data_types=SimpleNamespace(grad_accum_dtype=accum, buffer_dtype=buffer),
        communication_data_type=comm,
    )


# configuration, dtype of the parameter -> compute, master, accumulate, communicate
TABLE = [
    (_config(), FP32, (FP32, FP32, FP32, FP32)),
    (_config(), BF16, (BF16, FP32, BF16, BF16)),
    (_config(), FP64, (FP64, FP64, FP64, FP64)),
    (_config(accum="fp32", comm="bf16"), FP64, (FP64, FP64, FP64, FP64)),
    (_config(bf16=True), FP32, (BF16, FP32, BF16, BF16)),
    (_config(bf16=True), FP64, (BF16, FP32, BF16, BF16)),
    (_config(bf16=True, accum="fp32"), FP32, (BF16, FP32, FP32, BF16)),
    (_config(bf16=True, comm="fp32"), FP32, (BF16, FP32, BF16, FP32)),
    (_config(fp16=True, accum="fp32", comm="bf16"), FP32, (FP16, FP32, FP32, BF16)),
]


@pytest.mark.parametrize(("config", "dtype", "wanted"), TABLE)
def test_the_dtypes_follow_the_table(
    config: SimpleNamespace, dtype: torch.dtype, wanted: tuple[torch.dtype, ...]
) -> None:
    policy = Precision.from_config(config)
    got = (
        policy.compute_dtype_of(dtype),
        policy.master_dtype_of(dtype),
        policy.accum_dtype_of(dtype),
        policy.comm_dtype_of(dtype),
    )
    assert got == wanted


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_quantized_parameters_keep_their_dtype(dtype: torch.dtype) -> None:
    assert Precision.from_config(_config(bf16=True)).compute_dtype_of(dtype) is dtype


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (_config(fp16=True), True),
        (_config(fp16=True, accum="fp32"), True),
        (_config(fp16=True, accum="fp32", comm="fp32"), False),
        (_config(bf16=True), False),
        (_config(bf16=True, comm="fp16"), True),
    ],
)
def test_fp16_sums_are_recognised(config: SimpleNamespace, wanted: bool) -> None:
    assert Precision.from_config(config).sums_in_fp16 is wanted


def test_buffers_keep_their_dtype_unless_one_is_named() -> None:
    assert Precision.from_config(_config(bf16=True)).buffer_dtype is None
    assert Precision.from_config(_config(bf16=True, buffer="fp32")).buffer_dtype is FP32


def test_dtypes_have_several_names() -> None:
    assert {dtype_from_name(name) for name in ("bf16", "bfp16", "bfloat16", "torch.bfloat16")} == {BF16}
    with pytest.raises(ValueError, match="got 'fp8'"):
        dtype_from_name("fp8")
