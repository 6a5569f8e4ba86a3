"""Unmodified Hugging Face models under stages 1, 2 and 3: they train, generate, are built, saved and loaded.

Two ranks, each with batches of its own. Tolerances in fp32, against the oracle: losses 1e-6 and gradient norms 1e-5
(relative, as in test_matrix.py), parameters 3e-4 (a tenth of one AdamW step; the gradient of an attention key's bias is
zero but for rounding, and AdamW makes 1e-5 to 5e-5 of that noise in eight steps). Runs of the engine that should not
differ, generated tokens and saved weights are equal in every bit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import lorica
import lorica.engine
from lorica import zero
from tests import oracle
from tests.equivalence.training import (
    Outcome,
    Report,
    Training,
    adamw,
    finish,
    largest_difference,
    outcome,
    record_step,
    relative_difference,
)
from tests.harness import Ranks
from tests.huggingface_models import FAMILIES, Batch, WithLoss

NUM_STEPS = 8
STAGES = [pytest.param(stage, id=f"stage {stage}") for stage in (1, 2, 3)]
CHECKPOINTED = [name for name in FAMILIES if "checkpointing" in name]
KINDS = ["gpt2", "llama", "qwen3-moe", "bert", "t5", "vit", "llama, lora"]
GENERATING = ["gpt2", "llama", "qwen3-moe", "t5", "llama, lora"]
AUTO = {
    "gpt2": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "qwen3-moe": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForMaskedLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "vit": transformers.AutoModelForImageClassification,
}


def config(stage: int, precision: Any = "fp32") -> dict[str, Any]:
    """Every block is a unit and every plane is sharded, however tiny the model."""
    return Training(stage=stage, precision=precision).config()


def start(model: nn.Module, stage: int, precision: Any = "fp32") -> Any:
    """An engine for the model as it is; the optimizer is the configuration's, over what requires a gradient."""
    engine, *_ = lorica.initialize(model=model, config=config(stage, precision))
    return engine


def batch(family: str, step: int, rank: int) -> Batch:
    """What `rank` sees in this step."""
    return FAMILIES[family].batch(2 * step + rank)


def take_steps(engine: Any, family: str, num_steps: int = NUM_STEPS) -> Report:
    """The loop that the documentation shows."""
    report, rank = Report(), dist.get_rank()
    for step in range(num_steps):
        loss = engine(**batch(family, step, rank)).loss
        engine.backward(loss)
        engine.step()
        record_step(engine, report, [loss.item()], 1.0)
    return report


def held_fraction(model: nn.Module) -> float:
    """The memory behind the parameters as this rank sees them, relative to that of the whole model."""
    named = list(model.parameters())
    storages = {p.data.untyped_storage().data_ptr(): p.data.untyped_storage().nbytes() for p in named}
    return sum(storages.values()) / sum(p.numel() * p.element_size() for p in named)


def train(family: str, stage: int, precision: str) -> Report:
    """Train the model as it comes out of its constructor."""
    engine = start(FAMILIES[family].model(), stage, precision)
    return finish(engine, take_steps(engine, family))


@functools.cache
def expected(family: str) -> oracle.Run:
    """The oracle's run of the same model on the same batches."""
    steps = [[(batch(family, step, rank),) for rank in range(2)] for step in range(NUM_STEPS)]
    run = oracle.train(WithLoss(FAMILIES[family].model()), steps, optimizer=adamw, clip=1.0)
    run.parameters = {name.removeprefix("model."): value for name, value in run.parameters.items()}
    return run


class Plain:
    """Runs of plain models, each computed once."""

    def __init__(self, ranks: Callable[[int], Ranks]) -> None:
        self.ranks = ranks
        self.runs: dict[tuple[str, int, str], Outcome] = {}

    def run(self, family: str, stage: int, precision: str = "fp32") -> Outcome:
        """What `train` makes of it."""
        key = (family, stage, precision)
        if key not in self.runs:
            self.runs[key] = outcome(self.ranks(2).run(train, family=family, stage=stage, precision=precision))
        return self.runs[key]


@pytest.fixture(scope="module")
def plain(ranks: Callable[[int], Ranks]) -> Plain:
    """Runs that several tests compare with."""
    return Plain(ranks)


def is_same(run: Outcome, reference: Outcome) -> None:
    """Assert equality in every bit."""
    assert run.losses == reference.losses
    assert run.norms == reference.norms
    assert run.digest == reference.digest


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CHECKPOINTED])
def test_an_unmodified_model_trains_as_the_oracle(plain: Plain, family: str, stage: int) -> None:
    run, reference = plain.run(family, stage), expected(family)
    assert relative_difference(run.losses, reference.losses) < 1e-6
    assert relative_difference(run.norms, reference.norms) < 1e-5
    assert largest_difference(run.parameters, reference.parameters) < 3e-4


def train_checkpointed(family: str, stage: int) -> Report:
    """As `train`; a block must run its forward twice in every step."""
    model, calls = FAMILIES[family].model(), []
    inner = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    engine = start(model, stage)
    report = take_steps(engine, family)
    assert len(calls) == 2 * NUM_STEPS, f"{len(calls)} calls: the block was not recomputed once per step"
    return finish(engine, report)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing_changes_no_bit(
    ranks: Callable[[int], Ranks], plain: Plain, family: str, stage: int
) -> None:
    run = outcome(ranks(2).run(train_checkpointed, family=family, stage=stage))
    is_same(run, plain.run("llama, lora" if "lora" in family else "llama", stage))


def train_with_evaluation(family: str, stage: int) -> Report:
    """Evaluate after every step, with and without autograd's bookkeeping, by the engine and by its module."""
    engine, report, rank = start(FAMILIES[family].model(), stage), Report(), dist.get_rank()
    for step in range(NUM_STEPS):
        loss = engine(**batch(family, step, rank)).loss
        engine.backward(loss)
        engine.step()
        record_step(engine, report, [loss.item()], 1.0)
        engine.eval()
        with torch.no_grad():
            losses = [engine(**batch(family, 99, rank)).loss, engine.module(**batch(family, 99, rank)).loss]
        with torch.inference_mode():
            losses.append(engine(**batch(family, 99, rank)).loss)
        engine.train()
        assert losses[0] == losses[1] == losses[2] and torch.isfinite(losses[0])
    return finish(engine, report)


@pytest.mark.parametrize(("family", "stage"), [("llama", 1), ("llama", 2), ("llama", 3), ("qwen3-moe", 3), ("t5", 3)])
def test_evaluation_between_steps_changes_no_bit(
    ranks: Callable[[int], Ranks], plain: Plain, family: str, stage: int
) -> None:
    is_same(
        outcome(ranks(2).run(train_with_evaluation, family=family, stage=stage)),
        plain.run(family, stage),
    )


def ties_after_training(family: str) -> list[bool]:
    """Whether the head's weight still is the input embedding's: before, while and after it is gathered."""
    engine = start(FAMILIES[family].model(), stage=3)
    take_steps(engine, family, num_steps=2)
    model, found = engine.module, []
    for gathered in (False, True, False):
        context = zero.GatheredParameters(list(model.parameters())) if gathered else contextlib.nullcontext()
        with context:
            found.append(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    engine.destroy()
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama, tied", "bert", "t5"])
def test_tied_embeddings_stay_tied(ranks: Callable[[int], Ranks], family: str) -> None:
    for found in ranks(2).run(ties_after_training, family=family):
        assert found == [True, True, True]


def losses_in_bf16(family: str, num_steps: int) -> list[float]:
    """Losses on one batch that is seen again and again."""
    engine, data = start(FAMILIES[family].model(), stage=3, precision="bf16"), batch(family, 0, dist.get_rank())
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    losses = []
    for _ in range(num_steps):
        loss = engine(**data).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


@pytest.mark.parametrize("family", KINDS)
def test_a_model_trains_in_bf16_at_stage_3(ranks: Callable[[int], Ranks], family: str) -> None:
    for losses in ranks(2).run(losses_in_bf16, family=family, num_steps=8):
        assert all(loss == loss and abs(loss) < 20 for loss in losses)
        assert losses[-1] < (0.97 if "lora" in family else 0.8) * losses[0], f"the loss does not fall: {losses}"


def states_of_adapters(stage: int) -> tuple[lorica.engine.Memory, int, int]:
    """Memory of model states after a step, elements of all parameters, and of those that are trained."""
    model = FAMILIES["llama, lora"].model()
    numels = [sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)]
    engine = start(model, stage, "bf16")
    take_steps(engine, "llama, lora", num_steps=1)
    memory = engine.memory()
    engine.destroy()
    return memory, *numels


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_have_no_gradient_no_master_and_no_moments(ranks: Callable[[int], Ranks], stage: int) -> None:
    for memory, numel, trained in ranks(2).run(states_of_adapters, stage=stage):
        states, padded = memory.allocated_bytes, 8 * 128  # eight matrices in slots of 128 elements
        assert numel / 30 < trained <= padded
        assert states.master == 2 * padded / 2  # a split master: the 16 low bits
        assert states.moments == 2 * 4 * padded / 2
        assert states.grad <= 2 * padded


# Generation -----------------------------------------------------------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {"do_sample": False, "no_repeat_ngram_size": 2},
    {"do_sample": True},
    {"do_sample": False, "num_beams": 2, "use_cache": False},
]


def plain_copy(engine: Any, family: str) -> Any:
    """The engine's model in plain PyTorch, with the values that it has now; collective."""
    copy = FAMILIES[family].model().eval()
    with zero.GatheredParameters(list(engine.module.parameters())):
        copy.load_state_dict(engine.module.state_dict())
    return copy


def generate(family: str) -> list[list[Tensor]]:
    """Generate between steps; returns (plain, engine.generate, engine.module.generate) for each way."""
    engine, found = start(FAMILIES[family].model(), stage=3), []
    take_steps(engine, family, num_steps=2)
    prompt = batch(family, 100, dist.get_rank())["input_ids"][:, :5]
    copy = plain_copy(engine, family)
    engine.eval()
    for way in WAYS:
        tokens = []
        for model in (copy, engine, engine.module):
            torch.manual_seed(3)
            tokens.append(model.generate(prompt, max_new_tokens=8, **way))
        found.append(tokens)
    assert held_fraction(engine.module) < 0.01, "generation leaves gathered parameters behind"
    take_steps(engine.train(), family, num_steps=1)
    engine.destroy()
    return found


@pytest.mark.parametrize("family", GENERATING)
def test_a_model_generates_at_stage_3_what_the_plain_model_does(ranks: Callable[[int], Ranks], family: str) -> None:
    first, second = ranks(2).run(generate, family=family)
    for wanted, by_engine, by_module in first + second:
        assert torch.equal(by_engine, wanted) and torch.equal(by_module, wanted)
    for mine, other in zip(first, second, strict=True):
        assert not torch.equal(mine[0], other[0]), "the ranks had different prompts"
    assert len(set(first[0][0].flatten().tolist())) > 6, "the text is too monotonous to tell anything"


def generate_until_the_end(family: str) -> tuple[Tensor, Tensor, int]:
    """Generate until a token that comes early on rank 0 only; returns (plain, engine's, forward calls)."""
    engine, copy, calls = start(FAMILIES[family].model(), stage=3), FAMILIES[family].model().eval(), []
    prompts = [batch(family, 100, rank)["input_ids"][:1, :5] for rank in range(2)]
    ways = {"do_sample": False, "no_repeat_ngram_size": 2, "max_new_tokens": 12, "pad_token_id": 0}
    end = int(copy.generate(prompts[0], **ways)[0, 8])
    prompt = prompts[dist.get_rank()]
    wanted = copy.generate(prompt, eos_token_id=end, **ways)
    engine.module.register_forward_hook(lambda *_: calls.append(1))
    engine.eval()
    found = engine.generate(prompt, eos_token_id=end, synced_gpus=True, **ways)
    engine.destroy()
    return wanted, found, len(calls)


def test_ranks_may_stop_generating_at_different_lengths(ranks: Callable[[int], Ranks]) -> None:
    (wanted, found, calls), (longer, found_longer, more_calls) = ranks(2).run(generate_until_the_end, family="llama")
    assert torch.equal(found, wanted) and torch.equal(found_longer, longer)
    assert wanted.shape[1] < longer.shape[1], "rank 0 should have stopped earlier"
    assert calls == more_calls, "all ranks must run as many forwards as the slowest"


# Construction ---------------------------------------------------------------------------------------------------------


def build(family: str, how: str, folder: Path) -> nn.Module:
    """The model, constructed in one of Hugging Face's ways."""
    made = FAMILIES[family]
    if how == "constructor":
        return made.change(made.kind(made.config()))
    if how == "from_config":
        return AUTO[family].from_config(made.config())
    return AUTO[family].from_pretrained(folder)


def train_built_sharded(family: str, how: str, folder: Path, precision: str) -> tuple[Report, float]:
    """Build under `zero.Init` (rank 1 draws other numbers: rank 0's count), then train as usual."""
    torch.manual_seed(7 + dist.get_rank())
    with zero.Init(config_dict_or_path=config(3, precision)):
        model = build(family, how, folder)
    held = held_fraction(model)
    engine = start(model.train(), 3, precision)
    return finish(engine, take_steps(engine, family)), held


def run_built_sharded(
    ranks: Ranks, family: str, how: str, folder: Path = Path(), precision: str = "fp32"
) -> tuple[Outcome, float]:
    """The ranks' run, and the largest fraction of the model that a rank held after construction."""
    arguments = {"family": family, "how": how, "folder": folder, "precision": precision}
    reports, held = zip(*ranks.run(train_built_sharded, **arguments), strict=True)
    return outcome(list(reports)), max(held)


@pytest.mark.parametrize(
    ("family", "how"),
    [(family, "constructor") for family in [*KINDS, "llama, tied"]] + [(family, "from_config") for family in AUTO],
)
def test_a_model_built_sharded_trains_as_the_plain_one(
    ranks: Callable[[int], Ranks], plain: Plain, family: str, how: str
) -> None:
    # BERT's head replaces its bias after construction: 64 of 21 thousand elements stay whole until initialize
    run, held = run_built_sharded(ranks(2), family, how)
    is_same(run, plain.run(family, 3))
    assert held < 0.01, f"a rank holds {held:.0%} of the model after construction"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_masters_of_a_bf16_model_built_sharded_are_not_rounded(
    ranks: Callable[[int], Ranks], plain: Plain, family: str
) -> None:
    run, _ = run_built_sharded(ranks(2), family, "constructor", precision="bf16")
    is_same(run, plain.run(family, 3, "bf16"))


def test_weights_replaced_through_data_count(ranks: Callable[[int], Ranks], plain: Plain) -> None:
    run, _ = run_built_sharded(ranks(2), "older style", "constructor")
    is_same(run, plain.run("older style", 3))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3-moe", "t5"])
def test_a_pretrained_model_may_be_loaded_under_init(
    ranks: Callable[[int], Ranks], plain: Plain, family: str, tmp_path: Path
) -> None:
    FAMILIES[family].model().save_pretrained(tmp_path)
    run, _ = run_built_sharded(ranks(2), family, "from_pretrained", tmp_path)
    is_same(run, plain.run(family, 3))


def train_from_single_tensors(family: str, folder: Path) -> Report:
    """Build sharded, with numbers of no interest, then read one tensor of the checkpoint after the other."""
    torch.manual_seed(1234)
    with zero.Init(config_dict_or_path=config(stage=3)):
        model = AUTO[family].from_config(transformers.AutoConfig.from_pretrained(folder))
    engine = start(model, stage=3)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name, parameter in engine.module.named_parameters():
            zero.safe_set_full_fp32_param(parameter, file.get_tensor(name))
    return finish(engine, take_steps(engine, family))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_checkpoint_can_be_read_tensor_by_tensor_into_a_sharded_model(
    ranks: Callable[[int], Ranks], plain: Plain, family: str, tmp_path: Path
) -> None:
    FAMILIES[family].model().save_pretrained(tmp_path)
    run = outcome(ranks(2).run(train_from_single_tensors, family=family, folder=tmp_path))
    is_same(run, plain.run(family, 3))


# Documentation --------------------------------------------------------------------------------------------------------


def run_program(path: Path) -> tuple[float, list[int]]:
    """Run a program beside its own file; returns its last loss and what its engine generates."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        names = runpy.run_path(str(path))
    finally:
        os.chdir(before)
    engine, loss = names["engine"], names["loss"].item()
    tokens = engine.generate(names["prompt"], max_new_tokens=20, do_sample=False)
    engine.destroy()
    return loss, tokens[0].tolist()


def test_the_program_of_the_documentation_runs(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "huggingface.md"
    program = tmp_path / "train.py"
    program.write_text(page.read_text().split("```python\n", 1)[1].split("```", 1)[0])
    for loss, tokens in ranks(2).run(run_program, path=program):
        assert loss < 1.0
        assert bytes(tokens).startswith(b"The quick brown fox"), bytes(tokens)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    prompt = torch.tensor([tokens[:10]])
    assert loaded.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist() == tokens


# Saving ---------------------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """A trained model, as rank 0's consolidated state dict and as logits of a batch."""

    state: dict[str, Tensor] | None
    logits: Tensor


def train_and_save(family: str, stage: int, folder: Path, precision: str) -> Saved:
    """Train, then save with the engine into `folder` and with Hugging Face into `folder`/hf."""
    engine = start(FAMILIES[family].model(), stage, precision)
    take_steps(engine, family, num_steps=3)
    engine.save_16bit_model(str(folder))
    state = engine.consolidated_state_dict()
    if dist.get_rank() == 0:
        engine.module.config.save_pretrained(folder)
        engine.module.save_pretrained(folder / "hf", state_dict=dict(state))  # it empties what it is given
    logits = logits_of(engine.eval(), family)
    engine.destroy()
    return Saved(state, logits)


def logits_of(model: nn.Module, family: str) -> Tensor:
    """What the model says about one batch."""
    with torch.no_grad():
        logits = model(**batch(family, 50, 0)).logits
    assert isinstance(logits, Tensor)
    return logits.clone()


def save(ranks: Ranks, family: str, stage: int, folder: Path, precision: str = "fp32") -> Saved:
    """The trained model, the same on all ranks."""
    arguments = {"family": family, "stage": stage, "folder": folder, "precision": precision}
    first, second = ranks.run(train_and_save, **arguments)
    assert torch.equal(first.logits, second.logits) and second.state is None
    untrained = logits_of(FAMILIES[family].model().eval(), family)
    assert (first.logits - untrained).abs().max() > 1e-3, "nothing was trained"
    return first


def is_loaded(model: nn.Module, family: str, saved: Saved) -> None:
    """Assert equal weights in every bit, and logits equal to the last bits.

    Weights that were mapped from a file lie elsewhere in a cache line, for which kernels have other orders of addition.
    """
    found = model.state_dict()
    assert saved.state is not None and found.keys() == saved.state.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.state.items())
    torch.testing.assert_close(logits_of(model.eval(), family), saved.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "stage"), [("gpt2", 1), ("gpt2", 2), *((family, 3) for family in AUTO)])
def test_a_saved_model_can_be_loaded_by_hugging_face(
    ranks: Callable[[int], Ranks], family: str, stage: int, tmp_path: Path
) -> None:
    saved = save(ranks(2), family, stage, tmp_path)
    for folder in (tmp_path, tmp_path / "hf"):
        is_loaded(AUTO[family].from_pretrained(folder), family, saved)


def test_a_model_saved_in_bf16_loads_in_bf16(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    saved = save(ranks(2), "llama", 3, tmp_path, precision="bf16")
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = AUTO["llama"].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert saved.state is not None
    assert all(torch.equal(value, saved.state[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(logits_of(loaded, "llama"), saved.logits, rtol=0, atol=0.1)  # a few bf16 roundings of 8


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_can_be_saved_whole_or_alone(ranks: Callable[[int], Ranks], stage: int, tmp_path: Path) -> None:
    saved = save(ranks(2), "llama, lora", stage, tmp_path)
    whole = FAMILIES["llama, lora"].model()
    whole.load_state_dict(load_file(tmp_path / "model.safetensors"))
    is_loaded(whole, "llama, lora", saved)
    is_loaded(peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path / "hf"), "llama, lora", saved)
    assert all("lora_" in name for name in load_file(tmp_path / "hf" / "adapter_model.safetensors"))
