"""How a master becomes a parameter: one rounding for all planes, and the split master that rests on it.

Owns the two bit formulas, in plain torch; the kernels repeat them (`kernels/update.py`). Owns no plane.

[Note: split master] A bf16 parameter is the upper half of its fp32 master, rounded. If rounding is to nearest with
ties away from zero, the lower 16 bits, read as a signed number, are exactly what the rounding left out:

    hi = (bits(master) + 0x8000) >> 16        lo = int16(bits(master))        bits(master) = (hi << 16) + lo

so 2 + 2 bytes hold what 2 + 4 held, and no bit is lost. A parameter that was overwritten with zeros by hand may stand
beside a remainder that no zero has; it counts as zero then (read literally, the pair would be a NaN).
With ties to even (torch's own conversion) this cannot work: an even `hi` would have 2^16 + 1 masters. The two
roundings differ on exact ties only (one master in 2^17), and every plane uses the first, so that a run with a split
master and one with an fp32 master are the same run. A NaN stays a NaN, its payload may change.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The low 17 bits of a master that ties-to-even rounds down and ties-away rounds up: exactly one half, even upper half.
_LOW_17 = 0x1FFFF
_EVEN_TIE = 0x08000


def round_into(master: Tensor, out: Tensor) -> None:
    """Write `master` rounded to the dtype of `out`: to nearest, for fp32 -> bf16 with ties away from zero.

    Args:
        master: any float dtype, any shape. out: the same shape, contiguous; may not overlap `master`.
    """
    out.copy_(master)
    if out.dtype is torch.bfloat16 and master.dtype is torch.float32:
        bits = master.contiguous().view(torch.int32)
        out.view(torch.int16).bitwise_or_((bits & _LOW_17) == _EVEN_TIE)  # even upper half: up by one


def rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """`master` as a tensor of `dtype`, rounded as `round_into` does; itself if it has that dtype."""
    if master.dtype is dtype:
        return master
    out = torch.empty(master.shape, dtype=dtype, device=master.device)
    round_into(master, out)
    return out


def split_into(master: Tensor, hi: Tensor, lo: Tensor) -> None:
    """Write `master` [n] fp32 as its bf16 rounding `hi` [n] and the remainder `lo` [n] int16."""
    round_into(master, hi)
    lo.copy_(master.contiguous().view(torch.int32))  # integer conversion keeps the low bits


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """`master` [n] fp32 as two new tensors: see `split_into`."""
    hi, lo = (torch.empty(master.shape, dtype=d, device=master.device) for d in (torch.bfloat16, torch.int16))
    split_into(master, hi, lo)
    return hi, lo


def join(hi: Tensor, lo: Tensor, out: Tensor | None = None) -> Tensor:
    """The fp32 master [n] of which `split_into` made `hi` [n] bf16 and `lo` [n] int16; into `out` if given."""
    if out is None:
        out = torch.empty(hi.shape, dtype=torch.float32, device=hi.device)
    upper, bits = hi.view(torch.int16), out.view(torch.int32)
    bits.copy_(upper).bitwise_left_shift_(16).add_(lo.masked_fill((upper << 1 == 0) & (lo < 0), 0))
    return out
