"""Calls that take turns: their order, their numbers in autograd, random numbers, thread state, what a failure does."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorica.core.interleave import Turns

CPU = torch.device("cpu")


def visits(routes: list[list[int]]) -> list[tuple[int, int]]:
    """(place, call) in the order in which calls with these routes come by."""
    seen: list[tuple[int, int]] = []
    turns: Turns[None]

    def call(index: int, route: list[int]) -> Callable[[], None]:
        def go() -> None:
            for place in route:
                turns.wait(place)
                seen.append((place, index))

        return go

    turns = Turns([call(index, route) for index, route in enumerate(routes)], CPU, salt=0)
    turns.run()
    return seen


def test_all_calls_pass_a_place_before_the_next_one_the_last_call_first() -> None:
    assert visits([[0, 1, 2]] * 3) == [(place, call) for place in (0, 1, 2) for call in (2, 1, 0)]


def test_calls_that_leave_out_a_place_wait_behind_it_for_the_others() -> None:
    assert visits([[0, 1, 2], [0, 2], [1, 2]]) == [(0, 1), (0, 0), (1, 2), (1, 0), (2, 2), (2, 1), (2, 0)]


def test_a_place_that_is_visited_twice_is_visited_by_all_before_again() -> None:
    assert visits([[0, 0], [0, 0]]) == [(0, 1), (0, 0), (0, 1), (0, 0)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=4))
def test_every_call_walks_its_own_route_whatever_the_others_do(routes: list[list[int]]) -> None:
    seen = visits(routes)
    assert [[place for place, call in seen if call == index] for index in range(len(routes))] == routes
    assert visits(routes) == seen


def backward_order(layers: int, calls: int, run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> list[str]:
    """(layer, call) in the order in which backward comes by, and how the gradients of a shared weight are summed."""
    weight = torch.ones(1, requires_grad=True)
    seen: list[str] = []
    turns: Turns[Tensor]

    def call(index: int) -> Callable[[], Tensor]:
        def go() -> Tensor:
            x = torch.ones(1, requires_grad=True)
            for layer in range(layers):
                turns.wait(layer)
                x = run(lambda y: (y * weight).sin() * 2, x)
                x.register_hook(lambda _, layer=layer: seen.append(f"{layer}.{index}"))  # type: ignore[misc]
            return x

        return go

    turns = Turns([call(index) for index in range(calls)], CPU, salt=0)
    outputs = turns.run()
    turns.renumber([output] for output in outputs)
    torch.autograd.backward(outputs, [torch.ones(1)] * calls)
    return seen


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
def test_backward_goes_layer_by_layer_the_first_call_first(checkpointing: str) -> None:
    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if checkpointing == "none":
            return function(x)
        result = checkpoint(function, x, use_reentrant=checkpointing == "reentrant")
        assert isinstance(result, Tensor)
        return result

    assert backward_order(3, 4, run) == [f"{layer}.{call}" for layer in (2, 1, 0) for call in range(4)]


def test_each_call_has_its_own_random_numbers_and_the_first_one_those_of_the_caller() -> None:
    def draws(count: int, salt: int) -> list[list[float]]:
        torch.manual_seed(1)
        turns: Turns[list[float]]

        def go() -> list[float]:
            found = []
            for place in range(3):
                turns.wait(place)
                found.append(torch.rand(1).item())
            return found

        turns = Turns([go] * count, CPU, salt=salt)
        return [*turns.run(), [torch.rand(1).item()]]

    torch.manual_seed(1)
    alone = torch.rand(4).tolist()
    first, second, third, after = draws(3, salt=0)
    assert [*first, *after] == alone
    assert len({*first, *second, *third}) == 9
    assert draws(3, salt=0) == [first, second, third, after]
    assert draws(3, salt=1)[0] == first and draws(3, salt=1)[1] != second


VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("VARIABLE", default=0)


class Halving(torch.overrides.TorchFunctionMode):
    """Halves what `torch.ones` gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 0.5 if func is torch.ones else result


def test_a_call_finds_the_callers_thread_state_and_keeps_its_own() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    turns: Turns[tuple[Any, ...]]

    def go() -> tuple[Any, ...]:
        found = (torch.is_grad_enabled(), torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            VARIABLE.set(VARIABLE.get() + 1)
            turns.wait(0)
            inside = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), VARIABLE.get())
        turns.wait(1)
        torch.ones(1, requires_grad=True).exp()
        return *found, *inside, torch.ones(1).item()

    VARIABLE.set(6)
    turns = Turns([go, go], CPU, salt=0)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.float16), Halving(), hooks:
        results = turns.run()
        assert torch.ones(1).item() == 0.5
    assert results == [(True, torch.float16, True, False, False, 7, 0.5)] * 2
    assert len(packed) == 2
    assert VARIABLE.get() == 6
    turns = Turns([lambda: (torch.is_inference_mode_enabled(), torch.is_grad_enabled())], CPU, salt=0)
    with torch.inference_mode():
        assert turns.run() == [(True, False)]


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("at", range(4))
def test_a_failure_ends_all_calls_and_is_the_callers(failing: int, at: int) -> None:
    ended: list[int] = []
    turns: Turns[None]

    def call(index: int) -> Callable[[], None]:
        def go() -> None:
            try:
                for place in range(3):
                    if (index, place) == (failing, at):
                        raise KeyError("this one")
                    try:
                        turns.wait(place)
                    except Exception:
                        pytest.fail("a call that only ends because another one failed sees no Exception")
                if (index, at) == (failing, 3):
                    raise KeyError("this one")
            finally:
                ended.append(index)

        return go

    torch.manual_seed(2)
    before = torch.get_rng_state()
    turns = Turns([call(index) for index in range(3)], CPU, salt=0)
    with pytest.raises(KeyError, match="this one"):
        turns.run()
    assert len(ended) == len(set(ended)) and failing in ended
    assert torch.equal(torch.get_rng_state(), before)
