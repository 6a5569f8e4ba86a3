"""The optimizer and pack kernels against the copy bandwidth of the GPU: time, GB/s, share. One table.

    python benchmarks/update_bench.py [--numel 1e9] [--sweep]

Bytes are those that the algorithm must move: AdamW with bf16 gradient and parameter 28 a parameter, with a split master
26, pack of bf16 gradients 4. `--sweep` also tries other block sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from lorica.kernels import pack, update
from lorica.layout import Entry, build_layout

SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2  # one Llama block of 7 B


def median_s(call: Callable[[], object]) -> float:
    """Seconds of a call: the median over a second of calls."""
    return float(triton.testing.do_bench(call, warmup=100, rep=1000, return_mode="median")) / 1e3


def copy_bandwidth(num_bytes: int = 4 << 30) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / median_s(lambda: target.copy_(source))


def adam_call(numel: int, *, split: bool) -> tuple[Callable[[], object], int]:
    """One AdamW update of a plane, and its bytes."""
    out = torch.randn(numel, device="cuda").bfloat16()
    master = torch.zeros(numel, dtype=torch.int16, device="cuda") if split else out.float()
    grad, m, v = torch.randn(numel, device="cuda").bfloat16(), torch.zeros(numel, device="cuda"), None
    v = torch.zeros_like(m)
    hyper = torch.zeros(12, device="cuda")
    values = update.adam_hyper(
        10, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decoupled=True, bias_correction=True
    )
    hyper[: len(values)] = torch.tensor(values)
    coef, apply = torch.ones(1, device="cuda"), torch.ones(1, dtype=torch.int32, device="cuda")
    call = lambda: update.adam(master, out, grad, m, v, coef=coef, apply=apply, hyper=hyper)  # noqa: E731
    return call, (26 if split else 28) * numel


def torch_adam_call(numel: int) -> tuple[Callable[[], object], int]:
    """The same with torch: fp32 gradient copy, fused AdamW, rounded copy."""
    grad, out = torch.randn(numel, device="cuda").bfloat16(), torch.randn(numel, device="cuda").bfloat16()
    master = torch.nn.Parameter(out.float())
    optimizer = torch.optim.AdamW([master], fused=True)

    def call() -> Tensor:
        master.grad = grad.float()
        optimizer.step()
        return out.copy_(master.detach())

    return call, 28 * numel


def pack_calls() -> tuple[Callable[[], object], Callable[[], object], int]:
    """Packing the gradients of one block with the sum of squares: by the kernel, and by torch in two passes."""
    layout = build_layout([Entry(str(i), shape, 0) for i, shape in enumerate(SHAPES)], 1)
    grads: list[Tensor | None] = [torch.randn(shape, device="cuda").bfloat16() for shape in SHAPES]
    plane = torch.empty(layout.numel, dtype=torch.bfloat16, device="cuda")
    chunks = pack.chunk_map(layout, plane.device)
    squares = torch.empty(chunks.num_chunks, device="cuda")
    views = [plane[slot.start : slot.stop].view(slot.shape) for slot in layout.slots]

    def ours() -> None:
        pack.pack(grads, chunks, plane, squares, accumulate=False, scale=1.0)

    def by_torch() -> Tensor:
        torch._foreach_copy_(views, [grad for grad in grads if grad is not None])
        return torch.linalg.vector_norm(plane.view(-1, 128), dim=1, dtype=torch.float32).double().square().sum()

    return ours, by_torch, 4 * layout.numel


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=float, default=1e9)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    numel = int(arguments.numel) // 128 * 128
    copy = copy_bandwidth()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e12:.2f} TB/s")
    print("| kernel | ms | GB/s | of copy |\n|---|---|---|---|")

    def row(name: str, call: Callable[[], object], num_bytes: int) -> None:
        seconds = median_s(call)
        rate = num_bytes / seconds
        print(f"| {name} | {seconds * 1e3:.3f} | {rate / 1e9:.0f} | {rate / copy:.1%} |", flush=True)

    settings = [(update.BLOCK, update.NUM_WARPS)]
    if arguments.sweep:
        settings += [(1024, 4), (1024, 2), (2048, 8), (4096, 8), (4096, 4), (512, 2)]
    for update.BLOCK, update.NUM_WARPS in settings:
        for split in (False, True):
            what = f"AdamW, {'split' if split else 'fp32'} master (block {update.BLOCK}, {update.NUM_WARPS} warps)"
            row(what, *adam_call(numel, split=split))
            torch.cuda.empty_cache()
    row("AdamW by torch: cast, fused update, cast", *torch_adam_call(numel))
    torch.cuda.empty_cache()
    ours, by_torch, num_bytes = pack_calls()
    row("pack one block with its sum of squares", ours, num_bytes)
    row("the same by torch: foreach copy, norm", by_torch, num_bytes)


if __name__ == "__main__":
    main()
