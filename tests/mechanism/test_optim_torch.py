"""The adapter for torch's other optimizers and for client objects: the same bits as torch, however a plane is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.optim import SGD, Adagrad, Adam, FlatOptimizer, TorchOptimizer, from_client
from tests.mechanism.optim_planes import (
    make_plane,
    random_params,
    random_steps,
    relative_error,
    same_bits,
    train,
    train_torch,
)

SHAPES = {"w": (40, 30), "b": (7,), "big": (1000, 3), "scalar": ()}
PARAMS = random_params(SHAPES)
STEPS = random_steps(PARAMS, 4)

Make = Callable[[Any], torch.optim.Optimizer]


class KeepsStart(torch.optim.Optimizer):
    """A third-party class with an odd constructor, number-valued step and a state that starts from the parameter."""

    def __init__(self, model_params: Any, rate: float, pull: float) -> None:
        self.pull = pull
        super().__init__(model_params, {"rate": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["num_calls"] = group.get("num_calls", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["start"] = p.clone()
                state["step"] += 1
                rate = group["rate"] / (state["step"] + group["num_calls"])
                p.add_(p.grad, alpha=-rate).lerp_(state["start"], self.pull)


ELEMENT_WISE: dict[str, Make] = {
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, lr=0.5),
    "Adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2, weight_decay=0.1),
    "ASGD": lambda ps: torch.optim.ASGD(ps, lr=1e-2, lambd=0.1, t0=2),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=1e-2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.9, centered=True),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=1e-2),
    "Adam amsgrad": lambda ps: torch.optim.Adam(ps, lr=1e-2, amsgrad=True),
    "AdamW maximize": lambda ps: torch.optim.AdamW(ps, lr=1e-2, maximize=True),
    "Adam differentiable": lambda ps: torch.optim.Adam(ps, lr=1e-2, differentiable=True),
    "Adam fused amsgrad": lambda ps: torch.optim.Adam(ps, lr=1e-2, amsgrad=True, fused=True),
    "SGD maximize": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, maximize=True),
    "Adagrad maximize": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, initial_accumulator_value=0.5, maximize=True),
    "third party": lambda ps: KeepsStart(ps, 0.1, 0.2),
}


def _adapted(make: Make) -> FlatOptimizer:
    flat = from_client(make([nn.Parameter(value.clone()) for value in PARAMS.values()]))
    assert isinstance(flat, TorchOptimizer)
    return flat


def _groups(flat: FlatOptimizer) -> list[dict[str, Any]]:
    assert isinstance(flat, TorchOptimizer)
    return flat.template.param_groups


def _oracle(make: Make, steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def without_graph(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = make(parameters)
        if optimizer.param_groups[0].get("differentiable"):
            for parameter in parameters:
                parameter.requires_grad_(False)
        return optimizer

    return train_torch(without_graph, PARAMS, steps)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_the_adapter_gives_the_bits_of_torch(name: str, world_size: int) -> None:
    make = ELEMENT_WISE[name]
    flat = _adapted(make)
    got = train(flat, PARAMS, STEPS, groups=_groups(flat), world_size=world_size)
    if name == "Adam fused amsgrad":  # the kernel rounds the last few elements of an odd-sized tensor differently
        assert relative_error(got, _oracle(make, STEPS)) < 1e-7
    else:
        assert same_bits(got, _oracle(make, STEPS))


@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_the_tile_size_changes_no_bit_in_the_adapter(name: str) -> None:
    make = ELEMENT_WISE[name]
    whole, tiled = _adapted(make), _adapted(make)
    assert isinstance(tiled, TorchOptimizer)
    tiled.tile_numel = 1024
    wanted = train(whole, PARAMS, STEPS, groups=_groups(whole))
    assert same_bits(train(tiled, PARAMS, STEPS, groups=_groups(tiled)), wanted)


def test_the_probe_finds_the_names_of_the_moments() -> None:
    assert _adapted(ELEMENT_WISE["Adam amsgrad"]).moments == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert _adapted(ELEMENT_WISE["NAdam"]).moments == ("exp_avg", "exp_avg_sq")
    assert _adapted(ELEMENT_WISE["RMSprop"]).moments == ("square_avg", "momentum_buffer", "grad_avg")
    assert _adapted(ELEMENT_WISE["third party"]).moments == ("start",)


def test_the_moments_lie_in_the_planes() -> None:
    flat = _adapted(ELEMENT_WISE["Adamax"])
    plane = make_plane(flat, PARAMS, _groups(flat))
    parameter = nn.Parameter(PARAMS["w"].clone())
    optimizer = torch.optim.Adamax([parameter], lr=1e-2, weight_decay=0.1)
    for number, grads in enumerate(STEPS, start=1):
        plane.set_grads(grads)
        flat.update(plane.segments, coef=1.0, step=number)
        parameter.grad = grads["w"].clone()
        optimizer.step()
    slot = next(slot for slot in plane.layout.slots if slot.name == "w")
    for name in ("exp_avg", "exp_inf"):
        assert torch.equal(
            plane.moments[name][slot.start : slot.stop].view(slot.shape), optimizer.state[parameter][name]
        )


def test_neither_probe_nor_update_touches_the_clients_state_and_parameters() -> None:
    parameters = [nn.Parameter(value.clone()) for value in PARAMS.values()]
    client = torch.optim.NAdam(parameters, lr=1e-2)
    before = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in client.param_groups])
    train(from_client(client), PARAMS, STEPS, groups=client.param_groups)
    assert len(client.state) == 0
    assert same_bits(dict(enumerate(parameters)), dict(enumerate(PARAMS.values())))  # type: ignore[arg-type]
    assert [{k: v for k, v in group.items() if k != "params"} for group in client.param_groups] == before


@pytest.mark.parametrize("name", ["RMSprop", "third party"])
def test_a_schedule_on_the_clients_object_reaches_the_update(name: str) -> None:
    key = "rate" if name == "third party" else "lr"

    def halved(groups: list[dict[str, Any]], step: int) -> None:
        for group in groups:
            group[key] = 0.1 * 0.5**step

    flat = _adapted(ELEMENT_WISE[name])
    groups = _groups(flat)
    got = train(flat, PARAMS, STEPS, groups=groups, before_step=lambda step: halved(groups, step))
    parameters = [nn.Parameter(PARAMS["w"].clone())]
    plain = ELEMENT_WISE[name](parameters)
    for number, grads in enumerate(STEPS, start=1):
        halved(plain.param_groups, number)
        parameters[0].grad = grads["w"].clone()
        plain.step()
    assert torch.equal(got["w"], parameters[0].detach())


def test_torchs_scheduler_objects_work_on_the_clients_object() -> None:
    client = torch.optim.RMSprop([nn.Parameter(value.clone()) for value in PARAMS.values()], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(client, lambda step: 0.0 if step == 0 else 1.0)
    flat = from_client(client)
    assert same_bits(train(flat, PARAMS, STEPS[:1], groups=client.param_groups), PARAMS)
    client.step()
    schedule.step()
    assert client.param_groups[0]["lr"] == 1e-2


def _resume(flat: FlatOptimizer, planes: Any, other: FlatOptimizer, groups: list[dict[str, Any]]) -> Any:
    """A plane of `other` with the master and the moments of `planes`."""
    copied = make_plane(other, PARAMS, groups)
    copied.master.copy_(planes.master)
    for name, moment in planes.moments.items():
        copied.moments[name].copy_(moment)
    return copied


def _run(flat: FlatOptimizer, plane: Any, steps: Iterable[tuple[int, dict[str, Tensor]]]) -> None:
    for number, grads in steps:
        plane.set_grads(grads)
        flat.update(plane.segments, coef=1.0, step=number)


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "RMSprop", "Rprop", "third party"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name: str) -> None:
    numbered = list(enumerate(STEPS, start=1))
    flat, other = _adapted(ELEMENT_WISE[name]), _adapted(ELEMENT_WISE[name])
    plane = make_plane(flat, PARAMS, _groups(flat))
    _run(flat, plane, numbered[:2])
    resumed = _resume(flat, plane, other, _groups(other))
    other.load_state_dict(copy.deepcopy(flat.state_dict(_groups(flat))), _groups(other))
    _run(flat, plane, numbered[2:])
    _run(other, resumed, numbered[2:])
    assert torch.equal(plane.master, resumed.master)


def test_the_step_number_is_enough_where_the_class_keeps_no_other_scalar() -> None:
    numbered = list(enumerate(STEPS, start=1))
    flat, other = _adapted(ELEMENT_WISE["Adam amsgrad"]), _adapted(ELEMENT_WISE["Adam amsgrad"])
    plane = make_plane(flat, PARAMS, _groups(flat))
    _run(flat, plane, numbered[:2])
    resumed = _resume(flat, plane, other, _groups(other))
    _run(flat, plane, numbered[2:])
    _run(other, resumed, numbered[2:])
    assert torch.equal(plane.master, resumed.master)


def test_going_on_without_the_saved_scalars_is_an_error() -> None:
    flat = _adapted(ELEMENT_WISE["NAdam"])
    with pytest.raises(RuntimeError, match="mu_product"):
        _run(flat, make_plane(flat, PARAMS, _groups(flat)), [(3, STEPS[0])])


def test_saved_scalars_of_another_number_of_groups_are_an_error() -> None:
    flat = _adapted(ELEMENT_WISE["NAdam"])
    with pytest.raises(ValueError, match="of 1 param groups, got 2"):
        flat.load_state_dict({"scalars": [None, None]}, _groups(flat))


# -- what is not element-wise ------------------------------------------------------------------------------------------


class NormScaled(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad / p.grad.norm(), alpha=-group["lr"])


class RowScaled(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                scale = p.grad.abs().amax(-1, keepdim=True) if p.ndim > 1 else 1.0
                p.data.add_(p.grad / scale, alpha=-group["lr"])


class Noisy(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad + torch.randn_like(p), alpha=-group["lr"])


class CountsItself(torch.optim.SGD):
    count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"] / self.count)


class KeepsParameters(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.mine = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.mine:
            if p.grad is not None:
                p.data.sub_(p.grad)


class Averages(torch.optim.SGD):
    def train(self) -> None: ...
    def eval(self) -> None: ...


class HalfState(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["buffer"] = p.grad.bfloat16()
                p.data.sub_(p.grad)


REFUSED: dict[str, tuple[Make, str]] = {
    "LBFGS": (lambda ps: torch.optim.LBFGS(ps), "evaluates the loss several times"),
    "Adafactor": (lambda ps: torch.optim.Adafactor(ps), "row and column sums"),
    "SparseAdam": (lambda ps: torch.optim.SparseAdam(ps), "sparse gradients"),
    "Muon": (lambda ps: torch.optim.Muon(ps), 'optimizer type "Muon"'),
    "norm": (lambda ps: NormScaled(ps, lr=0.1), "other numbers for a matrix"),
    "rows": (lambda ps: RowScaled(ps, lr=0.1), "other numbers for a matrix"),
    "noise": (lambda ps: Noisy(ps, lr=0.1), "other numbers for a matrix"),
    "own counter": (lambda ps: CountsItself(ps, lr=0.1), "other numbers for a matrix"),
    "own list": (lambda ps: KeepsParameters(ps, lr=0.1), "does not change the parameters"),
    "train and eval": (lambda ps: Averages(ps, lr=0.1), r"rewrites the parameters in train\(\)"),
    "state in another dtype": (lambda ps: HalfState(ps, lr=0.1), "keeps 'buffer' as torch.bfloat16"),
    "needs a closure": (lambda ps: type("C", (torch.optim.LBFGS,), {})(ps), "evaluates the loss several times"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_element_wise_is_refused_with_a_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(NotImplementedError, match=reason) as caught:
        from_client(make([nn.Parameter(torch.zeros(4, 4))]))
    assert "Fix: use" in str(caught.value)


def test_an_error_inside_the_class_is_shown() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise KeyError("history")

    with pytest.raises(NotImplementedError, match="KeyError: 'history'"):
        from_client(Broken([nn.Parameter(torch.zeros(4))]))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adagrad])
def test_an_optimizer_that_was_stepped_is_refused(kind: Any) -> None:
    parameter = nn.Parameter(torch.zeros(4))
    client = kind([parameter], lr=0.1)
    parameter.grad = torch.arange(4.0)
    client.step()
    with pytest.raises(ValueError, match="has not been stepped"):
        from_client(client)


def test_a_learning_rate_of_zero_does_not_fool_the_probe() -> None:
    assert _adapted(lambda ps: torch.optim.RMSprop(ps, lr=0.0)).moments == ("square_avg",)


def test_groups_that_keep_other_moments_are_refused() -> None:
    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    groups = [{"params": [first]}, {"params": [second], "momentum": 0.9}]
    with pytest.raises(NotImplementedError, match="other moments in one param group"):
        from_client(torch.optim.RMSprop(groups, lr=0.1))


# -- client objects that need no adapter -------------------------------------------------------------------------------


def test_torchs_own_common_optimizers_become_the_fused_ones() -> None:
    parameters = [nn.Parameter(torch.zeros(4))]
    adamw, adam = from_client(torch.optim.AdamW(parameters)), from_client(torch.optim.Adam(parameters))
    assert isinstance(adamw, Adam) and adamw.adam_w_mode
    assert isinstance(adam, Adam) and not adam.adam_w_mode
    assert isinstance(from_client(torch.optim.SGD(parameters, momentum=0.9)), SGD)
    assert isinstance(from_client(torch.optim.Adagrad(parameters)), Adagrad)


def test_the_clients_defaults_are_kept() -> None:
    flat = from_client(torch.optim.AdamW([nn.Parameter(torch.zeros(4))], lr=0.3, weight_decay=0.4))
    assert (flat.defaults["lr"], flat.defaults["weight_decay"]) == (0.3, 0.4)


def test_momentum_in_one_param_group_is_enough_for_a_momentum_plane() -> None:
    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    client = torch.optim.SGD([{"params": [first]}, {"params": [second], "momentum": 0.9}], lr=0.1)
    assert from_client(client).moments == ("momentum_buffer",)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=1e-2),
        lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
        lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.Adagrad(ps, lr=1e-2, initial_accumulator_value=0.1),
    ],
)
def test_the_fused_ones_give_the_numbers_of_the_clients_object(make: Make) -> None:
    client = make([nn.Parameter(value.clone()) for value in PARAMS.values()])
    got = train(from_client(client), PARAMS, STEPS, groups=client.param_groups, world_size=2)
    assert relative_error(got, train_torch(make, PARAMS, STEPS)) < 1e-7


def test_an_object_that_knows_its_flat_optimizer_is_asked_for_it() -> None:
    class Known(torch.optim.SGD):
        def flat_optimizer(self) -> FlatOptimizer:
            return Adam(lr=0.25)

    flat = from_client(Known([nn.Parameter(torch.zeros(4))]))
    assert isinstance(flat, Adam)


def test_what_is_no_optimizer_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got dict"):
        from_client({})
