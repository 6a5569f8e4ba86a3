"""The optimizer object that `initialize` returns: param groups and state for the user, the engine's step behind it.

Owns no arithmetic. It is a `torch.optim.Optimizer`, so that every scheduler and every client accepts it; its
`param_groups` are the very dicts of the client's optimizer (schedulers write the learning rate into them), and the
update reads them at every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class ZeroOptimizer(torch.optim.Optimizer):
    """What the user sees of the sharded optimizer."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        client: torch.optim.Optimizer | None,
        step: Callable[[], None],
        zero_grad: Callable[[], None],
        scale: Callable[[], float],
        settle: Callable[[], None],
    ) -> None:
        """Wrap `groups`.

        Args:
            client: the user's own optimizer, if there was one.
            step, zero_grad, scale: the engine's.
            settle: learn whether the last step was applied, if the device has not said so yet.
        """
        super().__init__([{"params": [torch.zeros(())]}], dict(defaults))
        self.param_groups = groups
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.client = client
        self._overflow = False
        self._step, self._zero, self._scale, self._settle = step, zero_grad, scale, settle

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped because the gradient was not finite."""
        self._settle()
        return self._overflow

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The client's optimizer, or this object."""
        return self.client if self.client is not None else self

    @property
    def loss_scale(self) -> float:
        """The present loss scale (1.0 without fp16)."""
        return self._scale()

    @property
    def cur_scale(self) -> float:
        """DeepSpeed's other name of `loss_scale`."""
        return self._scale()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Reduce, clip, update and publish, as `engine.step()` does at a boundary."""
        loss = closure() if closure is not None else None
        self._step()
        return loss

    def note_update(self, *, applied: bool) -> None:
        """An update was made or skipped. torch's schedulers warn unless they see that `step` was called before them."""
        self._overflow = not applied
        for optimizer in (self, self.client):
            if applied and optimizer is not None:
                optimizer._opt_called = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those already reduced among them."""
        self._zero()

    def state_dict(self) -> dict[str, Any]:
        """Hyper-parameters of the groups. The sharded state itself is saved by `engine.save_checkpoint`."""
        self._settle()
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        return {"param_groups": groups, "loss_scale": self.loss_scale, "overflow": self.overflow}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back the hyper-parameters; the group dicts keep their identity."""
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(
                f"load_state_dict: expected {len(self.param_groups)} param groups, got {len(saved)}. "
                "Fix: build the optimizer with the groups that it had when it was saved."
            )
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update({k: v for k, v in values.items() if k != "params"})

    def __repr__(self) -> str:
        inner = type(self.client).__name__ if self.client is not None else "configured"
        return f"ZeroOptimizer({inner}, {len(self.param_groups)} param groups)"
