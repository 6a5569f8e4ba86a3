"""A Triton copy with a given number of blocks, for host memory that the GPU reaches by itself. Measures nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WORDS = 8192  # of 8 bytes, that a block has in flight
NUM_WARPS = 16


@triton.jit
def _copy_words(source, target, numel, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks take turns at pieces of SIZE words."""
    for start in range(tl.program_id(0) * SIZE, numel, tl.num_programs(0) * SIZE):
        place = start + tl.arange(0, SIZE)
        inside = place < numel
        tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)


def copy_words(source: Tensor, target: Tensor, num_blocks: int) -> None:
    """Copy int64 words [N] on the current stream; either side may be registered host memory."""
    _copy_words[(num_blocks,)](source, target, source.numel(), SIZE=WORDS, num_warps=NUM_WARPS)
