"""`zero.Init`: build a model whose parameters are sharded as soon as each module is constructed.

A model that is larger than one rank's memory never exists whole: when a module's constructor returns, its own
parameters are given rank 0's values, sharded over all ranks, and freed. `lorica.initialize` regroups them into units
later, one at a time, and rounds to the compute dtype only then: masters keep the values that the constructors made.

[Note: patching constructors] Python offers no event for "this object is constructed". So, while the context is open,
`__init__` of every `nn.Module` class is wrapped, and classes made meanwhile are wrapped by `__init_subclass__`. The
wrapper acts when the outermost constructor of an object returns. Everything is put back when the context closes.
`Module.apply` gathers each module's own parameters around the function, so that the usual `self.apply(init)` works.

[Note: reopened planes] Constructors also initialise the weights of modules that they hold, which are sharded by then
(nanoGPT, torchvision, Hugging Face). A parameter that is touched while the context is open is gathered; a few later it
is sharded again, with rank 0's values, and so are all when the outermost constructor returns.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lorica.comm import init_distributed
from lorica.config import load
from lorica.core.build import dtype_name, initial_values
from lorica.core.flat import Flat, Site
from lorica.core.parameter import ParamRecord, detach, record_of
from lorica.layout import Entry, build_layout
from lorica.plan import Request, plan_unit

MAX_REOPENED = 8
_PLANES = "_lorica_init_planes"  # where a module keeps the planes of its parameters until initialize
_BARE = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


class Init:
    """Context manager: modules constructed inside are sharded (ZeRO stage 3)."""

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
    ) -> None:
        """Prepare; nothing happens before `__enter__` (but `module`, if given, is sharded now).

        Args:
            module: an existing module to shard as it is.
            data_parallel_group, mpu: where the data-parallel ranks are, as in `initialize`.
            mem_efficient_linear: accepted; freed weights share their storage, no copy is kept anyway.
            remote_device: "cpu" keeps the shards in host memory; None or "none": if offload_param is "cpu" or "auto".
            pin_memory: accepted; host shards are pinned as the configuration says.
            config_dict_or_path, config: the configuration; only offload_param, mics_shard_size and "lorica" are read.
            enabled: False makes the context do nothing.
            dtype: of floating-point parameters; None: as the constructors make them.
        """
        self.enabled = enabled
        self._stack = ExitStack()
        if not enabled:
            return
        from lorica.construct import make_site  # construct imports this file

        init_distributed()
        settings = load(_relevant(config_dict_or_path if config_dict_or_path is not None else config))
        self._dtype = dtype
        leaves = remote_device == "cpu" or settings.zero_optimization.offload_param.device != "none"
        self._tier = "host" if leaves else "device"  # "auto" too: units are placed by `initialize`
        self._site, _, _ = make_site(settings, mpu if mpu is not None else _as_mpu(data_parallel_group))
        self._reopened = _Reopened()
        self._building: set[int] = set()
        if module is not None:
            for each in module.modules():
                self._shard(each)

    def __enter__(self) -> Init:
        if self.enabled:
            self._reopened.active = True
            self._stack.enter_context(torch.device(self._site.device))
            self._stack.enter_context(_patched_constructors(self._constructed, self._building))
            self._stack.enter_context(_patched_apply())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        if self.enabled:
            self._reopened.active = False
            if error[0] is None:
                self._reopened.close()

    def _constructed(self, module: nn.Module) -> None:
        self._shard(module)
        if not self._building:
            self._reopened.close()

    def _shard(self, module: nn.Module) -> None:
        """Shard the parameters that `module` itself owns and that are whole so far."""
        own = {n: p for n, p in module.named_parameters(recurse=False) if record_of(p) is None and not p.is_meta}
        for name, param in own.items():
            flat = self._make_plane(f"{type(module).__name__}.{name}", param)
            holder: list[Flat] = module.__dict__.setdefault(_PLANES, [])
            holder.append(flat)

    def _make_plane(self, name: str, param: nn.Parameter) -> Flat:
        dtype = self._dtype if self._dtype is not None and param.is_floating_point() else param.dtype
        plan = plan_unit(
            Request(
                stage=3,
                param_dtype=dtype_name(dtype),
                accum_dtype=dtype_name(dtype),
                comm_dtype=dtype_name(dtype),
                master_dtype=dtype_name(param.dtype),
                param_tier=self._tier,
                optimizer_tier=self._tier,
            )
        )
        layout = build_layout([Entry(name, tuple(param.shape), 0)], self._site.shard.world_size)
        flat = Flat(name, [param], layout, plan, self._site, trainable=param.is_floating_point())
        flat.fill(0, initial_values(param, name, self._site))
        flat.bind()
        flat.on_demand = self._reopened
        return flat


class _Reopened:
    """Parameters that are touched after they were sharded; see [Note: reopened planes]."""

    def __init__(self) -> None:
        self.active = False  # whether the context is open
        self._records: deque[ParamRecord] = deque()

    def touched(self, flat: Flat) -> bool:
        """Gather `flat`, which has one parameter (`core.parameter.OnDemand`)."""
        if not self.active:
            return False
        if len(self._records) == MAX_REOPENED:
            self._close_first()
        flat.holders += 1
        flat.unshard()
        flat.wait()
        record = record_of(flat.params[0])
        assert record is not None
        self._records.append(record)
        return True

    def close(self) -> None:
        """Shard everything again. Collective."""
        while self._records:
            self._close_first()

    def _close_first(self) -> None:
        from lorica.zero import adopt

        record = self._records.popleft()
        flat = record.flat
        flat.holders -= 1
        if flat.is_bound(record.index):
            adopt(record, 0)
            flat.reshard()
        else:  # it was given another tensor: an ordinary parameter again
            detach(flat.params[record.index])


def release_init_planes(model: nn.Module) -> None:
    """Close the transports of planes that `Init` made for `model`, once units have taken over the values."""
    sites: dict[int, Site] = {}
    for module in model.modules():
        for flat in module.__dict__.pop(_PLANES, ()):
            sites[id(flat.site)] = flat.site
    for site in sites.values():
        for comm in (site.shard, site.replicate):
            if comm is not None:
                comm.close()


def _relevant(source: Any) -> Any:
    """Only what `Init` reads: a client's configuration may still hold "auto" elsewhere."""
    if not isinstance(source, dict):
        return source if source is not None else _BARE
    kept = {"lorica": source["lorica"]} if "lorica" in source else {}
    zero = source.get("zero_optimization", {})
    zero = {k: zero[k] for k in ("offload_param", "mics_shard_size") if k in zero} if isinstance(zero, dict) else {}
    return {**_BARE, **kept, "zero_optimization": {"stage": 3, **zero}}


def _as_mpu(group: Any) -> Any:
    if group is None:
        return None

    class _Ranks:
        def get_data_parallel_group(self) -> Any:
            return group

    return _Ranks()


@contextmanager
def _patched_constructors(constructed: Callable[[nn.Module], None], building: set[int]) -> Iterator[None]:
    """Call `constructed(module)` when a module's outermost constructor has returned."""
    patched: list[tuple[type, Any]] = []

    def wrap(cls: type) -> None:
        original = cls.__dict__.get("__init__")
        if original is None:
            return

        @functools.wraps(original)
        def wrapper(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if id(module) in building:
                original(module, *args, **kwargs)
                return
            building.add(id(module))
            try:
                original(module, *args, **kwargs)
            finally:
                building.discard(id(module))
            constructed(module)

        cls.__init__ = wrapper  # type: ignore[misc]
        patched.append((cls, original))

    def wrap_new(cls: type, **kwargs: Any) -> None:
        object.__init_subclass__(**kwargs)
        wrap(cls)

    for cls in _subclasses(nn.Module):
        wrap(cls)
    before = nn.Module.__dict__.get("__init_subclass__")
    nn.Module.__init_subclass__ = classmethod(wrap_new)  # type: ignore[assignment, arg-type]
    try:
        yield
    finally:
        for cls, original in patched:
            cls.__init__ = original  # type: ignore[misc]
        if before is None:
            del nn.Module.__init_subclass__
        else:
            nn.Module.__init_subclass__ = before  # type: ignore[method-assign]


def _subclasses(cls: type) -> Iterator[type]:
    seen: set[type] = set()
    stack: list[type] = list(cls.__subclasses__())
    while stack:
        each = stack.pop()
        if each not in seen:
            seen.add(each)
            stack.extend(each.__subclasses__())
            yield each


@contextmanager
def _patched_apply() -> Iterator[None]:
    """`module.apply(fn)` with each module's own parameters gathered around `fn`."""
    from lorica.zero import GatheredParameters

    original = nn.Module.apply

    def apply(self: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
        for module in self.children():
            module.apply(fn)
        with GatheredParameters(list(self.parameters(recurse=False)), modifier_rank=0):
            fn(self)
        return self

    nn.Module.apply = apply  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.apply = original  # type: ignore[method-assign]
