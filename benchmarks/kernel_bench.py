"""Every fused kernel against plain PyTorch, torch.compile and Liger, at the shapes of a 7 B Llama. One table.

    python benchmarks/kernel_bench.py --out runs/kernel_bench
    python benchmarks/kernel_bench.py --report runs/kernel_bench/kernels.json --doc docs/kernels.md    # needs no GPU
    TRITON_INTERPRET=1 python benchmarks/kernel_bench.py --small     # a dry run on a CPU (Liger fails there)

Times are medians of `triton.testing.do_bench`, which empties the cache between calls; inputs are bf16. Bytes are those
that must move: every input, output and gradient once, what backward needs of the forward once more; a copy between two
buffers of the same device is the yardstick. `error` is the largest relative difference (in the Euclidean norm) of an
output or a gradient from what PyTorch computes in fp32. Some kernels work ahead: the forward of a fused head computes
gradients too, so compare the sums. The optimizer kernels are in gpu_step.py's table.

Shapes: B sequences, L length, D width, F feed-forward width, H heads, K head width, V vocabulary, T tokens (B * L).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.documents import replace_between  # noqa: E402
from benchmarks.gpu_ceilings import (  # noqa: E402
    NotOffered,
    copy_bandwidth,
    machine,
    matmul_rate,
    median_seconds,
    start_memory,
    the_device,
)
from benchmarks.gpu_tables import machine_line  # noqa: E402
from benchmarks.llama import CHUNK, apply_rotary_pos_emb, recomputed, rotary_tables  # noqa: E402

EPS = 1e-5
MARKER = "kernel table"
Call = Callable[..., Any]


class Shape(NamedTuple):
    """The sizes of all cases."""

    batch: int
    length: int
    dim: int
    ffn: int
    num_heads: int
    vocabulary: int

    @property
    def num_tokens(self) -> int:
        return self.batch * self.length


LLAMA_7B = Shape(batch=8, length=2048, dim=4096, ffn=11_008, num_heads=32, vocabulary=32_000)
SMALL = Shape(batch=2, length=8, dim=64, ffn=96, num_heads=2, vocabulary=256)


class Inputs(NamedTuple):
    """The arguments of one op: those that get a gradient, and the rest."""

    trained: tuple[Tensor, ...]
    fixed: tuple[Any, ...] = ()


class Case(NamedTuple):
    """One op.

    Attributes:
        make: fresh inputs of a shape, the same values at every call.
        calls: a name -> a function that returns the op's implementation; it may raise NotOffered or ImportError.
        bytes: what forward and backward together must move, or 0 where arithmetic decides.
        flop: operations of forward and backward together, where arithmetic decides.
    """

    name: str
    make: Callable[[Shape, torch.device], Inputs]
    calls: dict[str, Callable[[], Call]]
    bytes: Callable[[Shape], int] = lambda shape: 0
    flop: Callable[[Shape], int] = lambda shape: 0


# Inputs ---------------------------------------------------------------------------------------------------------------


def random(device: torch.device, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in bf16."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, device=device, generator=generator) * scale).bfloat16()


def rows(*num_rows: str, per_feature: int = 0) -> Callable[[Shape, torch.device], Inputs]:
    """Tensors [T, `name`] of the shape, then some vectors of the last one's width."""

    def make(shape: Shape, device: torch.device) -> Inputs:
        widths = [getattr(shape, name) for name in num_rows]
        wide = [random(device, shape.num_tokens, width, seed=i) for i, width in enumerate(widths)]
        thin = [1 + random(device, widths[-1], seed=10 + i, scale=0.1) for i in range(per_feature)]
        return Inputs((*wide, *thin))

    return make


def heads(shape: Shape, device: torch.device) -> Inputs:
    """Queries and keys [B, H, L, K] as projections leave them (transposed views), and the tables."""
    size = shape.dim // shape.num_heads
    flat = [random(device, shape.batch, shape.length, shape.num_heads, size, seed=seed) for seed in range(2)]
    cos, sin = rotary_tables(shape.length, size, device, torch.bfloat16)
    return Inputs(tuple(x.transpose(1, 2) for x in flat), (cos, sin))


def head_and_targets(shape: Shape, device: torch.device) -> Inputs:
    """Hidden states, the head's weight, the targets."""
    x = random(device, shape.num_tokens, shape.dim, seed=0)
    weight = random(device, shape.vocabulary, shape.dim, seed=1, scale=0.02)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(shape.vocabulary, (shape.num_tokens,), generator=generator).to(device)
    return Inputs((x, weight), (targets,))


# Implementations ------------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As benchmarks/llama.py does it: chunks of tokens, recomputed in backward."""

    def loss(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    parts = [recomputed(loss, *chunk) for chunk in zip(x.split(CHUNK), targets.split(CHUNK), strict=True)]
    return torch.stack(parts).sum() / targets.numel()


def torch_calls(call: Call) -> dict[str, Callable[[], Call]]:
    """A formula as it is, and compiled."""
    return {"PyTorch": lambda: call, "torch.compile": lambda: torch.compile(call, dynamic=False)}


def liger(name: str, arguments: Callable[[Call], Call]) -> dict[str, Callable[[], Call]]:
    """One of Liger's functions, put into the form of the formulas here by `arguments`."""

    def load() -> Call:
        if find_spec("liger_kernel") is None:
            raise NotOffered("liger-kernel is not installed")
        from liger_kernel.transformers import functional

        return arguments(getattr(functional, name))

    return {"Liger": load}


def _lorica_layer_norm() -> Call:
    from lorica.kernels.norm import layer_norm

    return lambda x, weight, bias: layer_norm(x, weight, bias, EPS)


def _lorica_add_rms_norm() -> Call:
    from lorica.kernels.norm import rms_norm

    return lambda x, residual, weight: rms_norm(x, weight, EPS, residual)


def _lorica_swiglu() -> Call:
    from lorica.kernels.activation import swiglu

    return swiglu


def _lorica_bias_gelu() -> Call:
    from lorica.kernels.activation import bias_gelu

    return lambda x, bias: bias_gelu(x, bias, "tanh")


def _lorica_rotary() -> Call:
    from lorica.kernels.rotary import apply_rotary

    return apply_rotary


def _lorica_linear_cross_entropy() -> Call:
    from lorica.kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


CASES = (
    Case(
        "layer_norm",
        rows("dim", per_feature=2),
        torch_calls(layer_norm)
        | liger("liger_layer_norm", lambda call: lambda x, weight, bias: call(x, weight, bias, EPS))
        | {"Lorica": _lorica_layer_norm},
        bytes=lambda s: 2 * 5 * s.num_tokens * s.dim,  # x | y; dy, x | dx
    ),
    Case(
        "rms_norm with residual",
        rows("dim", "dim", per_feature=1),
        torch_calls(add_rms_norm)
        | liger(
            "liger_fused_add_rms_norm",
            lambda call: lambda x, residual, weight: call(x, residual, weight, EPS, 0.0, "llama", False),
        )
        | {"Lorica": _lorica_add_rms_norm},
        bytes=lambda s: 2 * 8 * s.num_tokens * s.dim,  # x, residual | y, total; dy, dtotal, total | dx
    ),
    Case(
        "swiglu",
        rows("ffn", "ffn"),
        torch_calls(swiglu) | liger("liger_swiglu", lambda call: call) | {"Lorica": _lorica_swiglu},
        bytes=lambda s: 2 * 8 * s.num_tokens * s.ffn,  # gate, up | y; dy, gate, up | dgate, dup
    ),
    Case(
        "bias_gelu",
        rows("ffn", per_feature=1),
        torch_calls(bias_gelu) | {"Lorica": _lorica_bias_gelu},
        bytes=lambda s: 2 * 5 * s.num_tokens * s.ffn,  # x | y; dy, x | dx
    ),
    Case(
        "rotary",
        heads,
        torch_calls(apply_rotary_pos_emb)
        | liger("liger_rope", lambda call: lambda q, k, cos, sin: call(q, k, cos, sin)[:2])
        | {"Lorica": _lorica_rotary},
        bytes=lambda s: 2 * 8 * s.num_tokens * s.dim,  # q, k | q, k; dq, dk | dq, dk
    ),
    Case(
        "linear_cross_entropy",
        head_and_targets,
        torch_calls(linear_cross_entropy)
        | {"PyTorch, chunks recomputed": lambda: chunked_cross_entropy}
        | liger("liger_fused_linear_cross_entropy", lambda call: call)
        | {"Lorica": _lorica_linear_cross_entropy},
        flop=lambda s: 6 * s.num_tokens * s.dim * s.vocabulary,
    ),
)


# Measuring ------------------------------------------------------------------------------------------------------------


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """One output or several, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def with_gradients(call: Call, inputs: Inputs, upstream: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients; gradients of outputs are random numbers unless given (a scalar's is one)."""
    outputs = outputs_of(call(*inputs.trained, *inputs.fixed))
    return [*outputs, *torch.autograd.grad(outputs, inputs.trained, upstream or upstream_of(outputs))]


def upstream_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What flows back into the outputs: the same numbers whatever their dtype."""
    return [
        torch.ones_like(y) if y.dim() == 0 else random(y.device, *y.shape, seed=20 + i).to(y.dtype)
        for i, y in enumerate(outputs)
    ]


def made(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Fresh inputs that want gradients; some kernels write theirs over the inputs."""
    inputs = case.make(shape, device)
    trained = tuple(x.detach().to(dtype).requires_grad_() for x in inputs.trained)
    fixed = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs.fixed)
    return Inputs(trained, fixed)


def errors(case: Case, call: Call, shape: Shape, device: torch.device) -> float:
    """The largest relative error of an output or gradient against plain PyTorch in fp32."""
    wanted = with_gradients(case.calls["PyTorch"](), made(case, shape, device, torch.float32))
    found = with_gradients(call, made(case, shape, device))
    pairs = [(value.detach().float(), right.detach()) for value, right in zip(found, wanted, strict=True)]
    return torch.stack([(value - right).norm() / right.norm() for value, right in pairs]).max().item()


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call."""
    if device.type != "cuda":
        return median_seconds(call, device, warmup=1, repeats=3) * 1e3
    import triton

    return float(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median"))


def measured(case: Case, name: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """One implementation of one op: error, times of forward and of both, peak memory above the inputs."""
    call = case.calls[name]()
    row: dict[str, Any] = {"error": errors(case, call, shape, device)}
    inputs = made(case, shape, device)
    outputs = outputs_of(call(*inputs.trained, *inputs.fixed))
    upstream = upstream_of(outputs)
    del outputs
    start_memory(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with_gradients(call, inputs, upstream)
    row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    row["forward_ms"] = milliseconds(lambda: call(*inputs.trained, *inputs.fixed), device)
    row["ms"] = milliseconds(lambda: with_gradients(call, inputs, upstream), device)
    return row


def measure_all(shape: Shape, device: torch.device, ops: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each implementation of each op, with a problem in it where it did not run."""
    for case in CASES:
        if case.name not in ops:
            continue
        for name in case.calls:
            row: dict[str, Any] = {"op": case.name, "by": name, "bytes": case.bytes(shape), "flop": case.flop(shape)}
            start_memory(device)
            try:
                row |= measured(case, name, shape, device)
            except NotOffered as reason:
                row["problem"] = f"not available: {reason}"
            except Exception as error:  # a compiler's or a launch's, of any library; the table says it
                first_line = next(iter(str(error).splitlines()), "")
                row["problem"] = f"{type(error).__name__}: {first_line[:160]}"
            torch.compiler.reset()
            said = row.get("problem") or f"{row['ms']:9.3f} ms  error {row['error']:.1e}"
            print(f"{case.name:24} {name:28} {said}", flush=True)
            yield row


# The table ------------------------------------------------------------------------------------------------------------


def table(saved: dict[str, Any]) -> str:
    """The Markdown: a line about the run, and the table."""
    copy, product, shape = saved["copy_bytes_per_s"], saved["matmul_flop_per_s"], Shape(*saved["shape"])
    lines = [
        f"{machine_line(saved['machine'])}, Liger {saved['machine']['liger-kernel'] or 'not installed'}. bf16, "
        f"{shape.batch} x {shape.length} tokens, width {shape.dim}, FFN {shape.ffn}, {shape.num_heads} heads, "
        f"vocabulary {shape.vocabulary}. Copy {copy / 1e9:,.0f} GB/s (read plus written), bf16 matrix product "
        f"{product / 1e12:,.0f} TFLOP/s; linear_cross_entropy is in TFLOP/s of its three products.",
        "",
        "| op | by | forward ms | forward + backward ms | GB/s | of copy | peak MiB above inputs | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in saved["rows"]:
        if "problem" in row:
            lines.append(f"| {row['op']} | {row['by']} | {row['problem'].replace('|', '/')} |" + " |" * 5)
            continue
        work, unit, most = (row["flop"], "TFLOP/s", product) if row["flop"] else (row["bytes"], "", copy)
        rate = work / (row["ms"] / 1e3)
        shown = f"{rate / 1e12:,.0f} {unit}" if unit else f"{rate / 1e9:,.0f}"
        share = f"{rate / most:.3f}" + (" of product" if unit else "")
        lines.append(
            f"| {row['op']} | {row['by']} | {row['forward_ms']:.3f} | {row['ms']:.3f} | {shown} | {share} "
            f"| {row['peak_bytes'] / 2**20:,.0f} | {row['error']:.1e} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--ops", nargs="+", choices=names, default=names)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a dry run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kernel_bench")
    parser.add_argument("--doc", type=Path, help="a Markdown file whose table is replaced")
    parser.add_argument("--report", type=Path, help="make the table of this kernels.json; run nothing")
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything and write it."""
    device, shape = the_device(), SMALL if options.small else LLAMA_7B
    saved: dict[str, Any] = {
        "machine": machine(device),
        "shape": list(shape),
        "copy_bytes_per_s": copy_bandwidth(device),
        "matmul_flop_per_s": matmul_rate(device),
        "rows": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for row in measure_all(shape, device, options.ops):
        saved["rows"].append(row)
        (options.out / "kernels.json").write_text(json.dumps(saved, indent=1))
    return saved


def main() -> int:
    options = parse()
    saved = json.loads(options.report.read_text()) if options.report else run(options)
    text = table(saved)
    print(f"\n{text}\n")
    if options.doc is not None:
        replace_between(options.doc, MARKER, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
