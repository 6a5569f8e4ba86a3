"""Optimizer states in one or two bytes: the codes, and the stochastic rounding that they rest on, in plain torch.

Owns the formulas; the kernels repeat them bit for bit (`kernels/compact.py`, `native/compact.h`), `plan.FORMATS` says
which planes a format has. Owns no plane and no optimizer.

[Note: why stochastic rounding] A moment moves by little: with beta2 = 0.999 the second one by a thousandth of itself,
less than half a step of bf16 (2^-9) or of any 8-bit code, so rounding to nearest would leave it where it is. Rounded up
with the probability of what is left over, the stored value has the right expectation, and the moving average goes on.
The same holds for a bf16 parameter without a master: lr x update is mostly below half a step of it.
Source: Gupta et al. 2015 (arXiv:1502.02551); Zamirai et al. 2020 (arXiv:2010.06192), of parameters.

[Note: where the dice come from] A hash of the step, the plane (`salt`) and the element's place in the whole plane, not
a generator with a state: the same bits whatever the chunk, the processor, the tier and the number of ranks. 32 bits per
element: the low half for the first moment, the high half for the second; another hash for the parameter.
    x = i;  x ^= x >> 16;  x *= A;  x ^= key;  x ^= x >> 15;  x *= B;  x ^= x >> 16
Source: Salmon et al. 2011 (SC11), counter-based generators; A, B and the shifts: Wellons 2018, "lowbias32".

[Note: the 8-bit code] In a block of 128 elements x is stored as a whole number q, 0 .. L, that stands for q^2 scale:
L is 127 with a sign (first moment), 255 without (root of the second moment), scale = max |x| / L^2. Steps are 1.6 %
(0.8 %) of the largest value, and 16 % (8 %) of one a hundredth as large; the smallest one but 0 is 1/16129 (1/65025) of
the largest, where a linear code has 1/127. The root halves the range that a second moment needs, and what is not 0 is
never stored as 0, because the update divides by it. Blocks follow the alignment of a plane, so none spans two
parameters, shards or chunks.
Source: Dettmers et al. 2021 (arXiv:2110.02861), blocks and a non-linear code; Li et al. 2023 (arXiv:2309.01507), why a
second moment must not become 0.

[Note: one second moment per block] `int8_block` keeps one fp32 second moment for 128 neighbours in a parameter: the
moving average of the mean of their squared gradients. What is padding has the code -128, which no value has, and does
not count. The mean is taken in fixed point (24 bits below the largest square), where the order of additions means
nothing. Source: Zhang et al. 2024 (arXiv:2406.16793), one learning rate per block.

Shape suffixes: N elements, a multiple of 128; B = N / 128 blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorica.layout import ALIGN

BLOCK = ALIGN
SIGNED, UNSIGNED = 127, 255  # L
PAD = -128
FLOOR = 2.0**-100  # of the largest value of a block: its reciprocal and its scale are ordinary numbers
SEED, OF_PARAMETER = 0x5EED0CA5, 0x9E3779B9
STEPS = 1 << 24  # below it a step number is exact in fp32, as which it reaches the kernels (`adam_hyper`)

_MASK, _A, _B = 0xFFFFFFFF, 0x7FEB352D, 0x846CA68B
_INFINITY, _LOWEST_EXPONENT = 0x7F800000, 31


# -- dice --------------------------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    """A bijection of 32-bit numbers whose bits all depend on all bits of `x`."""
    x = ((x ^ (x >> 16)) * _A) & _MASK
    x = ((x ^ (x >> 15)) * _B) & _MASK
    return x ^ (x >> 16)


def key_of(step: int, salt: int, *, of_parameter: bool = False) -> int:
    """What a step's dice on one plane have in common."""
    return mix(mix((step % STEPS) ^ SEED) ^ (salt & _MASK) ^ (OF_PARAMETER if of_parameter else 0))


def dice(key: int, start: int, numel: int, device: torch.device) -> Tensor:
    """32 random bits for each of the elements [start, start + numel) of a plane, [numel] int64."""
    x = torch.arange(start, start + numel, dtype=torch.int64, device=device) & _MASK
    x = ((x ^ (x >> 16)) * _A) & _MASK
    x ^= key
    x = ((x ^ (x >> 15)) * _B) & _MASK
    return x ^ (x >> 16)


def low(bits: Tensor) -> Tensor:
    """The lower 16 bits."""
    return bits & 0xFFFF


def high(bits: Tensor) -> Tensor:
    """The upper 16 bits."""
    return bits >> 16


# -- bf16 --------------------------------------------------------------------------------------------------------------


def round_stochastically(x_N: Tensor, dice16_N: Tensor) -> Tensor:
    """fp32 as bf16, up with the probability of what is cut off. Args: dice16_N: whole numbers below 2^16."""
    upper = (x_N.view(torch.int32).to(torch.int64) + dice16_N) >> 16
    upper = upper.masked_fill(x_N.isnan(), 0x7FC0)
    return upper.to(torch.int16).view(torch.bfloat16)


# -- 8 bits ------------------------------------------------------------------------------------------------------------


class Coded(NamedTuple):
    """Codes [N] int8 or uint8, and what a unit of their square stands for, [B] fp32."""

    codes: Tensor
    scale: Tensor


def encode_signed(x_N: Tensor, dice16_N: Tensor | None) -> Coded:
    """A first moment in 8 bits. Args: x_N: fp32. dice16_N: whole numbers below 2^16; None: to nearest."""
    coded = _encode(x_N, SIGNED, dice16_N)
    return Coded(torch.where(x_N.signbit(), -coded.codes, coded.codes).to(torch.int8), coded.scale)


def encode_root(x_N: Tensor, dice16_N: Tensor | None) -> Coded:
    """The root of a second moment in 8 bits; arguments as in `encode_signed`, x_N not negative."""
    coded = _encode(x_N, UNSIGNED, dice16_N)
    return Coded(torch.maximum(coded.codes, (x_N > 0).to(torch.int32)).to(torch.uint8), coded.scale)


def _encode(x_N: Tensor, levels: int, dice16_N: Tensor | None) -> Coded:
    size = x_N.abs().view(-1, BLOCK)  # a NaN has no sign either
    floor = torch.tensor(FLOOR).view(torch.int32).item()
    top = size.view(torch.int32).amax(1).clamp_min(floor).view(torch.float32)  # as whole numbers: a NaN is the largest
    square = torch.full_like(top, float(levels * levels))
    t = size * (square / top)[:, None]
    t = torch.where(t < square[:, None], t, square[:, None])
    q = root(t).to(torch.int32)
    whole = q.float()
    chance = (whole + whole + 1.0) * (0.5 if dice16_N is None else _uniform(dice16_N).view(-1, BLOCK))
    q += (t - whole * whole > chance).to(torch.int32)
    return Coded(q.view(-1), top * torch.full_like(top, 1.0 / (levels * levels)))


def root(x: Tensor) -> Tensor:
    """The square root of fp32, correctly rounded, as kernels have it; torch's own may be a bit off (MKL's is)."""
    return x.double().sqrt().float()


def _uniform(dice16_N: Tensor) -> Tensor:
    """In (0, 1): the middles of 2^16 intervals."""
    return (dice16_N + dice16_N + 1).float() * 2.0**-17


def decode_signed(codes_N: Tensor, scale_B: Tensor) -> Tensor:
    """The first moment [N] fp32 that `encode_signed` stored; 0 for padding."""
    q = codes_N.to(torch.int32).masked_fill(codes_N == PAD, 0)
    return _times((q * q.abs()).float(), scale_B)


def decode_root(codes_N: Tensor, scale_B: Tensor) -> Tensor:
    """The root of the second moment, [N] fp32."""
    q = codes_N.to(torch.int32)
    return _times((q * q).float(), scale_B)


def _times(squares_N: Tensor, scale_B: Tensor) -> Tensor:
    return (squares_N.view(-1, BLOCK) * scale_B[:, None]).view(-1)


# -- one second moment per block ---------------------------------------------------------------------------------------


def mean_square(x_N: Tensor, inside_N: Tensor) -> Tensor:
    """The mean of the squares of each block's elements that are `inside`, [B] fp32; 0 where there is none.

    Exact but for 24 bits below the largest square: see [Note: one second moment per block].
    """
    squares = torch.where(inside_N, x_N * x_N, 0.0).view(-1, BLOCK)
    top = squares.abs().view(torch.int32).amax(1)
    exponent = (top >> 23).clamp_min(_LOWEST_EXPONENT)
    finite = top < _INFINITY
    up = _power_of_two(torch.where(finite, 277 - exponent, 1))
    fixed = torch.where(finite[:, None], squares * up[:, None], 0.0).to(torch.int32)
    total = fixed.sum(1, dtype=torch.int32).float() * _power_of_two(torch.where(finite, exponent - 23, 1))
    count = inside_N.view(-1, BLOCK).sum(1).clamp_min(1)
    return torch.where(finite, total / count, top.view(torch.float32))


def _power_of_two(biased_exponent: Tensor) -> Tensor:
    return (biased_exponent << 23).to(torch.int32).view(torch.float32)


# -- a moment as people see it ---------------------------------------------------------------------------------------


def decode(codes: Tensor, scale: Tensor | None, numel: int) -> Tensor:
    """A moment [numel] in fp32, from what is stored of it, whole blocks.

    Args:
        codes: fp32 or bf16: the values; int8, uint8: codes; fewer than `numel` fp32: one value for each block.
        scale: of 8-bit codes.
    """
    if scale is not None:
        is_root = codes.dtype is torch.uint8
        return decode_root(codes, scale).square() if is_root else decode_signed(codes, scale)
    values = codes.float()
    return values.repeat_interleave(BLOCK)[:numel] if values.numel() < numel else values


class Stored(NamedTuple):
    """What is stored of a moment: codes or values, and the scales of 8-bit codes."""

    codes: Tensor
    scale: Tensor | None


def encode(values_N: Tensor, dtype: torch.dtype, inside_N: Tensor, *, per_block: bool) -> Stored:
    """What is stored of a moment, to nearest.

    Args:
        values_N: fp32, whole blocks. dtype: of the stored plane. per_block: it has one value for each block, the mean.
        inside_N: what is not padding, for that mean.
    """
    if per_block:
        inside = inside_N.view(-1, BLOCK)
        total = torch.where(inside, values_N.view(-1, BLOCK), 0.0).double().sum(1)
        return Stored((total / inside.sum(1).clamp_min(1)).float(), None)
    if dtype is torch.int8:
        return Stored(*encode_signed(values_N, None))
    if dtype is torch.uint8:
        return Stored(*encode_root(root(values_N), None))
    return Stored(values_N.to(dtype), None)
