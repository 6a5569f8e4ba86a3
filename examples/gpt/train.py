"""Pretrain a GPT on real text under ZeRO: the demo's loop. Model, text, batches and picture are in the files beside it.

    lorica --num_gpus=2 examples/gpt/train.py --deepspeed --deepspeed_config examples/gpt/ds_config_zero2.json

All that is Lorica's here is `add_config_arguments`, `initialize`, and the three calls in `train_step`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from budget import UNSTEADY_STEPS, WARMUP_STEPS, Budget, width_factor
from curve import Curve
from data import check_length, training_batch, validation_batch
from model import GPT, SIZES, GPTConfig, generate
from progress import Display
from rich.console import Console
from rich.markup import escape
from text import Tokens, prepare
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import lorica

VALIDATION_BATCHES = 2  # on each process, on the way; at the end FINAL_TIMES times as many
FINAL_TIMES = 4
VALIDATIONS = 8  # about so many on the way
PROMPT_TOKENS = 32


def parse_arguments() -> argparse.Namespace:
    """The command line: what to train, on what, for how long. How it is trained is in the configuration file."""
    parser = argparse.ArgumentParser(description="Pretrain a GPT on real text.")
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="medium" if torch.cuda.is_available() else "tiny",
        help="shape of the model (default: medium on a GPU, tiny on a CPU)",
    )
    parser.add_argument("--seq_len", type=int, help="tokens in a sequence (default: as the size says)")
    parser.add_argument("--activation_checkpointing", action="store_true", help="less memory, a third more work")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to train")
    parser.add_argument("--steps", type=int, help="how many steps to train, instead of --minutes")
    parser.add_argument("--data_path", type=Path, help="a text file or folder (default: Python's standard library)")
    parser.add_argument("--vocab_size", type=int, help="tokens that the BPE learns (default: as the size says)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for results and tokenised text")
    parser.add_argument("--name", help="what to call this run (default: gpt-SIZE); its folder is RUNS/NAME-zeroSTAGE")
    parser.add_argument("--sample_tokens", type=int, default=64, help="tokens to generate after each prompt")
    arguments = lorica.add_config_arguments(parser).parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    return arguments


def shape_of(arguments: argparse.Namespace, vocab_size: int) -> GPTConfig:
    """The model that the command line asks for."""
    shape = SIZES[arguments.size]
    return dataclasses.replace(
        shape,
        seq_len=arguments.seq_len or shape.seq_len,
        vocab_size=vocab_size,
        activation_checkpointing=arguments.activation_checkpointing,
    )


class Run(NamedTuple):
    """What the steps of a run share."""

    engine: Any
    shape: GPTConfig
    tokens: Tokens
    seed: int

    @property
    def tokens_per_step(self) -> int:
        """Over all processes and accumulated micro-batches."""
        return int(self.engine.train_batch_size()) * self.shape.seq_len


def train_step(run: Run) -> Tensor:
    """One optimizer step. Returns: its loss on this process, a scalar on the device."""
    engine, losses = run.engine, []
    for _ in range(engine.gradient_accumulation_steps()):
        batch = training_batch(
            run.tokens.train,
            micro_step=engine.micro_steps,
            rank=engine.global_rank,
            world_size=engine.world_size,
            micro_batch=engine.train_micro_batch_size_per_gpu(),
            seq_len=run.shape.seq_len,
            seed=run.seed,
        )
        loss = engine(batch.tokens_BL.to(engine.device), batch.targets_BL.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


@torch.no_grad()
def validate(run: Run, num_batches: int) -> float:
    """The mean loss on the validation text. All processes look at a part of it, and all get the mean."""
    engine = run.engine
    engine.eval()
    total = torch.zeros((), device=engine.device)
    for index in range(num_batches):
        batch = validation_batch(
            run.tokens.validation,
            index=index,
            rank=engine.global_rank,
            world_size=engine.world_size,
            micro_batch=engine.train_micro_batch_size_per_gpu(),
            num_batches=num_batches,
            seq_len=run.shape.seq_len,
        )
        total += engine(batch.tokens_BL.to(engine.device), batch.targets_BL.to(engine.device)).float()
    engine.train()
    dist.all_reduce(total)
    mean: float = total.item() / (num_batches * engine.world_size)
    return mean


def train(run: Run, budget: Budget, display: Display) -> Curve:
    """Train until the budget is used up, and validate on the way and at the end."""
    curve, step, validated = Curve(), 0, 0
    while not budget.is_over(step):
        loss = train_step(run)
        step += 1
        curve.train.append(loss)
        if step in (UNSTEADY_STEPS, WARMUP_STEPS):
            float(loss)  # a GPU runs behind: wait for it before the time is taken
        budget.watch(step)
        if step == WARMUP_STEPS:
            budget.plan(step, run.engine.device)
        display.update(step, budget.total_steps, loss)
        if step >= WARMUP_STEPS and step - validated >= budget.steps_between(VALIDATIONS) and not budget.is_over(step):
            curve.validation[step] = display.validation_loss = validate(run, VALIDATION_BATCHES)
            validated = step
            budget.plan(step, run.engine.device)
    curve.validation[step] = validate(run, VALIDATION_BATCHES * FINAL_TIMES)
    return curve


def samples(run: Run, num_tokens: int) -> list[tuple[str, str]]:
    """Prompts from the validation text, and how the model goes on. All processes must come here: ZeRO-3 gathers."""
    engine = run.engine
    first = validation_batch(
        run.tokens.validation, index=0, rank=0, world_size=1, micro_batch=3, num_batches=1, seq_len=PROMPT_TOKENS
    )
    engine.eval()
    both = generate(engine, first.tokens_BL.to(engine.device), num_tokens, seq_len=run.shape.seq_len, seed=run.seed)
    engine.train()
    decode = run.tokens.tokenizer.decode
    return [(decode(row[:PROMPT_TOKENS]), decode(row[PROMPT_TOKENS:])) for row in both.tolist()]


def next_command(config: str, world_size: int, stage: int) -> str:
    """The command line of this run, with the configuration of the next ZeRO stage."""
    beside = Path(sys.executable).with_name("lorica")
    program = [os.path.relpath(beside)] if beside.exists() else [Path(sys.executable).name, "-m", "lorica"]
    here = Path(os.path.relpath(Path(__file__).parent))
    other = str(here / f"ds_config_zero{(stage + 1) % 4}.json")
    options = [word.replace(config, other) for word in sys.argv[1:] if not word.startswith("--local_rank")]
    return shlex.join([*program, f"--num_gpus={world_size}", str(here / "train.py"), *options])


def show_results(display: Display, run: Run, curve: Curve, folder: Path, title: str, command: str) -> None:
    """Write the table and the picture, and say where they are and what to do next (process 0)."""
    console = display.console
    folder.mkdir(parents=True, exist_ok=True)
    curve.write_table(folder / "losses.csv")
    curve.draw(folder / "loss.png", title=title, tokens_per_step=run.tokens_per_step)
    train, validation = curve.train_values(), list(curve.validation.values())
    uniform = math.log(run.shape.vocab_size)
    console.print(
        f"\n[bold]{len(train)} steps, {len(train) * run.tokens_per_step / 1e6:.2f} M tokens[/]: "
        f"loss {train[0]:.2f} -> {train[-1]:.2f}, validation {validation[-1]:.2f} nats per token "
        f"(guessing blindly: {uniform:.2f}); "
        f"memory {display.peak_bytes / 2**30:.2f} GiB a process",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Loss curve: [bold]{folder / 'loss.png'}[/]   table: {folder / 'losses.csv'}", soft_wrap=True)
    console.print(f"Go on with another ZeRO stage:\n  {escape(command)}", highlight=False, soft_wrap=True)


def show_samples(console: Console, texts: list[tuple[str, str]]) -> None:
    """Print each prompt (dim) with its continuation (bold)."""
    console.print("\n[bold]What it writes[/] (a piece of validation text, [dim]dim[/], and how the model goes on):")
    for prompt, continuation in texts:
        console.rule(style="dim")
        console.print(f"[dim]{escape(prompt)}[/][bold green]{escape(continuation)}[/]", highlight=False, soft_wrap=True)
    console.rule(style="dim")


def main() -> None:
    """Prepare the text, build the engine, train, and show what came of it."""
    arguments = parse_arguments()
    is_first = int(os.environ.get("RANK", "0")) == 0
    vocab_size = arguments.vocab_size or SIZES[arguments.size].vocab_size
    tokens = prepare(arguments.data_path, arguments.runs / "text", vocab_size=vocab_size, say=print)
    shape = shape_of(arguments, tokens.tokenizer.get_vocab_size())
    check_length(tokens.train, shape.seq_len, "training")
    check_length(tokens.validation, max(shape.seq_len, PROMPT_TOKENS), "validation")

    torch.manual_seed(arguments.seed)
    model = GPT(shape)
    num_parameters = model.num_parameters()
    budget = Budget(steps=arguments.steps, minutes=arguments.minutes)
    engine, _, _, _ = lorica.initialize(
        args=arguments,
        model=model,
        model_parameters=model.parameters(),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda i: budget.factor(i) * width_factor(shape.width)),
    )
    run = Run(engine, shape, tokens, arguments.seed)
    stage = engine.zero_optimization_stage()
    title = f"GPT, {num_parameters / 1e6:.1f} M parameters, ZeRO-{stage}, {engine.device.type} x {engine.world_size}"
    with Display(is_shown=is_first, tokens_per_step=run.tokens_per_step, device=engine.device) as display:
        display.say(f"{title}; {run.tokens_per_step} tokens a step from {len(tokens.train) / 1e6:.2f} M")
        curve = train(run, budget, display)
    texts = samples(run, arguments.sample_tokens)
    if is_first:
        folder = arguments.runs / f"{arguments.name or 'gpt-' + arguments.size}-zero{stage}"
        command = next_command(arguments.deepspeed_config, engine.world_size, stage)
        show_samples(display.console, texts)
        show_results(display, run, curve, folder, title, command)
    engine.destroy()


if __name__ == "__main__":
    main()
