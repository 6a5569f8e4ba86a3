"""The optimizers on a CUDA device: the numbers of torch and of the CPU, no host sync, half-precision Newton-Schulz."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.optim import SGD, Adagrad, AdamW, FlatOptimizer, Lamb, Lion, Muon, TorchOptimizer, from_client, fused
from lorica.optim.element import ElementOptimizer
from lorica.optim.newton_schulz import compute_dtype, orthogonalize
from lorica.precision.rounding import rounded
from tests.gpu.waiting import no_host_sync
from tests.mechanism.optim_planes import Plane, make_plane, random_params, random_steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PARAMS = random_params({"w": (300, 200), "b": (7,)})
STEPS = random_steps(PARAMS, 5)

OURS: dict[str, Callable[[], FlatOptimizer]] = {
    "adamw": lambda: AdamW(lr=1e-2, weight_decay=0.1),
    "sgd": lambda: SGD(lr=1e-2, momentum=0.9),
    "adagrad": lambda: Adagrad(lr=1e-2),
    "lion": lambda: Lion(lr=1e-2, weight_decay=0.1),
    "lamb": lambda: Lamb(lr=1e-2, weight_decay=0.1),
}


def _run(
    optimizer: FlatOptimizer, device: str, coef: Any, groups: list[dict[str, Any]] | None = None, **options: Any
) -> Plane:
    groups = groups or optimizer.param_groups([{"params": []}], {})
    plane = make_plane(optimizer, PARAMS, groups, device=device, **options)
    for number, grads in enumerate(STEPS, start=1):
        plane.set_grads(grads)
        with no_host_sync():
            optimizer.update(plane.segments, coef=coef, step=number, layout=plane.layout)
    return plane


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.cpu() - wanted.cpu()).norm() / wanted.cpu().norm())


@pytest.mark.parametrize("name", OURS)
def test_the_device_gives_the_numbers_of_the_cpu_without_a_host_sync(name: str) -> None:
    options: dict[str, Any] = {"grad_dtype": torch.bfloat16, "out_dtype": torch.bfloat16}
    got = _run(OURS[name](), "cuda", torch.tensor(0.5, device="cuda"), **options)
    assert got.out is not None
    assert torch.equal(got.out, rounded(got.master, torch.bfloat16))
    assert _error(got.master, _run(OURS[name](), "cpu", 0.5, **options).master) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "lion"])
def test_the_tile_size_changes_no_bit_on_the_device(name: str) -> None:
    tiled = OURS[name]()
    assert isinstance(tiled, ElementOptimizer)
    tiled.tile_numel = 1280
    coef = torch.tensor(0.5, device="cuda")
    assert torch.equal(_run(tiled, "cuda", coef).master, _run(OURS[name](), "cuda", coef).master)


def test_the_common_optimizers_have_a_fused_kernel_on_the_device() -> None:
    assert all(fused.has_kernel(name, "cuda") for name in ("adam", "adamw", "sgd"))


def test_the_formula_stands_in_for_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _run(OURS["adagrad"](), "cuda", 1.0).master
    monkeypatch.setattr(fused, "has_kernel", lambda name, device_type: False)
    assert _error(_run(OURS["adagrad"](), "cuda", 1.0).master, wanted) < 1e-7


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True, fused=True),
        lambda ps: torch.optim.NAdam(ps, lr=1e-2, capturable=True),
    ],
)
def test_fused_and_capturable_client_objects_run_through_the_adapter(make: Any) -> None:
    client = make([nn.Parameter(value.cuda()) for value in PARAMS.values()])
    flat = from_client(client)
    assert isinstance(flat, TorchOptimizer)
    plane = make_plane(flat, PARAMS, client.param_groups, device="cuda")
    parameter = nn.Parameter(PARAMS["w"].cuda())
    plain = make([parameter])
    for number, grads in enumerate(STEPS, start=1):
        plane.set_grads(grads)
        flat.update(plane.segments, coef=1.0, step=number)
        parameter.grad = grads["w"].cuda()
        plain.step()
    slot = plane.layout.slots[0]
    assert _error(plane.master[slot.start : slot.stop].view(slot.shape), parameter.detach()) < 1e-7


@pytest.mark.parametrize("method", ["gram", "standard"])
def test_half_precision_newton_schulz_is_near_full_precision(method: str) -> None:
    x = PARAMS["w"].cuda() * 1e-6
    dtype = compute_dtype(method, x.device)
    assert dtype is {"gram": torch.float16, "standard": torch.bfloat16}[method]
    with no_host_sync():
        half = orthogonalize(x, method, dtype=dtype)
    full = orthogonalize(x, method)
    assert float((half * full).sum() / (half.norm() * full.norm())) > 0.99


@pytest.mark.parametrize("method", ["gram", "standard"])
def test_muon_runs_without_a_host_sync(method: str) -> None:
    def make() -> tuple[FlatOptimizer, list[dict[str, Any]]]:
        optimizer = Muon(lr=0.02, ns_method=method)
        parameter = nn.Parameter(PARAMS["w"])
        return optimizer, optimizer.param_groups([{"params": [parameter]}], {parameter: "w"})

    def run(device: str) -> Tensor:
        optimizer, groups = make()
        plane = make_plane(optimizer, {"w": PARAMS["w"]}, groups, device=device)
        plane.set_grads(STEPS[0])
        with no_host_sync():
            optimizer.update(plane.segments, coef=1.0, step=1, layout=plane.layout)
        return plane.master

    moved = run("cuda").cpu() - make_plane(*_fresh(), device="cpu").master
    wanted = run("cpu") - make_plane(*_fresh(), device="cpu").master
    assert float((moved * wanted).sum() / (moved.norm() * wanted.norm())) > 0.99


def _fresh() -> tuple[FlatOptimizer, dict[str, Tensor], list[dict[str, Any]]]:
    return SGD(), {"w": PARAMS["w"]}, [{}]
