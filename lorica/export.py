"""Whole models out of sharded planes and into them: state dicts, one safetensors file. Makes no checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorica.core.flat import Flat
from lorica.core.parameter import record_of


def consolidated_state_dict(model: nn.Module, *, exclude_frozen: bool, keep: bool) -> dict[str, Tensor] | None:
    """The model's state dict with whole parameters, gathered plane by plane. Collective.

    Args:
        exclude_frozen: leave out parameters that do not require a gradient.
        keep: whether this rank wants the result (the others only take part).
    Returns:
        Tensors on the CPU, each with memory of its own (tied ones share theirs); None if not `keep`.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    copies: dict[int, Tensor] = {}
    for flat in _planes(state.values()):
        flat.holders += 1
        flat.unshard()
        flat.wait()
        if keep:
            copies.update({id(p): p.detach().cpu().clone() for p in flat.params})
        flat.holders -= 1
        flat.reshard()
    if not keep:
        return None
    return {
        name: copies[id(value)] if id(value) in copies else value.detach().cpu().clone()
        for name, value in state.items()
        if not (exclude_frozen and isinstance(value, nn.Parameter) and not value.requires_grad)
    }


def load_whole_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool) -> None:
    """Write whole tensors into the planes and buffers of `model`. Collective.

    Raises:
        ValueError: for names that are missing or left over (if `strict`), or shapes that differ.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [f"{n}: {tuple(state[n].shape)}, not {tuple(own[n].shape)}" for n in own if not _fits(own[n], state.get(n))]
    if wrong or (strict and (missing or unknown)):
        raise ValueError(
            f"load_module_state_dict: expected the tensors of the model, got missing {missing}, unknown {unknown}, "
            f"other shapes {wrong}. Fix: pass this model's whole state dict, or strict=False to skip names."
        )
    for flat in _planes(own.values()):
        flat.site.shard.fence()
    for name in own.keys() & state.keys():
        record = record_of(own[name])
        if record is not None:
            record.flat.fill(record.index, state[name].to(record.flat.site.device))
        else:
            with torch.no_grad():
                own[name].copy_(state[name])


def _fits(own: Tensor, given: Tensor | None) -> bool:
    return given is None or given.shape == own.shape


def _planes(values: Iterable[Tensor]) -> list[Flat]:
    planes: dict[int, Flat] = {}
    for value in values:
        record = record_of(value)
        if record is not None:
            planes[id(record.flat)] = record.flat
    return list(planes.values())


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Write `state` to `path`, tied tensors once, so that a reader never sees half a file."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            unique[name] = tensor.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(unique, partial, metadata={"format": "pt"})
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)
