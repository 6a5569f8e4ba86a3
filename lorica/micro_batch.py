"""What `train_batch` is fed with: micro-batches from an iterator, how one enters the model, where its loss comes out.

Trains nothing itself. Says what stands against running micro-batches unit by unit: sums in another dtype, and models
that keep something of one micro-batch in their modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lorica.core.unit import Unit
from lorica.log import logger

LossFn = Callable[[Any, Any], Tensor]


class MicroBatch:
    """One micro-batch, and how to make a loss of it."""

    def __init__(self, batch: Any, device: torch.device, loss_fn: LossFn | None, caller: str) -> None:
        """Remember them; nothing is moved yet.

        Args:
            batch: a mapping gives the model's arguments by name, a tuple or list by place, anything else is the one.
            device: where the model computes.
            loss_fn: makes the loss of the model's output and the micro-batch; None: the output holds it.
            caller: for errors.
        """
        self._batch, self._device, self._loss_fn, self._caller = batch, device, loss_fn, caller

    def loss(self, model: Callable[..., Any]) -> Tensor:
        """Call `model`; a scalar.

        Raises:
            ValueError: if there is no scalar loss.
        """
        batch = _moved(self._batch, self._device)
        if isinstance(batch, Mapping):
            output = model(**batch)
        elif isinstance(batch, (tuple, list)):
            output = model(*batch)
        else:
            output = model(batch)
        found = _loss_in(output) if self._loss_fn is None else self._loss_fn(output, batch)
        if isinstance(found, Tensor) and found.numel() == 1:
            return found.reshape(())
        shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{self._caller}: expected a scalar loss from {'the model' if self._loss_fn is None else 'loss_fn'}, got "
            f"{shape}. Fix: return it alone, first in a tuple or as `loss`, or pass loss_fn=(output, batch) -> loss."
        )


def take(
    batches: Iterator[Any], count: int, device: torch.device, loss_fn: LossFn | None, caller: str
) -> list[MicroBatch]:
    """The next `count` micro-batches (the other arguments: see `MicroBatch`).

    Raises:
        ValueError: if there are fewer, or `batches` is not an iterator.
    """
    if not isinstance(batches, Iterator):
        raise ValueError(
            f"{caller}: expected an iterator of micro-batches, got {type(batches).__name__}. Fix: make one, once, with "
            "iter(loader), and pass the same one in every call."
        )
    taken: list[MicroBatch] = []
    while len(taken) < count:
        try:
            taken.append(MicroBatch(next(batches), device, loss_fn, caller))
        except StopIteration:
            raise ValueError(
                f"{caller}: expected {count} micro-batches (gradient_accumulation_steps), got {len(taken)} before the "
                "iterator ended. Fix: end the epoch one step earlier, or pass lorica.data.RepeatingLoader(loader)."
            ) from None
    return taken


def _moved(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on `device`; page-locked ones are copied while the host goes on."""

    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    if isinstance(batch, Mapping):  # also those that torch does not know as trees
        return {key: tree_map(move, value) for key, value in batch.items()}
    return tree_map(move, batch)


def _loss_in(output: Any) -> Any:
    """What a model's output says is the loss."""
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, (tuple, list)):
        return output[0] if output else None
    return output if isinstance(output, Tensor) else getattr(output, "loss", None)


def lives_outside(units: Sequence[Unit]) -> bool:
    """Whether parameters live outside of the device between their uses."""
    flats = [flat for unit in units for flat in unit.flats]
    return any(flat.sharded and flat.plan.param.tier != "device" for flat in flats)


def other_sum(units: Sequence[Unit]) -> str | None:
    """Why gradients summed by autograd are not what was asked for; None if they are."""
    for grad in (grad for unit in units for grad in unit.grads):
        if grad.dtype != grad.flat.dtype:
            return (
                f"unit by unit, micro-batches are summed in {grad.flat.dtype}, but gradients are to be accumulated in "
                f"{grad.dtype}"
            )
    return None


class Evaluating:
    """A context in which a model is in evaluation mode and without gradients; every module's own mode comes back."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._no_grad = model, torch.no_grad()

    def __enter__(self) -> None:
        self._modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        self._no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._no_grad.__exit__(*error)
        for module, mode in self._modes.items():
            module.training = mode


def attributes(model: nn.Module) -> dict[str, Any]:
    """The attributes of every module, by name; parameters, buffers and submodules are not among them."""
    return {f"{name}.{key}": value for name, module in model.named_modules() for key, value in vars(module).items()}


def warn_of_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Warn if a forward has set attributes: while micro-batches take turns, one would read what another has left."""
    missing = object()
    changed = [name.removeprefix(".") for name, value in after.items() if before.get(name, missing) is not value]
    if changed:
        shown = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
        logger.warning(
            f"train_batch: the model's forward sets attributes ({shown}). Unit by unit, the micro-batches share them: "
            "what one module leaves there for another may be that of another micro-batch. Fix: pass values as "
            "arguments, or pass unit_major=False."
        )
