"""Between autograd and the units: what happens before and after a unit's forward and backward.

    pre_forward    gather the unit, look ahead            inputs are watched: their gradient means "unit done"
    post_forward   free the unit                          outputs are watched: their gradient means "unit begins"
    pre_backward   gather again, look ahead backwards
    post_backward  free, and hand the gradients to the reducer

Hooks are installed on the unmodified modules and removed by `close`.

[Note: watching inputs] An input tensor may be used by other units too, and its gradient is complete only when all of
them are done. Each unit therefore gets an alias (`view_as`) of every input that requires a gradient: the alias has a
graph node of its own, whose hook fires when this unit alone is done. An alias is an ordinary view, so in-place
operations on inputs keep working.

[Note: recomputation] Under activation checkpointing a unit's forward runs again inside backward. It must not be freed
after that (its backward follows at once), and it is watched again only if its first forward was not (reentrant
checkpointing runs it without gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from lorica.core.flat import Flat
from lorica.core.grads import Reducer
from lorica.core.prefetch import Prefetcher
from lorica.core.unit import Unit

NO_TASK = -1


def in_backward() -> bool:
    """Whether the calling code runs inside autograd's backward."""
    return torch._C._current_graph_task_id() != NO_TASK


class _Pass:
    """One forward pass through a unit, on its way to its backward.

    Only the hooks in the graph hold it: when a graph is dropped without a backward, its passes are gone too.
    """

    __slots__ = ("__weakref__", "num_inputs", "task", "waiting")

    def __init__(self, num_inputs: int) -> None:
        self.num_inputs = num_inputs
        self.waiting = num_inputs  # inputs whose gradient is not there yet
        self.task = NO_TASK  # autograd's number of the backward that is or was at it

    @property
    def started(self) -> bool:
        """Whether a backward has come to it."""
        return self.task != NO_TASK

    def start(self, task: int) -> None:
        """A backward comes to it: the first one, or another one over a retained graph."""
        self.task, self.waiting = task, self.num_inputs


class Hooks:
    """The hooks of one engine on one model."""

    def __init__(
        self,
        units: Sequence[Unit],
        prefetcher: Prefetcher,
        reducer: Reducer,
        *,
        begin_backward: Callable[[], None],
        max_reuse_numel: int,
    ) -> None:
        """Install the hooks.

        Args:
            begin_backward: called when the first unit's backward begins, if the engine has not begun it itself.
            max_reuse_numel: keep a unit between forward and backward if at most this many elements are used meanwhile.
        """
        self._units, self._prefetcher, self._reducer = list(units), prefetcher, reducer
        self._begin_backward, self._max_reuse = begin_backward, max_reuse_numel
        self._stack: list[tuple[Unit, _Pass | None]] = []
        self._owner = {id(flat): unit for unit in units for flat in unit.flats}
        self._kept: set[Unit] = set()
        self._passes: dict[Unit, WeakSet[_Pass]] = {unit: WeakSet() for unit in units}
        self._lingering: set[Unit] = set()
        self._handles: list[RemovableHandle] = []
        for unit in units:
            for flat in unit.flats:
                flat.on_demand = self
            for module in unit.modules:
                self._install(unit, module)

    def _install(self, unit: Unit, module: nn.Module) -> None:
        @torch.compiler.disable
        def pre(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            return self._pre_forward(unit, module, args, kwargs)

        @torch.compiler.disable
        def post(module: nn.Module, args: Any, output: Any) -> None:
            self._post_forward(unit, module, output)

        self._handles += [
            module.register_forward_pre_hook(pre, with_kwargs=True, prepend=True),
            module.register_forward_hook(post, always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def expects(self, unit: Unit) -> bool:
        """Whether gradients of `unit` may still come: it ran since the last backward, or a graph that used it lives."""
        return unit.visited or bool(self._passes[unit])

    # -- forward -------------------------------------------------------------------------------------------------------

    def _pre_forward(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        unit.depth += 1
        if unit.depth > 1:
            return None
        backward = in_backward()
        if not backward:
            self._enter(unit, module)
        recomputed = backward and bool(self._passes[unit])  # see [Note: recomputation]
        step = None
        if torch.is_grad_enabled() and not recomputed:
            args, kwargs, step = self._watch_inputs(unit, args, kwargs)
        self._stack.append((unit, step))
        self._prefetcher.use(unit, backward=backward)
        return None if step is None else (args, kwargs)

    def _enter(self, unit: Unit, module: nn.Module) -> None:
        unit.visited = True
        for other in self._lingering - {unit}:
            self._free_after_forward(other)
        if not unit.is_root:
            self._prefetcher.record(unit)
        elif module is unit.modules[0]:
            self._prefetcher.start_pass()

    def _post_forward(self, unit: Unit, module: nn.Module, output: Any) -> None:
        unit.depth -= 1
        if unit.depth:
            return
        _, step = self._stack.pop()
        if step is not None:
            self._watch_outputs(unit, step, output)
        if in_backward():
            return
        if unit.is_root and module is unit.modules[0]:
            self._end_forward(unit)
        elif unit.is_root or module is unit.modules[-1]:
            self._free_after_forward(unit)
        else:
            self._lingering.add(unit)  # a unit of several modules: the next one follows

    def _free_after_forward(self, unit: Unit) -> None:
        self._lingering.discard(unit)
        if torch.is_grad_enabled() and self._worth_keeping(unit):
            self._kept.add(unit)
        else:
            self._prefetcher.release(unit)

    def _worth_keeping(self, unit: Unit) -> bool:
        """Backward comes back to the last units at once; with a budget, to earlier ones soon enough."""
        return 2 * self._prefetcher.remaining_numel(unit) <= self._max_reuse

    def _end_forward(self, root: Unit) -> None:
        for unit in set(self._lingering):
            self._free_after_forward(unit)
        keep = self._kept | {root, *root.externals} if torch.is_grad_enabled() else set()
        self._kept.clear()
        self._prefetcher.release_all(keep=keep)

    def touched(self, flat: Flat) -> bool:
        """Gather a plane whose parameter is used outside its own modules, and remember who uses it."""
        if not self._stack:
            return False
        unit, user = self._owner[id(flat)], self._stack[-1][0]
        if unit is not user and unit not in user.externals:
            user.externals.append(unit)
        self._prefetcher.use(unit, backward=in_backward())
        return True

    # -- watching ------------------------------------------------------------------------------------------------------

    def _watch_inputs(self, unit: Unit, args: Any, kwargs: Any) -> tuple[Any, Any, _Pass]:
        leaves, spec = tree_flatten((args, kwargs))
        wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        step = _Pass(len(wanted))
        self._passes[unit].add(step)
        if not wanted:
            return args, kwargs, step
        hook = partial(self._post_backward, unit, step)
        for i in wanted:
            leaves[i] = leaves[i].view_as(leaves[i])  # see [Note: watching inputs]
            leaves[i].register_hook(hook)
        args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs, step

    def _watch_outputs(self, unit: Unit, step: _Pass, output: Any) -> None:
        hook = partial(self._pre_backward, unit, step)
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(hook)

    # -- backward ------------------------------------------------------------------------------------------------------

    def _pre_backward(self, unit: Unit, step: _Pass, _: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if step.task == task:
            return
        step.start(task)
        self._passes[unit].add(step)
        self._begin_backward()
        self._prefetcher.use(unit, backward=True)

    def _post_backward(self, unit: Unit, step: _Pass, _: Tensor) -> None:
        step.waiting -= 1
        if step.waiting:
            return
        self._passes[unit].discard(step)
        if unit.is_root or any(other.started for other in self._passes[unit]):
            return
        if not self._passes[unit]:
            self._reducer.complete(unit)
        self._prefetcher.release(unit)
        for other in unit.externals:
            self._prefetcher.release(other)

    def end_backward(self) -> None:
        """Forget the passes whose backward was begun, and free what is whole."""
        for unit in self._units:
            unit.depth = 0
            self._passes[unit] = WeakSet(step for step in self._passes[unit] if not step.started)
        self._stack.clear()
        self.free_all()

    def free_all(self) -> None:
        """Free every gathered parameter."""
        self._kept.clear()
        self._lingering.clear()
        self._prefetcher.release_all()


def tensors_in(tree: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in a module's output: containers, dataclasses and plain objects are searched."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value, depth + 1)
    elif isinstance(tree, (list, tuple, set)):
        for value in tree:
            yield from tensors_in(value, depth + 1)
    elif depth < 4 and hasattr(tree, "__dict__") and not isinstance(tree, (nn.Module, type)):
        for value in vars(tree).values():
            yield from tensors_in(value, depth + 1)
