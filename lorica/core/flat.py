"""The parameter plane of one unit: parameters that share dtype and trainability, as one flat buffer and its shards.

Owns `full` (all parameters, or nothing while sharded), `shard` (this rank's part), `master` and the moments. Does not
own gradients (`core/gradient.py`) and knows nothing of modules or of when to gather (`core/hooks.py`).

[Note: freed memory is the same storage] Autograd saves views of weights (a transposed weight, a weight of a fused
layer). When `full` is freed its storage is resized to zero, and later resized back: those views then see the gathered
values again. Handing out buffers from a pool would leave them looking at another unit's weights: silently wrong
gradients. Test: test_ordinary_use, "a layer that saves a view of its weight".
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorica.core.lifecycle import PARAM_MOVES, Lifecycle, ParamState
from lorica.core.parameter import (
    ParamRecord,
    attach,
    detach,
    hide,
    is_rebound,
    mark_finished,
    mark_pending,
    show,
)
from lorica.core.streams import Behind
from lorica.layout import ALIGN, Layout, Overlap, round_up
from lorica.plan import StateBytes, UnitPlan
from lorica.precision.compact import decode, encode
from lorica.precision.rounding import join, rounded, split

if TYPE_CHECKING:
    from lorica.comm.base import Collectives, Handle
    from lorica.core.gradient import GradPlane
    from lorica.core.parameter import OnDemand
    from lorica.core.streams import CudaStreams
    from lorica.tier import Tier


@dataclass(frozen=True)
class Site:
    """Where a rank's planes are: its device and the streams of it, its groups of ranks, its memory tiers."""

    device: torch.device
    shard: Collectives
    replicate: Collectives | None
    tiers: dict[str, Tier]
    streams: CudaStreams | None = None  # None on a CPU, where nothing is asynchronous

    @property
    def num_replicas(self) -> int:
        """Ranks over which gradients are summed."""
        return self.shard.world_size * (self.replicate.world_size if self.replicate else 1)


Stored = Any  # a plane: a tensor, or `tier.FilePlane`


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class Flat:
    """One parameter plane with its master and moments."""

    def __init__(
        self, name: str, params: Sequence[nn.Parameter], layout: Layout, plan: UnitPlan, site: Site, *, trainable: bool
    ) -> None:
        """Allocate the planes; `fill` and `bind` complete them.

        Args:
            params: in the order of `layout.slots`.
            trainable: whether an optimizer updates this plane; frozen planes have parameters only.
        """
        self.name, self.layout, self.plan, self.site, self.trainable = name, layout, plan, site, trainable
        self.params = list(params)
        self.comm = site.shard
        self.dtype = dtype_of(plan.param.dtype)
        self.start, self.stop = layout.shard_range(self.comm.rank)
        self.moments: dict[str, Stored] = {}  # what is stored of them: see `UnitPlan.moment_planes`
        self.moment_names: tuple[str, ...] = ()
        self.salt = zlib.crc32(name.encode())  # of the dice of stochastic rounding
        self.on_demand: OnDemand | None = None
        self.grad_plane: GradPlane | None = None
        self.destroyed = False  # its engine has ended
        self.holders = 0  # contexts that need the plane to stay whole
        self._gather: Handle | None = None
        self._source: Tensor | None = None
        self.opener: Callable[..., None] | None = None  # of the executor that works on copies of the record
        self._update: Callable[[], None] | None = None  # finishes an update that is still under way
        self._update_is_done: Callable[[], bool] = lambda: True
        self._alloc_param()
        self.master = self._alloc_master() if trainable else None
        self.state = Lifecycle(f"plane {name}", PARAM_MOVES, ParamState.SHARDED if self.sharded else ParamState.FULL)

    @property
    def sharded(self) -> bool:
        """Whether the parameters exist only as shards between their uses."""
        return self.plan.param.sharded

    @property
    def publishes(self) -> bool:
        """Whether every rank must be given the updated parameters: they are replicated, but updated in shards."""
        return not self.sharded and self.plan.master.sharded and self.comm.world_size > 1

    @property
    def is_full(self) -> bool:
        """Whether the parameters can be used now."""
        return self.state.state is ParamState.FULL

    # -- memory ------------------------------------------------------------------------------------------------------

    def _alloc_param(self) -> None:
        numel, shard_numel = self.layout.numel, self.layout.shard_numel
        if self.sharded:
            tier = self.site.tiers[self.plan.param.tier]
            on_device = tier.name == "device"
            self.shard = self.comm.shared(shard_numel, self.dtype) if on_device else tier.alloc(shard_numel, self.dtype)
            self.full = torch.empty(numel, dtype=self.dtype, device=self.site.device)
            self._views = self._make_views()
            self._release_storage()
        else:
            peers_read = self.plan.master.sharded and self.trainable
            self.full = self.comm.shared(numel, self.dtype) if peers_read else self._zeros(numel)
            self.shard = self.full[self.start : self.stop]
            self._views = self._make_views()

    def _zeros(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self.dtype, device=self.site.device)

    def _make_views(self) -> list[Tensor]:
        return [self.full[slot.start : slot.stop].view(slot.shape) for slot in self.layout.slots]

    def _release_storage(self) -> None:
        self.full.untyped_storage().resize_(0)

    def _restore_storage(self) -> None:
        self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())

    @property
    def owned(self) -> Tensor:
        """The part of the parameters that this rank's optimizer updates."""
        return self.shard if self.plan.master.sharded else self.full

    def _alloc_master(self) -> Stored:
        if self.plan.master_is_param:
            return self.owned
        return self.site.tiers[self.plan.master.tier].alloc(self.owned.numel(), dtype_of(self.plan.master.dtype))

    def alloc_moments(self, names: Sequence[str]) -> None:
        """Give the optimizer's moments `names` their memory (zeros), in the tier and the format of the plan."""
        assert self.master is not None
        owned, alloc = self.master.numel(), self.site.tiers[self.plan.moments.tier].alloc
        self.moment_names = tuple(names)
        planes = self.plan.moment_planes(names)
        self.moments = {plane.name: alloc(plane.numel(owned), dtype_of(plane.dtype)) for plane in planes}

    @property
    def master_start(self) -> int:
        """The plane element at which `master` begins."""
        return self.start if self.plan.master.sharded else 0

    def planned_bytes(self, num_moments: int) -> StateBytes:
        """What the plan says this rank holds of the plane and its gradient."""
        layout = self.layout
        return self.plan.bytes_per_rank(
            layout.numel,
            layout.num_shards,
            num_moments,
            trainable=self.trainable,
            param_numel=sum(slot.numel for slot in layout.slots),
        )

    def held_bytes(self) -> StateBytes:
        """Bytes that this rank holds between steps, by kind, counted from the tensors (gradients: see GradPlane)."""

        def size(tensor: Stored | None) -> int:
            return 0 if tensor is None else tensor.numel() * tensor.element_size()

        aliased = self.master is not None and self.plan.master_is_param
        return StateBytes(
            param=size(self.shard if self.sharded else self.full),
            master=0 if aliased else size(self.master),
            moments=sum(size(m) for m in self.moments.values()),
        )

    # -- values ------------------------------------------------------------------------------------------------------

    def fill(self, index: int, values: Tensor) -> None:
        """Write a parameter's values into every plane that holds part of it: parameter and master.

        Args:
            index: slot number. values: the whole parameter, any shape and float dtype (frozen: the plane's dtype).
        """
        self.open_record(write=True)
        exact = values.detach().reshape(-1)  # for the master
        if self.master is not None and self.plan.master_is_split:
            source, exact = split(exact.float())
        else:
            source = rounded(exact, self.dtype)
        slot = self.layout.slots[index]
        if not self.sharded or self.is_full:
            self.full[slot.start : slot.stop].copy_(source)
        if self.sharded:
            self.fill_plane(self.shard, self.start, index, source)
        if self.master is not None and not self.plan.master_is_param:
            self.fill_plane(self.master, self.master_start, index, exact)

    def fill_plane(self, plane: Stored, start: int, index: int, values: Tensor) -> None:
        """Write a parameter's values into the part of one plane that this rank holds.

        Args:
            plane: this rank's part, 1-D. start: the plane element at which it begins.
            index: slot number. values: the whole parameter, any shape.
        """
        part = self._part(index, start, start + plane.numel())
        if part is not None:
            source = values.detach().reshape(-1)[part.begin : part.end]
            _put(plane, part.place.start, source)

    def add_part(self, whole: Tensor, plane: Tensor, start: int, index: int) -> None:
        """Add this rank's part of a plane to a whole parameter-sized tensor (arguments as in `collect`)."""
        part = self._part(index, start, start + plane.numel())
        if part is not None:
            whole[part.begin : part.end] += plane[part.place]

    def _part(self, index: int, start: int, stop: int) -> Overlap | None:
        slot = self.layout.slots[index]
        low, high = max(start, slot.start), min(stop, slot.stop)
        return Overlap(index, low - slot.start, high - slot.start, low - start) if low < high else None

    def collect(self, index: int, plane: Stored, start: int) -> Tensor:
        """A whole parameter-shaped tensor of a plane of which each rank may hold a part. Collective if sharded.

        Args:
            index: slot number. plane: this rank's part, 1-D. start: the plane element at which it begins.
        Returns:
            A new tensor of the parameter's logical shape on the compute device, dtype of `plane`.
        """
        self.open_record(write=False)
        part = self._part(index, start, start + plane.numel())
        piece = None if part is None else _elements(plane, part.place)
        return self._assemble(index, part, piece, plane.dtype, sharded=plane.numel() < self.layout.numel)

    def _assemble(
        self, index: int, part: Overlap | None, piece: Tensor | None, dtype: torch.dtype, *, sharded: bool
    ) -> Tensor:
        """The whole parameter of which this rank has `piece` (None: nothing)."""
        slot = self.layout.slots[index]
        whole = torch.zeros(slot.numel, dtype=dtype, device=self.site.device)
        if part is not None and piece is not None:
            whole[part.begin : part.end].copy_(piece)
        if sharded and slot.numel:
            self.comm.all_reduce(whole).wait()
        return whole.view(slot.shape)

    def collect_master(self, index: int) -> Tensor:
        """The full-precision values of a parameter. Collective if they are sharded."""
        self.open_record(write=False)
        if self.master is None:
            return self.collect(index, self.shard if self.sharded else self.full, self.start if self.sharded else 0)
        if not self.plan.master_is_split:
            whole = self.collect(index, self.master, self.master_start)
            return whole.float() if self.plan.master_is_rounded else whole
        part, piece = self._part(index, self.master_start, self.master_start + self.master.numel()), None
        if part is not None:
            low = _elements(self.master, part.place)
            piece = join(self.owned[part.place], low.to(self.owned.device))
        return self._assemble(index, part, piece, torch.float32, sharded=self.plan.master.sharded)

    # -- moments -----------------------------------------------------------------------------------------------------

    def collect_moment(self, index: int, name: str) -> Tensor:
        """The values of a parameter's moment, fp32 (fp64 for a parameter of fp64). Collective if they are sharded."""
        self.open_record(write=False)  # first: a guess that was right puts other planes in their place
        if self.plan.moment_format == "fp32":
            return self.collect(index, self.moments[name], self.master_start)
        assert self.master is not None
        part, piece = self._part(index, self.master_start, self.master_start + self.master.numel()), None
        if part is not None:
            codes, scale, numel = self._stored(name, part), self._stored(f"{name}.scale", part), part.end - part.begin
            assert codes is not None
            piece = decode(codes, scale, round_up(numel, ALIGN))[:numel]
        return self._assemble(index, part, piece, torch.float32, sharded=self.plan.master.sharded)

    def fill_moment(self, index: int, name: str, values: Tensor) -> None:
        """Write the values of a parameter's moment, rounded to nearest where they are stored in few bytes.

        Args:
            index: slot number. values: the whole parameter's, any shape.
        """
        self.open_record(write=True)
        if self.plan.moment_format == "fp32":
            self.fill_plane(self.moments[name], self.master_start, index, values)
            return
        assert self.master is not None
        part = self._part(index, self.master_start, self.master_start + self.master.numel())
        if part is None:
            return
        mine = values.detach().reshape(-1)[part.begin : part.end].float()
        padded = mine.new_zeros(round_up(mine.numel(), ALIGN))
        padded[: mine.numel()] = mine
        plane, ratio = self.moments[name], self._ratio(name)
        inside = torch.arange(padded.numel(), device=mine.device) < mine.numel()
        coded = encode(padded, plane.dtype, inside, per_block=ratio > 1)
        _put(plane, part.place.start // ratio, coded.codes[: mine.numel()])  # what is padding keeps its mark
        if coded.scale is not None:
            _put(self.moments[f"{name}.scale"], part.place.start // ALIGN, coded.scale)

    def _ratio(self, name: str) -> int:
        """Elements of the parameters for each element of a stored plane."""
        assert self.master is not None
        return int(self.master.numel()) // int(self.moments[name].numel())

    def _stored(self, name: str, part: Overlap) -> Tensor | None:
        """What is stored of a parameter's part, in whole blocks; None if there is no such plane."""
        if name not in self.moments:
            return None
        ratio = self._ratio(name)
        stop = round_up(part.place.stop, ALIGN)
        return _elements(self.moments[name], slice(part.place.start // ratio, stop // ratio))

    # -- life --------------------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Make the parameters views of this plane (or hide them while it is sharded) and hang their records on them."""
        for index, (param, slot) in enumerate(zip(self.params, self.layout.slots, strict=True)):
            attach(param, ParamRecord(self, index, slot.name))
        (hide_all if self.sharded else show_all)(self.params, self._views)

    def is_bound(self, index: int) -> bool:
        """Whether a parameter still belongs to this plane (False after `param.data = another tensor`)."""
        return not is_rebound(self.params[index], self._views[index])

    def rebind(self, index: int) -> None:
        """Make a parameter that was given another tensor a view of this (gathered) plane again."""
        if not self.is_bound(index):
            show(self.params[index], self._views[index])

    def leave(self) -> None:
        """The engine ends: whole parameters are the model's own again; sharded ones keep saying where they belonged."""
        self.destroyed, self.on_demand, self.opener = True, None, None
        if not self.sharded:
            for param in self.params:
                detach(param)

    def defer(self, finish: Callable[[], None], is_done: Callable[[], bool]) -> None:
        """An update of this plane is under way.

        Args:
            finish: called once, before the plane's next use.
            is_done: whether `finish` would return at once.
        """
        self._update, self._update_is_done = finish, is_done
        if not self.sharded:
            mark_pending(self.params)

    @property
    def holds_up(self) -> bool:
        """Whether the next use would make the host wait for an update."""
        return self._update is not None and not self._update_is_done()

    def open_record(self, *, write: bool) -> None:
        """Before the host reads or writes master or moments: have them where they live, with nothing under way."""
        self.settle()
        if self.opener is not None:
            self.opener(write=write)

    def settle(self) -> None:
        """Finish the update that is under way, if there is one."""
        if self._update is not None:
            self._update()
            self._update = None
            mark_finished(self.params)

    def unshard(self) -> None:
        """Start gathering the parameters, if they are sharded; `wait` makes them usable."""
        self.settle()
        if self.state.state is not ParamState.SHARDED:
            return
        self.state.to(ParamState.UNSHARDING)
        self._restore_storage()
        self._gather = self._launch_gather()

    def _launch_gather(self) -> Handle:
        """Start filling `full`; what comes from host memory comes on a stream of its own, beside the computation."""
        streams = self.site.streams
        if self.shard.device == self.site.device or streams is None:
            return self.comm.all_gather(self.shard, self.full)
        ready = streams.record()  # the memory of `full` is free behind what the current stream has been given
        with streams.stream("parameters near"):
            streams.wait(ready)
            if self.comm.world_size == 1:
                self.full.copy_(self.shard, non_blocking=True)
                return Behind(streams, streams.record())
            self._source = self.shard.to(self.site.device, non_blocking=True)  # alive until the gather has read it
            return self.comm.all_gather(self._source, self.full)

    def wait(self) -> None:
        """Finish a gather that `unshard` or `publish` started; the parameters are plain tensors afterwards."""
        self.settle()
        if self._gather is not None:
            self._gather.wait()
            self._gather = self._source = None
        if self.state.state is ParamState.UNSHARDING:
            self.state.to(ParamState.FULL)
            show_all(self.params, self._views)

    def reshard(self) -> None:
        """Free the gathered parameters, unless a context holds them. See [Note: freed memory is the same storage]."""
        if not self.sharded or self.holders or not self.is_full:
            return
        hide_all(self.params, self._views)
        self._release_storage()
        self.state.to(ParamState.SHARDED)

    def publish(self) -> None:
        """Start giving every rank the updated parameters, if that has not begun yet."""
        if self.publishes and self._gather is None:
            self._gather = self.comm.all_gather(self.shard, self.full)

    def touched(self) -> bool:
        """A parameter was used while sharded: gather now if a forward pass is running."""
        return self.on_demand is not None and self.on_demand.touched(self)


def _put(plane: Stored, start: int, values: Tensor) -> None:
    """Write `values` to the elements from `start` on."""
    if isinstance(plane, Tensor):
        plane[start : start + values.numel()].copy_(values)
    else:
        plane.store(start, values.to(plane.dtype))


def _elements(plane: Stored, place: slice) -> Tensor:
    """Some elements of a plane in memory, or of one in a file."""
    return plane[place] if isinstance(plane, Tensor) else plane.load(place.start, place.stop)


def hide_all(params: Sequence[nn.Parameter], views: Sequence[Tensor]) -> None:
    """Take the values away from `params`; each keeps the description of its view."""
    for param, view in zip(params, views, strict=True):
        hide(param, view)


def show_all(params: Sequence[nn.Parameter], views: Sequence[Tensor]) -> None:
    """Bind each of `params` to its view."""
    for param, view in zip(params, views, strict=True):
        show(param, view)
