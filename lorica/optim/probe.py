"""Finds out whether a torch optimizer is element-wise and how it keeps its state, by running it on small tensors.

Two runs of a few steps must agree in every bit: the class itself on a matrix, and the adapter's way (a throw-away copy
per step, on the halves of the flattened matrix). That refuses whatever looks at a row, a norm, the shape, another
parameter or a random number, and whatever keeps its state elsewhere than in `state[param]` and its param group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorica.optim.tiles import Tile
from lorica.optim.torch_optim import Scalars, StateShape, copy_of, step_once

SIDE = 16
NUMEL = SIDE * SIDE
HALF = NUMEL // 2  # 128: where a plane may be cut
NUM_STEPS = 3

_USE_ELEMENT_WISE = "AdamW, SGD, Lion, Adagrad, or another element-wise class"
INSTEAD = {
    torch.optim.LBFGS: (
        "evaluates the loss several times a step and looks at all parameters at once",
        _USE_ELEMENT_WISE,
    ),
    torch.optim.Adafactor: (
        "keeps row and column sums of matrices and clips by a parameter's norm",
        'Lion (half of the state) or "Lamb"',
    ),
    torch.optim.SparseAdam: ("takes sparse gradients only, and flat planes are dense", '"Adam"'),
}
if hasattr(torch.optim, "Muon"):
    INSTEAD[torch.optim.Muon] = ("updates whole matrices", 'the optimizer type "Muon", which takes all parameters')


def probe(template: torch.optim.Optimizer) -> StateShape:
    """Return how `template`'s class keeps its state; neither the template nor its parameters change.

    Raises:
        NotImplementedError: if the class is not element-wise; says what works instead.
        ValueError: if the template has already been stepped.
    """
    name = type(template).__name__
    for kind, (reason, instead) in INSTEAD.items():
        if isinstance(template, kind):
            raise refused(name, reason, instead)
    if callable(getattr(template, "train", None)) and callable(getattr(template, "eval", None)):
        raise refused(name, "rewrites the parameters in train() and eval(), which flat planes do not see")
    require_fresh(template)
    shapes = [_probe_group(template, group) for group in template.param_groups]
    if any(shape.moments != shapes[0].moments for shape in shapes):
        names = sorted({shape.moments for shape in shapes})
        raise refused(name, f"keeps other moments in one param group than in another: {names}")
    return shapes[0]


def refused(name: str, reason: str, instead: str = _USE_ELEMENT_WISE) -> NotImplementedError:
    """The error for an optimizer that flat planes cannot run."""
    return NotImplementedError(
        f"{name} cannot run on flat planes: expected an element-wise optimizer, but it {reason}. Fix: use {instead}."
    )


def require_fresh(template: torch.optim.Optimizer) -> None:
    """Raise ValueError if the optimizer has been stepped: its moments would be lost."""
    for state in template.state.values():
        stepped = float(state.get("step") or 0) > 0
        filled = any(
            isinstance(value, Tensor) and value.ndim > 0 and _constant(value) is None for value in state.values()
        )
        if stepped or filled:
            raise ValueError(
                f"{type(template).__name__}: expected an optimizer that has not been stepped, got one with moments, "
                "which would be lost. Fix: make it anew before initialize(), and resume with load_checkpoint()."
            )


def _probe_group(template: torch.optim.Optimizer, group: dict[str, Any]) -> StateShape:
    name = type(template).__name__
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    device = torch.device("cpu") if device.type == "meta" else device
    options = _with_rate({key: value for key, value in group.items() if key != "params"})
    start, grads = _numbers(device)
    try:
        with torch.no_grad():
            matrix, state, shape = _run_class(template, options, start, grads)
            flat, planes = _run_adapter(template, shape, options, start, grads)
    except NotImplementedError:
        raise
    except Exception as error:
        raise refused(name, f"failed on a small tensor ({type(error).__name__}: {error})") from error
    if torch.equal(matrix.view(-1), start):
        raise refused(name, "does not change the parameters of its param groups")
    same = [torch.equal(matrix.view(-1), flat), *(torch.equal(state[key].view(-1), planes[key]) for key in planes)]
    if not all(same):
        raise refused(name, "gives other numbers for a matrix than for its flattened halves")
    return shape


def _run_class(
    template: torch.optim.Optimizer, options: dict[str, Any], start: Tensor, grads: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor], StateShape]:
    """The class by itself on a matrix: the parameter, its moments, and the shape of its state."""
    parameter = nn.Parameter(start.clone().view(SIDE, SIDE), requires_grad=not options.get("differentiable", False))
    optimizer = copy_of(template, [{**options, "params": [parameter]}])
    constructed = _constructed_state(template)
    if constructed is not None:
        fills, scalars = constructed
        moments: dict[str, Any] = {key: torch.full_like(parameter, value) for key, value in fills.items()}
        optimizer.state[parameter] = {**moments, **_copied(scalars)}
    shape: StateShape | None = None
    for grad in grads:
        parameter.grad = grad.clone().view(SIDE, SIDE)
        type(optimizer).step(optimizer)
        shape = shape or _state_shape(type(template).__name__, optimizer.state[parameter], parameter)
    assert shape is not None, "NUM_STEPS > 0"
    if constructed is not None:
        shape = shape._replace(fills=constructed[0], first=Scalars(constructed[1], {}))
    final = _state_shape(type(template).__name__, optimizer.state[parameter], parameter)
    if final.moments != shape.moments:
        raise refused(type(template).__name__, "keeps other moments after its first step than later")
    return parameter.detach(), {key: optimizer.state[parameter][key] for key in shape.moments}, shape


def _run_adapter(
    template: torch.optim.Optimizer, shape: StateShape, options: dict[str, Any], start: Tensor, grads: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The adapter's way: each half of the flattened matrix, every step on a new copy of the optimizer."""
    master = start.clone()
    planes = {key: torch.full_like(master, (shape.fills or {}).get(key, 0.0)) for key in shape.moments}
    before = shape.first
    for grad in grads:
        own = grad.clone()
        for begin in (0, HALF):
            half = slice(begin, begin + HALF)
            tile = Tile(master[half], own[half], {key: plane[half] for key, plane in planes.items()}, options)
            after = step_once(template, tile, shape.moments, before)
        before = after
    return master, planes


def _state_shape(name: str, state: dict[str, Any], parameter: Tensor) -> StateShape:
    moments, scalars = [], {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            if value.dtype != parameter.dtype:
                raise refused(name, f"keeps {key!r} as {value.dtype}, where moments are {parameter.dtype}")
            moments.append(key)
        elif (
            value is None or isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        ):
            scalars[key] = value
        else:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise refused(name, f"keeps {key!r}, {what}, for a parameter of shape {tuple(parameter.shape)}")
    return StateShape(tuple(moments), _copied(scalars))


def _constructed_state(template: torch.optim.Optimizer) -> tuple[dict[str, float], dict[str, Any]] | None:
    """Fill values and scalars of the state that the class made in its constructor, from any one parameter."""
    for parameter, state in template.state.items():
        moments = {key: value for key, value in state.items() if getattr(value, "shape", None) == parameter.shape}
        fills = {key: _constant(value) for key, value in moments.items()}
        scalars = {key: value for key, value in state.items() if key not in moments}
        return {key: 0.0 if value is None else value for key, value in fills.items()}, _copied(scalars)
    return None


def _constant(value: Tensor) -> float | None:
    """The one value of all elements; None if they differ (an empty tensor: 0)."""
    if value.numel() == 0 or value.device.type == "meta":
        return 0.0
    first = value.flatten()[0]
    return float(first) if bool((value == first).all()) else None


def _copied(scalars: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in scalars.items()}


def _with_rate(options: dict[str, Any]) -> dict[str, Any]:
    """The same options with a learning rate that changes something: schedules often start at 0."""
    rate = options.get("lr")
    if rate is None or float(rate) != 0.0:
        return options
    return {**options, "lr": torch.full_like(rate, 1e-2) if isinstance(rate, Tensor) else 1e-2}


def _numbers(device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Start values and gradients of both signs, many magnitudes and some zeros; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-6, 2, NUMEL)
    start = torch.randn(NUMEL, generator=generator)
    grads = [torch.randn(NUMEL, generator=generator) * scale for _ in range(NUM_STEPS)]
    grads[1][::7] = 0.0
    return start.to(device), [grad.to(device) for grad in grads]
