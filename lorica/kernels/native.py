"""One-pass optimizer kernels for the CPU: the calls into the C++ library of `native/`, and its thread pools.

The same operations in the same order as the Triton kernels of update.py, so the same bits on every processor; every
call releases the GIL. Owns no hyper-parameter (hyper.py) and no choice of a kernel (optim/element.py).

    python -m lorica.kernels.native --build      compile the library in a source tree, beside this file

`LORICA_NATIVE_ISA` = scalar, avx2, avx512 or neon forces an instruction set; otherwise the best one here is taken.
Shape suffix: N, the elements of one segment of a plane.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.kernels.hyper import NUM_HYPER
from lorica.layout import ALIGN as BLOCK

LIBRARY = Path(__file__).with_name("_native.so")
SOURCES = Path(__file__).resolve().parents[2] / "native"  # in a source tree
ABI = 2  # native/planes.h
ISA_VARIABLE = "LORICA_NATIVE_ISA"

# The numbers of native/planes.h.
_FLOAT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORM = {None: 0, torch.bfloat16: 1, torch.float16: 2}
_SPLIT, _ROUNDED = 3, 4
_RULE = {"adam": 0, "lion": 1, "sgd": 2, "sgd with momentum": 3, "adagrad": 4}
# By the dtypes of Adam's two moments; the second plane of the last one has an element per block.
_FORMAT = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.int8, torch.uint8): 2,
    (torch.int8, torch.float32): 3,
}


class Destination(NamedTuple):
    """Where an update writes, if not over what it reads; tensors like those it reads, which must not overlap them.

    Attributes:
        master: [N] fp32 or int16. out: [N] bf16 or fp16; None if the master is the parameter. moments: [N] fp32 each.
        scales: of moments in 8 bits, [N / 128] fp32 each.
    """

    master: Tensor
    out: Tensor | None
    moments: tuple[Tensor, ...]
    scales: tuple[Tensor, ...] = ()


class _Planes(ctypes.Structure):
    """`lorica_planes` of native/planes.h."""

    _fields_ = (
        ("numel", ctypes.c_int64),
        ("grad", ctypes.c_void_p),
        ("master_in", ctypes.c_void_p),
        ("master_out", ctypes.c_void_p),
        ("hi_in", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m_in", ctypes.c_void_p),
        ("m_out", ctypes.c_void_p),
        ("v_in", ctypes.c_void_p),
        ("v_out", ctypes.c_void_p),
        ("m_scale_in", ctypes.c_void_p),
        ("m_scale_out", ctypes.c_void_p),
        ("v_scale_in", ctypes.c_void_p),
        ("v_scale_out", ctypes.c_void_p),
        ("grad_type", ctypes.c_int32),
        ("form", ctypes.c_int32),
        ("rule", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("start", ctypes.c_uint32),
        ("moment_key", ctypes.c_uint32),
        ("parameter_key", ctypes.c_uint32),
        ("coef", ctypes.c_float),
        ("hyper", ctypes.c_float * NUM_HYPER),
    )


# -- the library -------------------------------------------------------------------------------------------------------


@cache
def _load() -> tuple[Any, str]:
    """The library, or None and why it cannot be had."""
    if not LIBRARY.exists():
        return None, f"{LIBRARY} is not there"
    try:
        library = ctypes.CDLL(str(LIBRARY), use_errno=True)
        abi = int(library.lorica_abi())
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY} cannot be loaded: {error}"
    if abi != ABI:
        return None, f"{LIBRARY} is of another version of Lorica (interface {abi}, expected {ABI})"
    pointer, int32, int64, float32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    library.lorica_isas.restype = ctypes.c_char_p
    library.lorica_pool_create.restype = pointer
    library.lorica_pool_create.argtypes = [int32, ctypes.POINTER(int32)]
    library.lorica_pool_destroy.restype = None
    library.lorica_pool_destroy.argtypes = [pointer]
    library.lorica_update.restype = int32
    library.lorica_update.argtypes = [pointer, int32, ctypes.POINTER(_Planes)]
    library.lorica_square_sum.restype = ctypes.c_double
    library.lorica_square_sum.argtypes = [pointer, int32, pointer, int32, int64]
    library.lorica_triad.restype = None
    library.lorica_triad.argtypes = [pointer, pointer, pointer, pointer, float32, int64]
    return library, ""


def available() -> bool:
    """Whether the library was built and can be loaded."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the library is not available, and how to get it; empty if it is."""
    problem = _load()[1]
    if not problem:
        return ""
    build = "python -m lorica.kernels.native --build"
    how = build if SOURCES.is_dir() else "reinstall Lorica from source"
    return f"{problem}. Fix: install a C++17 compiler (e.g. g++) and run: {how}"


@cache
def isas() -> tuple[str, ...]:
    """The instruction sets that this processor and the library have in common, the best one last."""
    return tuple(_library().lorica_isas().decode().split())


def isa() -> str:
    """The instruction set that updates use: the best one, or the one that LORICA_NATIVE_ISA names.

    Raises:
        ValueError: if this machine does not have it.
    """
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted and wanted not in isas():
        raise ValueError(
            f"{ISA_VARIABLE}: expected one of {', '.join(isas())} (what this processor has), got {wanted!r}. "
            "Fix: correct it, or leave it unset."
        )
    return wanted or isas()[-1]


def _library() -> Any:
    library, _ = _load()
    if library is None:
        raise RuntimeError(f"native kernels: {why_not()}.")
    return library


# -- threads -----------------------------------------------------------------------------------------------------------


class Pool:
    """Threads of the library: idle until an update is run on them, one update at a time.

    Results do not depend on their number. After a fork the child gets threads of its own at its first update.
    """

    def __init__(self, num_threads: int, cores: Sequence[int] | None = None) -> None:
        """Start the threads.

        Args:
            num_threads: at least 1; without `cores`, the caller of an update is one of them.
            cores: a logical CPU for each thread, to which it is bound (Linux; elsewhere no such call exists).
        Raises:
            ValueError: if there are not as many cores as threads, or this process may not use one of them.
            RuntimeError: if the system has no more threads, or the library is missing.
        """
        if num_threads < 1 or (cores is not None and len(cores) != num_threads):
            raise ValueError(
                f"Pool: expected at least one thread and no cores or one for each, got num_threads={num_threads}, "
                f"cores={None if cores is None else list(cores)}. Fix: correct them."
            )
        library = _library()
        where = None if cores is None else (ctypes.c_int32 * num_threads)(*cores)
        handle = library.lorica_pool_create(num_threads, where)
        if not handle:
            reason = os.strerror(ctypes.get_errno())
            if cores is not None:
                raise ValueError(
                    f"Pool: cannot bind {num_threads} threads to the cores {list(cores)}: {reason}. "
                    "Fix: name cores that os.sched_getaffinity(0) lists."
                )
            raise RuntimeError(f"Pool: cannot start {num_threads} threads: {reason}. Fix: ask for fewer.")
        self.num_threads = num_threads
        self.cores = None if cores is None else tuple(cores)
        self._handle: int | None = handle
        self._close = weakref.finalize(self, library.lorica_pool_destroy, handle)

    @property
    def handle(self) -> int:
        """The library's pointer.

        Raises:
            RuntimeError: after `close`.
        """
        if self._handle is None:
            raise RuntimeError("Pool: it was closed. Fix: close it after its last update, or make another.")
        return self._handle

    def close(self) -> None:
        """End the threads, after the update that is running."""
        self._handle = None
        self._close()


@cache
def default_pool(num_threads: int) -> Pool:
    """The pool of updates that name none: threads that are not bound, shared by the process."""
    return Pool(num_threads)


_chosen = threading.local()


@contextmanager
def on(pool: Pool) -> Iterator[None]:
    """Run the updates that this thread makes inside the block, and that name no pool, on `pool`."""
    before = getattr(_chosen, "pool", None)
    _chosen.pool = pool
    try:
        yield
    finally:
        _chosen.pool = before


def _pool(pool: Pool | None) -> Pool:
    return pool or getattr(_chosen, "pool", None) or default_pool(torch.get_num_threads())


# -- updates -----------------------------------------------------------------------------------------------------------


def fits(master_N: Tensor, grad_N: Tensor, out_N: Tensor | None) -> bool:
    """Whether the kernels take these planes: on the CPU, contiguous, an fp32 or split master, 16- or 32-bit floats."""
    return _misfit(master_N, grad_N, out_N) is None


def fits_compact(master_N: Tensor, grad_N: Tensor, out_N: Tensor | None) -> bool:
    """Whether `adam_compact` takes these planes: what `fits` says, or a bf16 parameter without a master."""
    return _misfit(master_N, grad_N, out_N, rounded=True) is None


def _misfit(master_N: Tensor, grad_N: Tensor, out_N: Tensor | None, *, rounded: bool = False) -> str | None:
    """What is wrong with the planes of an update. Args: rounded: a bf16 parameter may be its own master."""
    planes = {"master": master_N, "grad": grad_N} | ({} if out_N is None else {"out": out_N})
    for name, plane in planes.items():
        if plane.device.type != "cpu" or not plane.is_contiguous():
            return f"{name}: expected a contiguous CPU tensor, got one on {plane.device}, strides {plane.stride()}"
    out = None if out_N is None else out_N.dtype
    own = rounded and master_N.dtype is torch.bfloat16 and out is None
    if master_N.dtype not in (torch.float32, torch.int16) and not own:
        return f"master: expected float32, or int16 for a split one, got {master_N.dtype}"
    if master_N.dtype is torch.int16 and out is not torch.bfloat16:
        return f"out: expected bfloat16, the upper halves of a split master, got {out}"
    if out not in _FORM:
        return f"out: expected bfloat16, float16 or None, got {out}"
    if grad_N.dtype not in _FLOAT:
        return f"grad: expected bfloat16, float16 or float32, got {grad_N.dtype}"
    return None


def adam(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, m_N: Tensor, v_N: Tensor, *,
    coef: float, hyper: Sequence[float], pool: Pool | None = None, into: Destination | None = None,
) -> bool:  # fmt: skip
    """One Adam or AdamW update.

    Args:
        master_N: fp32, or int16: the remainders of a split master whose upper halves are `out_N`.
        out_N: bf16 or fp16, receives the rounded master; None if the master is the parameter itself.
        grad_N: bf16, fp16 or fp32, raw. m_N, v_N: fp32.
        coef: multiplies the gradient, in fp32. hyper: as `adam_hyper` says.
        pool: default: that of `on`, else unbound threads, as many as torch uses.
        into: where to write; default: over what is read. With it, `master_N`, `m_N`, `v_N` and a split master's
            `out_N` are read only, and the `out_N` of an fp32 master is not touched.
    Returns:
        Whether an element of the gradient was inf or nan. The update was made nevertheless.
    Raises:
        ValueError: if a plane has the wrong dtype, length or device.
    """
    return _update("adam", master_N, out_N, grad_N, (m_N, v_N), coef, hyper, pool, into)


def adam_compact(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, m_N: Tensor, v_N: Tensor, *,
    scales: tuple[Tensor, ...], coef: float, hyper: Sequence[float], keys: tuple[int, int], start: int,
    pool: Pool | None = None, into: Destination | None = None,
) -> bool:  # fmt: skip
    """One Adam or AdamW update of moments in few bytes, or of a parameter without a master; see precision/compact.py.

    Args:
        master_N: as in `adam`; or bf16, the parameter itself, rounded stochastically (`out_N` is None then).
            N: a multiple of 128.
        m_N, v_N: fp32; bf16; or int8 and uint8; or int8 and fp32 [N / 128].
        scales: [N / 128] fp32 for each moment in 8 bits.
        keys: `compact.key_of` the step and plane, for the moments and for the parameter.
        start: number of the first element in its plane.
        out_N, grad_N, coef, hyper, pool, into, and what is returned and raised: as in `adam`.
    """
    moments, numel = (m_N, v_N), master_N.numel()
    target = Destination(master_N, out_N, moments, scales) if into is None else into
    problem = _misfit(master_N, grad_N, out_N, rounded=True) or _compact_misfit(moments, scales, numel)
    problem = problem or _mismatch((master_N, out_N, *moments, *scales), grad_N, (*target[:2], *target[2], *target[3]))
    if problem:
        raise ValueError(f"adam_compact: {problem}. Fix: pass planes as Segment describes them.")
    dice = _Dice(_FORMAT[m_N.dtype, v_N.dtype], start & 0xFFFFFFFF, *keys)
    return _run("adam", Destination(master_N, out_N, moments, scales), target, grad_N, coef, hyper, pool, dice)


def lion(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, m_N: Tensor, *,
    coef: float, hyper: Sequence[float], pool: Pool | None = None, into: Destination | None = None,
) -> bool:  # fmt: skip
    """One Lion update; arguments and result as in `adam`."""
    return _update("lion", master_N, out_N, grad_N, (m_N,), coef, hyper, pool, into)


def sgd(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, buffer_N: Tensor | None, *,
    coef: float, hyper: Sequence[float], pool: Pool | None = None, into: Destination | None = None,
) -> bool:  # fmt: skip
    """One SGD update; `buffer_N` is None without momentum; other arguments and result as in `adam`."""
    if buffer_N is None:
        return _update("sgd", master_N, out_N, grad_N, (), coef, hyper, pool, into)
    return _update("sgd with momentum", master_N, out_N, grad_N, (buffer_N,), coef, hyper, pool, into)


def adagrad(
    master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, sum_N: Tensor, *,
    coef: float, hyper: Sequence[float], pool: Pool | None = None, into: Destination | None = None,
) -> bool:  # fmt: skip
    """One Adagrad update; arguments and result as in `adam`."""
    return _update("adagrad", master_N, out_N, grad_N, (sum_N,), coef, hyper, pool, into)


def _update(
    rule: str, master_N: Tensor, out_N: Tensor | None, grad_N: Tensor, moments: tuple[Tensor, ...],
    coef: float, hyper: Sequence[float], pool: Pool | None, into: Destination | None,
) -> bool:  # fmt: skip
    target = Destination(master_N, out_N, moments) if into is None else into
    problem = _misfit(master_N, grad_N, out_N) or _inexact(moments, master_N.numel())
    problem = problem or _mismatch((master_N, out_N, *moments), grad_N, (*target[:2], *target.moments))
    if problem:
        raise ValueError(f"{rule}: {problem}. Fix: pass planes as Segment describes them.")
    return _run(rule, Destination(master_N, out_N, moments), target, grad_N, coef, hyper, pool)


class _Dice(NamedTuple):
    """What `lorica_planes` says of compact states."""

    format: int = 0
    start: int = 0
    moment_key: int = 0
    parameter_key: int = 0


_NO_DICE = _Dice()


def _run(
    rule: str, read: Destination, written: Destination, grad_N: Tensor, coef: float, hyper: Sequence[float],
    pool: Pool | None, dice: _Dice = _NO_DICE,
) -> bool:  # fmt: skip
    split = read.master.dtype is torch.int16
    form = _SPLIT if split else _FORM[None if read.out is None else read.out.dtype]
    planes = _Planes(
        read.master.numel(), _address(grad_N), _address(read.master), _address(written.master),
        _address(read.out) if split else None, _address(written.out),
        *_pairs(read.moments, written.moments), *_pairs(read.scales, written.scales),
        _FLOAT[grad_N.dtype], _ROUNDED if read.master.dtype is torch.bfloat16 else form, _RULE[rule],
        *dice, coef, (ctypes.c_float * NUM_HYPER)(*hyper),
    )  # fmt: skip
    return bool(_library().lorica_update(_pool(pool).handle, isas().index(isa()), ctypes.byref(planes)))


def _pairs(read: tuple[Tensor, ...], written: tuple[Tensor, ...]) -> list[int | None]:
    """Four addresses: of two planes, where each is read and where it is written."""
    found = [_address(plane) for pair in zip(read, written, strict=True) for plane in pair]
    return [*found, *[None] * (4 - len(found))]


def _address(plane: Tensor | None) -> int | None:
    return None if plane is None else plane.data_ptr()


def _inexact(moments: tuple[Tensor, ...], numel: int) -> str | None:
    """What is wrong with fp32 moments."""
    for plane in moments:
        if plane.dtype is not torch.float32 or plane.device.type != "cpu" or not plane.is_contiguous():
            return f"moments: expected contiguous float32 CPU tensors, got {plane.dtype} on {plane.device}"
        if plane.numel() != numel:
            return f"moments: expected {numel} elements, as in the master, got {plane.numel()}"
    return None


def _compact_misfit(moments: tuple[Tensor, Tensor], scales: tuple[Tensor, ...], numel: int) -> str | None:
    """What is wrong with moments in few bytes."""
    dtypes, blocks = (moments[0].dtype, moments[1].dtype), numel // BLOCK
    if dtypes not in _FORMAT or numel % BLOCK:
        return f"moments: expected one of the formats in whole blocks of {BLOCK}, got {dtypes} for {numel} elements"
    lengths = [plane.numel() for plane in moments]
    if lengths != [numel, blocks if dtypes == (torch.int8, torch.float32) else numel]:
        return f"moments: expected planes for {numel} elements, got {lengths}"
    coded = sum(dtype in (torch.int8, torch.uint8) for dtype in dtypes)
    if len(scales) != coded or any(s.dtype is not torch.float32 or s.numel() != blocks for s in scales):
        return f"scales: expected {coded} of {blocks} float32, got {[(s.numel(), s.dtype) for s in scales]}"
    for plane in (*moments, *scales):
        if plane.device.type != "cpu" or not plane.is_contiguous():
            return f"moments: expected contiguous CPU tensors, got one on {plane.device}, strides {plane.stride()}"
    return None


Tensors = tuple[Tensor | None, ...]


def _mismatch(read: Tensors, grad_N: Tensor, written: Tensors) -> str | None:
    """What is wrong between the planes: lengths, where to write. Args: read, written: master, out, moments, scales."""
    master_N, out_N = read[:2]
    numel = 0 if master_N is None else master_N.numel()
    if grad_N.numel() != numel or (out_N is not None and out_N.numel() != numel):
        return f"expected {numel} elements in every plane, as in the master, got {grad_N.numel()} in grad, or others"
    if len(read) != len(written) or any(b is not a and _unlike(a, b) for a, b in zip(read, written, strict=True)):
        return "into: expected tensors of the same dtypes and lengths as those that are read, got others"
    return None


def _unlike(read: Tensor | None, written: Tensor | None) -> bool:
    if read is None or written is None:
        return read is not written
    same = read.dtype is written.dtype and read.numel() == written.numel()
    return not (same and written.device.type == "cpu" and written.is_contiguous())


# -- measures ----------------------------------------------------------------------------------------------------------


def square_sum(grad_N: Tensor, pool: Pool | None = None) -> float:
    """The sum of squares of a bf16, fp16 or fp32 CPU plane, added in double precision; inf or nan if an element is.

    The same bits for any number of threads and any instruction set.

    Raises:
        ValueError: for another dtype or device.
    """
    if grad_N.dtype not in _FLOAT or grad_N.device.type != "cpu" or not grad_N.is_contiguous():
        raise ValueError(
            f"square_sum: expected a contiguous bfloat16, float16 or float32 CPU tensor, got {grad_N.dtype} on "
            f"{grad_N.device}. Fix: convert it."
        )
    total = float(
        _library().lorica_square_sum(
            _pool(pool).handle, isas().index(isa()), grad_N.data_ptr(), _FLOAT[grad_N.dtype], grad_N.numel()
        )
    )
    if total < 0:
        raise RuntimeError("square_sum: no memory for the partial sums. Fix: free some.")
    return total


def triad(a_N: Tensor, b_N: Tensor, c_N: Tensor, factor: float, pool: Pool | None = None) -> None:
    """a = b + factor * c, the measure of memory bandwidth: 12 bytes an element.

    Args:
        a_N, b_N, c_N: fp32 on the CPU, contiguous, aligned to 64 bytes; N a multiple of 16.
    Source: McCalpin 1995, STREAM.
    Raises:
        ValueError: for other tensors.
    """
    planes = (a_N, b_N, c_N)
    aligned = all(plane.data_ptr() % 64 == 0 and plane.is_contiguous() for plane in planes)
    same = {(plane.dtype, plane.device.type, plane.numel()) for plane in planes}
    if not aligned or same != {(torch.float32, "cpu", a_N.numel())} or a_N.numel() % 16:
        raise ValueError(
            f"triad: expected aligned float32 CPU tensors of one length, a multiple of 16, got {sorted(map(str, same))}"
            ". Fix: allocate them anew."
        )
    _library().lorica_triad(_pool(pool).handle, *(plane.data_ptr() for plane in planes), factor, a_N.numel())


# -- building ----------------------------------------------------------------------------------------------------------


def build() -> str:
    """Compile the library of a source tree, beside this file; returns which tool did it.

    Raises:
        RuntimeError: if this is no source tree, or compiling fails.
    """
    script = SOURCES / "build.py"
    if not script.is_file():
        raise RuntimeError(
            f"native kernels: expected their sources in {SOURCES}, found none: this Lorica was installed. "
            "Fix: install a C++17 compiler, then reinstall Lorica from source."
        )
    builder = runpy.run_path(str(script))
    try:
        return str(builder["build"](LIBRARY))
    except builder["BuildError"] as error:
        raise RuntimeError(f"native kernels: {error}") from error


def main(argv: Sequence[str]) -> int:
    """`--build` compiles the library; without it, print whether it is there."""
    parser = argparse.ArgumentParser(prog="python -m lorica.kernels.native", description="The native CPU kernels.")
    parser.add_argument("--build", action="store_true", help="compile them in a source tree")
    if parser.parse_args(argv).build:
        try:
            print(f"native kernels: built by {build()}: {LIBRARY}")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"native kernels: {isa()}, of {', '.join(isas())}" if available() else f"native kernels: {why_not()}")
    return 0 if available() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
