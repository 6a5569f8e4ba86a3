"""The native CPU kernels: the bits of the Triton kernels, on every instruction set, however they are called."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.kernels import native
from lorica.kernels.hyper import adagrad_hyper, adam_hyper, lion_hyper, sgd_hyper
from lorica.optim import AdamW, Segment
from lorica.optim import element as element_file
from lorica.precision.rounding import join, rounded, split_into
from tests.mechanism.exact_arithmetic import fma, random_bits, same_values, usual

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels
GRADS = (torch.float32, torch.bfloat16, torch.float16)
STEPS = 20
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
SGD: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False}
NESTEROV = {**SGD, "nesterov": True, "dampening": 0.0}
ADAGRAD = {"lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-10}
BF16 = torch.bfloat16

# name: (the kernel, its scalars at a step, how many moments)
CASES: dict[str, tuple[str, Callable[[int], tuple[float, ...]], int]] = {
    "adamw": ("adam", partial(adam_hyper, decoupled=True, **ADAM), 2),
    "adam with L2": ("adam", partial(adam_hyper, decoupled=False, **ADAM), 2),
    "lion": ("lion", lambda step: lion_hyper(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), 1),
    "sgd": ("sgd", partial(sgd_hyper, **{**SGD, "momentum": 0.0}), 0),
    "momentum": ("sgd", partial(sgd_hyper, **SGD), 1),
    "nesterov": ("sgd", partial(sgd_hyper, **NESTEROV), 1),
    "adagrad": ("adagrad", partial(adagrad_hyper, **ADAGRAD), 1),
}
# name: (dtype of the rounded parameter, whether the master is split)
FORMS: dict[str, tuple[torch.dtype | None, bool]] = {
    "master": (None, False),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "split": (torch.bfloat16, True),
}
cases, forms = pytest.mark.parametrize("case", CASES), pytest.mark.parametrize("form", FORMS)
Values = Callable[..., Tensor]


@dataclass
class Planes:
    """What a kernel updates."""

    master: Tensor
    out: Tensor | None
    moments: list[Tensor]

    def all(self) -> list[Tensor]:
        return [self.master, *([] if self.out is None else [self.out]), *self.moments]

    def clone(self, device: str = "cpu") -> Planes:
        master, *rest = (plane.to(device, copy=True) for plane in self.all())
        return Planes(master, None if self.out is None else rest.pop(0), rest)

    def weights(self) -> Tensor:
        """The fp32 master."""
        if self.master.dtype is not torch.int16:
            return self.master
        assert self.out is not None
        return join(self.out, self.master)


def planes_of(case: str, form: str, numel: int, values: Values = random_bits) -> Planes:
    """Fresh planes; a second moment and a sum of squares are not negative."""
    dtype, split = FORMS[form]
    name, _, count = CASES[case]
    master = values(numel, 1)
    out = None if dtype is None else rounded(master, dtype)
    if split and out is not None:
        lower = torch.empty(numel, dtype=torch.int16)
        split_into(master, out, lower)
        master = lower
    moments = [values(numel, 2 + index) for index in range(count)]
    if name in ("adam", "adagrad"):
        moments[-1] = moments[-1].abs()
    return Planes(master, out, moments)


def step(planes: Planes, grad: Tensor, case: str, number: int, **options: Any) -> bool:
    """One native update; returns found_inf."""
    name, hyper, count = CASES[case]
    moments = planes.moments if count or name != "sgd" else [None]
    update = getattr(native, name)
    return bool(update(planes.master, planes.out, grad, *moments, coef=0.3, hyper=hyper(number), **options))


def steps(planes: Planes, case: str, dtype: torch.dtype = BF16, values: Values = random_bits, **options: Any) -> Planes:
    """All steps; returns the planes."""
    for number in range(1, STEPS + 1):
        step(planes, values(planes.master.numel(), 100 + number, dtype), case, number, **options)
    return planes


def equal(got: Planes, wanted: Planes) -> bool:
    """Whether all states are the same; a split NaN has no bits of its own."""
    rest = [] if got.out is None else [(got.out, wanted.out)]
    pairs = [(got.weights(), wanted.weights()), *rest, *zip(got.moments, wanted.moments, strict=True)]
    return all(b is not None and same_values(a, b) for a, b in pairs)


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this processor has."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    assert native.isa() == request.param
    return str(request.param)


# The reference --------------------------------------------------------------------------------------------------------


def test_the_reference_rounds_once() -> None:
    """Against fractions: the nearest fp32 to the exact sum, ties to even."""
    x, y, z = (random_bits(3000, seed).numpy() for seed in (1, 2, 3))
    with np.errstate(all="ignore"):
        z[1000:] = -(x * y)[1000:] * np.float32(1 + 2**-20)  # near cancellation
    finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(z)
    x, y, z = x[finite], y[finite], z[finite]
    got = fma(x, y, z)
    for a, b, c, value in zip(x, y, z, got, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        if not np.isfinite(value):
            assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
            continue
        error = abs(Fraction(float(value)) - exact)
        for neighbour in (np.nextafter(value, np.float32(np.inf)), np.nextafter(value, np.float32(-np.inf))):
            if np.isfinite(neighbour):
                other = abs(Fraction(float(neighbour)) - exact)
                assert error < other or (error == other and value.view(np.int32) % 2 == 0)


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton kernels; in the interpreter, which multiplies and adds in two roundings, with a true fma."""
    pytest.importorskip("triton")
    from lorica.kernels import update

    if DEVICE == "cpu":
        from triton.runtime import interpreter

        def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
            return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    return update


@cases
@forms
@pytest.mark.parametrize("values", [random_bits, usual])
def test_the_triton_kernel_and_the_native_one_give_the_same_bits(
    triton_kernels: Any, values: Values, case: str, form: str
) -> None:
    name, hyper, count = CASES[case]
    numel = 1500
    native_planes = planes_of(case, form, numel, values)
    triton_planes = native_planes.clone(DEVICE)
    scalars = {
        "coef": torch.tensor([0.3], dtype=torch.float64, device=DEVICE),
        "apply": torch.ones(1, dtype=torch.int32, device=DEVICE),
    }
    for number in range(1, 6):
        grad = values(numel, 100 + number)
        moments = triton_planes.moments if count or name != "sgd" else [None]
        padded = torch.tensor([*hyper(number), *[0.0] * (12 - len(hyper(number)))], device=DEVICE)
        with np.errstate(all="ignore"):
            update = getattr(triton_kernels, name)
            planes = (triton_planes.master, triton_planes.out, grad.to(DEVICE), *moments)
            update(*planes, **scalars, hyper=padded)
        step(native_planes, grad, case, number)
        assert equal(native_planes, triton_planes.clone()), number


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_the_formula_in_exact_arithmetic(isa: str, decoupled: bool) -> None:
    hyper = adam_hyper(3, decoupled=decoupled, **ADAM)
    planes, grad = planes_of("adamw", "master", 4000), random_bits(4000, 9)
    w, m, v, g = (plane.numpy().copy() for plane in (*planes.all(), grad))
    native.adam(planes.master, None, grad, *planes.moments, coef=0.3, hyper=hyper)
    b1, rest1, b2, rest2, eps, l2, shrink, step_size, inverse2 = (np.float32(value) for value in hyper[:9])
    with np.errstate(all="ignore"):
        g = fma(l2, w, g * np.float32(0.3))
        m = fma(b1, m, rest1 * g)
        v = fma(b2, v, rest2 * (g * g))
        w = fma(step_size, m / fma(np.sqrt(v), inverse2, eps), w * shrink)
    for got, wanted in zip(planes.all(), (w, m, v), strict=True):
        assert same_values(got, torch.from_numpy(wanted))


# Whatever the instruction set, form, cut and number of threads --------------------------------------------------------


@cases
@forms
@pytest.mark.parametrize("dtype", GRADS)
def test_every_instruction_set_gives_the_bits_of_the_baseline(
    monkeypatch: pytest.MonkeyPatch, case: str, form: str, dtype: torch.dtype
) -> None:
    assert native.isas()[0] == "scalar" and len(native.isas()) > 1
    results: list[list[Planes]] = []
    for name in native.isas():
        monkeypatch.setenv(native.ISA_VARIABLE, name)
        both = (random_bits, usual)
        results.append([steps(planes_of(case, form, 3001, values), case, dtype, values) for values in both])
    for others in results[1:]:
        assert all(map(equal, others, results[0]))
    assert not equal(results[0][1], planes_of(case, form, 3001, usual))


@cases
def test_a_split_master_trains_as_the_fp32_master_does(isa: str, case: str) -> None:
    for values in (random_bits, usual):
        whole = steps(planes_of(case, "bf16", 3001, values), case, values=values)
        split = steps(planes_of(case, "split", 3001, values), case, values=values)
        assert equal(split, whole)


@cases
@forms
@pytest.mark.parametrize("numel", [300, 400_003])  # below and above the size from which stores go past the caches
def test_out_of_place_is_in_place_elsewhere(isa: str, case: str, form: str, numel: int) -> None:
    before = planes_of(case, form, numel, usual)
    grad = usual(numel, 50, BF16)
    in_place, source = before.clone(), before.clone()
    target = Planes(*(None if x is None else torch.zeros_like(x) for x in (source.master, source.out)), [])  # type: ignore[arg-type]
    target.moments = [torch.zeros_like(moment) for moment in source.moments]
    into = native.Destination(target.master, target.out, tuple(target.moments))
    step(in_place, grad, case, 1)
    step(source, grad, case, 1, into=into)
    assert equal(target, in_place)
    assert all(map(torch.equal, source.all(), before.all()))


@cases
def test_planes_that_are_not_aligned_are_updated_alike(isa: str, case: str) -> None:
    numel = 300_000
    whole, cut = (planes_of(case, "bf16", numel + 1, usual) for _ in range(2))
    grad = usual(numel + 1, 5, BF16)
    step(whole, grad, case, 1)
    assert cut.out is not None
    for part in (slice(0, 1), slice(1, None)):
        step(Planes(cut.master[part], cut.out[part], [each[part] for each in cut.moments]), grad[part], case, 1)
    assert equal(cut, whole)


@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 127, 128, 129, 1000, 16384, 65536 + 77])
def test_every_size_is_updated_to_the_last_element_and_no_further(isa: str, numel: int) -> None:
    room = 64
    large = planes_of("adamw", "split", numel + room, usual)
    before, grad = large.clone(), usual(numel + room, 5, BF16)
    assert large.out is not None
    inside = Planes(large.master[:numel], large.out[:numel], [moment[:numel] for moment in large.moments])
    step(inside, grad[:numel], "adamw", 1)
    alone = planes_of("adamw", "split", numel + room, usual)
    step(alone, grad, "adamw", 1)
    for got, updated, untouched in zip(large.all(), alone.all(), before.all(), strict=True):
        assert torch.equal(got[:numel], updated[:numel])
        assert torch.equal(got[numel:], untouched[numel:])


@pytest.fixture(scope="module")
def pools() -> Iterator[list[native.Pool]]:
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    made = [native.Pool(number) for number in (1, 2, 3, 5)] + [native.Pool(3, [core] * 3)]
    yield made
    for pool in made:
        pool.close()


@pytest.mark.parametrize("numel", [1, 20_000, 100_003])
def test_the_number_of_threads_changes_no_bit(pools: list[native.Pool], numel: int) -> None:
    results = [steps(planes_of("adamw", "split", numel), "adamw", pool=pool) for pool in pools]
    assert all(equal(result, results[0]) for result in results[1:])


# Rounding and special values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_parameter_is_the_rounded_master(isa: str, dtype: torch.dtype) -> None:
    ties = (torch.arange(4096, dtype=torch.int32) * 0x1000 + 0x33000000).view(torch.float32)
    master = torch.cat([random_bits(200_000, 3), ties, -ties, torch.tensor([65504.0, 65519.0, 65520.0, -65520.0])])
    before, out = master.clone(), torch.zeros(master.numel(), dtype=dtype)
    hyper = sgd_hyper(1, **{**SGD, "lr": 0.0, "weight_decay": 0.0})
    native.sgd(master, out, torch.zeros_like(master), None, coef=1.0, hyper=hyper)
    finite = before.isfinite()
    assert same_values(master[finite], before[finite])
    assert same_values(out, rounded(master, dtype))


def test_every_16_bit_gradient_is_read_exactly(isa: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        master = torch.zeros(grad.numel())
        native.sgd(master, None, grad, None, coef=1.0, hyper=sgd_hyper(1, **{**SGD, "lr": 1.0, "weight_decay": 0.0}))
        wanted = -grad.float()
        assert same_values(master, wanted + 0.0)


def test_a_nan_reaches_the_parameter_and_stays_one(isa: str) -> None:
    master = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F808000], dtype=torch.int32).view(torch.float32)
    upper, lower = torch.empty(4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int16)
    split_into(master, upper, lower)
    native.sgd(lower, upper, torch.zeros(4), None, coef=1.0, hyper=sgd_hyper(1, **SGD))
    assert (upper.view(torch.int16) == 0x7FC0).all()
    assert join(upper, lower).isnan().all()


def test_a_parameter_overwritten_with_zeros_counts_as_zero(isa: str) -> None:
    lower = torch.tensor([-1, 5, -32768, -7], dtype=torch.int16)
    upper = torch.tensor([0.0, 0.0, -0.0, 1.0], dtype=torch.bfloat16)
    wanted = join(upper, lower)
    native.sgd(lower, upper, torch.zeros(4), None, coef=1.0, hyper=sgd_hyper(1, **{**SGD, "weight_decay": 0.0}))
    assert torch.equal(join(upper, lower), wanted)
    assert wanted[3] != 1.0 and (wanted[:3].abs() < 1e-38).all()


@pytest.mark.parametrize("dtype", GRADS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_an_element_that_is_not_finite_is_reported(isa: str, dtype: torch.dtype, value: float) -> None:
    numel = 70_001
    for at in (0, 40, 33_000, numel - 1):
        grad = usual(numel, 4, dtype)
        grad[1] = torch.finfo(dtype).max
        assert not step(planes_of("adamw", "bf16", numel, usual), grad, "adamw", 1)
        grad[at] = value
        with native.on(native.default_pool(2)):
            assert step(planes_of("adamw", "bf16", numel, usual), grad, "adamw", 1)


def test_denormals_are_kept_where_the_caller_flushes_them(isa: str) -> None:
    grad = torch.full((100_000,), 1e-41)
    torch.set_flush_denormal(True)
    pool = native.Pool(2)
    try:
        total = torch.zeros(grad.numel())
        native.sgd(total, None, grad, None, coef=1.0, hyper=(0.0, 1.0, 0.0, 0.0, 1.0, 1.0), pool=pool)
    finally:
        torch.set_flush_denormal(False)
        pool.close()
    assert torch.equal(total, grad)


# Threads and processes ------------------------------------------------------------------------------------------------


def test_several_python_threads_may_call_at_once(pools: list[native.Pool]) -> None:
    wanted = steps(planes_of("adamw", "split", 50_000, usual), "adamw", values=usual)
    results: list[Planes] = []

    def call() -> None:
        results.append(steps(planes_of("adamw", "split", 50_000, usual), "adamw", values=usual, pool=pools[1]))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(equal(result, wanted) for result in results)


def test_other_python_threads_run_during_a_call(pools: list[native.Pool]) -> None:
    """With the GIL held, the other thread would not run before a call's end."""
    planes, grad = planes_of("adamw", "master", 4_000_000, usual), usual(4_000_000, 8)
    started, stop, ticks = threading.Event(), threading.Event(), 0

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            started.set()
            stop.wait(1e-4)

    thread = threading.Thread(target=tick)
    thread.start()
    started.wait()
    before = ticks
    step(planes, grad, "adamw", 1, pool=pools[0])
    during = ticks - before
    stop.set()
    thread.join()
    assert during >= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own(pools: list[native.Pool]) -> None:
    mine, childs = (planes_of("adamw", "split", 50_000, usual) for _ in range(2))
    grad = usual(50_000, 5, BF16)
    step(mine, grad, "adamw", 1, pool=pools[1])
    child = os.fork()
    if child == 0:  # no torch operation here: its OpenMP does not survive a fork
        step(childs, grad, "adamw", 1, pool=pools[1])
        same = all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(childs.moments, mine.moments, strict=True))
        alive = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 2
        os._exit(0 if same and alive == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    step(childs, grad, "adamw", 1, pool=pools[1])
    assert equal(childs, mine)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_threads_are_bound_to_their_cores_and_end_with_the_pool() -> None:
    def tasks() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    cores = sorted(os.sched_getaffinity(0))
    before, own = tasks(), os.sched_getaffinity(0)
    pool = native.Pool(len(cores), cores)
    made = tasks() - before
    assert sorted(core for task in made for core in os.sched_getaffinity(int(task))) == cores
    assert os.sched_getaffinity(0) == own
    pool.close()
    assert not made & tasks()
    with pytest.raises(RuntimeError, match="it was closed"):
        step(planes_of("sgd", "master", 10), torch.zeros(10), "sgd", 1, pool=pool)


def test_an_idle_pool_uses_no_time() -> None:
    pool = native.Pool(4)
    steps(planes_of("adamw", "split", 100_000, usual), "adamw", values=usual, pool=pool)
    before = os.times()
    threading.Event().wait(0.3)
    after = os.times()
    pool.close()
    assert after.user + after.system - before.user - before.system < 0.1


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"master": torch.zeros(8, dtype=torch.float64)}, "master: expected float32"),
        ({"master": torch.zeros(8, dtype=torch.int16), "out": None}, "out: expected bfloat16"),
        ({"out": torch.zeros(8, dtype=torch.float32)}, "out: expected bfloat16, float16 or None"),
        ({"grad": torch.zeros(8, dtype=torch.float64)}, "grad: expected bfloat16, float16 or float32"),
        ({"grad": torch.zeros(7)}, "expected 8 elements"),
        ({"grad": torch.zeros(16)[::2]}, "contiguous"),
        ({"m": torch.zeros(8, dtype=torch.bfloat16)}, "moments: expected contiguous float32"),
        ({"v": torch.zeros(9)}, "expected 8 elements"),
        (
            {"into": native.Destination(torch.zeros(8), None, (torch.zeros(8), torch.zeros(8)))},
            "into: expected tensors",
        ),
        ({"into": native.Destination(torch.zeros(8), torch.zeros(8, dtype=BF16), (torch.zeros(8),))}, "into: expected"),
    ],
)
def test_planes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    planes = {
        "master": torch.zeros(8), "out": torch.zeros(8, dtype=BF16), "grad": torch.zeros(8),
        "m": torch.zeros(8), "v": torch.zeros(8), "into": None,
    } | change  # fmt: skip
    into = planes.pop("into")
    with pytest.raises(ValueError, match=message):
        native.adam(*planes.values(), coef=1.0, hyper=CASES["adamw"][1](1), into=into)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match=r"expected one of scalar.*'sse9'"):
        native.isa()


@pytest.mark.parametrize(("num_threads", "cores"), [(0, None), (2, [0]), (1, [-1]), (1, [10**6])])
def test_an_impossible_pool_is_refused(num_threads: int, cores: list[int] | None) -> None:
    with pytest.raises(ValueError, match="Fix:"):
        native.Pool(num_threads, cores)


# Beside the updates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", GRADS)
def test_the_sum_of_squares_is_exact_to_double_precision_and_the_same_for_any_number_of_threads(
    isa: str, pools: list[native.Pool], dtype: torch.dtype
) -> None:
    for numel in (0, 1, 33, 300_001):
        grad = usual(numel, 3, dtype)
        sums = {native.square_sum(grad, pool) for pool in pools}
        assert len(sums) == 1
        assert sums.pop() == pytest.approx(float(grad.double().square().sum()), rel=1e-13)
    grad[7] = float("inf")
    assert native.square_sum(grad) == float("inf")


def test_the_triad_is_computed(pools: list[native.Pool]) -> None:
    a, b, c = torch.zeros(100_000), usual(100_000, 1), usual(100_000, 2)
    for pool in pools:
        native.triad(a.zero_(), b, c, 3.0, pool)
        assert torch.equal(a, b + 3.0 * c)
    with pytest.raises(ValueError, match="multiple of 16"):
        native.triad(a[:17], b[:17], c[:17], 3.0)


# Under an optimizer ---------------------------------------------------------------------------------------------------


def segment(numel: int = 256) -> Segment:
    state = {name: torch.zeros(numel) for name in ("exp_avg", "exp_avg_sq")}
    (group,) = AdamW(lr=1e-2).param_groups([{}], {})
    return Segment(usual(numel, 1), usual(numel, 2, BF16), torch.zeros(numel, dtype=BF16), state, group)


def test_an_optimizer_on_the_cpu_is_one_native_call_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    own = native.adam
    monkeypatch.setattr(native, "adam", lambda *planes, **named: calls.append(named) or own(*planes, **named))
    for coef in (0.5, torch.tensor([0.5], dtype=torch.float64)):
        AdamW(lr=1e-2).update([segment(), segment()], coef=coef, step=1)
    assert [call["coef"] for call in calls] == [0.5] * 4


def test_an_update_that_must_not_be_applied_changes_nothing() -> None:
    planes = segment()
    before = [plane.clone() for plane in (planes.master, *planes.state.values())]
    AdamW(lr=1e-2).update([planes], coef=1.0, step=1, apply=torch.zeros(1, dtype=torch.int32))
    assert all(map(torch.equal, (planes.master, *planes.state.values()), before))
    AdamW(lr=1e-2).update([planes], coef=1.0, step=1, apply=torch.ones(1, dtype=torch.int32))
    assert not torch.equal(planes.master, before[0])


def test_without_the_library_one_warning_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "nothing there"))
    element_file._warn_once.cache_clear()
    planes, wanted = segment(), segment()
    with caplog.at_level("WARNING", logger="lorica"):
        AdamW(lr=1e-2).update([planes, segment()], coef=1.0, step=1)
        AdamW(lr=1e-2).update([segment()], coef=1.0, step=1)
    assert [message for message in caplog.messages if "native --build" in message and "nothing there" in message]
    assert len(caplog.messages) == 1
    monkeypatch.undo()
    AdamW(lr=1e-2).update([wanted], coef=1.0, step=1)
    torch.testing.assert_close(planes.master, wanted.master, rtol=1e-6, atol=1e-8)
