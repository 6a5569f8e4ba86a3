"""Several calls that take turns: a thread each, of which exactly one runs, in an order that places in the code decide.

`train_batch` runs the forward of every micro-batch as one such call, and the engine's hooks make each of them wait
before a unit: all micro-batches go through a unit before the first of them enters the next. Owns the threads, whose
turn it is, and what must be as if there were one thread. Knows no units: a place is a number.

[Note: one order of nodes] Autograd runs backward in the reverse order of the numbers that nodes got in forward, and
every thread counts by itself: K micro-batches would go backward node by node, all of them at once. `renumber` gives
every node the number that it would have had in one thread, so that backward, too, is unit by unit and micro-batch by
micro-batch within a unit, and gradients are summed in one order. Test: test_train_batch, "bit for bit".

[Note: a stream of random numbers each] Micro-batch 0 draws from torch's generators what it would have drawn in a loop,
and they go on after it. Micro-batch k > 0 draws from a stream of its own, seeded by the state in which the generators
were, k and a number from the caller: deterministic, and nothing is drawn for it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from hashlib import blake2b
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import _autograd
from torch.utils import _python_dispatch

T = TypeVar("T")
START = -1  # the place of a call that has not begun
LEAF = 2**63  # autograd's own number of the nodes that accumulate gradients is above, and they keep it


class Abandoned(BaseException):
    """Ends a call because another one failed; no `Exception`, so that nobody takes it for an error of his own."""


class Randomness(NamedTuple):
    """The states of torch's default generators: of the CPU, and of the device if it has one."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """As they are."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        """Make them what they were."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)

    def derived(self, index: int, salt: int, device: torch.device) -> Randomness:
        """Other streams, one for each `index` and `salt`. See [Note: a stream of random numbers each]."""

        def seeded(state: Tensor, where: torch.device | str) -> Tensor:
            key = f"{index} {salt}".encode()
            number = int.from_bytes(blake2b(state.numpy().tobytes(), digest_size=8, key=key).digest(), "little")
            return torch.Generator(where).manual_seed(number >> 1).get_state()

        return Randomness(seeded(self.cpu, "cpu"), None if self.cuda is None else seeded(self.cuda, device))


class Surroundings:
    """What torch and Python keep for each thread, as it is in the thread that makes this, for others to take on."""

    def __init__(self, device: torch.device) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}
        ]
        self._autocast_caches = torch.is_autocast_cache_enabled()
        self._function_modes = torch.overrides._get_current_function_mode_stack()
        self._dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack()
        self._saving = _autograd._top_saved_tensors_default_hooks(True)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._context = copy_context()

    def run(self, call: Callable[[], T]) -> T:
        """Run `call` in a new thread as if it ran in the old one."""
        return self._context.copy().run(self._run, call)

    def _run(self, call: Callable[[], T]) -> T:
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)  # and its device
        torch.set_autocast_cache_enabled(self._autocast_caches)
        for kind, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        with ExitStack() as stack:
            if self._saving is not None:
                _autograd._push_saved_tensors_default_hooks(*self._saving)
                stack.callback(_autograd._pop_saved_tensors_default_hooks)
            for function_mode in self._function_modes:
                torch.overrides._push_mode(function_mode)
                stack.callback(torch.overrides._pop_mode)
            for dispatch_mode in self._dispatch_modes:
                _python_dispatch._push_mode(dispatch_mode)
                stack.callback(_python_dispatch._pop_mode, getattr(dispatch_mode, "_mode_key", None))
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            return call()


class _Worker(Generic[T]):
    """One call: its thread, where it waits, its random numbers, and which nodes it made in which turn."""

    def __init__(self, call: Callable[[], T], randomness: Randomness) -> None:
        self.call, self.randomness = call, randomness
        self.go = threading.Semaphore(0)
        self.place = START
        self.alive = True
        self.result: T | None = None
        self.starts: list[int] = []  # of each turn: the first number of its nodes in this thread ...
        self.shifts: list[int] = []  # ... and how far it is from the number in the common order


class Turns(Generic[T]):
    """Calls that take turns, the last one first: then backward, which goes the other way, begins with the first one."""

    def __init__(self, calls: Sequence[Callable[[], T]], device: torch.device, *, salt: int) -> None:
        """Prepare; `run` starts the threads.

        Args:
            calls: in the order in which a loop would make them.
            device: on which they compute.
            salt: another number gives other random numbers to all calls but the first.
        """
        self._device = device
        before = Randomness.now(device)
        workers = [_Worker(c, before.derived(i, salt, device) if i else before) for i, c in enumerate(calls)]
        self._workers, self._ring = workers, workers[::-1]
        self._running = self._ring[0]
        self._place = START
        self._count = 0  # nodes made in all turns
        self._failure: BaseException | None = None

    # -- whose turn it is ----------------------------------------------------------------------------------------------

    def awaited(self, place: int) -> bool:
        """Whether a call waits to enter `place`."""
        return any(w.place == place for w in self._ring if w.alive and w is not self._running)

    @property
    def is_last(self) -> bool:
        """Whether all calls but the running one are over."""
        return sum(w.alive for w in self._ring) == 1

    def wait(self, place: int) -> None:
        """The running call has come to `place`: it goes on when it is its turn there.

        Those who wait at the place where one has just been go first; then the earliest place at which anybody waits.
        """
        worker = self._running
        worker.place = place
        self._end_turn(worker)
        following = self._choose()
        if following is not worker:
            worker.randomness = Randomness.now(self._device)
            self._hand_to(following)
            worker.go.acquire()
            self._take_over(worker)
        if self._failure is not None:
            raise Abandoned
        worker.place = START
        self._begin_turn(worker)

    def _choose(self) -> _Worker[T]:
        waiting = [w for w in self._ring if w.alive]
        here = [w for w in waiting if w.place == self._place]
        if not here:
            self._place = min(w.place for w in waiting)
            return next(w for w in waiting if w.place == self._place)
        last, size = self._ring.index(self._running), len(self._ring)
        return min(here, key=lambda w: (self._ring.index(w) - last - 1) % size)

    def _hand_to(self, worker: _Worker[T]) -> None:
        self._running = worker
        worker.go.release()

    def _take_over(self, worker: _Worker[T]) -> None:
        torch.clear_autocast_cache()  # another call's casts: gradients would be summed in the lower precision
        worker.randomness.restore(self._device)

    # -- threads -------------------------------------------------------------------------------------------------------

    def run(self) -> list[T]:
        """Make all calls.

        Returns:
            Their results, in the order of the calls.
        Raises:
            BaseException: what the first call that failed has raised; the others have been ended.
        """
        surroundings = Surroundings(self._device)
        threads = [
            threading.Thread(target=self._work, args=(worker, surroundings), name=f"micro-batch {index}", daemon=True)
            for index, worker in enumerate(self._workers)
        ]
        for thread in threads:
            thread.start()
        self._hand_to(self._ring[0])
        try:
            _join(threads)
        except BaseException as interrupt:
            self._failure = interrupt
            _join(threads)
        self._take_over(self._workers[0])
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # whose traceback holds this frame
        return [worker.result for worker in self._workers]  # type: ignore[misc]

    def _work(self, worker: _Worker[T], surroundings: Surroundings) -> None:
        """What the thread of `worker` does."""
        worker.go.acquire()
        if self._failure is None:
            self._take_over(worker)
            self._begin_turn(worker)
            try:
                worker.result = surroundings.run(worker.call)
            except Abandoned:
                pass
            except BaseException as error:
                self._failure = self._failure or error
            self._end_turn(worker)
            worker.randomness = Randomness.now(self._device)
        worker.alive = False
        if any(w.alive for w in self._ring):
            self._hand_to(self._choose())

    # -- autograd's numbers --------------------------------------------------------------------------------------------

    def _begin_turn(self, worker: _Worker[T]) -> None:
        start = _autograd._get_sequence_nr()
        worker.starts.append(start)
        worker.shifts.append(self._count - start)

    def _end_turn(self, worker: _Worker[T]) -> None:
        self._count = _autograd._get_sequence_nr() + worker.shifts[-1]

    def renumber(self, outputs: Iterable[Sequence[Tensor]]) -> None:
        """Give the graph behind each call's `outputs` the numbers of one thread. See [Note: one order of nodes].

        Args:
            outputs: in the order of the calls.
        """
        seen: set[torch.autograd.graph.Node] = set()
        for worker, tensors in zip(self._workers, outputs, strict=True):
            pending = [tensor.grad_fn for tensor in tensors]
            while pending:
                node = pending.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                number = node._sequence_nr()
                turn = bisect_right(worker.starts, number) - 1
                if number < LEAF and turn >= 0:
                    node._set_sequence_nr(number + worker.shifts[turn])  # type: ignore[attr-defined]
                pending += [following for following, _ in node.next_functions]


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
