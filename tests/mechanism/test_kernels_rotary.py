"""Rotary embedding: the kernel against its formula in float64, both directions, and against Hugging Face's words."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lorica.kernels.rotary import apply_rotary, rotary_formula
from tests.mechanism.kernel_checks import DEVICE, DTYPES, check, close, exact

SHAPES = [(1, 1, 1, 1, 2), (2, 3, 1, 7, 64), (1, 2, 1, 127, 14), (1, 3, 3, 9, 254)]  # B, H, Hk, T, D
ON_GPU_TOO = [(4, 32, 8, 2048, 128), (1, 12, 12, 1000, 64)] if DEVICE == "cuda" else []


def tables(*shape: int, dtype: torch.dtype = torch.float32, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, D] as models make them: each angle twice."""
    *batch, length, size = shape
    angles = torch.rand(*batch, length, size // 2, generator=torch.Generator().manual_seed(1)) * 6
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def _heads(batch: int, heads: int, length: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return exact(batch, heads, length, size, dtype=dtype, seed=seed).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES + ON_GPU_TOO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_kernel_is_its_formula(shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool) -> None:
    batch, heads, k_heads, length, size = shape
    q, k = _heads(batch, heads, length, size, dtype, 0), _heads(batch, k_heads, length, size, dtype, 2)
    kernel, formula = (partial(turn, interleaved=interleaved) for turn in (apply_rotary, rotary_formula))
    check(kernel, formula, [q, k, *tables(length, size, dtype=dtype, interleaved=interleaved)])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sequence_may_have_positions_of_its_own(batch: int) -> None:
    q, k = _heads(3, 4, 9, 16, torch.float32, 0), _heads(3, 2, 9, 16, torch.float32, 2)
    check(apply_rotary, rotary_formula, [q, k, *tables(batch, 9, 16)])
    cos, sin = tables(1, 9, 16)
    check(apply_rotary, rotary_formula, [q, k, cos.expand(3, 9, 16), sin.expand(3, 9, 16)])


def test_the_gradient_is_exact_where_the_two_of_a_pair_turn_differently() -> None:
    q, k = _heads(2, 4, 9, 16, torch.float32, 0), _heads(2, 2, 9, 16, torch.float32, 2)
    for interleaved in (False, True):
        kernel, formula = (partial(turn, interleaved=interleaved) for turn in (apply_rotary, rotary_formula))
        check(kernel, formula, [q, k, exact(9, 16, seed=3), exact(9, 16, seed=4)])


def test_half_rotation_is_that_of_hugging_face() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = exact(2, 4, 9, 16), exact(2, 2, 9, 16, seed=2)
    cos, sin = tables(2, 9, 16)
    for got, wanted in zip(apply_rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        close(got, wanted, 1e-6)


def test_interleaved_pairs_are_those_of_gpt_j() -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    q, k = exact(2, 4, 9, 16), exact(2, 2, 9, 16, seed=2)
    cos, sin = tables(2, 9, 16, interleaved=True)
    for x, got in zip((q, k), apply_rotary(q, k, cos, sin, interleaved=True), strict=True):
        wanted = apply_rotary_pos_emb(x.transpose(1, 2), sin[..., ::2], cos[..., ::2]).transpose(1, 2)
        close(got, wanted, 1e-6)


def test_any_strides_are_read_in_place_and_the_order_of_dims_is_kept() -> None:
    q = exact(2, 9, 4, 16).transpose(1, 2).requires_grad_()  # as a projection leaves it: [B, T, H, D] in memory
    fused = exact(2, 9, 8, 48, seed=2)
    k = fused[:, :, 2:4, 16:32].transpose(1, 2).requires_grad_()  # a slice of a fused projection
    check(apply_rotary, rotary_formula, [q, k, *tables(9, 16)])
    out, _ = apply_rotary(q, k, *tables(9, 16))
    assert out.stride() == q.stride()
    expanded = exact(2, 1, 9, 16, seed=3).expand(2, 4, 9, 16).requires_grad_()
    columns = exact(2, 4, 16, 9, seed=3).transpose(2, 3).requires_grad_()  # the last stride is not 1
    for x in (expanded, columns):
        check(apply_rotary, rotary_formula, [x, k.detach().requires_grad_(), *tables(9, 16)])


def test_a_part_of_a_head_can_be_turned() -> None:
    x = exact(2, 4, 9, 24).requires_grad_()
    check(
        lambda x, cos, sin: apply_rotary(x[..., :16], x[..., 8:], cos, sin),
        lambda x, cos, sin: rotary_formula(x[..., :16], x[..., 8:], cos, sin),
        [x, *tables(9, 16)],
    )


def test_turning_back_gives_the_input_and_leaves_it_alone() -> None:
    q, k = exact(2, 4, 9, 16), exact(2, 2, 9, 16, seed=2)
    before = q.clone()
    cos, sin = tables(9, 16)
    there = apply_rotary(q, k, cos, sin)
    back = apply_rotary(*there, cos, -sin)
    assert torch.equal(q, before)
    close(back[0], q, 1e-6)
    close(back[1], k, 1e-6)


def test_tables_may_be_wider_than_queries() -> None:
    q, k = _heads(2, 4, 9, 16, torch.bfloat16, 0), _heads(2, 2, 9, 16, torch.bfloat16, 2)
    check(apply_rotary, rotary_formula, [q, k, *tables(9, 16)])
    assert apply_rotary(q, k, *tables(9, 16))[0].dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 4, 9, 16), (2, 4, 0, 16)], ids=str)
def test_empty_inputs_have_empty_results(shape: tuple[int, ...]) -> None:
    q = exact(*shape).requires_grad_()
    out, _ = apply_rotary(q, exact(*shape), *tables(shape[2], 16))
    out.sum().backward()
    assert out.shape == shape and q.grad.shape == shape


def test_one_of_the_two_results_may_stay_unused() -> None:
    q, k = _heads(2, 4, 9, 16, torch.float32, 0), _heads(2, 2, 9, 16, torch.float32, 2)
    apply_rotary(q, k, *tables(9, 16))[0].sum().backward()
    assert q.grad.abs().sum() > 0 and torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": exact(2, 4, 9, 15)}, "q has the wrong shape"),
        ({"q": exact(4, 9, 16)}, "q has the wrong shape"),
        ({"q": exact(2, 4, 9, 16).double()}, "q has the wrong dtype"),
        ({"k": exact(2, 4, 8, 16)}, "k does not fit q"),
        ({"k": exact(2, 4, 9, 16).half()}, "k does not fit q"),
        ({"cos": exact(9, 8)}, "cos and sin do not fit q"),
        ({"sin": exact(3, 9, 16)}, "cos and sin do not fit q"),
        ({"cos": exact(9, 16).requires_grad_()}, "no gradient"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"q": exact(2, 4, 9, 16), "k": exact(2, 4, 9, 16), "cos": exact(9, 16), "sin": exact(9, 16)}
    with pytest.raises(ValueError, match=message):
        apply_rotary(**arguments | change)
