"""Compact Adam: the CPU's kernel is the exact one between decoding and encoding; the GPU's has its bits; cuts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.kernels import native
from lorica.kernels.hyper import adam_hyper
from lorica.optim import AdamW, Lion, Segment
from lorica.precision import compact
from lorica.precision.rounding import join, rounded, split
from tests.mechanism.exact_arithmetic import fma, random_bits, same_values, usual

if not native.available():
    pytest.skip(native.why_not(), allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernel
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
FORMATS = ("fp32", "bf16", "int8", "int8_block")
FORMS = ("master", "bf16", "fp16", "split", "rounded")
N, START, SALT, COEF = 128 * 24, 128 * 5, 0xDEADBEEF, 0.3
formats, forms = pytest.mark.parametrize("kind", FORMATS), pytest.mark.parametrize("form", FORMS)
both_values = pytest.mark.parametrize("values", [usual, random_bits])
GRADS = (torch.bfloat16, torch.float32, torch.float16)
Values = Callable[..., Tensor]


@dataclass
class Planes:
    """What a kernel updates."""

    master: Tensor
    out: Tensor | None
    m: Tensor
    v: Tensor
    scales: tuple[Tensor, ...]

    def all(self) -> list[Tensor]:
        return [self.master, *([] if self.out is None else [self.out]), self.m, self.v, *self.scales]

    def apply(self, change: Callable[[Tensor], Tensor]) -> Planes:
        out = None if self.out is None else change(self.out)
        return Planes(change(self.master), out, change(self.m), change(self.v), tuple(map(change, self.scales)))

    def clone(self, device: str = "cpu") -> Planes:
        return self.apply(lambda plane: plane.to(device, copy=True))

    def part(self, low: int, high: int) -> Planes:
        """Views of some whole blocks."""
        numel = self.master.numel()
        return self.apply(lambda p: p[low // (numel // p.numel()) : high // (numel // p.numel())])

    def weights(self) -> Tensor:
        """In fp32."""
        if self.master.dtype is torch.int16:
            assert self.out is not None
            return join(self.out, self.master)
        return self.master.float()

    def moments(self) -> list[Tensor]:
        """In fp32; the second one as it is stored if it is one per block."""
        scale = iter(self.scales)
        planes = [(p, next(scale) if p.dtype in (torch.int8, torch.uint8) else None) for p in (self.m, self.v)]
        return [compact.decode(p, s, p.numel()) for p, s in planes]


def planes_of(kind: str, form: str, values: Values = usual, numel: int = N) -> Planes:
    """Fresh planes; where one moment serves a block, some padding at ends of parameters."""
    w, m, v = values(numel, 1), values(numel, 2), values(numel, 3).abs()
    out = None
    if form in ("bf16", "fp16"):
        out = rounded(w, torch.bfloat16 if form == "bf16" else torch.float16)
    elif form == "split":
        out, w = split(w)
    elif form == "rounded":
        w = rounded(w, torch.bfloat16)
    if kind == "fp32":
        return Planes(w, out, m, v, ())
    if kind == "bf16":
        return Planes(w, out, m.bfloat16(), v.bfloat16(), ())
    first = compact.encode_signed(m, None)
    if kind == "int8":
        second = compact.encode_root(compact.root(v), None)
        return Planes(w, out, first.codes, second.codes, (first.scale, second.scale))
    first.codes[100:128] = first.codes[-128:] = compact.PAD
    return Planes(w, out, first.codes, v[: numel // 128].clone(), (first.scale,))


def step(planes: Planes, grad: Tensor, number: int, start: int = START, decoupled: bool = True, **options: Any) -> bool:
    """One native update; returns found_inf."""
    keys = compact.key_of(number, SALT), compact.key_of(number, SALT, of_parameter=True)
    hyper = adam_hyper(number, decoupled=decoupled, **ADAM)
    return native.adam_compact(
        planes.master, planes.out, grad, planes.m, planes.v,
        scales=planes.scales, coef=COEF, hyper=hyper, keys=keys, start=start, **options,
    )  # fmt: skip


def equal(got: Planes, wanted: Planes) -> bool:
    """Whether all states agree: of blocks that are no numbers only that they are none."""
    pairs = list(zip(got.all(), wanted.all(), strict=True))
    if got.scales:
        finite = got.scales[0].cpu().isfinite().repeat_interleave(128)
        pairs = [(a[finite], b[finite]) if a is got.m else (a, b) for a, b in pairs]
    if got.master.dtype is torch.int16:
        pairs = [(got.weights(), wanted.weights()), *pairs[1:]]  # a split NaN has no bits of its own
    return all(same_values(a, b) for a, b in pairs)


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this processor has."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return str(request.param)


# What it computes -----------------------------------------------------------------------------------------------------


def expected(before: Planes, grad: Tensor, number: int, decoupled: bool) -> Planes:
    """Decoded, updated in exact arithmetic, encoded by the formulas."""
    hyper = adam_hyper(number, decoupled=decoupled, **ADAM)
    b1, rest1, b2, rest2, eps, l2, shrink, step_size, inverse2 = (np.float32(value) for value in hyper[:9])
    w, (m, v) = before.weights().numpy(), (moment.numpy() for moment in before.moments())
    inside = before.m != compact.PAD
    numel = w.size
    with np.errstate(all="ignore"):
        g = fma(l2, w, grad.float().numpy() * np.float32(COEF))
        if v.size < numel:
            g = np.where(inside.numpy(), g, np.float32(0))
            v = fma(b2, v, rest2 * compact.mean_square(torch.from_numpy(g), inside).numpy())
        else:
            v = fma(b2, v, rest2 * (g * g))
        m = fma(b1, m, rest1 * g)
        denominator = np.repeat(fma(np.sqrt(v), inverse2, eps), numel // v.size)
        w = fma(step_size, m / denominator, w * shrink)
    return stored(before, *(torch.from_numpy(x) for x in (w, m, v)), number)


def stored(like: Planes, w: Tensor, m: Tensor, v: Tensor, number: int) -> Planes:
    """The values as planes like these, rounded with the dice of the step."""
    numel, cpu = w.numel(), w.device
    bits = compact.dice(compact.key_of(number, SALT), START, numel, cpu)
    of_parameter = compact.dice(compact.key_of(number, SALT, of_parameter=True), START, numel, cpu)
    out, scales = None if like.out is None else rounded(w, like.out.dtype), []
    if like.master.dtype is torch.int16:
        out, w = split(w)
    elif like.master.dtype is torch.bfloat16:
        w = compact.round_stochastically(w, compact.low(of_parameter))
    if like.m.dtype is torch.bfloat16:
        m, v = compact.round_stochastically(m, compact.low(bits)), compact.round_stochastically(v, compact.high(bits))
    if like.m.dtype is torch.int8:
        coded = compact.encode_signed(m, compact.low(bits))
        m, scales = torch.where(like.m == compact.PAD, like.m, coded.codes), [coded.scale]
    if like.v.dtype is torch.uint8:
        v, scale = compact.encode_root(compact.root(v), compact.high(bits))
        scales.append(scale)
    return Planes(w, out, m, v, tuple(scales))


@formats
@forms
@both_values
@pytest.mark.parametrize("decoupled", [True, False])
def test_the_native_kernel_is_the_exact_one_between_decoding_and_encoding(
    isa: str, values: Values, form: str, kind: str, decoupled: bool
) -> None:
    planes = planes_of(kind, form, values)
    for number in (1, 2, 3):
        grad = values(N, 100 + number)
        wanted = expected(planes, grad, number, decoupled)
        step(planes, grad, number, decoupled=decoupled)
        assert equal(planes, wanted), number


@pytest.fixture
def triton_kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton kernel; in the interpreter, which multiplies and adds in two roundings, with a true fma."""
    pytest.importorskip("triton")
    from lorica.kernels import compact as kernels

    if DEVICE == "cpu":
        from triton.runtime import interpreter

        def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
            return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    return kernels.adam_compact


@formats
@forms
@both_values
def test_the_triton_kernel_and_the_native_one_give_the_same_bits(
    triton_kernel: Any, values: Values, form: str, kind: str
) -> None:
    mine = planes_of(kind, form, values)
    theirs = mine.clone(DEVICE)
    for number in (1, 2, 3):
        exact = DEVICE == "cpu" and values is random_bits  # the interpreter does not know denormals of 16 bits
        grad = values(N, 100 + number, torch.float32 if exact else GRADS[number - 1])
        hyper = [*adam_hyper(number, decoupled=True, **ADAM), 0.0, 0.0]
        with np.errstate(all="ignore"):
            triton_kernel(
                theirs.master, theirs.out, grad.to(DEVICE), theirs.m, theirs.v,
                scales=theirs.scales, coef=torch.tensor([COEF], dtype=torch.float64, device=DEVICE),
                apply=torch.ones(1, dtype=torch.int32, device=DEVICE),
                hyper=torch.tensor(hyper, device=DEVICE), salt=SALT, start=START,
            )  # fmt: skip
        step(mine, grad, number)
        assert equal(mine, theirs.clone()), number


@formats
def test_the_triton_kernel_changes_nothing_if_told_so(triton_kernel: Any, kind: str) -> None:
    planes = planes_of(kind, "split").clone(DEVICE)
    before = planes.clone(DEVICE)
    triton_kernel(
        planes.master, planes.out, torch.full((N,), float("nan"), device=DEVICE), planes.m, planes.v,
        scales=planes.scales, coef=torch.ones(1, device=DEVICE), apply=torch.zeros(1, dtype=torch.int32, device=DEVICE),
        hyper=torch.ones(12, device=DEVICE), salt=SALT, start=START,
    )  # fmt: skip
    assert all(map(torch.equal, planes.all(), before.all()))


@formats
@pytest.mark.parametrize("form", ["master", "split", "rounded"])
def test_the_formula_in_torch_agrees_within_a_code(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where there is no kernel; without a fused multiply-add some dice fall the other way."""
    kernel, formula = planes_of(kind, form), planes_of(kind, form)
    optimizer = AdamW(lr=1e-2, weight_decay=0.1)
    (group,) = optimizer.param_groups([{}], {})
    for number in (1, 2, 3):
        grad = usual(N, 100 + number, torch.bfloat16)
        for planes, fits in ((kernel, True), (formula, False)):
            monkeypatch.setattr(native, "fits_compact", lambda *_, fits=fits: fits)
            optimizer.update([segment(planes, grad, group)], coef=COEF, step=number)
    assert not torch.equal(kernel.m, planes_of(kind, form).m)
    step_size = 2**-7 if form == "rounded" else 2**-20
    torch.testing.assert_close(kernel.weights(), formula.weights(), rtol=step_size, atol=3e-5)
    for mine, theirs in zip(kernel.moments(), formula.moments(), strict=True):
        worst = mine.abs().view(-1, 128).amax(1).repeat_interleave(128) if mine.numel() % 128 == 0 else mine
        assert float(((mine - theirs).abs() / worst.clamp_min(1e-20)).max()) < 0.04


def segment(planes: Planes, grad: Tensor, group: dict[str, Any]) -> Segment:
    """The planes as an optimizer is given them."""
    state = {"exp_avg": planes.m, "exp_avg_sq": planes.v}
    names = [name for name, plane in state.items() if plane.dtype in (torch.int8, torch.uint8)]
    state |= {f"{name}.scale": scale for name, scale in zip(names, planes.scales, strict=True)}
    return Segment(planes.master, grad, planes.out, state, group, start=START, salt=SALT)


# Whatever the cut, the threads and the place --------------------------------------------------------------------------


@formats
@forms
def test_every_instruction_set_gives_the_bits_of_the_baseline(
    monkeypatch: pytest.MonkeyPatch, kind: str, form: str
) -> None:
    results = []
    for name in native.isas():
        monkeypatch.setenv(native.ISA_VARIABLE, name)
        for dtype, values in itertools.product(GRADS, (usual, random_bits)):
            planes = planes_of(kind, form, values)
            step(planes, values(N, 50, dtype), 7)
            results.append((name, planes))
    per_isa = len(results) // len(native.isas())
    for index, (_, planes) in enumerate(results):
        assert equal(planes, results[index % per_isa][1])


@formats
@pytest.mark.parametrize("form", ["split", "rounded"])
def test_no_cut_and_no_number_of_threads_changes_a_bit(isa: str, kind: str, form: str) -> None:
    numel = 128 * 700  # several parts for the pool
    grad = usual(numel, 50, torch.bfloat16)
    whole, cut = planes_of(kind, form, numel=numel), planes_of(kind, form, numel=numel)
    for threads in (1, 3):
        other = planes_of(kind, form, numel=numel)
        pool = native.Pool(threads)
        step(other, grad, 1, pool=pool)
        pool.close()
        if threads == 1:
            whole = other
    assert equal(other, whole)
    borders = [0, 128, 384, 4096, 50_048, numel]
    for low, high in itertools.pairwise(borders):
        step(cut.part(low, high), grad[low:high], 1, start=START + low)
    assert equal(cut, whole)


@formats
@pytest.mark.parametrize("form", ["bf16", "split"])
def test_out_of_place_is_in_place_elsewhere(isa: str, kind: str, form: str) -> None:
    before, grad = planes_of(kind, form), usual(N, 50, torch.bfloat16)
    in_place, source = before.clone(), before.clone()
    target = before.apply(torch.zeros_like)
    step(in_place, grad, 1)
    step(source, grad, 1, into=native.Destination(target.master, target.out, (target.m, target.v), target.scales))
    assert equal(target, in_place)
    assert all(map(torch.equal, source.all(), before.all()))


@formats
def test_an_infinite_gradient_is_noticed(isa: str, kind: str) -> None:
    grad = usual(N, 50, torch.bfloat16)
    assert not step(planes_of(kind, "split"), grad, 1)
    grad[777] = float("inf")
    assert step(planes_of(kind, "split"), grad, 1)


def test_other_steps_planes_and_places_throw_other_dice(isa: str) -> None:
    def codes(number: int = 1, start: int = START) -> Tensor:
        planes = planes_of("int8", "rounded")
        step(planes, usual(N, 50), number, start)
        return torch.cat([planes.m.float(), planes.v.float(), planes.master.float()])

    assert torch.equal(codes(), codes())
    assert (codes() != codes(start=START + 128)).float().mean() > 0.1


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: setattr(p, "scales", ()), "scales: expected 2 of 24 float32"),
        (lambda p: setattr(p, "v", p.v.float()), "expected one of the formats|expected planes for"),
        (lambda p: setattr(p, "v", p.v[:-1]), "expected planes for 3072 elements"),
        (lambda p: setattr(p, "master", p.master.double()), "master: expected float32"),
    ],
)
def test_planes_that_do_not_belong_together_are_refused(change: Callable[[Planes], None], words: str) -> None:
    planes = planes_of("int8", "split")
    change(planes)
    with pytest.raises(ValueError, match=words):
        step(planes, usual(N, 50), 1)


def test_a_range_that_is_no_whole_blocks_is_refused() -> None:
    planes = planes_of("bf16", "master")
    short = planes.apply(lambda plane: plane[:100])
    with pytest.raises(ValueError, match="whole blocks of 128"):
        step(short, usual(100, 50), 1)


def test_an_optimizer_without_compact_states_says_so() -> None:
    optimizer = Lion(lr=1e-3)
    (group,) = optimizer.param_groups([{}], {})
    planes = planes_of("bf16", "master")
    with pytest.raises(ValueError, match="Lion: expected moments in fp32"):
        optimizer.update([segment(planes, usual(N, 50), group)], coef=1.0, step=1)
