"""The model of the GPU benchmarks: a Llama-like decoder in plain PyTorch, its weights from a seed, its random tokens.

RMSNorm, rotary positions, SwiGLU, untied head, causal `scaled_dot_product_attention`; every block is recomputed in
backward, and the head with its cross-entropy runs over chunks of tokens, so that the logits never exist whole. Modules
and `apply_rotary_pos_emb` bear the names that Hugging Face gave them. `MODELS["hf"]` is transformers' LlamaForCausalLM
of the same size (with whole logits), for what a user of that library sees. Owns no engine and no measurement.

Shapes: B sequences, L length, D width, F feed-forward width, H heads, K head width, V vocabulary, T tokens (B * L).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPS = 1e-5
ROTARY_BASE = 10_000.0
INIT_STD = 0.02
CHUNK = 2048  # tokens whose logits exist at a time


class Size(NamedTuple):
    """What makes a decoder of a size, and the batch it is measured with."""

    dim: int
    ffn: int
    num_blocks: int
    num_heads: int
    vocabulary: int
    length: int
    batch: int = 8


SIZES = {
    "tiny": Size(dim=64, ffn=160, num_blocks=3, num_heads=2, vocabulary=512, length=32, batch=2),  # for dry runs
    "1b3": Size(dim=2048, ffn=5504, num_blocks=24, num_heads=16, vocabulary=32_000, length=2048),
    "3b": Size(dim=3200, ffn=8640, num_blocks=26, num_heads=32, vocabulary=32_000, length=2048),
    "7b": Size(dim=4096, ffn=11_008, num_blocks=32, num_heads=32, vocabulary=32_000, length=2048),
    "13b": Size(dim=5120, ffn=13_824, num_blocks=40, num_heads=40, vocabulary=32_000, length=2048),
    "18b": Size(dim=6144, ffn=16_384, num_blocks=39, num_heads=48, vocabulary=32_000, length=2048),
    "20b": Size(dim=6144, ffn=16_384, num_blocks=43, num_heads=48, vocabulary=32_000, length=2048),
    "21b": Size(dim=6144, ffn=16_384, num_blocks=46, num_heads=48, vocabulary=32_000, length=2048),
    "25b": Size(dim=6144, ffn=16_384, num_blocks=54, num_heads=48, vocabulary=32_000, length=2048),
    "32b": Size(dim=6656, ffn=17_920, num_blocks=60, num_heads=52, vocabulary=32_000, length=2048),
    "70b": Size(dim=8192, ffn=24_576, num_blocks=80, num_heads=64, vocabulary=32_000, length=2048, batch=4),
}


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(size.dim, size.dim, bias=False) for _ in range(4)
        )

    def forward(self, x_BLD: Tensor, cos_1LK: Tensor, sin_1LK: Tensor) -> Tensor:
        """Mix every token with those before it."""
        batch, length, dim = x_BLD.shape
        heads = (batch, length, self.num_heads, dim // self.num_heads)
        query, key, value = (
            projection(x_BLD).view(heads).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos_1LK, sin_1LK)
        mixed_BHLK = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed_BHLK.transpose(1, 2).reshape(batch, length, dim))


class SwiGLU(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size.dim, size.ffn, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(size.ffn, size.dim, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x_BLD: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        return self.down_proj(self.act_fn(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(size.dim, eps=EPS) for _ in range(2))
        self.self_attn, self.mlp = Attention(size), SwiGLU(size)

    def forward(self, x_BLD: Tensor, cos_1LK: Tensor, sin_1LK: Tensor) -> Tensor:
        """One layer."""
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_1LK, sin_1LK)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Llama(nn.Module):
    """Tokens [B, L + 1] in, mean cross-entropy of the next token out (fp32).

    Args:
        checkpointing: recompute every block in backward.
        chunk: tokens whose logits exist at a time; 0: all, and nothing of the head is recomputed.
    """

    def __init__(self, size: Size, *, checkpointing: bool = True, chunk: int = CHUNK) -> None:
        super().__init__()
        self.size, self.checkpointing, self.chunk = size, checkpointing, chunk
        self.embed_tokens = nn.Embedding(size.vocabulary, size.dim)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.num_blocks))
        self.norm = nn.RMSNorm(size.dim, eps=EPS)
        self.lm_head = nn.Linear(size.dim, size.vocabulary, bias=False)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """The loss."""
        inputs, targets_T = tokens_BL[:, :-1], tokens_BL[:, 1:].reshape(-1)
        x_BLD = self.embed_tokens(inputs)
        head_dim = self.size.dim // self.size.num_heads
        cos_1LK, sin_1LK = rotary_tables(inputs.shape[1], head_dim, x_BLD.device, x_BLD.dtype)
        for block in self.layers:
            x_BLD = recomputed(block, x_BLD, cos_1LK, sin_1LK) if self.checkpointing else block(x_BLD, cos_1LK, sin_1LK)
        return self.loss(self.norm(x_BLD).flatten(0, 1), targets_T)

    def loss(self, x_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Mean cross-entropy, chunk by chunk."""
        if not self.chunk:
            return self.chunk_loss(x_TD, targets_T) / targets_T.numel()
        chunks = zip(x_TD.split(self.chunk), targets_T.split(self.chunk), strict=True)
        losses = [recomputed(self.chunk_loss, x_CD, targets_C) for x_CD, targets_C in chunks]
        return torch.stack(losses).sum() / targets_T.numel()

    def chunk_loss(self, x_CD: Tensor, targets_C: Tensor) -> Tensor:
        """Summed cross-entropy of some tokens."""
        return F.cross_entropy(self.lm_head(x_CD).float(), targets_C, reduction="sum")


def recomputed(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`call(*inputs)`, kept as its inputs alone and computed again in backward. (Nothing in the model is random.)"""
    out: Tensor = checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


@cache
def rotary_tables(length: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [1, L, K], computed in fp32; no buffers of the model, so that no engine casts or moves them.

    Source: Su et al. 2021 (arXiv:2104.09864), sec. 3.2, with the two halves of a head as real and imaginary part.
    """
    frequency = ROTARY_BASE ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(0)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn every pair (i, i + K / 2) of queries and keys [B, H, L, K] by its position's angle; tables [1, L, K]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x_BHLK: Tensor) -> Tensor:
        real, imaginary = x_BHLK.chunk(2, dim=-1)
        return x_BHLK * cos + torch.cat([-imaginary, real], dim=-1) * sin

    return turned(q), turned(k)


# Making and calling ---------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A way to make the decoder, and to get the loss of tokens [B, L + 1] from it or from an engine around it."""

    make: Callable[[Size, torch.device], nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    blocks: str  # the module list of its blocks


def make_plain(size: Size, device: torch.device) -> nn.Module:
    """The decoder of this file, in torch's default dtype."""
    with device:
        return Llama(size)


def make_hugging_face(size: Size, device: torch.device) -> nn.Module:
    """transformers' decoder, recomputing its blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.dim,
        intermediate_size=size.ffn,
        num_hidden_layers=size.num_blocks,
        num_attention_heads=size.num_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with device:
        model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def hugging_face_loss(model: Any, tokens_BL: Tensor) -> Tensor:
    """transformers' own loss; its targets are already shifted."""
    inputs, targets = tokens_BL[:, :-1], tokens_BL[:, 1:].contiguous()
    loss: Tensor = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
    return loss


MODELS = {
    "plain": Model(make_plain, lambda model, tokens: model(tokens), "layers"),
    "hf": Model(make_hugging_face, hugging_face_loss, "model.layers"),
}


def build(size: str, device: torch.device, model: str = "plain", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The decoder of that size on `device`; the same values in every process on the same kind of device.

    Args:
        dtype: of its parameters, which are made in it: nothing larger exists on the way.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = MODELS[model].make(SIZES[size], device)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=INIT_STD, generator=generator)
    return module


def tokens(size: str, step: int, device: torch.device) -> Tensor:
    """The [B, L + 1] tokens of one step, the same for every engine."""
    shape = SIZES[size]
    generator = torch.Generator().manual_seed(step)
    return torch.randint(shape.vocabulary, (shape.batch, shape.length + 1), generator=generator).to(device)


def numel_of(size: str) -> int:
    """Parameters of the decoder."""
    shape = SIZES[size]
    block = 4 * shape.dim**2 + 3 * shape.dim * shape.ffn + 2 * shape.dim
    return shape.num_blocks * block + 2 * shape.vocabulary * shape.dim + shape.dim
