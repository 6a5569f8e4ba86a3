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

[Note: unit by unit] `take_turns` runs the forward of several micro-batches at once, in turns (core/interleave.py): each
waits before a unit until it is its turn there, and a unit stays whole until the last of those that wait has left it.
One backward follows for all of them. It comes to a unit once for each micro-batch, so a unit stays whole while more
passes through it are to come; but if another unit is used meanwhile (not every micro-batch need run every unit), the
guess was wrong, and the unit is freed and gathered again later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from lorica.core.flat import Flat
from lorica.core.grads import Reducer
from lorica.core.interleave import Turns
from lorica.core.prefetch import Prefetcher
from lorica.core.unit import Unit

T = TypeVar("T")
NO_TASK = -1


def in_backward() -> bool:
    """Whether the calling code runs inside autograd's backward."""
    return torch._C._current_graph_task_id() != NO_TASK


class _Pass:
    """One forward pass through a unit, on its way to its backward.

    Only the hooks in the graph hold it: when a graph is dropped without a backward, its passes are gone too.
    """

    __slots__ = ("__weakref__", "num_inputs", "recomputed", "task", "waiting")

    def __init__(self, num_inputs: int, *, recomputed: bool) -> None:
        self.num_inputs = num_inputs
        self.recomputed = recomputed  # watched in backward only, because its forward ran without gradients
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
        self._turns: Turns[Any] | None = None  # while several micro-batches are in forward
        self._joint = False  # one backward is to come, or runs, for several micro-batches
        self._expected_again: set[Unit] = set()  # kept whole in backward for the next micro-batch
        self._unwatched: Counter[Unit] = Counter()  # forwards without gradients that may be recomputed in backward
        self._places: dict[Unit, int] = {}
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

    def is_whole_by_count(self, unit: Unit) -> bool:
        """Whether `unit` has all its gradients once each of its parameters has one (recomputations bring more)."""
        return not self._unwatched[unit]

    # -- several micro-batches -----------------------------------------------------------------------------------------

    def take_turns(self, turns: Turns[T]) -> list[T]:
        """Run forwards unit by unit. See [Note: unit by unit].

        Args:
            turns: the calls; with gradients, one backward through all of them has to follow, and `end_backward`.
        Returns:
            Their results.
        Raises:
            BaseException: what one of them has raised; everything is as before then.
        """
        order = self._prefetcher.order
        known = {unit: place for place, unit in enumerate(order)}
        self._places = {unit: known.get(unit, len(order) + unit.index) for unit in self._units}
        self._turns, self._joint = turns, torch.is_grad_enabled()
        try:
            return turns.run()
        except BaseException:
            self.end_backward()
            raise
        finally:
            self._turns = None

    def _await_turn(self, unit: Unit) -> None:
        """Let other micro-batches come here first; what is remembered about the present one is put aside meanwhile."""
        if self._turns is None or unit.is_root or unit in self._lingering:
            return
        if any(not user.is_root for user, _ in self._stack):
            return  # inside another unit, which would have to stay whole
        for other in set(self._lingering):
            self._free_after_forward(other)
        stack, self._stack = self._stack, []
        depths = [user.depth for user, _ in stack]
        for user, _ in stack:
            user.depth = 0
        self._turns.wait(self._places[unit])
        self._stack = stack
        for (user, _), depth in zip(stack, depths, strict=True):
            user.depth = depth

    # -- forward -------------------------------------------------------------------------------------------------------

    def _pre_forward(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        backward = in_backward()
        if not unit.depth and not backward:
            self._await_turn(unit)
        unit.depth += 1
        if unit.depth > 1:
            return None
        if backward:
            self._leave_others(unit)
        else:
            self._enter(unit, module)
        recomputed = backward and bool(self._passes[unit])  # see [Note: recomputation]
        step = None
        if torch.is_grad_enabled() and not recomputed:
            args, kwargs, step = self._watch_inputs(unit, args, kwargs, recomputed=backward)
        self._stack.append((unit, step))
        self._prefetcher.use(unit, backward=backward)
        return None if step is None else (args, kwargs)

    def _enter(self, unit: Unit, module: nn.Module) -> None:
        unit.visited = True
        if self._joint and not torch.is_grad_enabled():
            self._unwatched[unit] += 1
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
        if self._turns is not None and self._turns.awaited(self._places[unit]):
            return
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
        if self._turns is not None and not self._turns.is_last:
            return
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

    def _watch_inputs(self, unit: Unit, args: Any, kwargs: Any, *, recomputed: bool) -> tuple[Any, Any, _Pass]:
        leaves, spec = tree_flatten((args, kwargs))
        wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        step = _Pass(len(wanted), recomputed=recomputed)
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
        self._leave_others(unit)
        self._prefetcher.use(unit, backward=True)

    def _post_backward(self, unit: Unit, step: _Pass, _: Tensor) -> None:
        step.waiting -= 1
        if step.waiting:
            return
        self._passes[unit].discard(step)
        if step.recomputed and self._unwatched[unit]:
            self._unwatched[unit] -= 1
        if unit.is_root or any(other.started for other in self._passes[unit]):
            return
        if not self._passes[unit] and not self._unwatched[unit]:
            self._reducer.complete(unit)
        elif self._joint:
            self._expected_again.add(unit)
            return
        self._free_after_backward(unit)

    def _free_after_backward(self, unit: Unit) -> None:
        self._expected_again.discard(unit)
        self._prefetcher.release(unit)
        for other in unit.externals:
            self._prefetcher.release(other)

    def _leave_others(self, unit: Unit) -> None:
        """Backward comes to `unit`: see [Note: unit by unit]. (In between it comes to the root.)"""
        kept = self._expected_again if not unit.is_root else set()
        for other in kept - {unit, *unit.externals}:
            if not any(step.started or step.recomputed for step in self._passes[other]):
                self._free_after_backward(other)

    def end_backward(self) -> None:
        """Forget the passes whose backward was begun, and free what is whole."""
        for unit in self._units:
            unit.depth = 0
            self._passes[unit] = WeakSet(step for step in self._passes[unit] if not step.started)
        self._stack.clear()
        self._joint = False
        self._unwatched.clear()
        self.free_all()

    def free_all(self) -> None:
        """Free every gathered parameter."""
        self._kept.clear()
        self._lingering.clear()
        self._expected_again.clear()
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
