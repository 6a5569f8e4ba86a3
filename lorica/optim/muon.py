"""Muon on flat planes: orthogonalised momentum for matrices, AdamW for everything else. One all_gather per plane.

Per plane: every rank writes its part of the (Nesterov) momentum into one flat buffer (1), one all_gather fills the
rest (2), and each rank orthogonalises the matrices that overlap its shard and takes its own slice of them (3). Planes
without matrices are not gathered. The matrices are whole at any world size, so the results have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorica.optim.adam import adam_tile
from lorica.optim.base import (
    FlatOptimizerBase,
    Granularity,
    PlaneCollectives,
    PlaneLayout,
    PlaneSlot,
    Segment,
    require_betas,
    require_layout,
    require_range,
)
from lorica.optim.newton_schulz import METHODS, compute_dtype, orthogonalize
from lorica.optim.tiles import run_in_tiles, tiles
from lorica.precision.rounding import round_into

NOT_MATRICES = ("embed", "lm_head")


def uses_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates a parameter: its flag `use_muon` if it has one, else 2 or more dims, no embedding or head.

    Raises:
        ValueError: if a parameter with fewer than two dims is flagged.
    """
    flag = getattr(parameter, "use_muon", None)
    if flag and parameter.ndim < 2:
        raise ValueError(
            f"Muon: expected 2 dims or more in parameters flagged use_muon, got {tuple(parameter.shape)} ({name}). "
            "Fix: unset the flag; AdamW updates the parameter."
        )
    if flag is not None:
        return bool(flag)
    return parameter.ndim >= 2 and not any(word in name.lower() for word in NOT_MATRICES)


class Muon(FlatOptimizerBase):
    """Muon with an AdamW for the parameters that are no matrices; weight decay is decoupled in both.

    The moments of a matrix: "exp_avg" is Muon's momentum, "exp_avg_sq" stays zero.

    Args:
        lr: of both parts, where `muon_lr` and `adam_lr` say nothing; None: 0.02 for matrices, 3e-4 for the rest.
        momentum, nesterov, ns_method: of the matrices.
        betas, eps: of the rest.
    Raises:
        ValueError: for a hyper-parameter out of range.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    granularity: Granularity = "matrix"
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: float | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        ns_method: str = "gram",
        nesterov: bool = True,
    ) -> None:
        if ns_method not in METHODS:
            raise ValueError(f"Muon: ns_method must be one of {METHODS}, got {ns_method!r}. Fix: set ns_method.")
        inf = float("inf")
        muon_lr = next(value for value in (muon_lr, lr, 0.02) if value is not None)
        adam_lr = next(value for value in (adam_lr, lr, 3e-4) if value is not None)
        decay = require_range("Muon", "weight_decay", weight_decay, 0.0, inf)
        self.defaults: dict[str, Any] = {
            "lr": require_range("Muon", "muon_lr", muon_lr, 0.0, inf),
            "momentum": require_range("Muon", "momentum", momentum, 0.0, 1.0, open_end=True),
            "weight_decay": decay,
            "nesterov": nesterov,
            "ns_method": ns_method,
            "use_muon": True,
        }
        self.adam_defaults: dict[str, Any] = {
            "lr": require_range("Muon", "adam_lr", adam_lr, 0.0, inf),
            "betas": require_betas("Muon", betas),
            "eps": require_range("Muon", "eps", eps, 0.0, inf),
            "weight_decay": decay,
            "use_muon": False,
        }
        self._matrices: set[str] = set()

    def param_groups(self, groups: Sequence[dict[str, Any]], names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
        """Split each group into its matrices and the rest; a group that already says `use_muon` stays whole.

        The names of the matrices are kept: `update` needs to know on every rank which planes hold some.
        """
        result: list[dict[str, Any]] = []
        for group in groups:
            result += [group] if "use_muon" in group else _split(group, names)
        for group in result:
            for key, value in (self.defaults if group["use_muon"] else self.adam_defaults).items():
                group.setdefault(key, value)
            if group["use_muon"]:
                self._matrices |= {names[parameter] for parameter in group["params"]}
        return result

    @torch.no_grad()
    def update(
        self,
        segments: Sequence[Segment],
        *,
        coef: Tensor | float,
        step: int,
        apply: Tensor | None = None,
        comm: PlaneCollectives | None = None,
        layout: PlaneLayout | None = None,
    ) -> None:
        """See `FlatOptimizer.update`; collective over `comm` if the plane holds a matrix."""
        layout = require_layout("Muon", segments, layout)
        matrices = {slot.name: slot for slot in layout.slots if slot.name in self._matrices}
        muon_segments = [segment for segment in segments if segment.group["use_muon"]]
        _require_seen(muon_segments, matrices)
        for segment in segments:
            if not segment.group["use_muon"]:
                run_in_tiles(segment, coef, partial(adam_tile, step=step, decoupled=True))
        if not matrices:
            return
        plane = self._momentum_plane(layout.numel, segments[0].master)
        for segment in muon_segments:
            _write_momentum(segment, coef, plane, matrices)
        _gather(plane, comm)
        for segment in muon_segments:
            _apply(segment, plane, matrices)

    def _momentum_plane(self, numel: int, master: Tensor) -> Tensor:
        """Zeros for a whole plane's momentum; bf16 where the iteration is bf16 anyway."""
        half = compute_dtype(str(self.defaults["ns_method"]), master.device) is torch.bfloat16
        return torch.zeros(numel, dtype=torch.bfloat16 if half else master.dtype, device=master.device)


def muon_momentum(grad: Tensor, momentum_buffer: Tensor, *, momentum: float, nesterov: bool) -> Tensor:
    """Update the momentum in place and return what is to be orthogonalised (a new tensor with nesterov)."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    return torch.lerp(grad, momentum_buffer, momentum) if nesterov else momentum_buffer


def muon_direction(momentum: Tensor, *, ns_method: str, dtype: torch.dtype) -> Tensor:
    """Orthogonalise a parameter's momentum, in its own shape; 4-d filters count as [out, in * height * width].

    The factor sqrt(max(1, rows / columns)) is taken from the last two dims of the parameter, filters too: the
    convention that published learning rates are tuned to.
    """
    matrix = momentum.flatten(1) if momentum.ndim == 4 else momentum
    scale = max(1.0, momentum.shape[-2] / momentum.shape[-1]) ** 0.5
    return orthogonalize(matrix, ns_method, dtype=dtype).mul_(scale).reshape(momentum.shape)


def _split(group: dict[str, Any], names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for parameter in group["params"]:
        (matrices if uses_muon(names[parameter], parameter) else rest).append(parameter)
    options = {key: value for key, value in group.items() if key != "params"}
    halves = ((matrices, True), (rest, False))
    return [{**options, "params": params, "use_muon": flag} for params, flag in halves if params]


def _write_momentum(segment: Segment, coef: Tensor | float, plane: Tensor, matrices: Mapping[str, PlaneSlot]) -> None:
    """(1) Update this segment's momentum and write what is to be orthogonalised at its place in the plane."""
    if not segment.slices:
        return
    first, group = segment.slices[0], segment.group
    position = matrices[first.name].start + first.offset - first.start
    for tile, _ in tiles(segment, coef):
        numel = tile.master.numel()
        update = muon_momentum(
            tile.grad, tile.state["exp_avg"], momentum=float(group["momentum"]), nesterov=bool(group["nesterov"])
        )
        plane[position : position + numel].copy_(update)
        position += numel


def _apply(segment: Segment, plane: Tensor, matrices: Mapping[str, PlaneSlot]) -> None:
    """(3) Orthogonalise the matrices that overlap this segment and update its part of each."""
    group, method = segment.group, str(segment.group["ns_method"])
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    dtype = compute_dtype(method, plane.device)
    segment.master.mul_(1 - lr * weight_decay)
    for part in segment.slices:
        start, numel = matrices[part.name].start, torch.Size(part.shape).numel()
        momentum = plane[start : start + numel].view(part.shape)
        direction = muon_direction(momentum, ns_method=method, dtype=dtype).reshape(-1)
        segment.master[part.start : part.stop].add_(
            direction[part.offset : part.offset + part.stop - part.start], alpha=-lr
        )
    if segment.out is not None:
        round_into(segment.master, segment.out)


def _gather(plane: Tensor, comm: PlaneCollectives | None) -> None:
    """(2) Fill the plane with the other ranks' parts."""
    if comm is not None and comm.world_size > 1:
        numel = plane.numel() // comm.world_size
        comm.all_gather(plane[comm.rank * numel : (comm.rank + 1) * numel], plane).wait()


def _require_seen(segments: Sequence[Segment], matrices: Mapping[str, PlaneSlot]) -> None:
    unseen = [part.name for segment in segments for part in segment.slices if part.name not in matrices]
    if unseen:
        raise RuntimeError(
            f"Muon: expected only parameters that param_groups() saw ({len(matrices)} matrices in this plane), got "
            f"{unseen[0]!r}. Fix: build the groups with Muon.param_groups, with the names that the planes use."
        )
