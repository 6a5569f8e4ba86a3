"""Cross-entropy kernels against their formulas, the formulas against torch, and linear + cross-entropy against both.

References are computed in fp64 from the same (rounded) inputs. Tolerances: fp32 arithmetic gives 1e-5 of the largest
value; a gradient that is stored in bf16 or fp16 has half a unit in the last place besides, 2^-9 or 2^-11 of its size
(twice that where that unit is largest). Triton's interpreter cuts fp32 off to bf16 instead of rounding it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels import linear_cross_entropy as module
from lorica.kernels.cross_entropy import LossOptions, cross_entropy_, cross_entropy_formula_
from lorica.kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy
from lorica.kernels.runtime import interpreted
from lorica.kernels.scale import scale_, scale_formula_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 0.0,
    torch.bfloat16: 2.0**-7 if interpreted() else 2.0**-8,
    torch.float16: 2.0**-10,
}
SIZES = [(1, 1), (3, 7), (4, 127), (2, 1000), (2, 8193)]  # the last one takes two blocks
OPTIONS = [
    LossOptions(),
    LossOptions(ignore_index=0),
    LossOptions(label_smoothing=0.1),
    LossOptions(z_loss=1e-2),
    LossOptions(softcap=3.0),
    LossOptions(ignore_index=-1, label_smoothing=0.3, z_loss=1e-3, softcap=20.0),
]


def rows(num_rows: int, num_classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of very different sizes, and targets of which the first is 0."""
    generator = torch.Generator().manual_seed(num_rows * num_classes)
    size_N1 = torch.logspace(-1, 1.5, num_rows).unsqueeze(1)
    logits_NV = (torch.randn(num_rows, num_classes, generator=generator) * size_N1).to(dtype)
    target_N = torch.randint(num_classes, (num_rows,), generator=generator)
    target_N[0] = 0
    return logits_NV.to(DEVICE), target_N.to(DEVICE)


def is_close(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32, size: float | None = None) -> None:
    """Assert equality up to fp32 arithmetic and one rounding to `dtype`."""
    assert found.shape == wanted.shape
    wanted = wanted.to(found.device, torch.float64)
    size = wanted.abs().max().item() if size is None else size
    allowed = 1e-5 * size + ROUNDING[dtype] * wanted.abs() + torch.finfo(dtype).smallest_normal
    assert ((found.double() - wanted).abs() <= allowed).all(), (found.double() - wanted).abs().max()


# The formula ----------------------------------------------------------------------------------------------------------


def by_torch(logits_NV: Tensor, target_N: Tensor, options: LossOptions) -> Tensor:
    """The loss of each row, by torch's own functions in fp64."""
    logits_NV = logits_NV.double()
    if options.softcap is not None:
        logits_NV = options.softcap * torch.tanh(logits_NV / options.softcap)
    names = {"ignore_index": options.ignore_index, "label_smoothing": options.label_smoothing}
    loss_N = F.cross_entropy(logits_NV, target_N, reduction="none", **names)
    lse_N = torch.logsumexp(logits_NV, 1)
    return loss_N + options.z_loss * torch.where(target_N == options.ignore_index, 0.0, lse_N.square())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_formula_is_torchs_loss_and_gradient(size: tuple[int, int], options: LossOptions) -> None:
    logits_NV, target_N = rows(*size)
    leaf_NV, work_NV = logits_NV.double().requires_grad_(), logits_NV.double()
    scale_N = torch.linspace(0.5, 2.0, size[0], device=DEVICE, dtype=torch.float64)
    loss_N = by_torch(leaf_NV, target_N, options)
    loss_N.backward(scale_N)
    found = cross_entropy_formula_(work_NV, target_N, options, scale_N)
    torch.testing.assert_close(found.loss_N, loss_N.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(work_NV, leaf_NV.grad, rtol=1e-10, atol=1e-12)


# The kernel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernel_is_the_formula(size: tuple[int, int], options: LossOptions, dtype: torch.dtype) -> None:
    logits_NV, target_N = rows(*size, dtype)
    scale_N = torch.linspace(0.5, 2.0, size[0], device=DEVICE)
    wanted_NV = logits_NV.double()
    wanted = cross_entropy_formula_(wanted_NV, target_N, options, scale_N.double())
    found = cross_entropy_(logits_NV, target_N, options, scale_N)
    is_close(found.loss_N, wanted.loss_N)
    is_close(found.lse_N, wanted.lse_N)
    is_close(logits_NV, wanted_NV, dtype, size=2.0)


def test_without_a_scale_the_kernel_leaves_the_logits_alone() -> None:
    logits_NV, target_N = rows(3, 127)
    before_NV = logits_NV.clone()
    found = cross_entropy_(logits_NV, target_N, LossOptions())
    is_close(found.loss_N, by_torch(before_NV, target_N, LossOptions()))
    assert torch.equal(logits_NV, before_NV)


def test_one_scale_serves_all_rows() -> None:
    logits_NV, target_N = rows(3, 127)
    other_NV = logits_NV.clone()
    cross_entropy_(logits_NV, target_N, LossOptions(), torch.tensor(0.25, device=DEVICE))
    cross_entropy_(other_NV, target_N, LossOptions(), torch.full((3,), 0.25, device=DEVICE))
    assert torch.equal(logits_NV, other_NV)


@pytest.mark.parametrize("function", [cross_entropy_, cross_entropy_formula_])
def test_no_rows_are_no_losses(function: Callable[..., Any]) -> None:
    logits_NV, target_N = torch.empty(0, 5, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert function(logits_NV, target_N, LossOptions(), torch.ones((), device=DEVICE)).loss_N.shape == (0,)


def test_rows_may_have_any_stride_but_classes_lie_side_by_side() -> None:
    logits_NV, target_N = rows(4, 127)
    wide = torch.zeros(4, 200, device=DEVICE)
    part_NV = wide[:, :127].copy_(logits_NV)
    cross_entropy_(part_NV, target_N, LossOptions(), torch.ones((), device=DEVICE))
    cross_entropy_(logits_NV, target_N, LossOptions(), torch.ones((), device=DEVICE))
    assert torch.equal(part_NV, logits_NV) and not wide[:, 127:].any()
    with pytest.raises(ValueError, match="side by side"):
        cross_entropy_(torch.zeros(5, 4, device=DEVICE).t(), target_N, LossOptions())


def test_masked_classes_have_no_gradient_wherever_they_lie() -> None:
    logits_NV, target_N = rows(2, 8193)
    logits_NV[0, 8192:], logits_NV[1, :8192] = float("-inf"), float("-inf")  # whole blocks
    target_N[1] = 8192
    wanted_NV = logits_NV.double()
    wanted = cross_entropy_formula_(wanted_NV, target_N, LossOptions(), torch.ones((), device=DEVICE))
    found = cross_entropy_(logits_NV, target_N, LossOptions(), torch.ones((), device=DEVICE))
    is_close(found.loss_N, wanted.loss_N)
    is_close(logits_NV, wanted_NV)
    assert logits_NV.isfinite().all()


@pytest.mark.parametrize("target", [-3, 7])
def test_a_target_that_is_no_class_is_loud(target: int) -> None:
    logits_NV, _ = rows(2, 7)
    target_N = torch.tensor([target, 1], device=DEVICE)
    loss_N = cross_entropy_(logits_NV, target_N, LossOptions(), torch.ones((), device=DEVICE)).loss_N
    assert loss_N.isnan().tolist() == [True, False]
    assert logits_NV.isnan().all(1).tolist() == [True, False]


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        cross_entropy_(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64), LossOptions())


@pytest.mark.parametrize("options", [{"label_smoothing": 1.5}, {"softcap": 0.0}], ids=str)
def test_options_without_a_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LossOptions(**options)  # type: ignore[arg-type]


# Scaling --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 127, 5000])
def test_scaling_rounds_once(numel: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(numel, device=DEVICE).to(dtype)
    factor = torch.tensor(1 / 3, device=DEVICE)
    wanted = tensor.double() * factor.double()
    is_close(scale_formula_(tensor.clone(), factor), wanted, dtype, size=1.0)
    is_close(scale_(tensor, factor), wanted, dtype, size=1.0)


def test_scaling_by_one_changes_nothing() -> None:
    tensor = torch.tensor([1.0, float("nan"), -0.0], device=DEVICE)
    before = tensor.clone().view(torch.int32)
    assert torch.equal(scale_(tensor, torch.ones((), device=DEVICE)).view(torch.int32), before)


def test_scaling_refuses_what_is_not_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        scale_(torch.zeros(4, 4, device=DEVICE).t()[:, :2], torch.ones((), device=DEVICE))


# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 1, 1000, 1024, 1025, 5000, 16384, 100_001])
@pytest.mark.parametrize("num_classes", [1, 1000, 32000, 256_000])
def test_chunks_are_large_enough_small_enough_and_equal(num_rows: int, num_classes: int) -> None:
    limit = 2**28
    size = chunk_rows(num_rows, num_classes, 2, limit)
    num_chunks = -(-num_rows // size)
    assert size * num_classes * 2 <= limit or size <= 1024
    assert size >= min(num_rows, 512) or num_chunks == 1
    assert num_chunks <= 1 or (num_chunks - 1) * size < num_rows <= num_chunks * size
    assert num_chunks == max(1 if num_rows else 0, -(-num_rows // chunk_rows(10**9, num_classes, 2, limit)))


# Linear + cross-entropy -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["formula", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through a chunk, whatever the device would choose, and chunks of four rows."""
    monkeypatch.setattr(module, "runs_on", lambda device: request.param == "kernel")
    monkeypatch.setattr(module, "MIN_ROWS", 4)
    monkeypatch.setattr(module, "ROW_ALIGN", 4)
    return str(request.param)


def layer(num_rows: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, bias and targets, some of them ignored."""
    torch.manual_seed(num_rows)
    width, num_classes = 8, 37
    x_ND = torch.randn(num_rows, width, device=DEVICE).to(dtype).requires_grad_()
    weight_VD = torch.randn(num_classes, width, device=DEVICE).to(dtype).requires_grad_()
    bias_V = torch.randn(num_classes, device=DEVICE).to(dtype).requires_grad_() if bias else None
    target_N = torch.randint(num_classes, (num_rows,), device=DEVICE)
    target_N[2::5] = -100
    return x_ND, weight_VD, bias_V, target_N


def reference(
    layer: tuple[Tensor, Tensor, Tensor | None, Tensor], options: LossOptions, reduction: str, grad_output: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients in fp64, by torch."""
    *values, target_N = layer
    leaves = [value.detach().double().requires_grad_() for value in values if value is not None]
    loss_N = by_torch(F.linear(*leaves), target_N, options)
    count = (target_N != options.ignore_index).sum()
    loss = {"none": loss_N, "sum": loss_N.sum(), "mean": loss_N.sum() / count}[reduction]
    return loss.detach(), list(torch.autograd.grad(loss, leaves, grad_output.double()))


# Gradients are computed from logits and logits' gradients that are rounded to the dtype, as an unfused layer does it:
# sums of N or V terms with that relative error each.
LINEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("chunk_bytes", [1, 2**28], ids=["several chunks", "one chunk"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_the_loss_of_the_logits(
    way: str, reduction: Any, dtype: torch.dtype, chunk_bytes: int
) -> None:
    given = layer(10, dtype)
    x_ND, weight_VD, bias_V, target_N = given
    options = LossOptions(label_smoothing=0.1, z_loss=1e-3)
    loss = linear_cross_entropy(
        x_ND, weight_VD, target_N, bias=bias_V, reduction=reduction, label_smoothing=0.1, z_loss=1e-3,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip
    grad_output = torch.rand(loss.shape, device=DEVICE, dtype=loss.dtype) + 0.5
    loss.backward(grad_output)
    wanted, gradients = reference(given, options, reduction, grad_output)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=LINEAR[dtype], atol=LINEAR[dtype])
    for leaf, gradient in zip((x_ND, weight_VD, bias_V), gradients, strict=True):
        assert leaf is not None and leaf.grad is not None and leaf.grad.dtype == dtype
        error = (leaf.grad.double() - gradient).abs().max() / gradient.abs().max()
        assert error < LINEAR[dtype], error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_error_is_larger_than_that_of_the_plain_layer(way: str, dtype: torch.dtype) -> None:
    given = layer(64, dtype)
    x_ND, weight_VD, bias_V, target_N = given
    _, wanted = reference(given, LossOptions(), "mean", torch.ones((), device=DEVICE))
    # Rounding errors of other sums of the same length; one that cuts off instead is twice as large, and biased.
    slack = 3.0 if way == "kernel" and dtype == torch.bfloat16 and interpreted() else 1.25
    leaves = [leaf for leaf in (x_ND, weight_VD, bias_V) if leaf is not None]
    plain = torch.autograd.grad(F.cross_entropy(F.linear(x_ND, weight_VD, bias_V).float(), target_N), leaves)
    loss = linear_cross_entropy(x_ND, weight_VD, target_N, bias=bias_V, chunk_bytes=1)
    for found, other, exact in zip(torch.autograd.grad(loss, leaves), plain, wanted, strict=True):
        assert (found.double() - exact).norm() <= slack * (other.double() - exact).norm()


@pytest.mark.parametrize("which", range(3))
def test_only_the_gradients_that_are_wanted_are_computed(way: str, which: int) -> None:
    leaves = [leaf.detach() for leaf in layer(10, torch.float32)[:3] if leaf is not None]
    leaves[which].requires_grad_()
    loss = linear_cross_entropy(leaves[0], leaves[1], layer(10, torch.float32)[3], bias=leaves[2], chunk_bytes=1)
    loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == [each == which for each in range(3)]


def test_a_softcap_bounds_the_logits(way: str) -> None:
    given = layer(10, torch.float32, bias=False)
    x_ND, weight_VD, _, target_N = given
    loss = linear_cross_entropy(x_ND, weight_VD, target_N, softcap=2.0, chunk_bytes=1)
    loss.backward()
    wanted, gradients = reference(given, LossOptions(softcap=2.0), "mean", torch.ones((), device=DEVICE))
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight_VD.grad.double(), gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 6])
def test_without_any_target_the_mean_is_nan_and_the_gradients_are_zero(
    way: str, num_rows: int, dtype: torch.dtype
) -> None:
    x_ND, weight_VD, bias_V, target_N = layer(num_rows, dtype)
    loss = linear_cross_entropy(x_ND, weight_VD, target_N.fill_(-100), bias=bias_V)
    loss.backward()
    assert loss.isnan() and F.cross_entropy(x_ND @ weight_VD.t(), target_N).isnan()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (x_ND, weight_VD, bias_V) if leaf is not None)


def test_inputs_may_be_views(way: str) -> None:
    x_ND, weight_VD, _, target_N = layer(10, torch.float32, bias=False)
    wanted = torch.autograd.grad(linear_cross_entropy(x_ND, weight_VD, target_N), [x_ND, weight_VD])
    with torch.no_grad():
        views = (x_ND.t().contiguous().t(), weight_VD.t().contiguous().t())
    for view in views:
        assert not view.requires_grad_().is_contiguous()
    targets = torch.stack([target_N, target_N], 1)[:, 0]
    found = torch.autograd.grad(linear_cross_entropy(*views, targets), views)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_can_be_walked_again(way: str, reduction: Any) -> None:
    x_ND, weight_VD, bias_V, target_N = layer(10, torch.float32)
    leaves = [leaf for leaf in (x_ND, weight_VD, bias_V) if leaf is not None]
    loss = linear_cross_entropy(x_ND, weight_VD, target_N, bias=bias_V, reduction=reduction, chunk_bytes=1).sum()
    first = torch.autograd.grad(loss / 4, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, leaves)
    for one, before, other in zip(first, kept, second, strict=True):
        assert torch.equal(one, before), "a later backward changed gradients that were handed out"
        torch.testing.assert_close(4 * one, other, rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_without_gradients_there_is_only_a_loss(way: str) -> None:
    x_ND, weight_VD, bias_V, target_N = layer(10, torch.float32)
    wanted = linear_cross_entropy(x_ND, weight_VD, target_N, bias=bias_V)
    with torch.no_grad():
        loss = linear_cross_entropy(x_ND, weight_VD, target_N, bias=bias_V, chunk_bytes=1)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=0)


def test_autocast_casts_what_a_linear_layer_casts(way: str) -> None:
    x_ND, weight_VD, bias_V, target_N = layer(32, torch.float32)
    leaves = [leaf for leaf in (x_ND, weight_VD, bias_V) if leaf is not None]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        plain = F.cross_entropy(F.linear(x_ND, weight_VD, bias_V), target_N)
        loss = linear_cross_entropy(x_ND, weight_VD, target_N, bias=bias_V, chunk_bytes=1)
    assert loss.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=0)
    found, wanted = (torch.autograd.grad(each, leaves) for each in (loss, plain))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=LINEAR[torch.bfloat16] * other.abs().max().item())


def test_fp16_gradients_survive_a_mean_over_many_rows() -> None:
    """1/N of a small probability is below fp16's range until the loss scale comes."""
    num_rows, num_classes, scale = 5000, 33, 2.0**14
    torch.manual_seed(0)
    x_ND = torch.randn(num_rows, 4, device=DEVICE).half()
    weight_VD = torch.randn(num_classes, 4, device=DEVICE).half().requires_grad_()
    target_N = torch.randint(num_classes, (num_rows,), device=DEVICE)
    (linear_cross_entropy(x_ND, weight_VD, target_N, chunk_bytes=1) * scale).backward()
    given = (x_ND, weight_VD, None, target_N)
    _, (_, wanted) = reference(given, LossOptions(), "mean", torch.tensor(scale, device=DEVICE))
    assert weight_VD.grad is not None and weight_VD.grad.isfinite().all()
    assert (weight_VD.grad.double() - wanted).norm() < 2e-3 * wanted.norm()


def test_the_logits_never_exist_as_a_whole() -> None:
    """Counted on the sizes that operations put out: a chunk at most, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.numel = max(self.numel, leaf.numel())
            return result

    num_rows, num_classes = 4096, 64
    x_ND = torch.randn(num_rows, 4, device=DEVICE, requires_grad=True)
    weight_VD = torch.randn(num_classes, 4, device=DEVICE, requires_grad=True)
    target_N = torch.randint(num_classes, (num_rows,), device=DEVICE)
    with Largest() as largest:
        linear_cross_entropy(x_ND, weight_VD, target_N, chunk_bytes=1).backward()
    assert largest.numel == 1024 * num_classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_ND": torch.zeros(2, 3, 4)}, "flatten the rows"),
        ({"target_N": torch.zeros(3, dtype=torch.int64)}, "flatten the rows"),
        ({"bias": torch.zeros(4)}, "expected a bias"),
        ({"target_N": torch.zeros(2)}, "class indices"),
        ({"weight_VD": torch.zeros(5, 3, dtype=torch.float64)}, "one dtype"),
        ({"reduction": "average"}, "reduction"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x_ND": torch.zeros(2, 3),
        "weight_VD": torch.zeros(5, 3),
        "target_N": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))
