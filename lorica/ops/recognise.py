"""Finds out what a module computes: names suggest, numbers decide. Replaces nothing.

Each candidate is run on small random CPU tensors against the formula that its name suggests, outputs and gradients: a
variant that this file has never heard of is taken if it computes the same, and left alone if it does not. A probe
stands in for the module, so that its own weights (large, on another device, or sharded) are neither read nor moved.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

TOLERANCE = 2e-5  # of the largest value: fp32 rounding stays below, erf and tanh GELU differ by 1e-4
ROTARY_NAME = "apply_rotary_pos_emb"
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
_MLP_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}

Options = dict[str, Any]
Formula = Callable[..., Tensor]


class Match(NamedTuple):
    """A module is the formula of `op` with these options."""

    op: str
    options: tuple[tuple[str, Any], ...] = ()


class Mismatch(NamedTuple):
    """A module looks like `op`, but is not, or not certainly."""

    op: str
    why: str


Verdict = Match | Mismatch


def recognise(module: nn.Module) -> Verdict | None:
    """What `module` computes; None: nothing that this file looks for."""
    for is_candidate, judge in _JUDGES:
        if is_candidate(module):
            verdict = judge(module)
            if isinstance(verdict, Match) and "forward" in vars(module):
                return Mismatch(verdict.op, "the instance has a forward of its own")
            return verdict
    return None


# Norms ----------------------------------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    """A weight, perhaps a bias, nothing else: a probe shares buffers, which a forward may change."""
    named = ("LayerNorm" if "bias" in module._parameters else "Norm") in type(module).__name__
    vectors = {"weight"} <= set(module._parameters) <= {"weight", "bias"}
    return named and vectors and not module._buffers and not module._modules


def _judge_norm(module: nn.Module) -> Verdict:
    """RMSNorm or LayerNorm: names are not to be trusted (T5's RMSNorm is called LayerNorm), a bias tells."""
    op = "rms_norm" if "RMSNorm" in type(module).__name__ else "layer_norm"
    weight = module._parameters["weight"]
    if weight is None or weight.dim() != 1:
        return Mismatch(op, "expected one weight per element of the last dim")
    eps = [{"eps": eps} for eps in _eps_of(module)]
    verdicts = [] if "bias" in module._parameters else [_judge_rms_norm(module, weight.numel(), eps)]
    if not any(isinstance(verdict, Match) for verdict in verdicts):
        verdicts.append(_judge(module, "layer_norm", _layer_norm, eps, _rows(weight.numel()), _vectors(module)))
    matches = [verdict for verdict in verdicts if isinstance(verdict, Match)]
    return matches[0] if matches else next((v for v in verdicts if v.op == op), verdicts[0])


def _judge_rms_norm(module: nn.Module, numel: int, eps: Sequence[Options]) -> Verdict:
    trials = [{**each, "offset": offset} for each in eps for offset in (0.0, 1.0)]
    verdict = _judge(module, "rms_norm", _rms_norm, trials, _rows(numel), _vectors(module))
    if isinstance(verdict, Mismatch):
        return verdict
    early = _casts_before_weight(module, numel, **dict(verdict.options))
    return Match("rms_norm", (*verdict.options, ("cast_before_weight", early)))


def _rows(numel: int) -> Tensor:
    """Rows so different in size that epsilon, and what is done with it, shows."""
    size = torch.tensor([1e-4, 1e-3, 1e-2, 1.0, 30.0], device="cpu").view(-1, 1)
    return size * (_random(5, numel) + 0.1)


def _vectors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module._parameters.items() if value is not None}


def _eps_of(module: nn.Module) -> list[float]:
    """Its own epsilon if it has one; else the usual ones, of which the numbers choose."""
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        return [torch.finfo(torch.float32).eps]
    for name in _EPS_NAMES:
        if isinstance(getattr(module, name, None), float):
            return [getattr(module, name)]
    return list(_USUAL_EPS)


def _layer_norm(x: Tensor, *, weight: Tensor, bias: Tensor | None = None, eps: float) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def _rms_norm(x: Tensor, *, weight: Tensor, eps: float, offset: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight + offset, eps)


def _casts_before_weight(module: nn.Module, numel: int, *, eps: float, offset: float) -> bool:
    """Whether a bf16 row is rounded before the weight multiplies it, or only after: which gives more equal bits."""
    x, weight = _random(32, numel).bfloat16(), (1 + 0.3 * _random(numel, seed=7)).bfloat16()
    with torch.no_grad():
        found = type(module).forward(_probe(module, {"weight": weight}, {}), x)
    row, wide = functional.rms_norm(x.float(), (numel,), None, eps), weight.float() + offset
    early, late = (row.bfloat16() * wide).bfloat16(), (row * wide).bfloat16()
    return int((found == early).sum()) > int((found == late).sum())


# Activations ----------------------------------------------------------------------------------------------------------


def _is_gelu(module: nn.Module) -> bool:
    return "GELU" in type(module).__name__ and not (module._parameters or module._buffers or module._modules)


def _judge_gelu(module: nn.Module) -> Verdict:
    trials = [{"approximate": "none"}, {"approximate": "tanh"}]
    return _judge(module, "gelu", functional.gelu, trials, 3 * _random(4, 64))


def _is_gated_mlp(module: nn.Module) -> bool:
    return {"gate_proj", "up_proj", "down_proj"} <= set(module._modules)


def _judge_gated_mlp(module: nn.Module) -> Verdict:
    act_fn = module._modules.get("act_fn")
    alone = set(module._modules) == _MLP_CHILDREN and not module._parameters and not module._buffers
    if not alone or act_fn is None or act_fn.state_dict():
        return Mismatch("swiglu", "it holds more, or something else, than gate_proj, up_proj, down_proj and act_fn")
    gate, up, down = (_Constant(_random(*shape, seed=seed)) for seed, shape in enumerate(((12, 8), (12, 8), (8, 12))))

    def formula(x: Tensor) -> Tensor:
        product: Tensor = down(functional.silu(gate(x)) * up(x))
        return product

    children = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": act_fn}
    return _judge(module, "swiglu", formula, [{}], _random(2, 3, 8, seed=3), children=children)


class _Constant(nn.Module):
    """A linear layer that is not trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


# Rotary embedding -----------------------------------------------------------------------------------------------------


def _calls_rotary(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and ROTARY_NAME in code.co_names


def _judge_rotary(module: nn.Module) -> Verdict:
    """The function that the forward of `module` looks up in its file: the usual one, with halves rotated?"""
    forward: Any = type(module).forward
    function: Any = forward.__globals__.get(ROTARY_NAME)
    parameters = _parameters_of(function)
    if parameters[:4] != ["q", "k", "cos", "sin"] or set(parameters[4:]) - {"position_ids", "unsqueeze_dim"}:
        return Mismatch("rotary", f"{ROTARY_NAME} takes other arguments than q, k, cos, sin, unsqueeze_dim")
    angles = _random(2, 5, 4).repeat(1, 1, 2)
    q, k, cos, sin = _random(2, 3, 5, 8, seed=1), _random(2, 1, 5, 8, seed=2), angles.cos(), angles.sin()
    try:
        same = _agree(lambda q, k: function(q, k, cos, sin), lambda q, k: rotary_formula(q, k, cos, sin), [q, k])
    except Exception as error:
        return _failed("rotary", error)
    return Match("rotary") if same else Mismatch("rotary", f"{ROTARY_NAME} computes something else")


def rotary_formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (i, i + D / 2) of the last dim; q [B, H, L, D], k [B, G, L, D], cos and sin [B, L, D].

    Source: Su et al. 2021 (arXiv:2104.09864), eq. 34, with the pairs of GPT-NeoX.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return rotated(q), rotated(k)


# The comparison -------------------------------------------------------------------------------------------------------


def _judge(
    module: nn.Module,
    op: str,
    formula: Formula,
    trials: Sequence[Options],
    x: Tensor,
    parameters: dict[str, Tensor] | None = None,
    children: dict[str, nn.Module] | None = None,
) -> Verdict:
    """The first options with which `formula` computes what a probe of `module` does.

    The probe has random parameters of the shapes of `parameters`, and `children` instead of its own.
    """
    forward = type(module).forward
    if len(_parameters_of(forward)) != 2:
        return Mismatch(op, "its forward takes more than one tensor")
    shapes = {name: value.shape for name, value in (parameters or {}).items()}
    values = [1 + 0.3 * _random(*shape, seed=seed) for seed, shape in enumerate(shapes.values(), start=7)]

    def probed(x: Tensor, *own: Tensor) -> Any:
        return forward(_probe(module, dict(zip(shapes, own, strict=True)), children or {}), x)

    for options in trials:

        def expected(x: Tensor, *own: Tensor, options: Options = options) -> Tensor:
            return formula(x, **dict(zip(shapes, own, strict=True)), **options)

        try:
            same = _agree(probed, expected, [x, *values])
        except Exception as error:
            return _failed(op, error)
        if same:
            return Match(op, tuple(options.items()))
    return Mismatch(op, "it computes something else")


def _failed(op: str, error: Exception) -> Mismatch:
    """Whatever a foreign forward raises on a probe is a reason to leave it alone, and is said."""
    return Mismatch(op, f"it failed on small CPU tensors ({type(error).__name__}: {str(error)[:100]})")


def _probe(module: nn.Module, parameters: dict[str, Tensor], children: dict[str, nn.Module]) -> nn.Module:
    """An object of the same class and attributes with other parameters and children."""
    probe = type(module).__new__(type(module))
    absent = {name: None for name, value in module._parameters.items() if value is None}
    vars(probe).update({**vars(module), "_parameters": absent, "_modules": dict(children)})
    vars(probe).update(parameters)  # plain tensors, through which the comparison differentiates
    return probe


def _agree(left: Callable[..., Any], right: Callable[..., Any], inputs: Iterable[Tensor]) -> bool:
    """Whether two functions have the same outputs and the same gradients with respect to all inputs."""
    found, wanted = (_with_gradients(function, inputs) for function in (left, right))
    return len(found) == len(wanted) and all(map(_close, found, wanted))


def _with_gradients(function: Callable[..., Any], inputs: Iterable[Tensor]) -> list[Tensor | None]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        result = function(*leaves)
        outputs = list(result) if isinstance(result, tuple) else [result]
        loss = torch.stack([(output * _random(*output.shape, seed=5)).sum() for output in outputs]).sum()
        return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def _close(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool((left - right).abs().max() <= TOLERANCE * right.abs().max())


def _random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of its own: torch's generator is left as it is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _parameters_of(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


_JUDGES: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Verdict]], ...] = (
    (_is_norm, _judge_norm),
    (_is_gated_mlp, _judge_gated_mlp),
    (_is_gelu, _judge_gelu),
    (_calls_rotary, _judge_rotary),
)
