"""Linear layer and cross-entropy over chunks of rows, so that the logits never exist as a whole.

Owns the loop over chunks, the accumulation of gradients, and the autograd functions around them. What one block of
logits costs and yields is `cross_entropy.py` (or the formula, where Triton does not run); who calls it is not known
here.

    for each chunk of rows:   logits = x @ weight.T + bias      one matmul into one buffer that all chunks share
                              logits := d loss / d logits       in place
                              d x = d logits @ weight;  d weight += d logits.T @ x;  d bias += d logits.sum(0)

[Note: gradients in the forward] Reduced to one number, the loss has a gradient that is known but for a factor, so it is
computed while the logits are there, and backward multiplies by its argument. Nothing but these gradients is kept for
backward: the weight may be freed in between. A loss of each row ("none") has one factor per row, so backward computes
the logits again, and needs the input and the weight.

[Note: sums of chunks] With several chunks the weight's gradient is summed in fp32 and rounded once, at the end. On CUDA
the matmul adds into the fp32 sum itself (`out_dtype`). Elsewhere a chunk's product is rounded to bf16 before it is
added: an error of 2^-9 of that chunk's share, never of the running sum, which is what the final rounding costs anyway.
With one chunk there is nothing to sum, and the product is written in the weight's dtype. In fp16 the sum is always
fp32, and the division by the number of rows waits for backward, where the loss scale is known: p / N underflows, a sum
over all rows overflows.

Shape suffixes: N rows, D width, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.kernels.cross_entropy_formula import LossOptions, RowLosses, cross_entropy_formula_
from lorica.kernels.runtime import runs_on

Reduction = Literal["mean", "sum", "none"]
CHUNK_BYTES = 2**28
MIN_ROWS = 1024  # a matmul of fewer rows leaves a GPU idle
ROW_ALIGN = 128


@dataclass(frozen=True)
class Problem:
    """What is to be predicted from what; the logits have the dtype of `x_ND`, whatever the weight's is."""

    x_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    options: LossOptions
    chunk_bytes: int = CHUNK_BYTES

    @property
    def dtype(self) -> torch.dtype:
        """Of losses, and of the arithmetic between logits and gradients."""
        return torch.float64 if self.x_ND.dtype == torch.float64 else torch.float32

    @property
    def num_classes(self) -> int:
        """V."""
        return self.weight_VD.shape[0]

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return chunk_rows(self.x_ND.shape[0], self.num_classes, self.x_ND.element_size(), self.chunk_bytes)


class Wanted(NamedTuple):
    """Which gradients are to be computed."""

    x: bool
    weight: bool
    bias: bool


NOTHING = Wanted(False, False, False)


class Gradients(NamedTuple):
    """Gradients of input, weight and bias; None where none is wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Reduced(NamedTuple):
    """The loss [], and its gradients but for `factor` (None: 1)."""

    loss: Tensor
    gradients: Gradients
    factor: Tensor | None


# The public function --------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`cross_entropy(linear(x, weight, bias), target)` without ever holding the logits.

    Differentiable once, in x, weight and bias. Under autocast x is cast as a linear layer casts it. "mean" divides by
    the number of targets that are not ignored; without any it is NaN, as in torch, and the gradients are 0.

    Args:
        x_ND: bf16, fp16, fp32 or fp64. weight_VD, bias: [V, D] and [V], of the same dtype.
        target_N: integers, classes or `ignore_index`.
        z_loss: adds z_loss * (log sum exp)^2 to each row's loss.
        softcap: logits are softcap * tanh(logits / softcap); None: as they are.
        chunk_bytes: size of the logits that exist at a time, as long as that is at least 1024 rows.
    Returns:
        The loss in fp32 (fp64 for fp64): [], or [N] for reduction "none".
    Raises:
        ValueError: for shapes, dtypes or options that do not fit.
    """
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        x_ND = x_ND.to(torch.get_autocast_dtype(device))
    elif x_ND.dtype != weight_VD.dtype:
        raise ValueError(
            f"linear_cross_entropy: expected x and weight of one dtype, got {x_ND.dtype} and {weight_VD.dtype}. Fix: "
            "cast one of them, or use torch.autocast."
        )
    _check_shapes(x_ND, weight_VD, bias, target_N, reduction)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    function = _RowLoss if reduction == "none" else _ReducedLoss
    call = _Call(options, reduction, chunk_bytes, torch.is_grad_enabled())
    loss = function.apply(x_ND, weight_VD, bias, target_N.long(), call)
    assert isinstance(loss, Tensor)
    return loss


def _check_shapes(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, reduction: str) -> None:
    shapes = [tuple(t.shape) for t in (x_ND, weight_VD, target_N)]
    (rows, width, classes) = (target_N.numel(), weight_VD.shape[-1], weight_VD.shape[0])
    if shapes != [(rows, width), (classes, width), (rows,)]:
        raise ValueError(
            f"linear_cross_entropy: expected x [N, D], weight [V, D] and target [N], got {shapes}. Fix: flatten the "
            "rows, x.flatten(0, -2) and target.flatten()."
        )
    if bias_V is not None and tuple(bias_V.shape) != (classes,):
        raise ValueError(
            f"linear_cross_entropy: expected a bias [{classes}], got {tuple(bias_V.shape)}. Fix: one a class."
        )
    if target_N.is_floating_point() or target_N.dtype == torch.bool:
        raise ValueError(
            f"linear_cross_entropy: expected class indices, got a target of {target_N.dtype}. Fix: probabilities as "
            "targets need the logits, torch.nn.functional.cross_entropy."
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}. Fix: use one of them.')


# The loop over chunks -------------------------------------------------------------------------------------------------


def chunk_rows(num_rows: int, num_classes: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows of a chunk: equal chunks, as few as `chunk_bytes` allows, which is never less than `MIN_ROWS` rows."""
    most = max(MIN_ROWS, chunk_bytes // max(1, num_classes * itemsize) // ROW_ALIGN * ROW_ALIGN)
    if num_rows <= most:
        return max(1, num_rows)
    num_chunks = -(-num_rows // most)
    share = -(-num_rows // num_chunks)
    return min(most, -(-share // ROW_ALIGN) * ROW_ALIGN)


@torch.no_grad()
def losses_and_gradients(
    problem: Problem, *, scale: Tensor | None, wanted: Wanted, wide: bool = False
) -> tuple[Tensor, Gradients]:
    """The loss of each row, and the gradients of the sum of losses that are multiplied by `scale`.

    Args:
        scale: [] or [N]; needed for gradients only.
        wide: leave the gradients of weight and bias in the dtype of their sums.
    Returns:
        [N], and the gradients in the dtypes of input, weight and bias.
    """
    with torch.autocast(problem.x_ND.device.type, enabled=False):
        sums = _Sums(problem, wanted, wide)
        return _run_chunks(problem, sums, scale if any(wanted) else None), sums.result()


def _run_chunks(problem: Problem, sums: _Sums, scale: Tensor | None) -> Tensor:
    """The loss of each row; `sums` gets the gradients. The chunks' logits are gone when this returns."""
    num_rows, step = problem.x_ND.shape[0], problem.chunk_rows
    loss_N = problem.x_ND.new_empty(num_rows, dtype=problem.dtype)
    bias_V = None if problem.bias_V is None else problem.bias_V.to(problem.x_ND.dtype)
    block_NV = problem.x_ND.new_empty(min(step, num_rows), problem.num_classes)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        logits_NV = linear(problem.x_ND[rows], sums.weight_VD, bias_V, out=block_NV[: rows.stop - start])
        scale_N = scale[rows] if scale is not None and scale.dim() else scale
        loss_N[rows] = cross_entropy_(logits_NV, problem.target_N[rows], problem.options, scale_N).loss_N
        sums.add(rows, logits_NV)
    return loss_N


def linear(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out: Tensor) -> Tensor:
    """The logits, in `out`."""
    if bias_V is None:
        return torch.mm(x_ND, weight_VD.t(), out=out)
    return torch.addmm(bias_V, x_ND, weight_VD.t(), out=out)


def cross_entropy_(logits_NV: Tensor, target_N: Tensor, options: LossOptions, scale: Tensor | None) -> RowLosses:
    """The kernel where it runs, the formula elsewhere; both use `logits_NV` up."""
    if not runs_on(logits_NV.device) or logits_NV.dtype == torch.float64:
        return cross_entropy_formula_(logits_NV, target_N, options, scale)
    from lorica.kernels import cross_entropy

    return cross_entropy.cross_entropy_(logits_NV, target_N, options, scale)


class _Sums:
    """The gradients of the chunks, put together. See [Note: sums of chunks]."""

    def __init__(self, problem: Problem, wanted: Wanted, wide: bool) -> None:
        self._problem, self._wide = problem, wide
        self.weight_VD = weight_VD = problem.weight_VD.to(problem.x_ND.dtype)
        x_ND, dtype = problem.x_ND, problem.dtype
        whole = problem.chunk_rows >= x_ND.shape[0] and not wide and problem.weight_VD.dtype == x_ND.dtype
        self._x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format) if wanted.x else None
        make = weight_VD.new_empty if x_ND.shape[0] else weight_VD.new_zeros
        self._weight_sum = make(weight_VD.shape, dtype=x_ND.dtype if whole else dtype) if wanted.weight else None
        self._bias_sum = weight_VD.new_zeros(weight_VD.shape[0], dtype=dtype) if wanted.bias else None
        self._empty = True

    def add(self, rows: slice, grad_NV: Tensor) -> None:
        """Take what one chunk of the logits' gradient contributes."""
        if self._x_ND is not None:
            torch.mm(grad_NV, self.weight_VD, out=self._x_ND[rows])
        if self._weight_sum is not None:
            _add_product(self._weight_sum, grad_NV.t(), self._problem.x_ND[rows], first=self._empty)
        if self._bias_sum is not None:
            self._bias_sum += grad_NV.sum(0, dtype=self._bias_sum.dtype)
        self._empty = False

    def result(self) -> Gradients:
        """The gradients, rounded to the dtypes of the parameters unless they are to stay wide."""
        weight, bias, problem = self._weight_sum, self._bias_sum, self._problem
        if weight is not None and not self._wide:
            weight = weight.to(problem.weight_VD.dtype)
        if bias is not None and problem.bias_V is not None and not self._wide:
            bias = bias.to(problem.bias_V.dtype)
        return Gradients(self._x_ND, weight, bias)


def _add_product(sum_VD: Tensor, grad_VN: Tensor, x_ND: Tensor, *, first: bool) -> None:
    """`sum_VD` += `grad_VN` @ `x_ND`; the first product is written, not added."""
    as_wide = () if sum_VD.dtype == x_ND.dtype else (sum_VD.dtype,)
    if as_wide and (sum_VD.device.type != "cuda" or torch.version.hip is not None):
        product_VD = torch.mm(grad_VN, x_ND)
        sum_VD.copy_(product_VD) if first else sum_VD.add_(product_VD)
    elif first:
        torch.mm(grad_VN, x_ND, *as_wide, out=sum_VD)
    else:
        torch.addmm(sum_VD, grad_VN, x_ND, *as_wide, out=sum_VD)


# Reduced losses -------------------------------------------------------------------------------------------------------


def reduced(problem: Problem, reduction: Reduction, wanted: Wanted) -> Reduced:
    """The mean or the sum of the losses, with its gradients. See [Note: gradients in the forward].

    Args:
        reduction: "mean" or "sum".
    """
    one = problem.x_ND.new_ones((), dtype=problem.dtype)
    if reduction == "sum":
        loss_N, gradients = losses_and_gradients(problem, scale=one, wanted=wanted, wide=_is_narrow(problem))
        return Reduced(loss_N.sum(), gradients, None)
    count = (problem.target_N != problem.options.ignore_index).sum()
    share = one / count.clamp_min(1)
    late = _is_narrow(problem)
    loss_N, gradients = losses_and_gradients(problem, scale=one if late else share, wanted=wanted, wide=late)
    return Reduced(loss_N.sum() / count, gradients, share if late else None)


def _is_narrow(problem: Problem) -> bool:
    """Whether gradients may leave the range of the dtype before the loss scale is known."""
    return problem.x_ND.dtype == torch.float16


def finished(
    gradients: Gradients, dtypes: tuple[torch.dtype | None, ...], grad_output: Tensor, factor: Tensor | None
) -> Gradients:
    """The gradients times the gradient of the loss, in their dtypes; for backward. Uses `gradients` up if it can."""
    factor = grad_output if factor is None else grad_output * factor
    keep = torch._C._autograd._get_current_graph_task_keep_graph()  # another backward will need them as they are
    done = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if gradient is not None:
            gradient = _times(gradient.clone() if keep else gradient, factor).to(dtype)
        done.append(gradient)
    return Gradients(*done)


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor` *= `factor` [], without a rounded factor and without asking a device for it."""
    if tensor.device.type == "cpu":
        number = factor.item()
        return tensor if number == 1.0 else tensor.mul_(number)
    if runs_on(tensor.device) and tensor.dtype != torch.float64:
        from lorica.kernels import scale

        return scale.scale_(tensor, factor)
    return tensor.copy_(tensor.to(factor.dtype) * factor)


# Autograd -------------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What is no tensor."""

    options: LossOptions
    reduction: Reduction
    chunk_bytes: int
    wants_gradient: bool


class _ReducedLoss(torch.autograd.Function):
    """Mean or sum."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, call: _Call
    ) -> Tensor:
        problem = _problem(x_ND, weight_VD, bias_V, target_N, call)
        wanted = Wanted(*ctx.needs_input_grad[:3]) if call.wants_gradient else NOTHING
        loss, gradients, factor = reduced(problem, call.reduction, wanted)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x_ND, weight_VD, bias_V))
        ctx.save_for_backward(*gradients, factor)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        *gradients, factor = ctx.saved_tensors
        return *finished(Gradients(*gradients), ctx.dtypes, grad_output, factor), None, None


class _RowLoss(torch.autograd.Function):
    """A loss for each row."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, call: _Call
    ) -> Tensor:
        ctx.save_for_backward(x_ND, weight_VD, bias_V, target_N)
        ctx.call = call
        problem = _problem(x_ND, weight_VD, bias_V, target_N, call)
        return losses_and_gradients(problem, scale=None, wanted=NOTHING)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output_N: Tensor) -> Any:
        x_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        problem, wanted = _problem(x_ND, weight_VD, bias_V, target_N, ctx.call), Wanted(*ctx.needs_input_grad[:3])
        return *losses_and_gradients(problem, scale=grad_output_N, wanted=wanted)[1], None, None


def _problem(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, call: _Call) -> Problem:
    """Without a graph; `detach` is what asks an engine for a parameter that it has freed."""
    bias_V = None if bias_V is None else bias_V.detach()
    return Problem(x_ND.detach(), weight_VD.detach(), bias_V, target_N, call.options, call.chunk_bytes)
