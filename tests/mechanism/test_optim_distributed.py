"""LAMB and Muon, which look at more than an element: the same numbers at any world size, and what they communicate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.optim import FlatOptimizer, Lamb, Muon
from lorica.optim.muon import uses_muon
from lorica.optim.newton_schulz import orthogonalize
from tests.mechanism.optim_planes import (
    Plane,
    ThreadComm,
    make_plane,
    on_ranks,
    random_params,
    random_steps,
    relative_error,
    same_bits,
    unflatten,
)

SHAPES = {"w": (24, 40), "tall": (50, 12), "bias": (9,), "embed.weight": (30, 8), "conv": (6, 4, 3, 3), "e": (3, 8, 8)}
PARAMS = random_params(SHAPES)
STEPS = random_steps(PARAMS, 4)


def _train_on_ranks(
    make: Any, world_size: int, params: dict[str, Tensor], steps: list[dict[str, Tensor]], **options: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """Every rank's optimizer on its own shard, in threads; the parameters and rank 0's collectives."""

    def body(comm: ThreadComm) -> tuple[Plane, list[str]]:
        optimizer, groups, group_of = make(params)
        plane = make_plane(
            optimizer, params, groups, group_of=group_of, world_size=world_size, rank=comm.rank, **options
        )
        for number, grads in enumerate(steps, start=1):
            plane.set_grads(grads)
            optimizer.update(plane.segments, coef=0.5, step=number, comm=comm, layout=plane.layout)
        return plane, comm.calls

    results = on_ranks(world_size, body)
    planes = [plane for plane, _ in results]
    if planes[0].out is not None:
        assert all(torch.equal(plane.out, plane.master.to(plane.out.dtype)) for plane in planes)
    return unflatten(planes[0].layout, torch.cat([plane.master for plane in planes])), results[0][1]


def _lamb(params: dict[str, Tensor]) -> tuple[FlatOptimizer, list[dict[str, Any]], dict[str, int]]:
    optimizer = Lamb(lr=1e-2, weight_decay=0.1, max_coeff=4.0, min_coeff=0.3)
    groups = optimizer.param_groups([{"params": []}, {"params": [], "lr": 0.03, "weight_decay": 0.0}], {})
    return optimizer, groups, {"bias": 1}


def _muon(params: dict[str, Tensor], **options: Any) -> tuple[FlatOptimizer, list[dict[str, Any]], dict[str, int]]:
    optimizer = Muon(lr=0.02, adam_lr=1e-3, weight_decay=0.1, **options)
    parameters = {name: nn.Parameter(value) for name, value in params.items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    groups = optimizer.param_groups([{"params": list(parameters.values())}], names)
    group_of = {names[p]: index for index, group in enumerate(groups) for p in group["params"]}
    return optimizer, groups, group_of


# -- LAMB --------------------------------------------------------------------------------------------------------------


def _lamb_oracle(params: dict[str, Tensor], steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Algorithm 2 of the paper, one parameter at a time, in double precision."""
    result = {}
    for name, start in params.items():
        lr, decay = (0.03, 0.0) if name == "bias" else (1e-2, 0.1)
        w, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
        for number, grads in enumerate(steps, start=1):
            g = grads[name].double() * 0.5
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            direction = (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8) + decay * w
            ratio = float((w.norm() / direction.norm()).clamp(0.3, 4.0)) if w.norm() and direction.norm() else 1.0
            w = w - lr * ratio * direction
        result[name] = w.float()
    return result


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_lamb_equals_the_paper_at_any_world_size(world_size: int) -> None:
    got, _ = _train_on_ranks(_lamb, world_size, PARAMS, STEPS, out_dtype=torch.bfloat16)
    assert relative_error(got, _lamb_oracle(PARAMS, STEPS)) < 1e-6


def test_lamb_makes_one_all_reduce_per_plane() -> None:
    _, calls = _train_on_ranks(_lamb, 4, PARAMS, STEPS[:2])
    assert calls == ["all_reduce", "all_reduce"]


def test_the_trust_ratio_of_a_zero_parameter_is_one() -> None:
    params = {"w": torch.zeros(200)}
    grads = {"w": torch.ones(200)}
    got, _ = _train_on_ranks(lambda p: _lamb(p), 2, params, [grads])
    assert torch.allclose(got["w"], torch.full((200,), -1e-2))


def test_lamb_without_bias_correction_uses_the_raw_moments() -> None:
    params, grads = {"w": torch.ones(128)}, {"w": torch.full((128,), 2.0)}
    optimizer = Lamb(lr=0.1, bias_correction=False, max_coeff=100.0)
    plane = make_plane(optimizer, params, optimizer.param_groups([{}], {}))
    plane.set_grads(grads)
    optimizer.update(plane.segments, coef=1.0, step=1, layout=plane.layout)
    # the ratio scales the direction to the parameter's norm: 1 - 0.1 * 1
    assert torch.allclose(plane.master, torch.full((128,), 0.9))


def test_coarse_optimizers_need_the_layout() -> None:
    optimizer = Lamb()
    plane = make_plane(optimizer, PARAMS, optimizer.param_groups([{}], {}))
    with pytest.raises(RuntimeError, match="expected the plane's layout"):
        optimizer.update(plane.segments, coef=1.0, step=1)


# -- Newton-Schulz -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30), (4, 16, 40)])
@pytest.mark.parametrize("method", ["gram", "standard"])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...], method: str) -> None:
    x = random_params({"x": shape})["x"] * 1e-6
    got = orthogonalize(x, method)
    values = torch.linalg.svdvals(got)
    assert got.shape == x.shape
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    cosine = (got * (u @ vt)).sum() / (got.norm() * (u @ vt).norm())
    assert float(cosine) > 0.97


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (4, 16, 40)])
def test_both_methods_are_the_same_polynomial(shape: tuple[int, ...]) -> None:
    x = random_params({"x": shape})["x"]
    assert torch.allclose(orthogonalize(x, "gram"), orthogonalize(x, "standard"), atol=2e-5)


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


# -- Muon --------------------------------------------------------------------------------------------------------------


def _muon_oracle(
    params: dict[str, Tensor], steps: list[dict[str, Tensor]], method: str, nesterov: bool
) -> dict[str, Tensor]:
    """One parameter at a time, written out; AdamW for the embedding and the bias."""
    result = {}
    for name, start in params.items():
        w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        for number, grads in enumerate(steps, start=1):
            g = grads[name] * 0.5
            if name in ("bias", "embed.weight"):
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                step = (m / (1 - 0.9**number)) / ((v / (1 - 0.95**number)).sqrt() + 1e-10)
                w = w * (1 - 1e-3 * 0.1) - 1e-3 * step
                continue
            m = 0.95 * m + 0.05 * g
            u = 0.05 * g + 0.95 * m if nesterov else m
            u = u.view(6, -1) if name == "conv" else u
            scale = max(1.0, start.shape[-2] / start.shape[-1]) ** 0.5
            w = w * (1 - 0.02 * 0.1) - 0.02 * scale * orthogonalize(u, method).view(start.shape)
        result[name] = w
    return result


@pytest.mark.parametrize(("method", "nesterov"), [("gram", True), ("standard", True), ("gram", False)])
def test_muon_equals_the_update_written_out(method: str, nesterov: bool) -> None:
    def make(params: dict[str, Tensor]) -> Any:
        return _muon(params, ns_method=method, nesterov=nesterov)

    got, _ = _train_on_ranks(make, 1, PARAMS, STEPS)
    assert relative_error(got, _muon_oracle(PARAMS, STEPS, method, nesterov)) < 2e-6


@pytest.mark.parametrize("world_size", [2, 4])
def test_muon_has_the_same_bits_at_any_world_size(world_size: int) -> None:
    alone, _ = _train_on_ranks(_muon, 1, PARAMS, STEPS)
    got, _ = _train_on_ranks(_muon, world_size, PARAMS, STEPS, out_dtype=torch.bfloat16)
    assert same_bits(got, alone)


def test_muon_makes_one_all_gather_per_plane() -> None:
    _, calls = _train_on_ranks(_muon, 4, PARAMS, STEPS[:2])
    assert calls == ["all_gather", "all_gather"]


def test_a_plane_without_matrices_is_not_gathered() -> None:
    params = {name: PARAMS[name] for name in ("bias", "embed.weight")}
    _, calls = _train_on_ranks(_muon, 2, params, STEPS[:2])
    assert calls == []


def test_muon_splits_a_group_and_keeps_its_options() -> None:
    matrix, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    first, second = Muon(adam_lr=0.5).param_groups(
        [{"params": [bias, matrix], "weight_decay": 0.25}], {matrix: "w", bias: "b"}
    )
    assert first["params"] == [matrix] and first["use_muon"] and first["lr"] == 0.02
    assert second["params"] == [bias] and not second["use_muon"] and second["lr"] == 0.5
    assert first["weight_decay"] == second["weight_decay"] == 0.25
    assert (second["betas"], second["eps"]) == ((0.9, 0.95), 1e-10)


def test_one_learning_rate_serves_both_parts_of_muon() -> None:
    optimizer = Muon(lr=0.1, muon_lr=0.3)
    assert (optimizer.defaults["lr"], optimizer.adam_defaults["lr"]) == (0.3, 0.1)


def test_a_group_that_says_use_muon_is_not_split() -> None:
    matrix, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    group = {"params": [matrix, bias], "use_muon": False}
    assert Muon().param_groups([group], {matrix: "w", bias: "b"}) == [group]


@pytest.mark.parametrize(
    ("name", "shape", "flag", "wanted"),
    [
        ("layer.weight", (2, 2), None, True),
        ("layer.bias", (2,), None, False),
        ("model.Embed_tokens.weight", (2, 2), None, False),
        ("lm_head.weight", (2, 2), None, False),
        ("lm_head.weight", (2, 2), True, True),
        ("layer.weight", (2, 2), False, False),
    ],
)
def test_which_parameters_muon_takes(name: str, shape: tuple[int, ...], flag: bool | None, wanted: bool) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    if flag is not None:
        parameter.use_muon = flag  # type: ignore[attr-defined]
    assert uses_muon(name, parameter) is wanted


def test_a_flagged_vector_is_an_error() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.use_muon = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="2 dims or more"):
        uses_muon("bias", parameter)


def test_an_unknown_newton_schulz_method_is_an_error() -> None:
    with pytest.raises(ValueError, match="ns_method must be one of"):
        Muon(ns_method="quintic")


def test_segments_of_parameters_that_muon_never_saw_are_an_error() -> None:
    optimizer, groups, group_of = _muon({"w": PARAMS["w"]})
    plane = make_plane(optimizer, {"w": PARAMS["w"], "other": PARAMS["tall"]}, groups, group_of=group_of)
    with pytest.raises(RuntimeError, match="got 'other'"):
        optimizer.update(plane.segments, coef=1.0, step=1, layout=plane.layout)


def test_without_ranks_no_collective_is_needed() -> None:
    optimizer, groups, group_of = _muon(PARAMS)
    plane = make_plane(optimizer, PARAMS, groups, group_of=group_of)
    plane.set_grads(STEPS[0])
    optimizer.update(plane.segments, coef=0.5, step=1, layout=plane.layout)
    wanted, _ = _train_on_ranks(_muon, 1, PARAMS, STEPS[:1])
    assert same_bits(unflatten(plane.layout, plane.master), wanted)
