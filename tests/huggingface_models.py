"""Unmodified Hugging Face models of a few thousand random weights, and data that they can learn. Knows no engine.

A `Family` is a model and its micro-batches, as `Recipe` is in models.py; a batch is what the model takes as keywords,
labels among them, so `model(**batch).loss` is a scalar. Nothing is fetched: every model is built from its configuration
class. Dropout is off (the oracle draws other random numbers than two ranks do), and the initial weights are large
enough that greedy generation does not repeat one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import transformers
from torch import Tensor

from tests import models

transformers.logging.set_verbosity_error()

VOCABULARY, MASK, LENGTH, IMAGE = 64, 1, 12, 8
Batch = dict[str, Tensor]
sequences = models.tokens(num_sequences=2, length=LENGTH, vocabulary=VOCABULARY)


@dataclass(frozen=True)
class Family:
    """A kind of model: its class, its configuration, what is done to it, and its endless stream of micro-batches."""

    kind: Callable[[Any], nn.Module]
    config: Callable[[], Any]
    batch: Callable[[int], Batch]
    change: Callable[[nn.Module], nn.Module] = lambda model: model

    def model(self) -> nn.Module:
        """A fresh model; the same values on every call in every process."""
        torch.manual_seed(7)
        return self.change(self.kind(self.config()))


class WithLoss(nn.Module):
    """A Hugging Face model as the oracle wants it: `model(batch)` is the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        loss = self.model(**batch).loss
        assert isinstance(loss, Tensor)
        return loss


# Data -----------------------------------------------------------------------------------------------------------------


def next_token(index: int) -> Batch:
    """Predict each token from those before it."""
    (tokens_BL,) = sequences(index)
    return {"input_ids": tokens_BL, "labels": tokens_BL}


def masked_tokens(index: int) -> Batch:
    """Fill in every fourth token; the second sequence is padded, so that a mask is in use."""
    (tokens_BL,) = sequences(index)
    hidden_L = torch.arange(LENGTH) % 4 == index % 4
    attention_BL = torch.ones_like(tokens_BL)
    attention_BL[1, LENGTH - 3 :] = 0
    labels_BL = tokens_BL.masked_fill(~hidden_L | (attention_BL == 0), -100)
    return {
        "input_ids": tokens_BL.masked_fill(hidden_L, MASK),
        "attention_mask": attention_BL,
        "labels": labels_BL,
    }


def translation(index: int) -> Batch:
    """The target is the source backwards."""
    (tokens_BL,) = sequences(index)
    return {"input_ids": tokens_BL, "labels": tokens_BL.flip(1)[:, : LENGTH - 2].contiguous()}


def images(index: int) -> Batch:
    """Noisy pictures of a bright row; the row is the class."""
    generator = torch.Generator().manual_seed(4000 + index)
    pixels_BCHW = torch.randn(4, 3, IMAGE, IMAGE, generator=generator) * 0.3
    labels_B = torch.randint(IMAGE, (4,), generator=generator)
    pixels_BCHW[torch.arange(4), :, labels_B] += 1.0
    return {"pixel_values": pixels_BCHW, "labels": labels_B}


# Models ---------------------------------------------------------------------------------------------------------------


def gpt2_config() -> Any:
    """Two blocks; the head is the embedding's weight."""
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=None,
        pad_token_id=0,
    )


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": 32,
    "bos_token_id": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama_config(**changes: Any) -> Any:
    """Two blocks with grouped-query attention and a head of its own."""
    return transformers.LlamaConfig(**(DECODER | changes))


def qwen3_moe_config() -> Any:
    """Eight experts in each of two blocks, of which every token chooses two: ranks disagree about which are busy."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    return transformers.Qwen3MoeConfig(**DECODER, **experts)


def bert_config() -> Any:
    """Two blocks; the head's weight and bias are shared."""
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
    )


def t5_config() -> Any:
    """Two blocks on either side; encoder, decoder and head share one embedding."""
    return transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=None,
    )


def vit_config() -> Any:
    """Two blocks on four patches."""
    return transformers.ViTConfig(
        image_size=IMAGE,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        num_labels=IMAGE,
    )


class OlderConfig(transformers.PretrainedConfig):
    """The configuration of `OlderStyle`."""

    model_type = "older-style"

    def __init__(self, dim: int = 32, **rest: Any) -> None:
        self.dim = dim
        super().__init__(**rest)


class OlderStyle(transformers.PreTrainedModel):
    """What code on the hub does: weights are initialised and replaced through `.data`, and used by other modules."""

    config_class = OlderConfig
    _no_split_modules = ("Linear",)

    def __init__(self, config: OlderConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, config.dim)
        self.layers = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(3))
        self.post_init()
        self.layers[0].weight.data = torch.linspace(-0.2, 0.2, config.dim**2).view(config.dim, config.dim)
        self.layers[1].weight.data = self.layers[1].weight.data * 2

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.2)
            module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.2)
            module.weight.data[0].zero_()

    def forward(self, input_ids: Tensor, labels: Tensor) -> transformers.modeling_outputs.CausalLMOutput:
        """Predict the next token from the present one."""
        x_BLD = self.embed(input_ids)
        for layer in self.layers:
            x_BLD = x_BLD + torch.tanh(layer(x_BLD))
        logits_BLV = x_BLD @ self.embed.weight.detach().t() + x_BLD @ self.layers[0].weight[:1].t()
        loss = nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits_BLV)


def with_lora(model: nn.Module) -> nn.Module:
    """PEFT's low-rank adapters on the attention's projections; everything else is frozen."""
    import peft

    torch.manual_seed(8)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, config)


def checkpointed(reentrant: bool) -> Callable[[nn.Module], nn.Module]:
    """Gradient checkpointing, switched on as Hugging Face's own trainer does."""

    def change(model: Any) -> nn.Module:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    return change


FAMILIES: dict[str, Family] = {
    "gpt2": Family(transformers.GPT2LMHeadModel, gpt2_config, next_token),
    "llama": Family(transformers.LlamaForCausalLM, llama_config, next_token),
    "llama, tied": Family(transformers.LlamaForCausalLM, lambda: llama_config(tie_word_embeddings=True), next_token),
    "llama, lora": Family(transformers.LlamaForCausalLM, llama_config, next_token, with_lora),
    "llama, reentrant checkpointing": Family(
        transformers.LlamaForCausalLM, llama_config, next_token, checkpointed(reentrant=True)
    ),
    "llama, non-reentrant checkpointing": Family(
        transformers.LlamaForCausalLM, llama_config, next_token, checkpointed(reentrant=False)
    ),
    "llama, lora, reentrant checkpointing": Family(
        transformers.LlamaForCausalLM,
        llama_config,
        next_token,
        lambda model: with_lora(checkpointed(reentrant=True)(model)),
    ),
    "qwen3-moe": Family(transformers.Qwen3MoeForCausalLM, qwen3_moe_config, next_token),
    "bert": Family(transformers.BertForMaskedLM, bert_config, masked_tokens),
    "t5": Family(transformers.T5ForConditionalGeneration, t5_config, translation),
    "vit": Family(transformers.ViTForImageClassification, vit_config, images),
    "older style": Family(OlderStyle, OlderConfig, next_token),
}
