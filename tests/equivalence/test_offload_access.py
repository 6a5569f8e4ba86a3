"""Looking at state and changing it while its update is still under way: the answer is that of a run without offload.

Every loop here takes steps and does something between `step()` and the next forward; what it saw, and every bit at the
end, must be as with everything on the device. The update threads pause at random, so that something is under way.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lorica import zero
from tests.equivalence.offloading import (
    Case,
    Plan,
    delays,
    start_engine,
    states,
    status,
    swap_files,
    take_step,
    update_threads,
)
from tests.equivalence.training import Training, digest
from tests.harness import Ranks

NUM_STEPS = 3
PLANS = {
    "streamed, one slot": Plan(1, ("host",), ("device",)),
    "streamed, all near": Plan(2, ("host",), ("device",), staging_bytes=1 << 26),
    "on the host": Plan(3, ("host",), ("host",)),
    "on the host, guessing": Plan(6, ("host",), ("host",), keys=(("speculate", True),)),
    "files": Plan(4, ("nvme",)),
    "everything": Plan(5, staging_bytes=1 << 18),
}
Seen = list[Any]


def case_for(world_size: int, stage: int = 3, recipe: str = "gpt", accumulation: int = 1) -> Case:
    """A short bf16 training without clipping, so that guesses are right."""
    return Case(Training(recipe, stage, "bf16", world_size, accumulation, clip=0.0, num_steps=NUM_STEPS))


def named(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, without waiting for anything."""
    return dict(engine.module.named_parameters())


def some(engine: Any) -> list[torch.nn.Parameter]:
    """Parameters of all units; first those of the last block, whose gradient is complete first."""
    params = named(engine)
    return [p for name, p in params.items() if "blocks.2" in name][1::3] + list(params.values())[::5]


# What happens between step() and the next forward ---------------------------------------------------------------------


def get_masters(engine: Any, case: Case, number: int) -> Any:
    return [zero.safe_get_full_fp32_param(p) for p in some(engine)]


def get_moments(engine: Any, case: Case, number: int) -> Any:
    return [zero.safe_get_full_optimizer_state(p, "exp_avg_sq") for p in some(engine)]


def set_masters(engine: Any, case: Case, number: int) -> Any:
    seen = []
    for param in some(engine):
        before = zero.safe_get_full_fp32_param(param)
        assert before is not None
        zero.safe_set_full_fp32_param(param, before.flip(0) * 0.75 + 0.001)
        seen.append(zero.safe_get_full_fp32_param(param))
    return seen


def set_masters_unread(engine: Any, case: Case, number: int) -> Any:
    for param in some(engine):
        zero.safe_set_full_fp32_param(param, torch.full(zero_shape(param), 0.01 * (number + 1)))


def set_moments(engine: Any, case: Case, number: int) -> Any:
    for param in some(engine):
        zero.safe_set_full_optimizer_state(param, torch.full(zero_shape(param), 0.25), "exp_avg")
        zero.safe_set_full_optimizer_state(param, torch.full(zero_shape(param), 0.5), "exp_avg_sq")
    return [zero.safe_get_full_optimizer_state(p, "exp_avg") for p in some(engine)]


def zero_shape(param: torch.nn.Parameter) -> tuple[int, ...]:
    """The logical shape of a parameter that may be sharded."""
    return tuple(param.shape)


def gather_and_change(engine: Any, case: Case, number: int) -> Any:
    seen = []
    with zero.GatheredParameters(some(engine), modifier_rank=dist.get_world_size() - 1), torch.no_grad():
        for param in some(engine):
            seen.append(param.detach().clone())
            if dist.get_rank() == dist.get_world_size() - 1:
                param.mul_(0.5)
    return seen


def gather_and_read(engine: Any, case: Case, number: int) -> Any:
    with zero.GatheredParameters(list(named(engine).values())):
        return [p.detach().clone() for p in named(engine).values()]


def read_state_dict(engine: Any, case: Case, number: int) -> Any:
    """At stages 1 and 2 the module's own state dict has the new values; at stage 3 the consolidated one."""
    state = engine.module_state_dict()
    return {name: value.clone() for name, value in state.items()} if state is not None else None


def read_parameters(engine: Any, case: Case, number: int) -> Any:
    return [p.detach().clone() for p in engine.parameters()]


def synchronize_and_read(engine: Any, case: Case, number: int) -> Any:
    params = list(named(engine).values())
    engine.synchronize()
    return [p.detach().clone() for p in params]


def load_a_state_dict(engine: Any, case: Case, number: int) -> Any:
    if number == 1:
        generator = torch.Generator().manual_seed(5)
        engine.load_module_state_dict(
            {n: 0.1 * torch.randn(zero_shape(p), generator=generator) for n, p in named(engine).items()}
        )


def write_parameters(engine: Any, case: Case, number: int) -> Any:
    """As a constraint on weights would (stages 1 and 2)."""
    with torch.no_grad():
        for param in engine.parameters():
            param.mul_(0.9)


def change_before_the_step(engine: Any, case: Case, number: int) -> Any:
    """What guesses were made from, after the backward that made them."""
    loss = engine(*case.training.micro_batch(500 + number, 0, dist.get_rank()))
    engine.backward(loss)
    if number == 0:
        set_masters(engine, case, number)
    elif number == 1:
        set_moments(engine, case, number)
    else:
        change_the_rate(engine, case, number)
    engine.step()
    return float(loss.detach())


def evaluate(engine: Any, case: Case, number: int) -> Any:
    engine.eval()
    with torch.no_grad():
        loss = engine(*case.training.micro_batch(100 + number, 0, dist.get_rank()))
    engine.train()
    return float(loss)


def drop_gradients(engine: Any, case: Case, number: int) -> Any:
    engine.zero_grad()
    engine.optimizer.zero_grad()


def train_in_vain(engine: Any, case: Case, number: int) -> Any:
    """A backward whose gradients are dropped."""
    loss = engine(*case.training.micro_batch(200 + number, 0, dist.get_rank()))
    engine.backward(loss)
    engine.zero_grad()
    return float(loss.detach())


def forget_a_graph(engine: Any, case: Case, number: int) -> Any:
    return float(engine(*case.training.micro_batch(300 + number, 0, dist.get_rank())).detach())


def change_the_rate(engine: Any, case: Case, number: int) -> Any:
    """The update under way goes on with the rate that it was given."""
    for group in engine.optimizer.param_groups:
        group["lr"] *= 0.5
        group["weight_decay"] += 0.05


def change_gradients(engine: Any, case: Case, number: int) -> Any:
    """Between backward and step."""
    loss = engine(*case.training.micro_batch(400 + number, 0, dist.get_rank()))
    engine.backward(loss)
    for param in some(engine):
        before = zero.safe_get_full_grad(param)
        assert before is not None
        zero.safe_set_full_grad(param, before * 0.5)
    engine.step()
    return float(loss.detach())


DETOURS: dict[str, tuple[Callable[[Any, Case, int], Any], tuple[int, ...]]] = {
    "masters are read": (get_masters, (1, 3)),
    "moments are read": (get_moments, (2, 3)),
    "masters are written": (set_masters, (1, 3)),
    "masters are written unread": (set_masters_unread, (2, 3)),
    "moments are written": (set_moments, (1, 3)),
    "parameters are gathered": (gather_and_read, (2, 3)),
    "parameters are gathered and changed": (gather_and_change, (2, 3)),
    "a state dict is read": (read_state_dict, (2, 3)),
    "engine.parameters() is read": (read_parameters, (1, 2)),
    "engine.synchronize() is called": (synchronize_and_read, (1, 2)),
    "a state dict is loaded": (load_a_state_dict, (2, 3)),
    "the model is evaluated": (evaluate, (1, 3)),
    "gradients are dropped": (drop_gradients, (1, 3)),
    "a backward is dropped": (train_in_vain, (2, 3)),
    "a graph is forgotten": (forget_a_graph, (2, 3)),
    "rates are changed": (change_the_rate, (1, 3)),
    "gradients are changed": (change_gradients, (2, 3)),
    "parameters are written in place": (write_parameters, (1, 2)),
    "state is written between backward and step": (change_before_the_step, (2, 3)),
}


def loop(case: Case, plan: Plan | None, folder: str, detour: str) -> tuple[str, str]:
    """Train with the detour after every step; fingerprints of what it saw and of the state at the end."""
    with delays(plan.seed if plan is not None else 0):
        engine, (call, _) = start_engine(case, plan, folder), DETOURS[detour]
        seen: Seen = []
        for number in range(NUM_STEPS):
            seen += take_step(engine, case, number)
            seen.append(call(engine, case, number))
        final = digest(states(engine))
        engine.destroy()
    return fingerprint(seen), final


def fingerprint(tree: Any) -> str:
    """Of every bit of every tensor and number in nested lists and dicts."""
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    return digest(
        {
            f"{i:05d}": x if isinstance(x, Tensor) else torch.tensor(float(x))
            for i, x in enumerate(leaves)
            if x is not None
        }
    )


def loops(case: Case, folder: str, detour: str) -> dict[str, tuple[str, str]]:
    """The loop under some plans (others for other detours), and with everything on the device ("")."""
    found = {"": loop(case, None, folder, detour)}
    names = ["on the host, guessing", "everything"]
    if dist.get_world_size() == 1:
        others = [name for name in PLANS if name not in names]
        names.append(others[list(DETOURS).index(detour) % len(others)])
    return found | {name: loop(case, PLANS[name], folder, detour) for name in names}


@pytest.mark.parametrize(
    ("detour", "stage", "world_size"),
    [
        (name, stage, world)
        for name, (_, stages) in DETOURS.items()
        for stage, world in zip(stages, (1, 2), strict=True)
    ],
)
def test_a_detour_sees_and_leaves_what_it_does_without_offload(
    ranks: Callable[[int], Ranks], tmp_path: Path, detour: str, stage: int, world_size: int
) -> None:
    case = case_for(world_size, stage)
    for found in ranks(world_size).run(loops, case=case, folder=str(tmp_path), detour=detour):
        assert {name: same == found[""] for name, same in found.items()} == dict.fromkeys(found, True)
    assert not swap_files(tmp_path)


# Loops of another shape -----------------------------------------------------------------------------------------------


def leave_units_out(engine: Any, case: Case) -> Seen:
    """Blocks that a step does not use (the recipe leaves another one out every fourth batch)."""
    return [take_step(engine, case, number) for number in range(8)]


def accumulate_without_sync(engine: Any, case: Case) -> Seen:
    seen: Seen = []
    for number in range(3):
        for micro_step in range(2):
            with engine.no_sync():
                loss = engine(*case.training.micro_batch(10 * number + micro_step, 0, dist.get_rank()))
                engine.backward(loss)
            seen.append(float(loss.detach()))
        seen += take_step(engine, case, 10 * number + 5)
    return seen


def run_forwards_ahead(engine: Any, case: Case) -> Seen:
    seen: Seen = []
    for number in range(3):
        seen += take_step(engine, case, number)
        losses = [engine(*case.training.micro_batch(50 + 3 * number + i, 0, dist.get_rank())) for i in range(3)]
        engine.backward(losses[0] + losses[1] * losses[2])
        engine.step()
        seen += [float(loss.detach()) for loss in losses]
    return seen


def write_by_hand(engine: Any, case: Case) -> Seen:
    """What is set changes the next steps, not only the reading: a stale copy would train on the old values."""
    seen: Seen = []
    for number in range(3):
        seen += take_step(engine, case, number)
        for key in ("exp_avg", "exp_avg_sq"):
            for param in named(engine).values():
                zero.safe_set_full_optimizer_state(param, torch.full(zero_shape(param), 0.125), key)
        seen += take_step(engine, case, 10 + number)
        seen.append(zero.safe_get_full_optimizer_state(next(iter(named(engine).values())), "exp_avg"))
    return seen


LOOPS: dict[str, tuple[Callable[[Any, Case], Seen], str]] = {
    "units are left out": (leave_units_out, "blocks in any order"),
    "no_sync": (accumulate_without_sync, "gpt"),
    "several forwards before a backward": (run_forwards_ahead, "gpt, tied head"),
    "all moments are written before the next step": (write_by_hand, "gpt"),
}


def other_loops(case: Case, folder: str, name: str) -> dict[str, tuple[str, str]]:
    """The loop under some plans, and with everything on the device ("")."""
    found = {}
    for key in ("", "streamed, all near", "on the host, guessing", "everything"):
        plan = PLANS.get(key)
        with delays(plan.seed if plan is not None else 0):
            engine = start_engine(case, plan, folder)
            seen = LOOPS[name][0](engine, case)
            found[key] = fingerprint(seen), digest(states(engine))
            engine.destroy()
    return found


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(("stage", "world_size"), [(2, 1), (3, 2)])
def test_another_loop_trains_as_it_does_without_offload(
    ranks: Callable[[int], Ranks], tmp_path: Path, name: str, stage: int, world_size: int
) -> None:
    case = case_for(world_size, stage, LOOPS[name][1])
    if name == "units are left out":
        case = Case(Training(LOOPS[name][1], stage, "fp32", world_size))
    for found in ranks(world_size).run(other_loops, case=case, folder=str(tmp_path), name=name):
        assert {key: same == found[""] for key, same in found.items()} == dict.fromkeys(found, True)


def fail_in_forward(case: Case, folder: str) -> dict[str, tuple[str, str]]:
    """A forward that raises half way, straight after a step; then training goes on."""
    found = {}
    for key, plan in [("", None), *PLANS.items()]:
        with delays(plan.seed if plan is not None else 0):
            engine, seen = start_engine(case, plan, folder), []
            for number in range(NUM_STEPS):
                seen += take_step(engine, case, number)
                for mark in (1000.0, 2000.0):
                    x_BD, y_BD = case.training.micro_batch(number, 0, dist.get_rank())
                    x_BD[0, 0] = mark
                    with pytest.raises(ArithmeticError):
                        engine.backward(engine(x_BD, y_BD))
                    engine.zero_grad()
            found[key] = fingerprint(seen), digest(states(engine))
            engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "world_size"), [(1, 1), (3, 2)])
def test_an_exception_in_forward_or_backward_leaves_no_trace(
    ranks: Callable[[int], Ranks], tmp_path: Path, stage: int, world_size: int
) -> None:
    case = Case(Training("fragile", stage, "fp32", world_size))
    for found in ranks(world_size).run(fail_in_forward, case=case, folder=str(tmp_path)):
        assert {key: same == found[""] for key, same in found.items()} == dict.fromkeys(found, True)


# The end --------------------------------------------------------------------------------------------------------------


def destroy_at_once(case: Case, folder: str, steps: int) -> dict[str, list[Any]]:
    """What is left of an engine, while the model lives on, that is destroyed straight after a step (or before any)."""
    left = {}
    for name, plan in PLANS.items():
        threads = status("Threads")
        with delays(plan.seed):
            engine = start_engine(case, plan, folder)
            for number in range(steps):
                take_step(engine, case, number)
            model = engine.module
            held = [weakref.ref(tensor) for tensor in state_tensors(engine)]
            assert held or plan.records == ("nvme",)
            engine.destroy()
            del engine
        gc.collect()
        more_threads = status("Threads") - threads
        alive = sum(ref() is not None for ref in held)
        left[name] = [update_threads(), swap_files(folder), more_threads > 0, alive]
        del model
    return left


def state_tensors(engine: Any) -> list[Tensor]:
    """Masters and moments in memory that are nobody's but the engine's."""
    flats = [flat for unit in engine._parts.units for flat in unit.flats if flat.trainable]
    tensors = [t for flat in flats for t in (flat.master, *flat.moments.values())]
    return [t for t in tensors if isinstance(t, Tensor)]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("stage", "world_size"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_nothing_is_left_of_an_engine_that_is_destroyed_straight_after_a_step(
    ranks: Callable[[int], Ranks], tmp_path: Path, stage: int, world_size: int, steps: int
) -> None:
    answers = ranks(world_size).run(
        destroy_at_once, case=case_for(world_size, stage), folder=str(tmp_path), steps=steps
    )
    for left in answers:
        assert left == {name: [[], [], False, 0] for name in PLANS}
