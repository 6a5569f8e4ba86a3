"""Whole models out of sharded planes: a consolidated state dict, one safetensors file. Makes no checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

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
