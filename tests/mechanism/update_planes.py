"""Planes, an optimizer, files and streams for the tests of the executors: everything counts, nothing is fast.

`Counting` adds to what it updates, so that an element that was updated twice, never, or from a stale copy has another
value. `SlowFile` moves bytes only when a transfer ends. `WatchedStreams` with `Watch` is a race detector: it knows
which access is ordered before which, by what the executor has recorded and waited for.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lorica.comm.solo import Solo
from lorica.core.flat import Flat, Site
from lorica.core.gradient import GradPlane
from lorica.layout import Entry, build_layout
from lorica.optim.base import FlatOptimizerBase, Segment
from lorica.plan import Request, plan_unit
from lorica.tier import make_tiers
from lorica.update.pieces import Work

GROUPS: list[dict[str, Any]] = [{"params": [], "add": 0.0}, {"params": [], "add": 1000.0}]


class Updated(NamedTuple):
    """One call of the optimizer: the parameters it saw parts of, elements, and its arguments."""

    names: tuple[str, ...]
    numel: int
    coef: float
    step: int
    thread: str


class Counting(FlatOptimizerBase):
    """master += coef * grad + add, m += step: exact in fp32 for small integers."""

    granularity = "element"
    moments = ("m",)

    def __init__(self) -> None:
        self.defaults: dict[str, Any] = {"add": 0.0}
        self.calls: list[Updated] = []
        self.fail: Callable[[Segment], None] = lambda segment: None

    @property
    def runs_in_chunks(self) -> bool:
        return True

    def update(self, segments: Sequence[Segment], **how: Any) -> None:
        coef, step, apply = float(how["coef"]), how["step"], how.get("apply")
        for segment in segments:
            self.fail(segment)
            names = tuple(piece.name for piece in segment.slices)
            name = threading.current_thread().name
            self.calls.append(Updated(names, segment.master.numel(), coef, step, name))
            if apply is not None and not apply.item():
                continue
            segment.master.add_(segment.grad.to(segment.master.dtype) * coef + segment.group["add"])
            segment.state["m"].add_(step)
            if segment.out is not None:
                segment.out.copy_(segment.master)


def site(num_replicas: int = 1) -> Site:
    """The site of a rank on the CPU; `num_replicas` is what it says, without other ranks."""
    device = torch.device("cpu")
    alone = Site(device, Solo(device), None, make_tiers(device, pin_memory=False))
    return alone if num_replicas == 1 else Many(*(getattr(alone, name) for name in alone.__dataclass_fields__))


class Many(Site):
    """One rank that says it is one of two."""

    @property
    def num_replicas(self) -> int:
        return 2


def make_planes(where: Site, numels: Sequence[int], executor: str, *, fp32: bool = False) -> list[GradPlane]:
    """Planes `0`, `1`, ... with two parameters in two groups each, values 0, and gradients 1.

    Args:
        numels: elements of each plane; multiples of 256.
        fp32: parameters in fp32 (else bf16); masters are fp32, in host memory, either way.
    """
    dtype = "float32" if fp32 else "bfloat16"
    request = Request(2, dtype, dtype, dtype, optimizer_tier="host", executor=executor, overlap=True)
    found = []
    for number, numel in enumerate(numels):
        half = numel // 2 // 128 * 128
        sizes = {f"{number}.a": half, f"{number}.b": numel - half}
        layout = build_layout([Entry(n, (size,), g) for g, (n, size) in enumerate(sizes.items())], 1)
        assert layout.numel == numel
        params = [nn.Parameter(torch.zeros(size, dtype=getattr(torch, dtype))) for size in sizes.values()]
        flat = Flat(f"{number}", params, layout, plan_unit(request), where, trainable=True)
        flat.bind()
        flat.alloc_moments(Counting.moments)
        plane = GradPlane(flat, bucket_numel=1 << 30, predivide=1.0, keep=True)
        plane.reduced = torch.ones(numel, dtype=plane.dtype)
        found.append(plane)
    return found


def work(step: int, coef: Tensor | float = 1.0, apply: Tensor | None = None) -> Work:
    """What a step asks for."""
    return Work(coef, step, apply, 1.0)


def expected(plane: GradPlane, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Master and moment after these steps with coef 1 and gradients 1."""
    slots = plane.flat.layout.slots
    master = torch.zeros(plane.flat.layout.numel)
    for slot in slots:
        master[slot.start : slot.stop] = len(steps) * (1.0 + GROUPS[slot.group]["add"])
    return master, torch.full_like(master, float(sum(steps)))


def assert_updated(planes: Sequence[GradPlane], steps: Sequence[int]) -> None:
    """Masters, moments and parameters are those after these steps."""
    for plane in planes:
        flat, (master, moment) = plane.flat, expected(plane, steps)
        for stored, wanted in ((flat.master, master), (flat.moments["m"], moment)):
            here = stored if isinstance(stored, Tensor) else stored.content
            assert torch.equal(here, wanted), f"plane {flat.name}: {here[:3]} ... {here[-3:]}, not {wanted[:3]} ..."
        assert torch.equal(flat.owned, master.to(flat.owned.dtype)), f"parameters of plane {flat.name}"


# -- files -------------------------------------------------------------------------------------------------------------


class SlowFile:
    """A plane in a "file": bytes move at the end of a transfer, after a pause, in another thread."""

    device = torch.device("cpu")

    def __init__(self, content: Tensor, disk: Disk) -> None:
        self.content, self.dtype, self._disk = content, content.dtype, disk

    def numel(self) -> int:
        return self.content.numel()

    def element_size(self) -> int:
        return self.content.element_size()

    def read(self, start: int, stop: int, out: Tensor) -> Moving:
        out.fill_(float("nan"))  # nobody may look before the end
        return self._disk.submit("read", lambda: out.copy_(self.content[start:stop]))

    def write(self, start: int, values: Tensor) -> Moving:
        def move() -> None:
            self.content[start : start + values.numel()] = values
            values.fill_(float("nan"))  # the executor may not need them any more

        return self._disk.submit("write", move)


class Moving(NamedTuple):
    """A transfer."""

    future: Future[None]

    def wait(self) -> None:
        self.future.result()


class Disk:
    """Transfers of all files, with pauses by lot, some of them failing."""

    def __init__(self, seed: int = 0, threads: int = 4) -> None:
        self._pool, self._draw = ThreadPoolExecutor(threads), random.Random(seed)
        self.fail: Callable[[str], None] = lambda kind: None
        self.under_way: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._lock = threading.Lock()

    def submit(self, kind: str, move: Callable[[], Any]) -> Moving:
        """Move later."""
        with self._lock:
            pause = self._draw.choice([0.0, 0.0, 0.001, 0.003])
            self.under_way[kind] += 1
            self.most[kind] = max(self.most[kind], self.under_way[kind])

        def run() -> None:
            time.sleep(pause)
            try:
                self.fail(kind)
                move()
            finally:
                with self._lock:
                    self.under_way[kind] -= 1

        return Moving(self._pool.submit(run))

    def take(self, planes: Sequence[GradPlane]) -> None:
        """Put the records of planes into files."""
        for plane in planes:
            plane.flat.master = SlowFile(plane.flat.master, self)
            plane.flat.moments = {name: SlowFile(each, self) for name, each in plane.flat.moments.items()}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


# -- streams -----------------------------------------------------------------------------------------------------------

Clock = Counter[str]


class WatchedStreams:
    """Streams on which nothing is asynchronous, but which know what a device would be free to do in another order.

    Vector clocks: each stream counts its own work and remembers of every other stream how far it has waited for it.
    """

    def __init__(self, *, forgetful: bool = False) -> None:
        """Args: forgetful: waits are forgotten (to see whether the detector sees that)."""
        self.clocks: dict[str, Clock] = {}
        self.host: Clock = Counter()
        self._current, self._forgetful = "main", forgetful

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self._current = self._current, name
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """The body's accesses are the host's own."""
        with self.stream("host"):
            yield

    def _clock(self) -> Clock:
        if self._current == "host":
            return self.host
        clock = self.clocks.setdefault(self._current, Counter())
        clock |= self.host  # launched after whatever the host has done or waited for
        self.clocks[self._current] = clock
        return clock

    def record(self) -> Clock:
        return Counter(self._clock())

    def wait(self, event: Clock | None) -> None:
        clock = self._clock()
        if event is not None and not self._forgetful:
            clock |= event

    def synchronize(self, event: Clock | None) -> None:
        if event is not None:
            self.host |= event

    def tick(self) -> tuple[str, int, Clock]:
        """One piece of work on the current stream: its name and number, and what is ordered before it."""
        clock = self._clock()
        clock[self._current] += 1
        return self._current, clock[self._current], Counter(clock)


class Access(NamedTuple):
    """Bytes [start, stop) that an operation read or wrote, and when."""

    start: int
    stop: int
    writes: bool
    stream: str
    count: int
    clock: Clock
    what: str


class Watch(TorchDispatchMode):
    """Notes which memory every operation reads and writes, on which stream."""

    def __init__(self, streams: WatchedStreams) -> None:
        super().__init__()
        self.accesses: list[Access] = []
        self._streams, self._alive = streams, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):  # no mere view
            stream, count, clock = self._streams.tick()
            for argument, value in zip(func._schema.arguments, args, strict=False):
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tree_flatten(value)[0]:
                    if isinstance(tensor, Tensor) and tensor.numel() and tensor.dim():
                        self._alive.append(tensor.untyped_storage())  # its address is not given out again
                        start = tensor.data_ptr()
                        stop = start + tensor.numel() * tensor.element_size()
                        self.accesses.append(Access(start, stop, writes, stream, count, clock, str(func)))
        return func(*args, **(kwargs or {}))

    def races(self) -> list[tuple[Access, Access]]:
        """Pairs of accesses to the same bytes, one of them writing, of which neither is ordered before the other."""
        found = []
        for index, later in enumerate(self.accesses):
            for earlier in self.accesses[:index]:
                overlap = earlier.start < later.stop and later.start < earlier.stop
                if overlap and (earlier.writes or later.writes) and later.clock[earlier.stream] < earlier.count:
                    found.append((earlier, later))
        return found
