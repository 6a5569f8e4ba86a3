"""Writes docs/configuration.md from the schema: `python -m lorica.config.docs > docs/configuration.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby

from lorica.config.compat import IGNORED
from lorica.config.keys import Block, Status
from lorica.config.names import Entry, entries
from lorica.config.optimizer import (
    OPTIMIZERS,
    SCHEDULERS,
    TORCH_OPTIMIZERS,
    TORCH_OPTIMIZERS_REFUSED,
    TORCH_SCHEDULERS,
    TORCH_SCHEDULERS_REFUSED,
    TorchAdamParams,
)
from lorica.config.report import default_text
from lorica.config.rules import RULES
from lorica.config.schema import Config

_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m lorica.config.docs`; a test compares it with the schema. -->

A configuration is a JSON object in DeepSpeed's language. It is given as a path, a dict or a base64 string:

```python
engine, optimizer, _, _ = lorica.initialize(model=model, config="ds_config.json")
```

```json
{
  // comments, /* comments */, # comments and trailing commas are welcome
  "train_micro_batch_size_per_gpu": 4,
  "gradient_accumulation_steps": 16,
  "zero_optimization": {"stage": 2},
  "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
  "bf16": {"enabled": true},
}
```

`lorica check ds_config.json --world_size 8` checks a file without starting anything and prints what it means. All
problems of a file are reported at once, each with its line, its key and a way out:

```
ds_config.json:4: zero_optimization.stge = 2: unknown key of zero_optimization. Fix: write "stage".
```

## Batch sizes

`train_batch_size` = `train_micro_batch_size_per_gpu` x `gradient_accumulation_steps` x data-parallel ranks. Give any of
them but `gradient_accumulation_steps` alone; the rest follows:

| given | the rest |
|---|---|
| all three | must fit the number of ranks |
| batch, micro-batch | accumulation = batch / micro-batch / ranks |
| batch, accumulation | micro-batch = batch / accumulation / ranks |
| micro-batch, accumulation | batch = micro-batch x accumulation x ranks |
| batch | accumulation = 1, micro-batch = batch / ranks |
| micro-batch | accumulation = 1, batch = micro-batch x ranks |

A division that leaves a rest is an error that says how many ranks were counted, and where that number comes from.

## How values are read

- An unknown key is an error that names the nearest known one, or the block where the key belongs.
- A size may be written as `5e8`. A fraction of an element is rounded, a number in quotes is read as a number, 0 and 1
  are read as false and true; each with a warning.
- `"auto"` leaves a choice to the engine, which takes it from the model, the optimizer or the default. Hugging Face
  Trainer and accelerate fill in their own values before that. Where nobody can know (`optimizer.params.lr`, the number
  of steps of a schedule), the engine refuses to start.
- `null` is the same as leaving the key out.
- A key that begins with `_comment`, `//`, `#` or `$schema` is a comment.

## What the status says

- **supported**: does what it says.
- **no effect**: accepted because DeepSpeed's configurations contain it. It warns when set to something else than its
  default.
- **not yet**: refused, with what works instead, unless it is switched off.
- **with X**: means nothing without X.

Defaults are DeepSpeed 0.19's, with two exceptions. `stage3_max_live_parameters` and `stage3_max_reuse_distance` are not
1e9 but empty: a unit is freed after its forward, and how much is whole at one time is bounded by what is prefetched.
That is the memory people expect of stage 3; give both keys to trade memory for fewer gathers.
"""

_OPTIMIZERS = """\
## Optimizers

`optimizer.type` is one of the following, in any case, or a class of torch.optim that works element by element:
{torch}, also written `torch.optim.<Name>`. `Adam` and `AdamW` both mean AdamW; `Adam` with `"adam_w_mode": false` is
Adam with an L2 penalty.
"""

_SCHEDULERS = """\
## Schedules

`scheduler.type` is one of the following, or a class of torch.optim.lr_scheduler:
{torch}.
The schedule is stepped once per optimizer step, not after a step that was skipped.
"""


def markdown() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION, "## Keys\n", *_key_tables(), *_optimizers(), *_schedulers(), *_combinations(), *_names()]
    return "\n".join(parts)


def _key_tables() -> Iterator[str]:
    """One table per block, the top level first."""
    by_block: dict[str, list[Entry]] = {}
    for entry in entries(Config):
        by_block.setdefault(".".join(entry.path[:-1]), []).append(entry)
    for block in sorted(by_block, key=lambda name: bool(name)):  # stable: the top level comes first
        yield f"### {f'`{block}`' if block else 'Top level'}\n"
        yield _table(by_block[block])


def _table(listed: Iterable[Entry]) -> str:
    rows = ["| key | default | meaning | status |", "|---|---|---|---|"]
    for entry in listed:
        meaning = entry.declared.description or ""
        names = "".join(f", `{name}`" for name in entry.info.aliases)
        default = "" if entry.block is not None else _code(default_text(entry))
        rows.append(f"| `{entry.path[-1]}`{names} | {default} | {meaning} | {_status(entry)} |")
    return "\n".join(rows) + "\n"


def _status(entry: Entry) -> str:
    info = entry.info
    if info.part_of:
        return f"with `{info.part_of}`"
    if info.refused:
        refused = "; ".join(f"`{value}` not yet: {instead}" for value, instead in info.refused.items())
        return f"supported; {refused}"
    if info.status is Status.SUPPORTED:
        return "" if entry.block is not None else "supported"
    return f"{info.status.value}: {info.note}"


def _code(text: str) -> str:
    """Values as code, words as words."""
    is_value = text[:1] in '"[{-0123456789' or text in ("true", "false", "null")
    return f"`{text}`" if is_value and " x " not in text and ", or" not in text else text


def _optimizers() -> Iterator[str]:
    yield _OPTIMIZERS.format(torch=", ".join(TORCH_OPTIMIZERS))
    known = [(name, kind.params) for name, kind in OPTIMIZERS.items() if kind.params is not None]
    for params, names in groupby([*known, ("adam, adamw with torch_adam", TorchAdamParams)], key=lambda item: item[1]):
        yield _params_table(", ".join(name for name, _ in names), params)
    refused = {name: kind.instead for name, kind in OPTIMIZERS.items() if kind.params is None}
    yield _refused_table(refused | TORCH_OPTIMIZERS_REFUSED)


def _schedulers() -> Iterator[str]:
    yield _SCHEDULERS.format(torch=", ".join(TORCH_SCHEDULERS))
    for name, params in SCHEDULERS.items():
        yield _params_table(name, params)
    yield _refused_table(TORCH_SCHEDULERS_REFUSED)


def _params_table(title: str, params: type[Block]) -> str:
    return f"### {title}\n\n{_table(entries(params))}"


def _refused_table(refused: dict[str, str]) -> str:
    rows = [
        "| refused type | instead |",
        "|---|---|",
        *(f"| `{name}` | {instead} |" for name, instead in refused.items()),
    ]
    return "\n".join(rows) + "\n"


def _combinations() -> Iterator[str]:
    yield "## Combinations that are refused\n"
    yield "| key | why | instead |\n|---|---|---|"
    yield "\n".join(f"| `{rule.keys[0]}` | {rule.message} | {rule.fix} |" for rule in RULES) + "\n"


def _names() -> Iterator[str]:
    yield "## Old names and names without effect\n"
    yield "| name | read as |\n|---|---|"
    for entry in entries(Config):
        for name in entry.info.deprecated:
            yield f"| `{'.'.join((*entry.path[:-1], name))}` | `{'.'.join(entry.path)}` |"
    for name, today in _MOVED:
        yield f"| `{name}` | {today} |"
    for path, because in IGNORED.items():
        yield f"| `{'.'.join(path)}` | nothing: {because} |"
    yield ""


_MOVED = (
    ("zero_optimization: true", '`"zero_optimization": {"stage": 1}`'),
    ("allgather_size", "`zero_optimization.allgather_bucket_size`"),
    ("zero_optimization.cpu_offload: true", '`zero_optimization.offload_optimizer: {"device": "cpu"}`'),
    ("zero_optimization.cpu_offload_param: true", '`zero_optimization.offload_param: {"device": "cpu"}`'),
    ("zero_optimization.aio", "`aio`"),
)


if __name__ == "__main__":
    sys.stdout.write(markdown())
