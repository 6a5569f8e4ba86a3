"""Puts fused kernels into an unmodified model, in place, and says what it replaced and what not.

Owns that walk, and which library is taken for which op; what a module computes is found out in `recognise`, its new
forward is made in `forwards`.

    report = inject(model)          # before or without lorica.initialize, which does it for kernels.inject
    print(report)                   # kernels: 5 LlamaRMSNorm -> lorica rms_norm, 2 LlamaMLP -> lorica swiglu, ...
    undo(model)

Modules stay the same objects with the same parameters and names (see `swap`), so that a state dict, a tied weight, an
optimizer and hooks do not notice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lorica.core.parameter import record_of
from lorica.kernels.runtime import runs_on
from lorica.ops import forwards
from lorica.ops.linear_cross_entropy import LazyHead
from lorica.ops.recognise import Match, Mismatch, recognise
from lorica.ops.swap import Recipe, Swapped, swap, swap_back
from lorica.zero import GatheredParameters

HEAD = "linear_cross_entropy"
BEST: dict[str, tuple[str, ...]] = {
    "layer_norm": ("lorica", "liger"),
    "rms_norm": ("lorica", "liger"),
    "swiglu": ("lorica", "liger"),
    "gelu": ("lorica",),
    "rotary": ("lorica", "liger"),
    HEAD: ("lorica",),
}
"""Op -> the libraries that have it, the faster one first: "auto" takes the first that is installed."""

_NOWHERE = "no Triton kernel runs on {device}: there the modules compute as before, only the head keeps no logits"

_MAKERS: dict[str, Any] = {
    "layer_norm": forwards.layer_norm,
    "rms_norm": forwards.rms_norm,
    "swiglu": forwards.swiglu,
    "gelu": forwards.gelu,
    "rotary": forwards.rotary,
}


class Entry(NamedTuple):
    """One module: its name in the model, its class, the op, and whose kernel it has now, or why it has none."""

    name: str
    kind: str
    op: str
    library: str | None
    why: str = ""

    @property
    def subject(self) -> str:
        """How the report calls it: a head, of which there is one, by its name."""
        return self.name.rpartition(".")[2] if self.op == HEAD else self.kind


@dataclass(frozen=True)
class Report:
    """The modules that were replaced, those that only look as if they could be, and the ops asked for and not found.

    `remark` says where kernels will not run.
    """

    replaced: tuple[Entry, ...] = ()
    kept: tuple[Entry, ...] = ()
    missing: tuple[str, ...] = ()
    remark: str = ""

    def __str__(self) -> str:
        """One line, equal modules counted."""
        done = Counter(f"{entry.subject} -> {entry.library} {entry.op}" for entry in self.replaced)
        kept = Counter(f"{entry.subject} (no {entry.op}: {entry.why})" for entry in self.kept)
        parts = [_listed(done) or "nothing replaced"]
        if kept:
            parts.append(f"not replaced: {_listed(kept)}")
        if self.missing:
            parts.append(f"not in this model: {', '.join(self.missing)}")
        parts += [self.remark] if self.remark else []
        return f"kernels: {'; '.join(parts)}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(text if count == 1 else f"{count} {text}" for text, count in counts.items())


def inject(
    model: nn.Module,
    ops: Literal["auto"] | Sequence[str] = "auto",
    library: Literal["auto", "lorica", "liger"] = "auto",
    *,
    device: torch.device | None = None,
) -> Report:
    """Replace the modules of `model` that have a fused kernel.

    Args:
        model: any module; changed in place.
        ops: "auto": every one that `library` has; or names out of `BEST`.
        library: "auto": the best installed one for each op; "liger" needs liger-kernel.
        device: where the model will run, if that is known: the report says so if no kernel runs there.
    Returns: what was replaced. A module that already has a kernel is left alone.
    Raises:
        ValueError: for an unknown op, or one that was asked for by name and `library` does not have.
        ImportError: for "liger" without liger-kernel.
    """
    wanted = tuple(BEST) if ops == "auto" else tuple(ops)
    sources = {op: _library_for(op, library) for op in wanted}
    lacking = [op for op, source in sources.items() if source is None]
    if lacking and ops != "auto":
        raise ValueError(
            f"kernels.inject: expected ops that {library} has, got {lacking}. "
            'Fix: remove them, or set kernels.library to "auto".'
        )
    entries = [
        _replace(name, module, verdict, sources[verdict.op]) for name, module, verdict in _verdicts(model, wanted)
    ]
    if HEAD in wanted:
        entries += _replace_head(model, sources[HEAD])
    entries.sort(key=lambda entry: list(BEST).index(entry.op))
    return Report(
        replaced=tuple(entry for entry in entries if entry.library is not None),
        kept=tuple(entry for entry in entries if entry.library is None),
        missing=() if ops == "auto" else tuple(op for op in wanted if all(entry.op != op for entry in entries)),
        remark="" if device is None or runs_on(device) else _NOWHERE.format(device=device),
    )


def undo(model: nn.Module) -> int:
    """Give every replaced module of `model` its own forward again; return how many there were."""
    changed = [module for module in model.modules() if isinstance(module, (Swapped, LazyHead))]
    for module in changed:
        if isinstance(module, LazyHead):
            LazyHead.detach(module)
        else:
            swap_back(module)
    return len(changed)


def _library_for(op: str, library: str) -> str | None:
    """Whose kernel is taken; None: `library` has none."""
    if op not in BEST:
        raise ValueError(f"kernels.inject: expected ops out of {', '.join(BEST)}, got {op!r}. Fix: correct the name.")
    if library == "auto":
        return next(name for name in BEST[op] if _installed(name))
    if not _installed(library):
        raise ImportError(
            'kernels.library: expected liger-kernel to be installed for "liger", found no module liger_kernel. '
            'Fix: pip install liger-kernel, or set kernels.library to "auto".'
        )
    return library if library in BEST[op] else None


def _installed(library: str) -> bool:
    return library == "lorica" or find_spec("liger_kernel") is not None


def _verdicts(model: nn.Module, wanted: Sequence[str]) -> Iterator[tuple[str, nn.Module, Match | Mismatch]]:
    """The modules that do, or seem to do, one of the ops `wanted`."""
    for name, module in model.named_modules():
        if isinstance(module, Swapped) or type(module).__module__.startswith("lorica."):
            continue
        verdict = recognise(module)
        if verdict is not None and verdict.op in wanted:
            yield name, module, verdict


def _replace(name: str, module: nn.Module, verdict: Match | Mismatch, source: str | None) -> Entry:
    """Give a module the kernel of `source`, if it is a match and there is one."""
    kind = type(module).__name__
    if isinstance(verdict, Mismatch):
        return Entry(name, kind, verdict.op, None, verdict.why)
    if source is None:
        return Entry(name, kind, verdict.op, None, "this library has no kernel for it")
    swap(module, Recipe(_MAKERS[verdict.op], verdict.op, source, verdict.options))
    return Entry(name, kind, verdict.op, source)


def _replace_head(model: nn.Module, source: str | None) -> list[Entry]:
    """The output head, which a Hugging Face model names itself."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if head is None or isinstance(head, LazyHead):
        return []
    kind = type(head).__name__
    name = next((name for name, module in model.named_modules() if module is head), kind)
    if source is None:
        return [Entry(name, kind, HEAD, None, "this library replaces the forward of whole models instead")]
    if type(head) is not nn.Linear or "forward" in vars(head):
        return [Entry(name, kind, HEAD, None, f"expected nn.Linear with its own forward, got {kind}")]
    LazyHead.attach(head, whole)
    return [Entry(name, kind, HEAD, source)]


def whole(params: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """A context for a lazy head: gathers what ZeRO has freed by the time that a loss or logits are computed, no more.

    It has a name in this module, so that a head that refers to it can be pickled.
    """
    records = ((param, record_of(param)) for param in params)
    return GatheredParameters([param for param, record in records if record is not None and not record.flat.is_full])
