"""Kernels in unmodified models: what is replaced, that it computes the same, and that nothing else changes.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: the fixture `kernels` lets them. fp32 tolerances:
1e-5 of the largest value for loss and gradients, because kernels add in another order.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import activations

from lorica.config.features import KernelOp
from lorica.kernels import runtime
from lorica.ops import forwards
from lorica.ops.inject import BEST, Report, inject, undo
from lorica.ops.linear_cross_entropy import LazyHead
from lorica.ops.recognise import Match, Mismatch, recognise
from lorica.ops.swap import Swapped
from tests.harness import Ranks
from tests.huggingface_models import DECODER, FAMILIES, Batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(not runtime.available(), reason="Triton is not installed")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Let kernels take the tensors of this machine; counts the calls of each op."""
    calls: Counter[str] = Counter()
    whole = forwards.kernel

    def counted(library: str, op: str) -> Callable[..., Any]:
        calls[op] += 1
        return whole(library, op)

    monkeypatch.setattr(forwards, "kernel", counted)
    if DEVICE == "cpu":
        monkeypatch.setattr(forwards, "fused", lambda x: x.dtype is not torch.float64)
    yield calls


def model_of(family: str) -> Any:
    return FAMILIES[family].model().to(DEVICE)


def batch_of(family: str, index: int = 0) -> Batch:
    return {name: value.to(DEVICE) for name, value in FAMILIES[family].batch(index).items()}


def loss_and_gradients(model: Any, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """What differs by more than the tolerance, relative to the largest gradient of all (some are rounding only)."""
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for name, value in wanted.items() if name != "loss")
    errors = {
        name: float((found[name] - wanted[name]).abs().max())
        / (float(wanted[name].abs()) if name == "loss" else largest)
        for name in wanted
    }
    return {name: error for name, error in errors.items() if error > TOLERANCE}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Every bit; on a GPU, where attention adds up its gradients in any order, within the tolerance."""
    if DEVICE == "cuda":
        return not differences(found, wanted)
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


# Whole models ---------------------------------------------------------------------------------------------------------

LLAMA = (
    "kernels: 5 LlamaRMSNorm -> lorica rms_norm, 2 LlamaMLP -> lorica swiglu, 2 LlamaAttention -> lorica rotary, "
    "lm_head -> lorica linear_cross_entropy"
)
EXPECTED = {
    "llama": LLAMA,
    "llama, tied": LLAMA,
    "gpt2": "kernels: 5 LayerNorm -> lorica layer_norm, 2 NewGELUActivation -> lorica gelu, "
    "lm_head -> lorica linear_cross_entropy",
    "bert": "kernels: 6 LayerNorm -> lorica layer_norm, 3 GELUActivation -> lorica gelu, "
    "decoder -> lorica linear_cross_entropy",
}
families = pytest.mark.parametrize("family", EXPECTED)


@families
def test_a_model_computes_the_same_with_kernels(family: str, kernels: Counter[str]) -> None:
    model = model_of(family)
    wanted = loss_and_gradients(model, batch_of(family))
    report = inject(model)
    found = loss_and_gradients(model, batch_of(family))
    assert set(kernels) == {entry.op for entry in report.replaced} - {"linear_cross_entropy"}
    assert not differences(found, wanted)


@pytest.mark.parametrize("family", ["qwen3-moe", "t5", "vit", "llama, lora", "llama, reentrant checkpointing"])
def test_so_do_models_that_are_not_named_anywhere(family: str, kernels: Counter[str]) -> None:
    model = model_of(family)
    wanted = loss_and_gradients(model, batch_of(family))
    assert inject(model).replaced
    assert not differences(loss_and_gradients(model, batch_of(family)), wanted)
    assert kernels


@families
def test_the_report_counts_what_was_replaced(family: str) -> None:
    model = model_of(family)
    report = inject(model)
    assert str(report) == EXPECTED[family]
    assert len(report.replaced) == sum(isinstance(module, (Swapped, LazyHead)) for module in model.modules())
    assert {entry.name for entry in report.replaced} <= dict(model.named_modules()).keys()


@families
def test_parameters_keep_their_identity_and_their_names(family: str) -> None:
    model = model_of(family)
    parameters, keys = dict(model.named_parameters(remove_duplicate=False)), list(model.state_dict())
    modules = dict(model.named_modules())
    inject(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in parameters)
    assert list(model.state_dict()) == keys
    assert all(module is modules[name] for name, module in model.named_modules())
    model.load_state_dict(FAMILIES[family].model().state_dict())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_gives_the_same_tokens(family: str, kernels: Counter[str]) -> None:
    model = model_of(family).eval()
    prompt = batch_of(family)["input_ids"][:, :4]
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)
    inject(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)
    assert kernels


def _deep(model: Any) -> Any:
    return copy.deepcopy(model)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@families
@pytest.mark.parametrize("again", [_deep, _pickled, _saved])
def test_a_copied_or_pickled_model_keeps_its_kernels(family: str, again: Callable[[Any], Any]) -> None:
    model = model_of(family)
    inject(model)
    twin = again(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in twin.named_modules()} == kinds
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys() and not any(ours[name] is theirs[name] for name in ours)
    assert torch.equal(twin(**batch_of(family)).loss, model(**batch_of(family)).loss)
    assert undo(twin) > 0 and not any(isinstance(module, Swapped) for module in twin.modules())
    assert any(isinstance(module, Swapped) for module in model.modules())


@families
def test_undo_gives_back_the_model_that_was(family: str) -> None:
    model = model_of(family)
    wanted, looks = loss_and_gradients(model, batch_of(family)), repr(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    report = inject(model)
    assert repr(model) != looks
    assert undo(model) == len(report.replaced)
    assert {name: type(module) for name, module in model.named_modules()} == kinds and repr(model) == looks
    assert same(loss_and_gradients(model, batch_of(family)), wanted)
    assert undo(model) == 0


def test_another_model_of_the_process_does_not_change(kernels: Counter[str]) -> None:
    other, model = model_of("llama"), model_of("llama")
    file = importlib.import_module(type(model).__module__)
    before = dict(vars(file))
    kinds = {name: type(module) for name, module in other.named_modules()}
    inject(model)
    assert {name: type(module) for name, module in other.named_modules()} == kinds
    assert dict(vars(file)) == before
    other(**batch_of("llama"))
    assert not kernels


def test_injecting_twice_changes_nothing_more() -> None:
    model = model_of("llama")
    inject(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    again = inject(model)
    assert not again.replaced and not again.kept
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_random_numbers_are_left_as_they_are() -> None:
    model = model_of("llama")
    before = torch.get_rng_state()
    inject(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_neither_read_nor_moved() -> None:
    """Under zero.Init they are sharded, on the meta device they have no values."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    assert len(inject(model).replaced) == 10
    assert all(param.is_meta for param in model.parameters())


def test_hooks_stay_and_classes_keep_their_names() -> None:
    model = model_of("llama")
    seen: list[str] = []
    model.model.norm.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    inject(model)
    model(**batch_of("llama"))
    assert seen == ["LlamaRMSNorm"]
    assert "LlamaRMSNorm[lorica rms_norm]" in repr(model)


def test_without_a_device_for_kernels_a_model_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "fused", lambda x: False)
    model = model_of("llama")
    wanted = loss_and_gradients(model, batch_of("llama"))
    inject(model, ["rms_norm", "swiglu", "rotary"])
    assert same(loss_and_gradients(model, batch_of("llama")), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_compile_in_one_piece(family: str) -> None:
    """Inside torch.compile the modules run their own forward, which the compiler fuses itself."""
    model = model_of(family)
    wanted = loss_and_gradients(model, batch_of(family))
    inject(model, "auto" if family == "gpt2" else ["rms_norm", "swiglu", "rotary"])
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    for block in blocks:
        block.compile(backend="eager", fullgraph=True)
    assert not differences(loss_and_gradients(model, batch_of(family)), wanted)
    torch._dynamo.reset()


def test_running_statistics_of_a_norm_do_not_change() -> None:
    """A forward may change buffers: a norm that has some is not tried at all."""
    norm = nn.BatchNorm1d(4)
    before = copy.deepcopy(norm.state_dict())
    inject(nn.Sequential(norm))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


# What is recognised ---------------------------------------------------------------------------------------------------


def rms_class(name: str, formula: Callable[[Any, Tensor], Tensor], **attributes: Any) -> nn.Module:
    """A module called `name` with one weight and a forward that this process has never seen."""

    def __init__(self: Any) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(16))
        vars(self).update(attributes)

    forward = lambda self, x: formula(self, x)  # noqa: E731
    made: nn.Module = type(name, (nn.Module,), {"__init__": __init__, "forward": forward})()
    return made


class LayerNorm(nn.Module):
    """As nanoGPT has it: the bias is optional, epsilon is in the code."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.bias = nn.Parameter(torch.zeros(16)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-6)


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def from_models(family: str, name: str, **config: Any) -> nn.Module:
    file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module: nn.Module = getattr(file, name)(**config)
    return module


SAME: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "nn.LayerNorm": (lambda: nn.LayerNorm(16, eps=1e-3), "layer_norm", {"eps": 1e-3}),
    "nn.LayerNorm without bias": (lambda: nn.LayerNorm(16, bias=False), "layer_norm", {"eps": 1e-5}),
    "nanoGPT's LayerNorm": (lambda: LayerNorm(bias=True), "layer_norm", {"eps": 1e-6}),
    "nanoGPT's LayerNorm without bias": (lambda: LayerNorm(bias=False), "layer_norm", {"eps": 1e-6}),
    "Cohere": (lambda: from_models("cohere", "CohereLayerNorm", hidden_size=16), "layer_norm", {"eps": 1e-5}),
    "nn.RMSNorm": (
        lambda: nn.RMSNorm(16, eps=1e-4),
        "rms_norm",
        {"eps": 1e-4, "offset": 0.0, "cast_before_weight": False},
    ),
    "nn.RMSNorm, default epsilon": (
        lambda: nn.RMSNorm(16),
        "rms_norm",
        {"eps": torch.finfo(torch.float32).eps, "offset": 0.0, "cast_before_weight": False},
    ),
    "Llama": (
        lambda: from_models("llama", "LlamaRMSNorm", hidden_size=16, eps=1e-5),
        "rms_norm",
        {"eps": 1e-5, "offset": 0.0, "cast_before_weight": True},
    ),
    "Mistral": (
        lambda: from_models("mistral", "MistralRMSNorm", hidden_size=16),
        "rms_norm",
        {"eps": 1e-6, "offset": 0.0, "cast_before_weight": True},
    ),
    "Qwen 2": (
        lambda: from_models("qwen2", "Qwen2RMSNorm", hidden_size=16),
        "rms_norm",
        {"eps": 1e-6, "offset": 0.0, "cast_before_weight": True},
    ),
    "Gemma": (
        lambda: from_models("gemma", "GemmaRMSNorm", dim=16),
        "rms_norm",
        {"eps": 1e-6, "offset": 1.0, "cast_before_weight": False},
    ),
    "Gemma 2": (
        lambda: from_models("gemma2", "Gemma2RMSNorm", dim=16),
        "rms_norm",
        {"eps": 1e-6, "offset": 1.0, "cast_before_weight": False},
    ),
    "Olmo 2": (
        lambda: from_models("olmo2", "Olmo2RMSNorm", hidden_size=16),
        "rms_norm",
        {"eps": 1e-6, "offset": 0.0, "cast_before_weight": False},
    ),
    "T5": (
        lambda: from_models("t5", "T5LayerNorm", hidden_size=16),
        "rms_norm",
        {"eps": 1e-6, "offset": 0.0, "cast_before_weight": True},
    ),
    "an unknown RMSNorm with an epsilon in its code": (
        lambda: rms_class("MyRMSNorm", lambda self, x: normed(x, 1e-8) * self.weight),
        "rms_norm",
        {"eps": 1e-8, "offset": 0.0, "cast_before_weight": True},
    ),
    "nn.GELU": (lambda: nn.GELU(), "gelu", {"approximate": "none"}),
    "nn.GELU, tanh": (lambda: nn.GELU(approximate="tanh"), "gelu", {"approximate": "tanh"}),
    "NewGELU": (lambda: activations.NewGELUActivation(), "gelu", {"approximate": "tanh"}),
    "FastGELU": (lambda: activations.FastGELUActivation(), "gelu", {"approximate": "tanh"}),
    "GELU of transformers": (lambda: activations.GELUActivation(), "gelu", {"approximate": "none"}),
    "GELU by torch's tanh": (lambda: activations.PytorchGELUTanh(), "gelu", {"approximate": "tanh"}),
}


@pytest.mark.parametrize("name", SAME)
def test_a_module_is_recognised_by_what_it_computes(name: str) -> None:
    make, op, options = SAME[name]
    verdict = recognise(make())
    assert isinstance(verdict, Match), verdict
    assert (verdict.op, dict(verdict.options)) == (op, options)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_kernel_computes_the_same(name: str, dtype: torch.dtype, kernels: Counter[str]) -> None:
    """bf16: none is off by more than two steps. The norms of Hugging Face, which are composed of fp32 operations, agree
    in most bits, because the kernel rounds where they do."""
    make, op, _ = SAME[name]
    module = make().to(DEVICE, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(1 + 0.3 * torch.randn(param.shape, generator=generator))
    x = torch.randn(6, 16, generator=generator).to(DEVICE, dtype)
    wanted = module(x)
    assert inject(module).replaced
    found = module(x)
    assert kernels.total() == 1 and found.dtype == wanted.dtype
    step = 2.0**-7 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(found, wanted, rtol=2 * step, atol=step)  # the interpreter truncates, twice in Llama's
    if dtype is torch.bfloat16 and DEVICE == "cuda" and op == "rms_norm" and "nn." not in name:
        assert int((found == wanted).sum()) >= 0.95 * wanted.numel()


def gated(act: nn.Module, extra: bool = False) -> nn.Module:
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act_fn = act
            if extra:
                self.dropout = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    return MLP()


class Swapped_roles(nn.Module):
    """Gates what should be the product's other half."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def with_own_forward() -> nn.Module:
    module = nn.LayerNorm(16)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def rotary_attention(family: str, name: str, config: type[Any], **changes: Any) -> nn.Module:
    return from_models(family, name, config=config(**DECODER, **changes), layer_idx=0)


class GatedRMSNorm(nn.RMSNorm):
    """An RMSNorm with a gate, which its caller passes as well."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else super().forward(x) * F.silu(gate)


DIFFERENT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "LayerNorm over two dims": (lambda: nn.LayerNorm((4, 4)), "layer_norm", "one weight"),
    "LayerNorm without weight": (lambda: nn.LayerNorm(16, elementwise_affine=False), "layer_norm", "one weight"),
    "LayerNorm that scales twice": (
        lambda: type("LayerNorm", (nn.LayerNorm,), {"forward": lambda self, x: 2 * nn.LayerNorm.forward(self, x)})(16),
        "layer_norm",
        "something else",
    ),
    "RMSNorm that squares its weight": (
        lambda: rms_class("RMSNorm", lambda self, x: normed(x) * self.weight**2, eps=1e-6),
        "rms_norm",
        "something else",
    ),
    "RMSNorm with epsilon outside of the root": (
        lambda: rms_class(
            "RMSNorm", lambda self, x: self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6), eps=1e-6
        ),
        "rms_norm",
        "something else",
    ),
    "RMSNorm with another epsilon than its attribute says": (
        lambda: rms_class("RMSNorm", lambda self, x: normed(x, 1e-5) * self.weight, eps=1e-6),
        "rms_norm",
        "something else",
    ),
    "RMSNorm that stops a gradient": (
        lambda: rms_class("RMSNorm", lambda self, x: normed(x) * self.weight.detach(), eps=1e-6),
        "rms_norm",
        "something else",
    ),
    "RMSNorm that needs a GPU": (
        lambda: rms_class("RMSNorm", lambda self, x: normed(x).view(-1, 7), eps=1e-6),
        "rms_norm",
        "failed on small CPU tensors",
    ),
    "RMSNorm with a gate": (lambda: GatedRMSNorm(16), "rms_norm", "more than one tensor"),
    "QuickGELU": (lambda: activations.QuickGELUActivation(), "gelu", "something else"),
    "ClippedGELU": (lambda: activations.ClippedGELUActivation(-1, 1), "gelu", "something else"),
    "an MLP gated by GELU": (lambda: gated(nn.GELU()), "swiglu", "something else"),
    "an MLP with dropout": (lambda: gated(nn.SiLU(), extra=True), "swiglu", "holds more"),
    "an MLP that gates the other half": (lambda: Swapped_roles(), "swiglu", "something else"),
    "an instance with its own forward": (with_own_forward, "layer_norm", "forward of its own"),
    "interleaved rotary embedding": (
        lambda: rotary_attention("cohere", "CohereAttention", transformers.CohereConfig),
        "rotary",
        "something else",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_module_that_computes_something_else_is_left_alone_and_reported(name: str) -> None:
    make, op, why = DIFFERENT[name]
    module = make()
    verdict = recognise(module)
    assert isinstance(verdict, Mismatch), verdict
    assert verdict.op == op and why in verdict.why
    kind = type(module)
    report = inject(module)
    assert type(module) is kind
    assert f"not replaced: {kind.__name__} (no {op}: " in str(report) and why in str(report)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.BatchNorm1d(4),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.InstanceNorm1d(4, affine=True),
        nn.SiLU,
        nn.Identity,
    ],
)
def test_other_modules_are_not_spoken_of(make: Callable[[], nn.Module]) -> None:
    assert recognise(make()) is None
    assert inject(make()) == Report()


def test_partial_rotary_embeddings_fall_back_and_say_so(
    kernels: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    """StableLM turns a part of each head: its attention slices q and k itself, which the kernel takes as they are."""
    config = transformers.StableLmConfig(**DECODER, partial_rotary_factor=0.5)
    torch.manual_seed(0)
    model = transformers.StableLmForCausalLM(config).to(DEVICE)
    wanted = loss_and_gradients(model, batch_of("llama"))
    report = inject(model, ["rotary"])
    assert [entry.op for entry in report.replaced] == ["rotary", "rotary"]
    assert not differences(loss_and_gradients(model, batch_of("llama")), wanted)
    assert kernels["rotary"] == 2


def test_a_rotary_call_that_the_kernel_does_not_take_runs_the_models_own_function(
    kernels: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    own = importlib.import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    call = forwards._rotary_function(own, "lorica")
    q, k = torch.randn(2, 4, 6, 8, device=DEVICE), torch.randn(2, 2, 6, 8, device=DEVICE)
    angles = torch.randn(1, 6, 4, device=DEVICE).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    for found, wanted in (
        (call(q, k, cos, sin), own(q, k, cos, sin)),
        (call(q, k, cos, sin, unsqueeze_dim=1), own(q, k, cos, sin)),
        (
            call(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2),
            own(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2),
        ),
    ):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert kernels["rotary"] == 4 - 1
    with caplog.at_level("WARNING", logger="lorica"):
        for _ in range(2):
            call(q.double(), k.double(), cos, sin)  # not a tensor for kernels at all: no warning
            per_head = cos.unsqueeze(1).expand(1, 4, 6, 8)
            (ours, _), (theirs, _) = call(q, q, per_head, per_head, 0), own(q, q, per_head, per_head, 0)
            assert torch.equal(ours, theirs)
    assert [record.message for record in caplog.records if "not fused" in record.message] != []
    assert len([record for record in caplog.records if "not fused" in record.message]) == 1


# Choosing -------------------------------------------------------------------------------------------------------------


def test_the_configuration_and_the_table_know_the_same_ops() -> None:
    assert set(BEST) == set(KernelOp.__args__)  # type: ignore[attr-defined]
    for library, table in forwards.KERNELS.items():
        assert {op for op, order in BEST.items() if library in order} - {"linear_cross_entropy"} == set(table)


def test_a_list_restricts_what_is_replaced() -> None:
    model = model_of("llama")
    report = inject(model, ["rms_norm"])
    assert str(report) == "kernels: 5 LlamaRMSNorm -> lorica rms_norm"
    assert not isinstance(model.lm_head, LazyHead)


def test_ops_that_a_model_does_not_have_are_named() -> None:
    assert str(inject(model_of("gpt2"), ["swiglu", "gelu"])) == (
        "kernels: 2 NewGELUActivation -> lorica gelu; not in this model: swiglu"
    )


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'rmsnorm'"):
        inject(nn.Identity(), ["rmsnorm"])


def test_liger_must_be_there_to_be_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match=r"kernels\.library: .*Fix: pip install liger-kernel"):
        inject(nn.LayerNorm(4), library="liger")


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A stand-in for liger-kernel with the signatures of its functions; notes what each is called with."""
    calls: list[tuple[Any, ...]] = []

    def liger_rms_norm(
        X: Any, W: Any, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: Any = True
    ):  # type: ignore[no-untyped-def]
        calls.append(("rms_norm", eps, offset, casting_mode, in_place))
        return F.rms_norm(X, W.shape, W + offset, eps)

    def liger_layer_norm(X: Any, W: Any, B: Any, eps: float):  # type: ignore[no-untyped-def]
        calls.append(("layer_norm", eps))
        return F.layer_norm(X, W.shape, W, B, eps)

    def liger_swiglu(a: Any, b: Any):  # type: ignore[no-untyped-def]
        calls.append(("swiglu",))
        return F.silu(a) * b

    def liger_rope(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1):  # type: ignore[no-untyped-def]
        from lorica.ops.recognise import rotary_formula

        calls.append(("rotary",))
        return (*rotary_formula(q, k, cos, sin), cos, sin)

    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional")
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for function in (liger_rms_norm, liger_layer_norm, liger_swiglu, liger_rope):
        setattr(sys.modules[names[-1]], function.__name__, function)
    forwards.kernel.cache_clear()
    yield calls
    forwards.kernel.cache_clear()


def test_ligers_kernels_are_called_with_ligers_arguments(
    liger: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwards, "fused", lambda x: True)
    model = model_of("llama")
    wanted = loss_and_gradients(model, batch_of("llama"))
    report = inject(model, library="liger")
    assert not differences(loss_and_gradients(model, batch_of("llama")), wanted)
    assert set(liger) == {("rms_norm", 1e-6, 0.0, "llama", False), ("swiglu",), ("rotary",)}
    assert "lm_head (no linear_cross_entropy: this library" in str(report)
    assert "5 LlamaRMSNorm -> liger rms_norm" in str(report)


def test_what_liger_does_not_have_is_said_or_refused(liger: list[tuple[Any, ...]]) -> None:
    model = model_of("gpt2")
    assert "2 NewGELUActivation (no gelu: this library has no kernel for it)" in str(inject(model, library="liger"))
    with pytest.raises(ValueError, match=r"expected ops that liger has, got \['gelu'\]"):
        inject(model_of("gpt2"), ["gelu", "layer_norm"], library="liger")


def test_auto_takes_loricas_even_where_liger_is_installed(liger: list[tuple[Any, ...]]) -> None:
    assert {entry.library for entry in inject(model_of("llama")).replaced} == {"lorica"}


# Under the engine -----------------------------------------------------------------------------------------------------


def _train(family: str, stage: int, inject: Any, sharded: bool = False) -> tuple[list[float], list[str]]:
    """Losses of a few steps, and what the engine logged about kernels; `sharded`: built under zero.Init."""
    import logging

    import lorica

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lorica").addHandler(handler)
    logging.getLogger("lorica").setLevel(logging.INFO)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "lorica": {"units": {"min_numel": 1}},
        "kernels": {"inject": inject},
    }
    with lorica.zero.Init(config_dict_or_path=config, enabled=sharded):
        model = FAMILIES[family].model()
    engine, *_ = lorica.initialize(model=model, config=config)
    losses = []
    for step in range(3):
        batch = {name: value.to(engine.device) for name, value in FAMILIES[family].batch(step).items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    engine.destroy()
    logging.getLogger("lorica").removeHandler(handler)
    return losses, [line for line in said if line.startswith("kernels")]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("family", EXPECTED)
def test_the_engine_injects_before_it_builds_units(ranks: Callable[[int], Ranks], family: str, stage: int) -> None:
    """Two ranks with the same data: at stage 3 the head's weight is freed by the time that the loss is computed."""
    (wanted, nothing), _ = ranks(2).run(_train, family=family, stage=stage, inject=False)
    (found, said), (others, silent) = ranks(2).run(_train, family=family, stage=stage, inject="auto")
    assert found == others and found[0] == pytest.approx(wanted[0], rel=TOLERANCE)
    assert found == pytest.approx(wanted, rel=1e-4)  # AdamW makes a step even of a gradient that is rounding only
    (line,) = said
    assert not nothing and not silent and line.startswith(EXPECTED[family])
    assert ("no Triton kernel runs on cpu" in line) is (DEVICE == "cpu")


def test_a_model_that_was_built_sharded_is_recognised_as_well(ranks: Callable[[int], Ranks]) -> None:
    (wanted, _), _ = ranks(2).run(_train, family="llama", stage=3, inject="auto")
    (found, (line,)), _ = ranks(2).run(_train, family="llama", stage=3, inject="auto", sharded=True)
    assert line.startswith(LLAMA)
    if DEVICE == "cpu":  # on a GPU zero.Init draws the weights from the generator of that device
        assert found == pytest.approx(wanted, rel=TOLERANCE)
