"""The codes of compact states: right on average, never 0 for what is not; dice that depend on their place only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorica.plan import FORMATS, ITEMSIZE
from lorica.precision import compact
from tests.mechanism.exact_arithmetic import random_bits, usual

N = 128 * 64
CPU = torch.device("cpu")


def dice(step: int = 1, salt: int = 7, start: int = 0, numel: int = N) -> Tensor:
    return compact.dice(compact.key_of(step, salt), start, numel, CPU)


def tops(x: Tensor) -> Tensor:
    """The largest size of each element's block."""
    return x.abs().view(-1, 128).amax(1).repeat_interleave(128)


# Dice -----------------------------------------------------------------------------------------------------------------


def test_dice_depend_on_the_place_in_the_plane_not_on_the_cut() -> None:
    whole = dice(numel=4096)
    assert torch.equal(dice(start=1280, numel=512), whole[1280:1792])


def test_dice_of_steps_planes_elements_and_halves_have_nothing_in_common() -> None:
    """Uniform, and correlations within five standard deviations of none."""
    numel = 1 << 18
    first = dice(numel=numel)
    others = {
        "next step": dice(step=2, numel=numel),
        "another plane": dice(salt=8, numel=numel),
        "of the parameter": compact.dice(compact.key_of(1, 7, of_parameter=True), 0, numel, CPU),
        **{f"element {k} further": first.roll(k) for k in (1, 2, 128, 1024)},
        "the other half": compact.high(first),
    }
    for name, other in others.items():
        for half in (compact.low, compact.high):
            pair = torch.stack([compact.low(first).double(), half(other).double()])
            if name != "the other half" or half is compact.low:
                assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(numel), name
    for half in (compact.low(first), compact.high(first)):
        counts = torch.bincount(half >> 8, minlength=256).double()
        chi_square = float(((counts - numel / 256).square() / (numel / 256)).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_a_step_number_beyond_what_fp32_holds_starts_again() -> None:
    assert compact.key_of(compact.STEPS + 5, 1) == compact.key_of(5, 1) != compact.key_of(6, 1)


# Rounding -------------------------------------------------------------------------------------------------------------


def test_bf16_is_rounded_to_a_neighbour_and_right_on_average() -> None:
    x = usual(N, 1)
    sums, steps = torch.zeros(N, dtype=torch.float64), 400
    for step in range(steps):
        got = compact.round_stochastically(x, compact.low(dice(step)))
        assert ((got.float() - x).abs() <= x.abs() * 2**-7 + 1e-40).all()
        sums += got.double()
    error = (sums / steps - x.double()).abs() / (x.abs() + 1e-30)
    assert float(error.max()) < 5 * 2**-7 / 2 / math.sqrt(steps)
    exact = x.bfloat16()
    assert torch.equal(compact.round_stochastically(exact.float(), compact.low(dice())), exact)


def test_bf16_keeps_infinities_and_nans() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0])
    got = compact.round_stochastically(x, torch.full((6,), 0xFFFF))
    assert got[0] == math.inf and got[1] == -math.inf and got[2:4].isnan().all() and (got[4:] == 0).all()


@pytest.mark.parametrize("kind", ["signed", "root"])
def test_eight_bits_are_right_on_average(kind: str) -> None:
    x = usual(N, 2) if kind == "signed" else usual(N, 2).abs()
    encode = compact.encode_signed if kind == "signed" else compact.encode_root
    decode = compact.decode_signed if kind == "signed" else compact.decode_root
    levels = 127 if kind == "signed" else 255
    sums, steps = torch.zeros(N, dtype=torch.float64), 400
    for step in range(steps):
        sums += decode(*encode(x, compact.high(dice(step)))).double()
    mean, share = (sums / steps).float(), x.abs() / tops(x).clamp_min(1e-30)
    gap = (2 * share.sqrt() * levels + 1) / levels**2  # between neighbouring codes
    certain = share > 1 / levels**2  # smaller roots of second moments become 1, never 0
    error = ((mean - x).abs() / tops(x).clamp_min(1e-30) / gap)[certain]
    assert float(error.max()) < 5 / 2 / math.sqrt(steps)


@pytest.mark.parametrize("values", [usual, random_bits])
def test_no_second_moment_that_is_not_zero_is_stored_as_zero(values: object) -> None:
    x = values(N, 3).abs()  # type: ignore[operator]
    x = torch.where(x.isfinite(), x, 1.0)
    for chance in (compact.low(dice()), torch.zeros(N, dtype=torch.int64), torch.full((N,), 0xFFFF), None):
        codes = compact.encode_root(x, chance).codes
        assert torch.equal(codes == 0, x == 0)


def test_nearest_is_a_fixed_point() -> None:
    """What is read can be written again without a change."""
    for encode, decode in (
        (compact.encode_signed, compact.decode_signed),
        (compact.encode_root, compact.decode_root),
    ):
        coded = encode(usual(N, 4).abs(), None)
        again = encode(decode(*coded), None)
        assert torch.equal(again.codes, coded.codes)
        torch.testing.assert_close(again.scale, coded.scale, rtol=3e-7, atol=0.0)


def test_a_block_with_a_nan_is_a_nan_and_its_neighbours_are_not() -> None:
    for bad in (math.nan, math.inf):
        x = usual(384, 5).abs()
        x[200] = bad
        for coded, decode in (
            (compact.encode_signed(x, None), compact.decode_signed),
            (compact.encode_root(x, None), compact.decode_root),
        ):
            values = decode(*coded)
            assert not values[128:256].isfinite().any()
            assert values[:128].isfinite().all() and values[256:].isfinite().all()


def test_zeros_and_denormals_stay_small() -> None:
    for x in (torch.zeros(128), torch.full((128,), 1e-42), torch.full((128,), 1e-37)):
        coded = compact.encode_signed(x, None)
        assert (compact.decode_signed(*coded) <= 2.0**-99).all()


# One second moment per block ------------------------------------------------------------------------------------------


def test_the_mean_square_of_a_block_counts_what_is_inside() -> None:
    x = usual(N, 6)
    inside = torch.ones(N, dtype=torch.bool)
    inside[100:128] = False
    inside[-128:] = False
    got = compact.mean_square(x, inside)
    wanted = [
        float(b[i].double().square().mean()) if i.any() else 0.0
        for b, i in zip(x.view(-1, 128), inside.view(-1, 128), strict=True)
    ]
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=128 * 2**-23, atol=0.0)


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e15])
def test_the_order_in_which_squares_are_added_means_nothing(size: float) -> None:
    x = usual(N, 7) * size
    inside = torch.ones(N, dtype=torch.bool)
    mixed = x.view(-1, 128)[:, torch.randperm(128, generator=torch.Generator().manual_seed(0))].reshape(-1)
    assert torch.equal(compact.mean_square(x, inside), compact.mean_square(mixed, inside))


def test_a_mean_square_of_what_is_not_finite_is_not_finite() -> None:
    for bad in (math.inf, -math.inf, math.nan, -math.nan, 1e30):
        x = usual(256, 8)
        x[130] = bad
        got = compact.mean_square(x, torch.ones(256, dtype=torch.bool))
        assert got[0].isfinite() and not got[1].isfinite()


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "wanted"), [("bf16", 4.0), ("int8", 2.0625), ("int8_block", 1.0625)])
def test_a_format_takes_so_many_bytes_per_parameter(name: str, wanted: float) -> None:
    planes = [plane for moment in FORMATS[name] for plane in moment]
    assert sum(ITEMSIZE[plane.dtype] / plane.ratio for plane in planes) == wanted
