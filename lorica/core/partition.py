"""Cut a module tree into units: blocks of repeated structure, large leaves, and the root. Allocates nothing.

1. Blocks are the modules named by the model (`_no_split_modules` of Hugging Face) or by the user; without either, the
   children of every `ModuleList` and `Sequential`, outermost first; a block above `max_numel` is cut again inside.
2. Consecutive blocks below `min_numel` are merged.
3. An embedding or linear layer outside the blocks, large enough and with parameters of its own, is a unit.
4. All other parameters, tied ones among them, are the root unit: gathered for the whole forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

LEAVES = (nn.Embedding, nn.Linear)
CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Cut:
    """How fine the units are: elements per unit, and class names of blocks.

    `classes` replaces what would be found automatically; `also` adds to it.
    """

    classes: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    min_numel: int = 2**18
    max_numel: int = 10**9
    leaf_min_numel: int = 2**20


@dataclass(frozen=True)
class UnitSpec:
    """A unit to be: its name, the modules whose calls surround its use, and its parameters by full name."""

    name: str
    modules: tuple[nn.Module, ...]
    params: dict[str, nn.Parameter]
    is_root: bool = False


def partition(model: nn.Module, cut: Cut) -> list[UnitSpec]:
    """The units of `model` in order of definition; the root is the last one, with or without parameters.

    Every parameter is in exactly one unit. A parameter that modules of several units use is in the root.
    """
    names = {module: name for name, module in model.named_modules()}
    owners = _owners(model)
    classes = set(cut.classes) or _declared_blocks(model)
    containers = CONTAINERS if not classes else ()
    blocks = list(_find_blocks(model, classes | set(cut.also), containers, cut.max_numel))
    if classes and not blocks:
        blocks = list(_find_blocks(model, set(cut.also), CONTAINERS, cut.max_numel))
    groups = _merge(blocks, names, cut.min_numel)
    taken = {module for block in blocks for module in block.modules()}
    groups += [[leaf] for leaf in _large_leaves(model, taken, owners, cut.leaf_min_numel)]

    specs: list[UnitSpec] = []
    placed: set[int] = set()
    for group in groups:
        params = _own_params(group, names, owners, placed)
        if params:
            placed.update(map(id, params.values()))
            called = [module for block in group for module in _callable(block)]
            specs.append(UnitSpec(_span([names[m] for m in group]), tuple(called), params))
    rest = {name: p for name, p in model.named_parameters() if id(p) not in placed}
    return [*specs, UnitSpec("root", _root_modules(model, rest, owners), rest, is_root=True)]


def numel_of(module: nn.Module) -> int:
    """Elements of all parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[id(param)].append(module)
    return owners


def _declared_blocks(model: nn.Module) -> set[str]:
    declared: set[str] = set()
    for module in model.modules():
        names = getattr(module, "_no_split_modules", None)
        if isinstance(names, (list, tuple, set)):
            declared.update(names)
    return declared


def _find_blocks(
    module: nn.Module, classes: Collection[str], containers: tuple[type, ...], max_numel: int
) -> Iterator[nn.Module]:
    """Outermost blocks below `module`, in order; those above `max_numel` are searched for smaller ones."""
    for child in module.children():
        chosen = type(child).__name__ in classes or isinstance(module, containers)
        if chosen and numel_of(child):
            too_large = numel_of(child) > max_numel
            inner = list(_find_blocks(child, (), CONTAINERS, max_numel)) if too_large else []
            yield from inner or [child]
        else:
            yield from _find_blocks(child, classes, containers, max_numel)


def _merge(blocks: Sequence[nn.Module], names: dict[nn.Module, str], min_numel: int) -> list[list[nn.Module]]:
    """Join neighbours of one container until each group has `min_numel` elements."""
    groups: list[list[nn.Module]] = []
    parent = None
    for block in blocks:
        container = names[block].rpartition(".")[0]
        if groups and container == parent and sum(map(numel_of, groups[-1])) < min_numel:
            groups[-1].append(block)
        else:
            groups.append([block])
        parent = container
    return groups


def _large_leaves(
    model: nn.Module, taken: Collection[nn.Module], owners: dict[int, list[nn.Module]], min_numel: int
) -> Iterator[nn.Module]:
    for module in model.modules():
        params = list(module.parameters(recurse=False))
        own = all(len(owners[id(p)]) == 1 for p in params)
        outside = isinstance(module, LEAVES) and module is not model and module not in taken
        if outside and own and sum(p.numel() for p in params) >= min_numel:
            yield module


def _own_params(
    group: Sequence[nn.Module], names: dict[nn.Module, str], owners: dict[int, list[nn.Module]], placed: set[int]
) -> dict[str, nn.Parameter]:
    """Parameters that only modules inside `group` use."""
    inside = {module for block in group for module in block.modules()}
    params: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for block in group:
        for name, param in block.named_parameters(prefix=names[block]):
            if id(param) in seen or id(param) in placed or not all(owner in inside for owner in owners[id(param)]):
                continue
            seen.add(id(param))
            params[name] = param
    return params


def _root_modules(
    model: nn.Module, rest: dict[str, nn.Parameter], owners: dict[int, list[nn.Module]]
) -> tuple[nn.Module, ...]:
    """The model itself, and every module that uses a root parameter (it may be called without the model's forward)."""
    users = {id(owner): owner for param in rest.values() for owner in owners[id(param)] if owner is not model}
    return (model, *users.values())


def _callable(block: nn.Module) -> Iterator[nn.Module]:
    """The modules whose calls surround the use of `block`: itself, or what is in it if it is a mere list.

    A list of experts is one unit: ranks that choose different experts still gather the same planes.
    """
    if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        for child in block.children():
            yield from _callable(child)
    else:
        yield block


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}..{names[-1].rpartition('.')[2]}"
