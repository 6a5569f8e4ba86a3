"""The fused modules: torch's module on every device, and the kernels behind them where they run.

Where there is no GPU, the tests of the second half force the kernels, which are then interpreted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorica.kernels import runtime
from lorica.ops import BiasGELU, FusedLayerNorm, FusedRMSNorm, SwiGLU, modules
from tests.mechanism.kernel_checks import DEVICE, TOLERANCE, close, exact

SIZE = 48


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make modules call the kernels, also interpreted ones; the list says which were called."""
    pytest.importorskip("triton")
    from lorica.kernels import activation, norm

    if DEVICE == "cpu":
        monkeypatch.setattr(modules, "fused", lambda x: True)
    called: list[str] = []
    for file, names in ((norm, ("layer_norm", "rms_norm")), (activation, ("bias_gelu", "swiglu"))):
        for name in names:
            monkeypatch.setattr(file, name, _recorded(getattr(file, name), called))
    return called


def _recorded(function: Callable[..., Any], called: list[str]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        called.append(function.__name__)
        return function(*args, **kwargs)

    return record


def _filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(exact(*parameter.shape, seed=seed + 1))
    return module.to(DEVICE)


def _results(module: Callable[..., Any], parameters: list[nn.Parameter], *inputs: Tensor) -> list[Tensor]:
    """Results and gradients of parameters and inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = module(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    grads = [exact(*y.shape, dtype=y.dtype, seed=9) for y in outs]
    return [y.detach() for y in outs] + list(torch.autograd.grad(outs, [*parameters, *leaves], grads))


class AddNorm(nn.Module):
    """A norm behind a sum, in torch's words."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x + residual), x + residual


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "layer_norm": (lambda: FusedLayerNorm(SIZE), lambda: nn.LayerNorm(SIZE)),
    "layer_norm_without_bias": (lambda: FusedLayerNorm(SIZE, bias=False), lambda: nn.LayerNorm(SIZE, bias=False)),
    "layer_norm_bare": (
        lambda: FusedLayerNorm(SIZE, 1e-3, False), lambda: nn.LayerNorm(SIZE, 1e-3, False),
    ),
    "layer_norm_of_two_dims": (lambda: FusedLayerNorm((4, SIZE)), lambda: nn.LayerNorm((4, SIZE))),
    "rms_norm": (lambda: FusedRMSNorm(SIZE, 1e-6), lambda: nn.RMSNorm(SIZE, 1e-6)),
    "rms_norm_default_eps": (lambda: FusedRMSNorm(SIZE), lambda: nn.RMSNorm(SIZE)),
    "rms_norm_bare": (
        lambda: FusedRMSNorm(SIZE, elementwise_affine=False), lambda: nn.RMSNorm(SIZE, elementwise_affine=False),
    ),
    "rms_norm_of_two_dims": (lambda: FusedRMSNorm((4, SIZE)), lambda: nn.RMSNorm((4, SIZE))),
}  # fmt: skip


def _compare(case: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = (_filled(make().to(dtype)) for make in CASES[case])
    theirs.load_state_dict(ours.state_dict())
    x, residual = exact(3, 4, SIZE, dtype=dtype), exact(3, 4, SIZE, dtype=dtype, seed=4)
    both = list(ours.parameters()), list(theirs.parameters())
    got = _results(ours, both[0], x) + _results(ours, both[0], x, residual)
    wanted = _results(theirs, both[1], x) + _results(AddNorm(theirs), both[1], x, residual)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype is b.dtype
        close(a, b, tolerance)


# -- everywhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_that_of_torch(case: str, dtype: torch.dtype) -> None:
    _compare(case, dtype, 1e-5 if dtype is torch.float32 else 2.0**-7)  # torch rounds in its backward, too


def test_without_a_gpu_no_kernel_is_asked() -> None:
    assert not modules.fused(torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_kernel_takes_plain_tensors_of_a_known_dtype_on_a_gpu() -> None:
    x = torch.zeros(3, device=DEVICE)
    assert runtime.runs_on(x.device) and modules.fused(x) and modules.fused(nn.Parameter(x))
    assert not modules.fused(x.double()) and not modules.fused(x.cpu()) and not modules.fused(x[0])
    assert not modules.fused(torch.Tensor._make_subclass(type("Sub", (Tensor,), {}), x))


@pytest.mark.parametrize("case", CASES)
def test_constructor_repr_and_state_dict_are_those_of_torch(case: str) -> None:
    ours, theirs = (make() for make in CASES[case])
    assert isinstance(ours, type(theirs))
    assert theirs.extra_repr() in ours.extra_repr()
    state = theirs.state_dict()
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name])
    ours.load_state_dict(state, strict=True)


def test_gemma_starts_from_weight_zero() -> None:
    assert torch.equal(FusedRMSNorm(8, offset=1.0).weight, torch.zeros(8))
    assert FusedRMSNorm(8, device="meta").weight.is_meta
    assert FusedRMSNorm(8, dtype=torch.bfloat16).weight.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norms_of_hugging_face_with_their_roundings(dtype: torch.dtype) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = exact(64, SIZE, dtype=dtype)
    for theirs, options in (
        (LlamaRMSNorm(SIZE, 1e-5), {"cast_before_weight": True}),
        (Gemma2RMSNorm(SIZE, 1e-5), {"offset": 1.0}),
    ):
        theirs = _filled(theirs.to(dtype))
        ours = FusedRMSNorm(SIZE, 1e-5, dtype=dtype, device=DEVICE, **options)
        ours.load_state_dict(theirs.state_dict())
        got, wanted = ours(x), theirs(x)
        assert got.dtype is wanted.dtype
        if dtype is torch.bfloat16:  # the last bit of fp32 may carry a value over a rounding boundary, rarely
            assert (got == wanted).float().mean() > 0.98
        close(got.detach(), wanted.detach(), 1e-6 if dtype is torch.float32 else 2.0**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_bias_gelu_is_that_of_torch(dtype: torch.dtype, approximate: str) -> None:
    ours = _filled(BiasGELU(SIZE, approximate, dtype=dtype))
    gelu = nn.GELU(approximate)
    x, tolerance = exact(5, SIZE, dtype=dtype), 1e-5 if dtype is torch.float32 else 2.0**-7
    bias = ours.bias.detach().clone().requires_grad_()
    got = _results(ours, [ours.bias], x)
    for a, b in zip(got, _results(lambda x: gelu(x + bias), [bias], x), strict=True):
        close(a, b, tolerance)
    for a, b in zip(_results(lambda x: BiasGELU(None, approximate)(x, bias), [bias], x), got, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(_results(BiasGELU(None, approximate), [], x), _results(gelu, [], x), strict=True):
        close(a, b, tolerance)


def test_two_biases_are_refused() -> None:
    with pytest.raises(ValueError, match="bias is there twice"):
        BiasGELU(4)(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_that_of_torch(dtype: torch.dtype) -> None:
    gate, up = exact(5, SIZE, dtype=dtype), exact(5, SIZE, dtype=dtype, seed=1)
    wanted = _results(lambda gate, up: F.silu(gate) * up, [], gate, up)
    tolerance = 1e-5 if dtype is torch.float32 else 2.0**-7
    for a, b in zip(_results(SwiGLU(), [], gate, up), wanted, strict=True):
        close(a, b, tolerance)
    side_by_side = torch.cat((gate, up), -1)
    for a, b in zip(_results(SwiGLU(), [], side_by_side), (wanted[0], torch.cat(wanted[1:], -1)), strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_that_torch_gives(case: str, dtype: torch.dtype) -> None:
    ours, theirs = (_filled(make()) for make in CASES[case])
    x = exact(3, 4, SIZE, dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, wanted = ours(x), theirs(x)
    assert got.dtype is wanted.dtype
    close(got.detach(), wanted.detach(), 2.0**-8)


class Block(nn.Module):
    """A little of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = FusedLayerNorm(SIZE)
        self.up = nn.Linear(SIZE, 2 * SIZE, bias=False)
        self.act = BiasGELU(2 * SIZE)
        self.gated = SwiGLU()
        self.last = FusedRMSNorm(SIZE, 1e-6, cast_before_weight=True)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.last(self.gated(self.act(self.up(self.norm(x)))), x)
        return x + total


def test_a_compiled_block_has_no_graph_break() -> None:
    torch.compiler.reset()
    block = _filled(Block())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    x = exact(5, SIZE)
    parameters = list(block.parameters())
    got = _results(torch.compile(block, backend=backend, fullgraph=True), parameters, x)
    assert len(graphs) == 1
    for a, b in zip(got, _results(block, parameters, x), strict=True):
        close(a, b, 1e-4)


# -- with kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_by_its_kernel_is_that_of_torch(case: str, dtype: torch.dtype, kernels: list[str]) -> None:
    _compare(case, dtype, 1e-5 if dtype is torch.float32 else 2.0**-7)
    assert kernels == (["layer_norm"] if case.startswith("layer") else ["rms_norm"]) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_epsilon_is_that_of_torch(dtype: torch.dtype, kernels: list[str]) -> None:
    x = exact(9, SIZE, dtype=dtype) * 2.0**-12  # so small that epsilon decides
    ours, theirs = FusedRMSNorm(SIZE, dtype=dtype), nn.RMSNorm(SIZE, dtype=dtype)
    close(ours.to(DEVICE)(x).detach(), theirs.to(DEVICE)(x).detach(), TOLERANCE[dtype])
    assert kernels == ["rms_norm"]


def test_a_shape_that_does_not_fit_is_refused_by_torch(kernels: list[str]) -> None:
    for norm in (FusedLayerNorm(SIZE), FusedRMSNorm(SIZE)):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm.to(DEVICE)(exact(3, SIZE + 1))
    assert kernels == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_gives_the_same_under_checkpointing(reentrant: bool, kernels: list[str]) -> None:
    block, x = _filled(Block()), exact(5, SIZE)
    parameters = list(block.parameters())

    def grads(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(exact(*y.shape, seed=9))
        return [y.detach(), leaf.grad, *(parameter.grad.clone() for parameter in parameters)]

    plain = grads(block)
    assert kernels == ["layer_norm", "bias_gelu", "swiglu", "rms_norm"]
    again = grads(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert len(kernels) == 12
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_parameter_may_be_freed_between_forward_and_backward(kernels: list[str]) -> None:
    block, x = _filled(Block()), exact(5, SIZE).requires_grad_()
    parameters = [block.norm.weight, block.norm.bias, block.act.bias, block.last.weight]
    wanted = torch.autograd.grad(block(x).sum(), [x, *parameters])
    y = block(x).sum()
    values = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.untyped_storage().resize_(0)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.untyped_storage().resize_(value.untyped_storage().nbytes())
        parameter.data.copy_(value)
    got = torch.autograd.grad(y, [x, *parameters])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len(kernels) == 8


def test_without_gradients_the_result_is_the_same(kernels: list[str]) -> None:
    block, x = _filled(Block()), exact(5, SIZE)
    wanted = block(x)
    with torch.no_grad():
        y = block(x)
    with torch.inference_mode():
        z = block(x)
    assert wanted.requires_grad and not y.requires_grad and torch.equal(y, wanted.detach()) and torch.equal(z, y)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_module_on_another_device_than_the_current_one_works() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    block = _filled(Block()).to("cuda:1")
    assert torch.cuda.current_device() == 0
    block(exact(5, SIZE).to("cuda:1")).sum().backward()
    torch.cuda.synchronize(1)
