"""Updates planes in place where their records live, whole planes in one go, on the current stream or in this thread.

Serves records in device memory, and optimizers that must see more than an element (LAMB, Muon) or keep state of their
own (client optimizers) wherever their records live. Owns no formula and no decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorica.comm.solo import Solo
from lorica.core.flat import Flat, Site
from lorica.core.gradient import GradPlane
from lorica.optim.base import FlatOptimizer
from lorica.update.executor import Executor
from lorica.update.pieces import Work, own_gradient, record_of, segments, update_record

if TYPE_CHECKING:
    from lorica.comm.base import Collectives


class Resident(Executor):
    """The executor that moves nothing that it need not move."""

    def __init__(
        self, optimizer: FlatOptimizer, planes: Sequence[GradPlane], groups: Sequence[dict[str, Any]], site: Site
    ) -> None:
        """Serve `planes`, whose param groups are `groups`."""
        self.planes = list(planes)
        self._optimizer, self._groups, self._site = optimizer, groups, site
        self.runs_on_device = all(self._runs_on_device(plane) for plane in self.planes)

    def _runs_on_device(self, plane: GradPlane) -> bool:
        """Whether the plane's update reads `coef` and `apply` on the compute device, without waiting for them."""
        flat = plane.flat
        assert flat.master is not None
        grad = torch.empty(0, dtype=plane.dtype, device=flat.master.device)
        record = record_of(flat)._replace(out=self._output(flat))
        found = segments(flat, record, grad, self._groups, 0, flat.owned.numel())
        return flat.master.device == self._site.device and all(map(self._optimizer.runs_on_device, found))

    def start(self, work: Work) -> None:
        """Update every plane and start giving all ranks the new parameters. Collective."""
        for plane in self.planes:
            self._update(plane, work)
            plane.flat.publish()

    def _update(self, plane: GradPlane, work: Work) -> None:
        flat = plane.flat
        assert flat.master is not None
        grad, out = own_gradient(plane).to(flat.master.device), self._output(flat)
        if out is not None and out is not flat.owned and flat.plan.master_is_split:
            out.copy_(flat.owned)  # the upper halves of the masters
        update_record(
            self._optimizer,
            flat,
            record_of(flat)._replace(out=out),
            grad,
            self._groups,
            0,
            flat.owned.numel(),
            coef=work.coef,
            step=work.step,
            apply=work.apply,
            comm=self._comm(flat),
        )
        if out is not None and out is not flat.owned:
            flat.owned.copy_(out)

    def _output(self, flat: Flat) -> Tensor | None:
        """Where the optimizer writes the rounded parameter: nowhere if the master is the parameter."""
        assert flat.master is not None
        if flat.plan.master_is_param:
            return None
        here = flat.owned.device == flat.master.device
        return flat.owned if here else torch.empty_like(flat.owned, device=flat.master.device)

    def _comm(self, flat: Flat) -> Collectives:
        return self._site.shard if flat.plan.master.sharded else Solo(self._site.device)
