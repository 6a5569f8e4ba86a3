"""Planes in a file on a local disk. Owns where each plane lies in the swap file; the file does the rest.

Source: Rajbhandari et al. 2021, ZeRO-Infinity (arXiv:2104.07857), sec. 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.tier.base import TierFull, padded_bytes
from lorica.tier.swap import SwapFile, Transfer


class FilePlane:
    """A 1-D plane in a swap file.

    `read` and `write` start transfers and move at the disk's speed where borders are multiples of 4096 elements (or the
    plane's end) and memory begins at a page. Any other border works too, through a buffer. Two transfers of the same
    elements keep no order: wait for the first.
    """

    device = torch.device("cpu")

    def __init__(self, file: SwapFile, offset: int, numel: int, dtype: torch.dtype) -> None:
        self._file, self._offset, self._numel = file, offset, numel
        self.dtype = dtype

    def numel(self) -> int:
        """Elements."""
        return self._numel

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def read(self, start: int, stop: int, out: Tensor) -> Transfer:
        """Start reading elements [start, stop) into `out`.

        Args:
            out: [stop - start] of the plane's dtype, contiguous, on the CPU; not to be touched before `wait()`.
        Raises:
            ValueError: if range, size, dtype or device do not fit.
        """
        self._require(start, stop, out)
        return self._file.read(self._byte(start), out)

    def write(self, start: int, values: Tensor) -> Transfer:
        """Start writing `values` to the elements from `start` on; arguments and errors as in `read`."""
        self._require(start, start + values.numel(), values)
        return self._file.write(self._byte(start), values)

    def load(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) as a new tensor on the CPU."""
        stop = self._numel if stop is None else stop
        out = torch.empty(max(0, stop - start), dtype=self.dtype)
        self.read(start, stop, out).wait()
        return out

    def store(self, start: int, values: Tensor) -> None:
        """Write `values` (1-D, the plane's dtype, any device) to the elements from `start` on, and wait for it."""
        self.write(start, values.detach().to("cpu").contiguous()).wait()

    def _byte(self, element: int) -> int:
        return self._offset + element * self.dtype.itemsize

    def _require(self, start: int, stop: int, memory: Tensor) -> None:
        if not 0 <= start <= stop <= self._numel or memory.numel() != stop - start or memory.dtype != self.dtype:
            raise ValueError(
                f"A plane of {self._numel} x {self.dtype} in a file: expected a tensor of its dtype for a range within "
                f"it, got [{start}, {stop}) and {memory.numel()} x {memory.dtype}."
            )


class NvmeTier:
    """The disk as memory: one swap file, cut into planes once.

    Args:
        file: fresh; it is closed with the tier. See `padded_bytes` for what each plane takes of it.
    """

    name = "nvme"

    def __init__(self, file: SwapFile) -> None:
        self.device = torch.device("cpu")
        self.file = file
        self._used = 0

    @property
    def free_bytes(self) -> int:
        """Room that is left."""
        return self.file.num_bytes - self._used

    def alloc(self, numel: int, dtype: torch.dtype) -> FilePlane:
        """Zero-filled plane of `numel` elements in the file.

        Raises:
            TierFull: if the file has not that much room left.
        """
        num_bytes = numel * dtype.itemsize
        if num_bytes > self.free_bytes:
            raise TierFull(
                f"The swap file {self.file.path} is full: expected room for {num_bytes} bytes ({numel} x {dtype}), got "
                f"{self.free_bytes} of {self.file.num_bytes} bytes free. Fix: make it as large as the planes of the "
                "plan, each padded to a page."
            )
        plane = FilePlane(self.file, self._used, numel, dtype)
        self._used = min(self._used + padded_bytes(num_bytes), self.file.num_bytes)
        return plane

    def verify(self) -> None:
        """See `SwapFile.verify`."""
        self.file.verify()

    def close(self) -> None:
        """Let transfers end and remove the file."""
        self.file.close()
