"""Updates on the CPU, in a thread of their own, of records that live in host memory or in files.

    fetch   gradient and parameters of chunk i+1 to the host, its record from the file, where they are elsewhere
    update  chunk i by the optimizer's CPU kernel
    send    parameters of chunk i-1 to the device, its record to the file

`start` hands the work over and returns; a plane's next use waits for its own chunks only. The thread learns of the
verdict by itself, so that nobody else waits for it. Owns the thread and the ring of buffers; no formula, no decision.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.core.flat import Flat, Site, Stored
from lorica.core.gradient import GradPlane
from lorica.core.streams import CudaStreams, Streams
from lorica.kernels import native
from lorica.log import logger
from lorica.optim.base import FlatOptimizer
from lorica.update.executor import Executor
from lorica.update.guess import Assumed, Guesses, can_guess, update_beside
from lorica.update.pieces import Record, Waitable, Work, chunks_of, is_on_host, own_gradient, record_of, update_record

FETCH, SEND = "parameters down", "parameters up"


class _After:
    """An event of a device as a `Waitable` of the host."""

    def __init__(self, streams: Streams, event: Any) -> None:
        self._streams, self._event = streams, event

    def wait(self) -> None:
        """Block the host."""
        self._streams.synchronize(self._event)


class Buffers:
    """Host memory for one chunk: for what has to be brought, and only that."""

    def __init__(self, example: GradPlane, numel: int, alloc: Callable[[int, torch.dtype], Tensor]) -> None:
        """Allocate for `numel` elements of planes like `example`."""

        record = record_of(example.flat)

        def room(like: Stored | None) -> Tensor | None:
            return None if like is None or is_on_host(like) else alloc(record.range_of(like, 0, numel)[1], like.dtype)

        self.grad = alloc(numel, example.dtype) if example.flat.site.device.type != "cpu" else None
        self.master, self.out = room(record.master), room(record.out)
        self.state = {name: room(plane) for name, plane in record.state.items()}
        self.sending: list[Waitable] = []

    def wait(self) -> None:
        """Until nothing is being sent from here any more."""
        sending, self.sending = self.sending, []
        for each in sending:
            each.wait()


class Fetched(NamedTuple):
    """A chunk as the CPU sees it, once everything has arrived."""

    record: Record
    grad: Tensor
    arriving: list[Waitable]
    buffers: Buffers


class _Done:
    """Whether a plane's update is through, for the thread that needs it."""

    def __init__(self) -> None:
        self.flag = threading.Event()
        self.sent: Any = None  # the event behind which its parameters are on the device


class _Job(NamedTuple):
    """One step's work, as the thread sees it: values that nobody changes any more."""

    coef: Callable[[], float]
    apply: Callable[[], bool]
    unclipped: float
    step: int
    groups: list[dict[str, Any]]
    grads: dict[Flat, Tensor]
    versions: dict[Flat, int]
    done: dict[Flat, _Done]
    launched: Any  # the event behind which gradients and verdict are final


class _Guess(NamedTuple):
    """One plane's work ahead of the verdict."""

    plane: GradPlane
    assumed: Assumed
    grad: Tensor
    launched: Any


class OnHost(Executor):
    """The executor that brings gradients to the host and computes there."""

    learns_late = True

    def __init__(
        self,
        optimizer: FlatOptimizer,
        planes: Sequence[GradPlane],
        groups: Sequence[dict[str, Any]],
        site: Site,
        streams: Streams,
        *,
        chunk_numel: int,
        num_slots: int = 4,
        pool: native.Pool | None = None,
        guessed: Sequence[GradPlane] = (),
        before_chunk: Callable[[], None] | None = None,
    ) -> None:
        """Allocate the ring and start the thread.

        Args:
            planes: in the order of their use, with records of one kind.
            chunk_numel: elements that one slot holds, a multiple of 4096.
            num_slots: slots of the ring, at least 2: half of them are fetched ahead, the others are being sent.
            pool: the threads of the optimizer's native kernel; None: the process's.
            guessed: planes that are updated ahead of the verdict; see `update/guess.py`.
            before_chunk: called by the thread before each update (tests: delays).
        """
        self.planes = list(planes)
        self._optimizer, self._groups, self._streams = optimizer, groups, streams
        self._before_chunk, self._pool = before_chunk, pool
        self.raises = site.num_replicas == 1  # else the step raises it on all ranks alike: see `Update`
        self._chunks = chunks_of(self.planes, chunk_numel)
        size = max(chunk.numel for chunk in self._chunks)
        alloc = site.tiers["host"].alloc
        self._ring = [Buffers(self.planes[0], size, alloc) for _ in range(min(num_slots, len(self._chunks)))]
        self._ahead = max(1, len(self._ring) // 2)
        self._indices: dict[Flat, list[int]] = {}
        for index, chunk in enumerate(self._chunks):
            self._indices.setdefault(chunk.plane.flat, []).append(index)
        self._guesses = Guesses([plane for plane in guessed if can_guess(plane)])
        self.guesses = self._guesses.any
        self._expected_step = 0
        self._done: dict[Flat, _Done] = {}
        self._last: Future[None] | None = None  # the last job that was given to the thread, which takes them in order
        # It ends with this object, or at the interpreter's exit, then behind what it was given: a daemon would be cut
        # off in the middle of a kernel, whose threads are gone by then.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorica-update")

    # -- the side of the engine ----------------------------------------------------------------------------------------

    def start(self, work: Work) -> None:
        """Hand the updates of all planes over; returns at once."""
        if self.raises:
            self._raise_problem()
        self._expected_step = work.step + 1
        done = {plane.flat: _Done() for plane in self.planes}
        self._done = dict(done)
        grads = {plane.flat: own_gradient(plane) for plane in self.planes}
        versions = {plane.flat: plane.version for plane in self.planes}
        coef, apply = self._number(work.coef), self._number(1.0 if work.apply is None else work.apply)
        launched = self._streams.record()
        step, hypers = work.step, self._hypers()
        self._give(_Job(coef, lambda: bool(apply()), work.unclipped, step, hypers, grads, versions, done, launched))

    def guess(self, plane: GradPlane, coef: float, step: int) -> None:
        """The plane's gradient is complete: begin its update, if there is spare memory for it.

        Args:
            coef, step: what `start` will be told if nothing is clipped.
        """
        if self.problem is None and self._guesses.worth_while and self._guesses.has_room(plane):
            assumed = Assumed(coef, step, self._hypers(), plane.version)
            self._give(_Guess(plane, assumed, own_gradient(plane), self._streams.record()))

    def _hypers(self) -> list[dict[str, Any]]:
        """The param groups as they are now, whatever is written into them later."""
        return [copy.deepcopy({k: value for k, value in group.items() if k != "params"}) for group in self._groups]

    def _give(self, job: _Job | _Guess) -> None:
        self._last = self._thread.submit(self._perform, job)

    def _number(self, value: Tensor | float) -> Callable[[], float]:
        """A number that may still be on its way from the device."""
        if not isinstance(value, Tensor):
            return lambda: value
        if isinstance(self._streams, CudaStreams) and value.is_cuda:
            arriving = self._streams.fetch(value)
            return lambda: float(arriving.wait())
        return lambda: float(value)

    def finish(self, plane: GradPlane) -> None:
        """Wait for the plane's update, so that its parameters may be used.

        Raises:
            what went wrong in the thread.
        """
        done = self._done.get(plane.flat)
        if done is None:
            return
        done.flag.wait()
        if self.raises:
            self._raise_problem()
        self._streams.wait(done.sent)
        del self._done[plane.flat]

    def is_done(self, plane: GradPlane) -> bool:
        """Whether `finish` would return at once."""
        done = self._done.get(plane.flat)
        return done is None or done.flag.is_set()

    def open(self, plane: GradPlane, *, write: bool) -> None:
        """Wait until all records are at home; what was guessed of one that will be written is void."""
        if self._last is not None:
            self._last.result()
        self._raise_problem()
        if write:
            self._guesses.drop()

    def close(self) -> None:
        """End the thread, after what it was given, and free the ring; says what went wrong, for nobody else will."""
        self._thread.shutdown(wait=True)
        if self.problem is not None:
            logger.error("The last updates of optimizer states were not made: %s", self.problem)
        self._ring.clear()

    def _raise_problem(self) -> None:
        if self.problem is not None:
            raise self.problem

    # -- the side of the thread ----------------------------------------------------------------------------------------

    def _perform(self, job: _Job | _Guess) -> None:
        """All chunks of one step, or of one guess."""
        try:
            if self.problem is None:
                with nullcontext() if self._pool is None else native.on(self._pool):
                    self._run_guess(job) if isinstance(job, _Guess) else self._run(job)
        except BaseException as problem:  # handed to whoever waits: see `finish`
            self.problem = problem
        if isinstance(job, _Job):
            for each in job.done.values():
                each.flag.set()

    def _run(self, job: _Job) -> None:
        if not job.apply():
            self._guesses.drop()
            self._guesses.learn(right=False)
            return
        coef, left = job.coef(), []
        for flat, indices in self._indices.items():
            assumed = Assumed(coef, job.step, job.groups, job.versions[flat])
            new_params = self._guesses.take(flat, assumed)
            if new_params is None:
                left += indices
            else:
                self._announce(job, flat, self._send_params(flat, new_params))
        self._guesses.learn(right=coef == job.unclipped)
        self._pipeline(left, job.grads, job.launched, partial(self._update, job, coef))

    def _update(self, job: _Job, coef: float, index: int, fetched: Fetched) -> None:
        """Update one chunk in place and send it home."""
        chunk = self._chunks[index]
        flat = chunk.plane.flat
        update_record(
            self._optimizer, flat, fetched.record, fetched.grad, job.groups, chunk.low, chunk.high,
            coef=coef, step=job.step,
        )  # fmt: skip
        sent = self._send(index, fetched.record, fetched.buffers)
        if chunk.is_last:
            self._announce(job, flat, sent)

    def _announce(self, job: _Job, flat: Flat, sent: Any) -> None:
        """The plane may be used behind `sent`."""
        job.grads.pop(flat)
        job.done[flat].sent = sent
        job.done[flat].flag.set()

    def _send_params(self, flat: Flat, values: Tensor) -> Any:
        with self._streams.stream(SEND):
            flat.owned.copy_(values, non_blocking=True)
            sent = self._streams.record()
        self._ring[0].sending.append(_After(self._streams, sent))
        return sent

    def _run_guess(self, guess: _Guess) -> None:
        if guess.assumed.step < self._expected_step:
            return  # the verdict is there already: no need to guess
        flat, assumed = guess.plane.flat, guess.assumed
        spare = self._guesses.spare(flat)
        self._pipeline(
            self._indices[flat], {flat: guess.grad}, guess.launched, partial(self._write_beside, spare, assumed)
        )
        self._guesses.made(flat, assumed)

    def _write_beside(self, spare: Record, assumed: Assumed, index: int, fetched: Fetched) -> None:
        """Write one chunk's new record to spare memory."""
        chunk = self._chunks[index]
        new = spare.part(chunk.low, chunk.high)
        update_beside(
            self._optimizer, chunk.plane.flat, fetched.record, new, fetched.grad, assumed, chunk.low, chunk.high
        )

    def _pipeline(
        self, indices: Sequence[int], grads: dict[Flat, Tensor], launched: Any, work: Callable[[int, Fetched], None]
    ) -> None:
        """Fetch ahead and work on one chunk after the other; returns when everything is where it belongs."""
        fetched: deque[Fetched] = deque()
        for number, index in enumerate(indices):
            while len(fetched) < self._ahead and number + len(fetched) < len(indices):
                fetched.append(self._fetch(indices[number + len(fetched)], number + len(fetched), grads, launched))
            here = fetched.popleft()
            for each in here.arriving:
                each.wait()
            if self._before_chunk is not None:
                self._before_chunk()
            work(index, here)
        for buffers in self._ring:
            buffers.wait()

    def _fetch(self, index: int, place: int, grads: dict[Flat, Tensor], launched: Any) -> Fetched:
        """Start bringing what a chunk needs to a place of the ring; what is on the host is used where it is."""
        chunk, buffers = self._chunks[index], self._ring[place % len(self._ring)]
        buffers.wait()
        there, arriving = record_of(chunk.plane.flat), []
        with self._streams.stream(FETCH):
            self._streams.wait(launched)

            def bring(plane: Stored, buffer: Tensor | None) -> Tensor:
                low, high = there.range_of(plane, chunk.low, chunk.high)
                if buffer is None:
                    part: Tensor = plane[low:high]
                    return part
                here = buffer[: high - low]
                if isinstance(plane, Tensor):
                    here.copy_(plane[low:high], non_blocking=True)
                else:
                    arriving.append(plane.read(low, high, here))
                return here

            grad = bring(grads[chunk.plane.flat], buffers.grad)
            out = None if there.out is None else bring(there.out, buffers.out)
            state = {name: bring(plane, buffers.state[name]) for name, plane in there.state.items()}
            record = Record(bring(there.master, buffers.master), out, state)
            arriving.append(_After(self._streams, self._streams.record()))
        return Fetched(record, grad, arriving, buffers)

    def _send(self, index: int, here: Record, buffers: Buffers) -> Any:
        """Start sending what lives elsewhere; returns the event behind which the parameters are on the device."""
        chunk = self._chunks[index]
        there = record_of(chunk.plane.flat)
        pairs = [(here.master, there.master), (here.out, there.out)]
        pairs += [(here.state[name], plane) for name, plane in there.state.items()]
        with self._streams.stream(SEND):
            for source, target in pairs:
                if target is None or is_on_host(target):
                    continue
                low, high = there.range_of(target, chunk.low, chunk.high)
                if isinstance(target, Tensor):
                    target[low:high].copy_(source, non_blocking=True)
                else:
                    buffers.sending.append(target.write(low, source))
            sent = self._streams.record()
        buffers.sending.append(_After(self._streams, sent))
        return sent
