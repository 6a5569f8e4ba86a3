"""Runs one function on P processes that are started once and reused; knows processes and time limits, not engines.

    ranks = Ranks(2)
    first, second = ranks.run(call, keyword=argument)      # one result per rank, or RankFailure
    ranks.close()

Importing torch costs seconds, a case costs tenths of a second: so each world size has one group of workers for the
whole test session (fixture `ranks` in conftest.py). Every call gets a fresh gloo process group over loopback; its store
lives in the parent, whose port the system chose, so two sessions on one machine cannot collide.

A call that raises comes back as its traceback and leaves the workers alive. A call that hangs is cut after its time
limit: the error names the ranks that hang and the line each of them stands in, and the next call gets new workers.
World size 1 runs in this process, where a debugger works.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

START_LIMIT_S = 120.0  # importing torch on a machine that is busy with something else
CALL_LIMIT_S = 120.0
M_MMAP_THRESHOLD = -3  # of malloc.h
GRACE_S = 20.0  # what the other ranks get once one rank has failed: they may wait in a collective for ever


class RankFailure(AssertionError):
    """A call failed on some rank; the message holds every rank's traceback or the place where it hangs."""


@dataclass(frozen=True)
class Answer:
    """What one rank sends back: a value, or the traceback of what it raised."""

    value: Any = None
    problem: str | None = None


@contextmanager
def process_group(store: dist.Store, rank: int, world_size: int, limit_s: float) -> Iterator[None]:
    """A default gloo group and the environment a launcher would set, gone again at the end."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=limit_s))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in names:
            os.environ.pop(name, None)


def answer(call: Callable[..., Any], kwargs: dict[str, Any]) -> Answer:
    """Call and catch: the one place where any exception of a case becomes text."""
    try:
        return Answer(value=call(**kwargs))
    except BaseException:
        return Answer(problem=traceback.format_exc())


def give_freed_memory_back() -> None:
    """Tell glibc to map large blocks and unmap them when freed: what a process holds is then what it uses.

    By default it raises its limit for mapping with every large block that is freed, and keeps hundreds of MiB.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)


def work(rank: int, world_size: int, port: int, pipe: Connection, stacks: str) -> None:
    """A worker's life: receive (number, call, kwargs, limit), run it in a fresh group, send the answer."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    give_freed_memory_back()
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=START_LIMIT_S))
        pipe.send_bytes(b"ready")
        while (message := pipe.recv_bytes()) != b"end":
            pipe.send_bytes(pickle.dumps(perform(message, rank, world_size, store)))


def perform(message: bytes, rank: int, world_size: int, store: dist.Store) -> Answer:
    """Decode and run one call; an unpicklable result is the case's failure, not the worker's."""

    def call() -> bytes:
        number, function, kwargs, limit_s = pickle.loads(message)
        with process_group(dist.PrefixStore(f"call {number}", store), rank, world_size, limit_s):
            return pickle.dumps(function(**kwargs))

    done = answer(call, {})
    return Answer(value=pickle.loads(done.value)) if done.problem is None else done


@dataclass
class Worker:
    """One process, the parent's end of its pipe, and the file into which it dumps its stack on SIGUSR1."""

    process: BaseProcess
    pipe: Connection
    stacks: Path

    def stack(self) -> str:
        """The lines in which the threads of a hanging worker stand."""
        if self.process.pid is None or not self.process.is_alive():
            return f"the process has ended with exit code {self.process.exitcode}"
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self.stacks.read_text()

    def end(self) -> None:
        """Stop the process, politely if it listens."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self.pipe.close()


def is_ready(pipe: Connection) -> bool:
    """Whether the worker at the other end has started."""
    try:
        return pipe.poll(START_LIMIT_S) and pipe.recv_bytes() == b"ready"
    except (EOFError, OSError):
        return False


class Ranks:
    """`world_size` processes that run one call after the other; the processes start with the first call."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.workers: list[Worker] = []
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.folder = tempfile.TemporaryDirectory(prefix="lorica-ranks-")
        self.calls = 0
        self.starts = 0

    def run(self, call: Callable[..., Any], *, limit_s: float = CALL_LIMIT_S, **kwargs: Any) -> list[Any]:
        """Run `call(**kwargs)` on every rank.

        Args:
            call: a function that pickle finds by its name (top level of a module).
            limit_s: seconds after which ranks that have not answered count as hanging.
        Returns: the ranks' results, in rank order.
        Raises:
            RankFailure: a rank raised, hung or died.
        """
        self.calls += 1
        answers = self._run_here(call, kwargs, limit_s) if self.world_size == 1 else self._run(call, kwargs, limit_s)
        problems = [f"--- rank {rank}\n{a.problem}" for rank, a in enumerate(answers) if a.problem is not None]
        if problems:
            raise RankFailure(
                f"{call.__name__} failed on {len(problems)} of {self.world_size} ranks\n" + "\n".join(problems)
            )
        return [a.value for a in answers]

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.end()
        self.workers = []
        self.folder.cleanup()

    def _run_here(self, call: Callable[..., Any], kwargs: dict[str, Any], limit_s: float) -> list[Answer]:
        def grouped() -> Any:
            with process_group(dist.PrefixStore(f"call {self.calls}", self.store), 0, 1, limit_s):
                return call(**kwargs)

        return [answer(grouped, {})]

    def _run(self, call: Callable[..., Any], kwargs: dict[str, Any], limit_s: float) -> list[Answer]:
        if not self.workers:
            self._start()
        message = pickle.dumps((self.calls, call, kwargs, limit_s))
        for worker in self.workers:
            worker.pipe.send_bytes(message)
        answers = self._collect(limit_s)
        missing = [rank for rank in range(self.world_size) if rank not in answers]
        if missing:
            for rank in missing:
                answers[rank] = Answer(problem=f"no answer; it stands in\n{self.workers[rank].stack()}")
            self._replace()
        return [answers[rank] for rank in range(self.world_size)]

    def _collect(self, limit_s: float) -> dict[int, Answer]:
        """Answers that arrive in time; after the first failure the others get `GRACE_S` at most."""
        answers: dict[int, Answer] = {}
        rank_of = {worker.pipe: rank for rank, worker in enumerate(self.workers)}
        deadline = time.monotonic() + limit_s
        while rank_of and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(rank_of), timeout=left):
                assert isinstance(pipe, Connection)
                rank = rank_of.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):  # the process died; `_run` reports its exit code
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                    continue
                if answers[rank].problem is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _start(self) -> None:
        self.starts += 1
        context = get_context("spawn")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            stacks = Path(self.folder.name) / f"start{self.starts}-rank{rank}.txt"
            arguments = (rank, self.world_size, self.store.port, there, str(stacks))
            process = context.Process(
                target=work, args=arguments, name=f"rank {rank} of {self.world_size}", daemon=True
            )
            process.start()
            there.close()
            self.workers.append(Worker(process, here, stacks))
        late = [worker.process.name for worker in self.workers if not is_ready(worker.pipe)]
        if late:
            self._replace()
            raise RankFailure(
                f"{', '.join(late)}: ended, or did not start within {START_LIMIT_S:.0f} s (see its output)"
            )

    def _replace(self) -> None:
        """End workers that hang; the next call starts new ones."""
        for worker in self.workers:
            worker.end()
        self.workers = []
