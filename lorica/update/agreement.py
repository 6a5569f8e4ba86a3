"""Ranks that end together when one of them cannot go on, and figures that all see alike. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorica.core.flat import Site


def raise_together(problem: BaseException | None, site: Site, what: str) -> None:
    """Raise on all ranks if one of them has a problem: none is left waiting in a collective. Collective.

    Args:
        problem: of this rank; it raises just this.
        what: was tried, for the other ranks' message.
    Raises:
        RuntimeError: on ranks without a problem of their own.
    """
    if site.num_replicas > 1:
        failed = torch.tensor([float(problem is not None)], device=site.device)
        for comm in (site.shard, site.replicate):
            if comm is not None:
                comm.all_reduce(failed).wait()
        if problem is None and failed.item():
            raise RuntimeError(
                f"{what} failed on another rank, which says why. Fix: mend it there; no rank has gone on."
            )
    if problem is not None:
        raise problem


def least_of_all_ranks(figures: Sequence[int], site: Site) -> list[int]:
    """The smallest value of each figure on any rank, the same list on all of them. Collective."""
    least = torch.tensor(figures, dtype=torch.int64, device=site.device)
    for comm in (site.shard, site.replicate):
        if comm is not None and comm.world_size > 1:
            everyone = torch.empty(comm.world_size * len(least), dtype=torch.int64, device=site.device)
            comm.all_gather(least, everyone).wait()
            least = everyone.view(comm.world_size, -1).amin(0)
    return [int(figure) for figure in least.tolist()]
