"""The engines of the CPU comparison, each as a user of it would write it: a model in, a training step out.

All train with AdamW (the fastest CPU kernel the engine offers), gradient clipping 1.0 and no accumulation. In bf16, DDP
keeps fp32 weights and autocasts; the others hold bf16 weights beside fp32 masters and reduce gradients in bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

CLIP = 1.0
ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Trainer(NamedTuple):
    """One engine, ready: `step(tokens)` trains on a batch and returns the loss; `sent_bytes()` if it counts itself."""

    step: Callable[[Tensor], Tensor]
    sent_bytes: Callable[[], int] | None = None


def torch_step(model: nn.Module, inner: nn.Module, precision: str) -> Trainer:
    """The plain loop around a wrapped model."""
    optimizer = torch.optim.AdamW(inner.parameters(), fused=True, **ADAMW)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")

    def step(tokens: Tensor) -> Tensor:
        with autocast():
            loss: Tensor = model(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(inner.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Trainer(step)


def independent(model: nn.Module, precision: str) -> Trainer:
    """Each rank for itself, without communication: what computation alone costs."""
    return torch_step(model, model, precision)


def ddp(model: nn.Module, precision: str) -> Trainer:
    """DistributedDataParallel with gradients as bucket views."""
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return torch_step(wrapped, model, precision)


def fsdp2(model: nn.Module, precision: str, *, reshard: bool) -> Trainer:
    """`fully_shard` per block and for the root; `reshard` frees the gathered weights after forward."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    mesh = torch.distributed.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return torch_step(model, model, "fp32")  # the policy casts; autocast would do it twice


def json_config(precision: str, batch_size: int, stage: int, offload: bool) -> dict[str, Any]:
    """The configuration that DeepSpeed and Lorica share."""
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": ADAMW | {"betas": list(ADAMW["betas"])}},  # type: ignore[call-overload]
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
    }


def engine_step(engine: Any) -> Callable[[Tensor], Tensor]:
    """The loop that DeepSpeed and Lorica share."""

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = engine(tokens)
        engine.backward(loss)
        engine.step()
        return loss

    return step


def deepspeed(model: nn.Module, precision: str, batch_size: int, *, stage: int, offload: bool = False) -> Trainer:
    """DeepSpeed's engine, its own CPU optimizer compiled on first use."""
    import deepspeed as package

    config = json_config(precision, batch_size, stage, offload)
    engine, *_ = package.initialize(
        model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
    )
    return Trainer(engine_step(engine))


def lorica(model: nn.Module, precision: str, batch_size: int, *, stage: int, offload: bool = False) -> Trainer:
    """Lorica's engine."""
    import lorica as package

    config = json_config(precision, batch_size, stage, offload)
    engine, *_ = package.initialize(model=model, model_parameters=model.parameters(), config=config)
    return Trainer(engine_step(engine), sent_bytes=lambda: sum(engine.traffic().values()))


class Peer(NamedTuple):
    """A row of the comparison: its name, how to make it, its library, and the rows that its ratios refer to."""

    make: Callable[..., Trainer]
    library: str | None = None
    deepspeed_row: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - read only


PEERS: dict[str, Peer] = {
    "independent": Peer(independent),
    "ddp": Peer(ddp),
    "fsdp2-keep": Peer(fsdp2, deepspeed_row="deepspeed-2", options={"reshard": False}),
    "fsdp2-reshard": Peer(fsdp2, deepspeed_row="deepspeed-3", options={"reshard": True}),
    **{f"deepspeed-{stage}": Peer(deepspeed, "deepspeed", options={"stage": stage}) for stage in range(4)},
    "deepspeed-2-offload": Peer(deepspeed, "deepspeed", options={"stage": 2, "offload": True}),
    **{f"lorica-{stage}": Peer(lorica, "lorica", f"deepspeed-{stage}", options={"stage": stage}) for stage in range(4)},
    "lorica-2-offload": Peer(lorica, "lorica", "deepspeed-2-offload", options={"stage": 2, "offload": True}),
}


def make(name: str, model: nn.Module, precision: str, batch_size: int) -> Trainer:
    """Wrap `model` in the engine of that row."""
    peer = PEERS[name]
    arguments = [batch_size] if peer.library is not None else []
    return peer.make(model, precision, *arguments, **peer.options)
