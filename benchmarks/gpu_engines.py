"""The engines of the GPU comparison, each as a careful user of it would write it: a decoder in, a training step out.

All train in bf16 with fp32 masters, AdamW and gradient clipping 1.0, on one device. They start from the same weights;
DeepSpeed alone rounds fp32 ones to bf16 before it makes its masters. Owns no measurement. Those that offload are in
offload_engines.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu_ceilings import NotOffered
from benchmarks.llama import MODELS, SIZES, build

CLIP = 1.0
ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
GROUP_NUMEL = 2**28  # parameters that `hand-written-lean` updates at a time


class Setup(NamedTuple):
    """What all engines of one table share."""

    size: str
    model: str
    device: torch.device
    lorica: dict[str, Any] = {}  # noqa: RUF012 - read only; keys laid over the configuration of Lorica's rows
    accumulation: int = 1  # micro-batches of a step
    init: torch.dtype = torch.float32  # of the weights that engines are handed
    folder: str = tempfile.gettempdir()  # for the files of NVMe tiers

    def build(self) -> nn.Module:
        """The decoder on the device."""
        return build(self.size, self.device, self.model, self.init)

    def loss(self, module: Any, tokens: Tensor) -> Tensor:
        """The loss of `tokens`, from the decoder or an engine around it."""
        return MODELS[self.model].loss(module, tokens)

    def json_config(self, stage: int, **adam: Any) -> dict[str, Any]:
        """The configuration that DeepSpeed and Lorica share."""
        return {
            "train_micro_batch_size_per_gpu": SIZES[self.size].batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": CLIP,
            "optimizer": {"type": "AdamW", "params": ADAMW | {"betas": list(ADAMW["betas"])} | adam},  # type: ignore[call-overload]
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
        }


def _nothing() -> None:
    """For engines with nothing to close."""


Step = Callable[[Sequence[Tensor]], Tensor]


class Trainer(NamedTuple):
    """One engine, ready.

    Attributes:
        step: one optimizer step on micro-batches of tokens [B, L + 1]; returns their mean loss, on the device.
        close: frees what the engine holds.
        states: what the engine itself says about its memory.
        norm: the gradient's norm in the last step, before clipping; may wait for the device.
        note: what the table must say about this row.
    """

    step: Step
    close: Callable[[], None] = _nothing
    states: Callable[[], Any] | None = None
    norm: Callable[[], Any] | None = None
    note: str = ""


# PyTorch alone --------------------------------------------------------------------------------------------------------


def in_bf16(module: nn.Module) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Turn the parameters to bf16; return them and their fp32 values. Buffers keep their dtype."""
    weights = list(module.parameters())
    masters = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    return weights, masters


def floor(setup: Setup) -> Trainer:
    """Forward and backward alone: what no engine can beat without other kernels."""
    model = setup.build()
    weights, _ = in_bf16(model)

    def drop(weight: Tensor) -> None:
        weight.grad = None

    for weight in weights:
        weight.register_post_accumulate_grad_hook(drop)

    return Trainer(lambda batches: backward_of_all(setup, model, batches))


def backward_of_all(setup: Setup, model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Forward and backward of a plain loop's micro-batches; the mean loss."""
    losses = []
    for tokens in batches:
        loss = setup.loss(model, tokens)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
    return mean(losses)


def mean(losses: Sequence[Tensor]) -> Tensor:
    """The mean loss of a step."""
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).mean()


def hand_written(setup: Setup, *, lean: bool = False) -> Trainer:
    """bf16 weights, fp32 masters, fused AdamW on them, foreach clipping, no host sync.

    Args:
        lean: update a group of parameters at a time, so that fp32 gradients exist for one group only.
    """
    model = setup.build()
    weights, masters = in_bf16(model)
    groups = grouped(weights, masters, GROUP_NUMEL if lean else None)
    optimizers = [torch.optim.AdamW(group, fused=True, **ADAMW) for _, group in groups]  # type: ignore[arg-type]
    norm = torch.zeros(())

    def step(batches: Sequence[Tensor]) -> Tensor:
        nonlocal norm
        loss = backward_of_all(setup, model, batches)
        norm = nn.utils.clip_grad_norm_(weights, CLIP, foreach=True)
        for (some_weights, some_masters), optimizer in zip(groups, optimizers, strict=True):
            for weight, master in zip(some_weights, some_masters, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
                weight.grad = None
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_copy_(some_weights, some_masters)
        return loss

    return Trainer(step, norm=lambda: norm)


def grouped(
    weights: Sequence[nn.Parameter], masters: Sequence[Tensor], numel: int | None
) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
    """Weights and masters cut into groups of at least `numel` elements; None: one group."""
    groups: list[tuple[list[nn.Parameter], list[Tensor]]] = []
    for weight, master in zip(weights, masters, strict=True):
        full = groups and numel is not None and sum(m.numel() for m in groups[-1][1]) >= numel
        if not groups or full:
            groups.append(([], []))
        groups[-1][0].append(weight)
        groups[-1][1].append(master)
    return groups


def fsdp2(setup: Setup, *, reshard: bool, offload: bool = False, reduce_dtype: torch.dtype | None = None) -> Trainer:
    """`fully_shard` per block and for the root; gradients of micro-batches are added up on the device.

    Args:
        reshard: free a block's gathered weights after forward.
        offload: sharded parameters, gradients and optimizer in pinned host memory (CPUOffloadPolicy).
        reduce_dtype: of the gradients' reduction; None: as the parameters in forward, bf16.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    model: Any = setup.build()
    choices = {
        "mesh": init_device_mesh(setup.device.type, (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=setup.device.type == "cuda") if offload else OffloadPolicy(),
    }
    for block in model.get_submodule(MODELS[setup.model].blocks).children():
        fully_shard(block, reshard_after_forward=reshard, **choices)
    fully_shard(model, **choices)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)  # type: ignore[arg-type]
    norm: Any = torch.zeros(())

    def step(batches: Sequence[Tensor]) -> Tensor:
        nonlocal norm
        losses = []
        for index, tokens in enumerate(batches):
            model.set_requires_gradient_sync(index == len(batches) - 1)
            loss = setup.loss(model, tokens)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return mean(losses)

    return Trainer(step, norm=lambda: norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# Engines --------------------------------------------------------------------------------------------------------------


def engine_step(setup: Setup, engine: Any) -> Step:
    """The loop that DeepSpeed and Lorica share."""

    def step(batches: Sequence[Tensor]) -> Tensor:
        losses = []
        for tokens in batches:
            loss = setup.loss(engine, tokens)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return mean(losses)

    return step


def deepspeed(setup: Setup, *, stage: int) -> Trainer:
    """DeepSpeed's engine at its defaults, with its own FusedAdam where that builds."""
    try:
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise NotOffered(f"import deepspeed: {error}") from error
    adam, note = {"torch_adam": False}, ""
    try:
        get_accelerator().create_op_builder("FusedAdamBuilder").load(verbose=False)
    except Exception as error:  # whatever a compiler may say; the table repeats it
        adam = {"torch_adam": True, "fused": True}
        note = f"torch's fused AdamW, since FusedAdam did not build: {type(error).__name__}: {str(error)[:200]}"
    return deepspeed_trainer(setup, setup.json_config(stage, **adam), note)


def deepspeed_trainer(setup: Setup, config: dict[str, Any], note: str = "") -> Trainer:
    """DeepSpeed's engine with this configuration."""
    import deepspeed as package

    model = setup.build()
    engine, *_ = package.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config | {"steps_per_print": 10**9},
        dist_init_required=False,
    )
    return Trainer(engine_step(setup, engine), engine.destroy, norm=engine.get_global_grad_norm, note=note)


def lorica(setup: Setup, *, stage: int, extra: dict[str, Any] | None = None, unit_major: bool = False) -> Trainer:
    """Lorica's engine.

    Args:
        extra: more keys of the configuration; the row is not offered where this Lorica does not know them.
        unit_major: one call of `engine.train_batch` a step instead of forward, backward and step for every micro-batch.
    """
    import lorica as package

    for block, keys in (extra or {}).items():
        for key in keys:
            require_key(block, key)
    config = merged(merged(setup.json_config(stage), extra or {}), setup.lorica)
    engine: Any
    engine, *_ = package.initialize(model=setup.build(), config=config)
    return Trainer(
        (lambda batches: engine.train_batch(iter(batches)).detach()) if unit_major else engine_step(setup, engine),
        close=engine.destroy,
        states=lambda: plain(engine.memory()),
        norm=engine.get_global_grad_norm,
        note=f"with {json.dumps(setup.lorica)}" if setup.lorica else "",
    )


def require_key(block: str, key: str) -> None:
    """Raise NotOffered if this Lorica's configuration has no `block.key`."""
    from lorica.config import Config

    field = Config.model_fields.get(block)
    if field is None or key not in getattr(field.annotation, "model_fields", {}):
        raise NotOffered(f"this Lorica's configuration has no {block}.{key}")


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`low` with the keys of `high` laid over it, block by block."""
    both = {
        key: merged(low[key], high[key]) for key in low.keys() & high.keys() if isinstance(low[key], dict)
    }  # a block, in both
    return {**low, **high, **both}


def plain(value: Any) -> Any:
    """Named tuples as dictionaries, down to what JSON can hold."""
    if hasattr(value, "_asdict"):
        total = {"total": value.total} if hasattr(value, "total") else {}
        return {key: plain(item) for key, item in value._asdict().items()} | total
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


# The table of them ----------------------------------------------------------------------------------------------------


class Engine(NamedTuple):
    """A row of the comparison: how to make it, what it is, and whether it wants a process group of one rank."""

    make: Callable[[Setup], Trainer]
    says: str
    grouped: bool = False
    standard: bool = True  # measured unless --engines says otherwise


ENGINES: dict[str, Engine] = {
    "floor": Engine(floor, "forward and backward only, gradients dropped"),
    "hand-written": Engine(hand_written, "PyTorch loop: fp32 masters, fused AdamW, foreach clipping"),
    "hand-written-lean": Engine(
        partial(hand_written, lean=True), "the same, updating 0.27 B parameters at a time", standard=False
    ),
    **{f"lorica-{stage}": Engine(partial(lorica, stage=stage), f"Lorica, stage {stage}") for stage in range(4)},
    "lorica-inject": Engine(
        partial(lorica, stage=0, extra={"kernels": {"inject": "auto"}}), "Lorica, stage 0, its kernels in the model"
    ),
    "lorica-compile": Engine(
        partial(lorica, stage=0, extra={"compile": {"enabled": True}}), "Lorica, stage 0, compiled", standard=False
    ),
    "fsdp2": Engine(partial(fsdp2, reshard=True), "FSDP2, one rank", grouped=True),
    "fsdp2-keep": Engine(
        partial(fsdp2, reshard=False), "FSDP2, weights kept after forward", grouped=True, standard=False
    ),
    **{
        f"deepspeed-{stage}": Engine(partial(deepspeed, stage=stage), f"DeepSpeed, stage {stage}", grouped=True)
        for stage in range(4)
    },
}
