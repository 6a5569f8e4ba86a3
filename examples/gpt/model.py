"""A compact modern GPT (pre-norm decoder, RMSNorm, rotary positions, SwiGLU) in plain PyTorch: no Lorica in this file.

Shape suffixes: B batch, L length of the sequence, D width of the model, H heads, K width of a head, F width inside the
MLP, V vocabulary. `x_BLD` has three dimensions, in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """What a GPT looks like. `width` must be a multiple of `num_heads`, and a head's width even (rotary pairs)."""

    num_layers: int
    num_heads: int
    width: int
    seq_len: int
    vocab_size: int = 8192
    tied: bool = True  # one matrix for the embedding and the head
    activation_checkpointing: bool = False  # keep only each block's input, and compute the rest again in backward

    def __post_init__(self) -> None:
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"The heads do not fit: expected a width that is an even multiple of num_heads, got width "
                f"{self.width} and num_heads {self.num_heads}. Fix: choose width = num_heads x an even number."
            )

    @property
    def hidden(self) -> int:
        """Width inside the MLP: 8/3 of the model's, so that SwiGLU's three matrices cost what two of 4x would."""
        return (8 * self.width // 3 + 63) // 64 * 64


SIZES = {
    "tiny": GPTConfig(num_layers=4, num_heads=4, width=128, seq_len=256, vocab_size=4096),  # two laptop cores
    "small": GPTConfig(num_layers=8, num_heads=8, width=512, seq_len=512),
    "medium": GPTConfig(num_layers=12, num_heads=12, width=768, seq_len=1024),  # GPT-2's smallest shape; one GPU
    "1b3": GPTConfig(num_layers=24, num_heads=16, width=2048, seq_len=2048),
}


class Linear(nn.Linear):
    """A matrix multiplication without bias.

    On a CPU that has no fast bf16 multiplication the product of bf16 matrices is taken in fp32 and then rounded to
    bf16: what bf16 hardware does inside, and ten times as fast as PyTorch's fallback on such a CPU (AVX2).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if multiplies_in_fp32(x):
            return F.linear(x.float(), self.weight.float()).to(x.dtype)
        return F.linear(x, self.weight)


def multiplies_in_fp32(x: Tensor) -> bool:
    """Whether `x` is in half precision on a CPU that is slow at it."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return False
    return torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def rotary_angles(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding.

    Returns: two fp32 tensors [L, K/2]. They are computed anew in every forward: a buffer would be rounded to bf16 with
        the model, and far positions would then look alike.
    Source: Su et al. 2021 (arXiv:2104.09864), eq. 15.
    """
    frequencies = 10000.0 ** -(torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BHLK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle."""
    left, right = x_BHLK.float().chunk(2, dim=-1)
    rotated = torch.cat((left * cos_LK - right * sin_LK, left * sin_LK + right * cos_LK), dim=-1)
    return rotated.to(x_BHLK.dtype)


class Attention(nn.Module):
    """Causal self-attention over normalised queries and keys (which keeps large learning rates stable)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x_BLD: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
        heads = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1))
        q_BHLK, k_BHLK, v_BHLK = heads.permute(2, 0, 3, 1, 4)
        q_BHLK, k_BHLK = (rotate(F.rms_norm(h, h.shape[-1:]), cos_LK, sin_LK) for h in (q_BHLK, k_BHLK))
        if multiplies_in_fp32(x_BLD):
            q_BHLK, k_BHLK, v_BHLK = q_BHLK.float(), k_BHLK.float(), v_BHLK.float()
        y_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=True)
        return cast(Tensor, self.out(y_BHLK.transpose(1, 2).flatten(2).to(x_BLD.dtype)))


class MLP(nn.Module):
    """SwiGLU: one half of the hidden layer decides how much of the other passes.

    Source: Shazeer 2020 (arXiv:2002.05202), eq. 6.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_and_up = Linear(config.width, 2 * config.hidden)
        self.down = Linear(config.hidden, config.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.gate_and_up(x_BLD).chunk(2, dim=-1)
        return cast(Tensor, self.down(F.silu(gate_BLF) * up_BLF))


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the residual stream and each behind its own norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x_BLD: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), cos_LK, sin_LK)
        return x_BLD + cast(Tensor, self.mlp(self.mlp_norm(x_BLD)))


class GPT(nn.Module):
    """The language model: tokens in; out come the mean cross-entropy (with targets) or the logits (without)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = Linear(config.width, config.vocab_size)
        self.initialise()
        if config.tied:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal with 0.02; what is added to the residual stream is smaller, so that its sum keeps its size."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
                parameter.normal_(std=0.02 / (2 * self.config.num_layers) ** 0.5 if into_stream else 0.02)

    def forward(self, tokens_BL: Tensor, targets_BL: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            tokens_BL: int64, at most `seq_len` long.
            targets_BL: int64; the token that follows each one of `tokens_BL`.
        Returns: a scalar fp32 loss in nats a token, or logits [B, L, V] in the model's dtype.
        """
        config = self.config
        x_BLD = self.embedding(tokens_BL)
        cos_LK, sin_LK = rotary_angles(tokens_BL.shape[1], config.width // config.num_heads, x_BLD.device)
        for block in self.blocks:
            if config.activation_checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, cos_LK, sin_LK, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, cos_LK, sin_LK)
        logits_BLV = cast(Tensor, self.head(self.final_norm(x_BLD)))
        if targets_BL is None:
            return logits_BLV
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())

    def num_parameters(self) -> int:
        """How many numbers the model learns; a shared matrix counts once. Ask before the parameters are sharded."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt_BL: Tensor,
    num_tokens: int,
    *,
    seq_len: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Tensor:
    """Continue each prompt by `num_tokens` tokens, drawn one after the other.

    Args:
        model: tokens [B, L] -> logits [B, L, V]; the GPT, or an engine around it. An engine that shards parameters
            (ZeRO-3) communicates in every call: all of its processes must come here, with the same `num_tokens`.
        prompt_BL: int64 [B, L], L >= 1.
        seq_len: the model sees at most this many of the last tokens.
        temperature: below 1 sharpens the distribution, above 1 flattens it.
        top_k: only this many of the likeliest tokens can be drawn.
    Returns: int64 [B, L + num_tokens], the same on every process.
    """
    dice = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every process and device
    tokens_BL = prompt_BL
    for _ in range(num_tokens):
        logits_BV = model(tokens_BL[:, -seq_len:])[:, -1].float().cpu()
        best_BK, index_BK = logits_BV.topk(min(top_k, logits_BV.shape[-1]))
        drawn_B1 = torch.multinomial((best_BK / temperature).softmax(-1), 1, generator=dice)
        tokens_BL = torch.cat((tokens_BL, index_BK.gather(1, drawn_B1).to(tokens_BL.device)), dim=1)
    return tokens_BL
