"""torch.compile of the blocks of a model, and the way back. Owns compiled code; knows no planes and gathers nothing.

[Note: the region] What is compiled is a block's own forward. `nn.Module.compile` would compile the whole call, the
engine's hooks inside it, and every gather would break the graph. Here the hooks stay outside and run as ordinary
Python, so a compiled block needs nothing from the engine but parameters that are whole.

[Note: one region per kind] Dynamo keeps what it compiled on the code object of a function, a few variants at most, and
remembers there which sizes have changed. All blocks of a class have one forward, blocks of every size among them. So
each kind of block (class, submodules, shapes and dtypes) has a function of its own: a hundred equal blocks are compiled
once, blocks of other sizes are neither counted as its variants nor taken for dynamic shapes, and all of it goes when
the engine goes.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from lorica.core.partition import LEAVES
from lorica.core.unit import Unit
from lorica.log import logger

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class Named(NamedTuple):
    """A block and its name in the model."""

    name: str
    module: nn.Module


class CompiledForward:
    """Stands in a block's `__dict__` where its class's forward would be found."""

    def __init__(self, block: Named, region: Callable[..., Any]) -> None:
        self._name, self._module, self._region = block.name, block.module, region
        self._eager = block.module.forward
        functools.update_wrapper(self, self._eager)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, compiled at the first call.

        Raises:
            RuntimeError: if it cannot be compiled as it was asked for.
        """
        try:
            return self._region(self._module, *args, **kwargs)
        except _errors().no_graph as error:
            raise self._no_graph(error) from error
        except _errors().too_many as error:
            raise self._too_many() from error

    def _no_graph(self, error: Exception) -> RuntimeError:
        stack = getattr(error, "real_stack", None)
        where = f" in {stack[-1].filename}:{stack[-1].lineno}" if stack else ""
        what = str(error).strip().partition("\n")[0]
        return RuntimeError(
            f"{self._title}: expected a forward that torch.compile takes as one graph, got: {what}{where}. Fix: change "
            "that line, or set compile.fullgraph to false (the block then runs in pieces), or compile.enabled to false."
        )

    def _too_many(self) -> RuntimeError:
        return RuntimeError(
            f"{self._title}: expected compiled code that serves every block like it, got one more variant than "
            "torch._dynamo.config.recompile_limit allows, because Python values that its forward reads differ from "
            "call to call (the log names one). Fix: keep them equal (Hugging Face: config.use_cache = False), raise "
            "that limit, or set compile.fullgraph to false (further variants then run uncompiled)."
        )

    @property
    def _title(self) -> str:
        return f"Block {self._name} ({type(self._module).__name__})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model must not run the original's weights: its forward is the plain one, bound to the copy."""
        return copy.deepcopy(self._eager, memo)


class _Errors(NamedTuple):
    """What Dynamo raises: if it cannot make one graph, and if it has made as many variants as it may."""

    no_graph: type[Exception]
    too_many: type[Exception]


@functools.cache
def _errors() -> _Errors:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return _Errors(TorchDynamoException, FailOnRecompileLimitHit)


class CompiledBlocks:
    """The blocks of one engine, compiled or not."""

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self._model, self._units = model, list(units)
        self._replaced: list[tuple[nn.Module, Any]] = []  # with the forward that the instance had of its own, or None

    @property
    def active(self) -> bool:
        """Whether forwards are compiled (or will be, at their first call)."""
        return bool(self._replaced)

    def compile(self, arguments: dict[str, Any], *, log: bool) -> None:
        """Compile every block at its next call; blocks that are compiled already are compiled anew.

        Args:
            arguments: keyword arguments of `torch.compile`.
            log: say what is compiled and what is not.
        Raises:
            NotImplementedError: if CUDA graphs are asked for.
        """
        _refuse_cuda_graphs(arguments)
        self.restore()
        regions: dict[Hashable, Callable[..., Any]] = {}
        blocks, left = self._choose()
        for block in blocks:
            kind = _kind_of(block.module)
            if kind not in regions:
                regions[kind] = _make_region(block.module, kind, arguments)
            self._replaced.append((block.module, block.module.__dict__.get("forward")))
            block.module.__dict__["forward"] = CompiledForward(block, regions[kind])
        if log:
            _report(len(blocks), len(regions), left, arguments)

    def restore(self) -> None:
        """Give every block the forward back that it had, unless somebody has replaced it since."""
        for module, own in self._replaced:
            if not isinstance(module.__dict__.get("forward"), CompiledForward):
                continue
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
        self._replaced.clear()

    def _choose(self) -> tuple[list[Named], list[str]]:
        """The blocks to compile, and the names of those that hold modules which other units' hooks surround."""
        names = {module: name for name, module in self._model.named_modules()}
        hooked = {module for unit in self._units for module in unit.modules}
        chosen, left = [], []
        for module in _blocks_of(self._units):
            if any(inner in hooked for inner in module.modules() if inner is not module):
                left.append(names[module])
            else:
                chosen.append(Named(names[module], module))
        return chosen, left


def _blocks_of(units: Sequence[Unit]) -> Iterator[nn.Module]:
    """The modules of all units but the root; a lone linear or embedding layer gains nothing."""
    for unit in units:
        if not unit.is_root:
            yield from (module for module in unit.modules if not isinstance(module, LEAVES))


def _kind_of(module: nn.Module) -> Hashable:
    """Equal for blocks that can share compiled code."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (
        _function_of(module) or id(module),
        tuple((name, type(inner)) for name, inner in module.named_modules()),
        tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors),
    )


def _function_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function of a forward that is an ordinary method; None for one that somebody hung on the instance."""
    forward = module.forward
    return forward.__func__ if isinstance(forward, MethodType) and forward.__self__ is module else None


def _make_region(module: nn.Module, kind: Hashable, arguments: dict[str, Any]) -> Callable[..., Any]:
    """A compiled function of (block, its arguments) with a code object of its own."""
    function, bound = _function_of(module), module.forward
    if function is not None:
        method = function

        def region(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return method(block, *args, **kwargs)
    else:

        def region(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return bound(*args, **kwargs)

    # The name tells Dynamo the kinds apart where it remembers changing sizes by file, line and name of a function.
    name = f"{type(module).__name__}_{zlib.crc32(repr(kind).encode()):08x}"
    region.__code__ = region.__code__.replace(co_name=name)
    return torch.compile(region, **arguments)


def _refuse_cuda_graphs(arguments: dict[str, Any]) -> None:
    options = arguments.get("options") or {}
    asked = [name for name in ("mode", "backend") if arguments.get(name) in (*CUDA_GRAPH_MODES, "cudagraphs")]
    if options.get("triton.cudagraphs"):
        asked.append("options")
    if asked:
        raise NotImplementedError(
            f"compile: {asked[0]} = {arguments[asked[0]]!r} records CUDA graphs, which need parameters and gradients "
            "at fixed addresses; Lorica does not promise them yet. Fix: leave it out, or use mode "
            '"max-autotune-no-cudagraphs".'
        )


def _report(num_blocks: int, num_kinds: int, left: list[str], arguments: dict[str, Any]) -> None:
    backend = arguments.get("backend")
    if num_blocks:
        logger.info("torch.compile (%s): %d blocks of %d kinds", backend, num_blocks, num_kinds)
    else:
        logger.warning(
            "torch.compile: expected blocks, but the model has none that can be compiled; it runs as it is. "
            "Fix: name their classes in lorica.units.classes, or set compile.enabled to false."
        )
    if left:
        logger.warning(
            "torch.compile: %s shares parameters with other units and runs uncompiled. Fix: untie them, or put the "
            "modules that share them into one unit (lorica.units.classes).",
            ", ".join(left),
        )
