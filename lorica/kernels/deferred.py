"""A tensor that has a shape and a place in autograd's graph, but no values until somebody asks. Knows no formula.

`Deferred` is a tensor for everything that looks at a description: shape, dtype, device, requires_grad, hooks. A
subclass says which operations leave it deferred (`rules`); every other one forms the values, once, and goes on with
them as with any tensor, in-place operations included. Autograd sees the deferred tensor itself, so its graph and its
hooks are those of an ordinary tensor.

[Note: two levels] `__torch_function__` sees what the user calls, `reshape` or `cross_entropy`; that is where rules
apply, and where functions that read memory directly (`numpy`, `repr`, pickling) get a plain tensor. Below autograd,
`__torch_dispatch__` sees what is left, also when it comes from C++ (a custom autograd function, the accumulation of
gradients), and hands it the values.

[Note: shared values] Views of one deferred tensor share its values, as views do, but autograd does not know that they
are views of each other. As long as nobody writes, that makes no difference. Once one of them was changed in place, the
others raise instead of telling autograd a lie. A change shows in the version of the tensor through which it came: below
autograd, where values live, nobody counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_READS_MEMORY = {
    "numpy", "tolist", "data_ptr", "const_data_ptr", "storage", "untyped_storage", "share_memory_", "is_shared",
    "pin_memory", "is_pinned", "__array__", "__deepcopy__", "__dlpack__", "__format__", "__reduce_ex__", "__repr__",
}  # fmt: skip
_aten = torch.ops.aten
_ALIASES = {_aten.alias.default, _aten.detach.default, _aten.view.default}


class Line:
    """One deferred tensor and its aliases, which have one version, among those that share values."""

    __slots__ = ("_probe", "_start")

    def __init__(self, tensor: Deferred) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            self._probe = tensor.detach()  # shares the version ...
        self._probe.__dict__.clear()  # ... and nothing else
        self._start = self.version

    @property
    def version(self) -> int:
        """How often it was changed in place."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._probe._version

    @property
    def changed(self) -> bool:
        """Whether values were changed through it."""
        return self.version != self._start


class Values:
    """Values that one or several deferred tensors share, formed at the first request."""

    def __init__(self, form: Callable[[], Tensor]) -> None:
        self._form: Callable[[], Tensor] | None = form
        self._formed: Tensor | None = None
        self.lines: list[Line] = []

    @property
    def are_formed(self) -> bool:
        """Whether somebody has asked."""
        return self._formed is not None

    def read(self, reader: Line) -> Tensor:
        """The values, without a graph.

        Raises:
            RuntimeError: if another line changed them; see [Note: shared values].
        """
        if self._formed is None:
            assert self._form is not None
            with torch._C._EnableTorchFunction(), torch.no_grad():
                self._formed, self._form = self._form(), None
        if any(line.changed for line in self.lines if line is not reader):
            raise RuntimeError(
                "Deferred tensor: expected values as computed, but they were changed in place through another "
                "tensor that shares them. Fix: clone() before the change, or take views after it."
            )
        return self._formed


class Deferred(Tensor):
    """A tensor without values; see the file's first lines."""

    rules: ClassVar[dict[Any, Callable[..., Any]]] = {}
    _shared: Values
    _line: Line
    _shows: Callable[[Tensor], Tensor] | None
    _own: Tensor | None

    @staticmethod
    def __new__(
        cls, like: Tensor, device: torch.device, values: Values, view: Callable[[Tensor], Tensor] | None = None
    ) -> Deferred:
        """Describe it.

        Args:
            like: a tensor on the meta device: shape, strides, dtype.
            view: what it shows of `values`; None: all.
        """
        self = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=device,
        )
        assert isinstance(self, Deferred)
        self._shared, self._shows, self._own = values, view, None
        self._line = Line(self)
        values.lines.append(self._line)
        return self

    @property
    def is_formed(self) -> bool:
        """Whether its values exist."""
        return self._shared.are_formed

    def formed(self) -> Tensor:
        """Its values, as a plain tensor without a graph."""
        values = self._shared.read(self._line)
        if self._own is None:
            with torch._C._EnableTorchFunction(), torch.no_grad():
                self._own = values if self._shows is None else self._shows(values)
        return self._own

    def twin(self) -> Deferred:
        """An alias of it without its graph."""
        like = description(self)
        other = Tensor._make_wrapper_subclass(
            type(self), like.shape, strides=like.stride(), dtype=like.dtype, device=self.device
        )
        assert isinstance(other, Deferred)
        other.__dict__.update(self.__dict__)
        return other

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the user calls; see [Note: two levels]."""
        kwargs = kwargs or {}
        rule = cls.rules.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        reads_memory = getattr(func, "__name__", "") in _READS_MEMORY
        if reads_memory or not all(kind is Tensor or issubclass(kind, Deferred) for kind in types):
            return func(*tree_map(plain, args), **tree_map(plain, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches the device; see [Note: two levels]."""
        if func in _ALIASES and not args[0].is_formed and (len(args) == 1 or list(args[1]) == list(args[0].shape)):
            return args[0].twin()
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(
                f"{func}: a deferred tensor cannot change its own shape. Fix: use the operation without the underscore."
            )
        given: dict[int, Deferred] = {}

        def formed(leaf: Any) -> Any:
            if not isinstance(leaf, Deferred):
                return leaf
            values = leaf.formed()
            given[id(values)] = leaf
            return values

        result = func(*tree_map(formed, args), **tree_map(formed, kwargs or {}))
        return tree_map(
            lambda leaf: given.get(id(leaf), leaf), result
        )  # in-place operations return what they were given


def description(tensor: Tensor) -> Tensor:
    """Shape, strides and dtype of `tensor`, on the meta device."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def plain(leaf: Any) -> Any:
    """A deferred tensor as an ordinary one with the same graph; anything else as it is."""
    if not isinstance(leaf, Deferred):
        return leaf
    leaf.formed()
    with torch._C.DisableTorchFunctionSubclass():
        return _aten.alias.default(leaf)
