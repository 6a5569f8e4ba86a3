"""The pack kernel against its formula: cast, accumulate, missing gradients, padding, and the sum of squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lorica.kernels import pack
from lorica.kernels.runtime import interpreted
from lorica.layout import Entry, Layout, build_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5), (64, 128), (1,), (0, 4), (5000,), (100, 41)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def plane_of(shapes: list[tuple[int, ...]], num_shards: int = 1) -> Layout:
    return build_layout([Entry(f"p{i}", shape, 0) for i, shape in enumerate(shapes)], num_shards)


def gradients(dtype: torch.dtype, missing: int | None = None) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in SHAPES]
    return [None if index == missing else grad for index, grad in enumerate(grads)]


@pytest.mark.parametrize("missing", [None, 1])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("plane_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_the_kernel_packs_as_the_formula_does(
    grad_dtype: torch.dtype, plane_dtype: torch.dtype, accumulate: bool, missing: int | None
) -> None:
    layout, grads = plane_of(SHAPES), gradients(grad_dtype, missing)
    before = torch.randn(layout.numel, generator=torch.Generator().manual_seed(1))
    for start, stop in layout.gaps:
        before[start:stop] = 0
    before = before if accumulate else torch.full_like(before, float("nan"))  # every element must be written
    got, wanted = (before.to(plane_dtype).to(DEVICE, copy=True) for _ in range(2))
    chunks = pack.chunk_map(layout, torch.device(DEVICE))
    squares = torch.full((chunks.num_chunks,), float("nan"), device=DEVICE)
    assert pack.fits(grads, got)
    pack.pack(grads, chunks, got, squares, accumulate=accumulate, scale=0.25)
    total = pack.pack_formula(grads, layout, wanted, accumulate=accumulate, scale=0.25)
    cuts_off = interpreted() and plane_dtype is torch.bfloat16  # the interpreter does not round to bf16
    torch.testing.assert_close(got, wanted, rtol=2**-7 if cuts_off else 0, atol=1e-30)
    torch.testing.assert_close(squares.double().sum(), total, rtol=2**-6 if cuts_off else 1e-6, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_shows_in_the_sum(value: float) -> None:
    layout, grads = plane_of(SHAPES), gradients(torch.bfloat16)
    last = grads[-1]
    assert last is not None
    last[0, 0] = value
    chunks = pack.chunk_map(layout, torch.device(DEVICE))
    plane = torch.empty(layout.numel, dtype=torch.bfloat16, device=DEVICE)
    squares = torch.empty(chunks.num_chunks, device=DEVICE)
    pack.pack(grads, chunks, plane, squares, accumulate=False, scale=1.0)
    assert not squares.sum().isfinite()


def test_every_element_of_a_plane_is_in_one_chunk() -> None:
    layout = plane_of(SHAPES, num_shards=3)
    chunks = pack.chunk_map(layout, torch.device("cpu"))
    seen = torch.zeros(layout.numel, dtype=torch.int32)
    for at, stop in zip(chunks.at_C.tolist(), chunks.stop_C.tolist(), strict=True):
        seen[at : at + stop] += 1
    assert (seen == 1).all()


def test_gradients_that_the_kernel_cannot_read_are_refused() -> None:
    plane = torch.empty(1024, dtype=torch.bfloat16, device=DEVICE)
    good = torch.zeros(8, 8, dtype=torch.bfloat16, device=DEVICE)
    assert pack.fits([good, None], plane)
    assert not pack.fits([good, good.float()], plane)
    assert not pack.fits([good, torch.zeros(8, 16, dtype=torch.bfloat16, device=DEVICE)[:, ::2]], plane)
    assert not pack.fits([good.reshape(-1)[1:]], plane)
    assert not pack.fits([good.to_sparse()], plane)
    assert not pack.fits([None], plane)
