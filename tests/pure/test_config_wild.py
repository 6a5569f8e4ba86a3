"""Whole configurations: those that people write are accepted, hundreds of generated bad ones are refused by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt

from lorica.config import check, load
from lorica.config.coerce import leaf_of
from lorica.config.keys import Form, Status
from lorica.config.names import Entry, all_entries, names_of
from lorica.config.optimizer import OPTIMIZERS, SCHEDULERS, TorchAdamParams

CONFIGS = sorted((Path(__file__).parent.parent / "data" / "ds_configs").glob("*.json"))
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
}
TYPE_OF: dict[Any, str] = (
    {kind.params: name for name, kind in OPTIMIZERS.items()}
    | {params: name for name, params in SCHEDULERS.items()}
    | {TorchAdamParams: "adam"}
)


def test_there_are_enough_configurations_to_mean_something() -> None:
    assert len(CONFIGS) >= 30


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_as_people_write_them_is_accepted(path: Path) -> None:
    config = load(path)
    assert config.summary_line()
    assert load(config.raw).model_dump() == config.model_dump()


@pytest.mark.parametrize("path", [path for path in CONFIGS if '"auto"' not in path.read_text()], ids=lambda p: p.stem)
def test_an_effective_configuration_is_a_legal_configuration_that_means_the_same(path: Path) -> None:
    config = load(path)
    effective = json.loads(config.model_dump_json())
    assert load(effective).model_dump() == config.model_dump()


def test_the_appendix_of_the_issue_means_what_it_says() -> None:
    config = load(next(path for path in CONFIGS if path.stem == "issue_appendix"), world_size=8)
    zero = config.zero_optimization
    assert config.batch == (512, 4, 16)
    assert (zero.stage, zero.overlap_comm, zero.offload_optimizer.device, zero.offload_optimizer.pin_memory) == (
        2, True, "cpu", True,
    )  # fmt: skip
    assert config.optimizer is not None and config.scheduler is not None
    assert (config.optimizer.name, config.optimizer.params) == ("adamw", {"lr": 0.00015, "weight_decay": 0.01})
    assert config.scheduler.params == {"warmup_min_lr": 1e-5, "warmup_max_lr": 0.00015, "warmup_num_steps": 1000}
    assert (config.compute_dtype, config.steps_per_print, config.gradient_clipping) == ("bf16", 10, 1.0)
    assert config.warnings == ()


def placed(entry: Entry, name: str, value: Any) -> tuple[str, dict[str, Any]]:
    """The dotted key and the base configuration with `value` there."""
    path = (*entry.path[:-1], name)
    raw: dict[str, Any] = json.loads(json.dumps(BASE))
    block = raw
    for step in path[:-1]:
        block = block.setdefault(step, {})
    for required, declared in entry.owner.model_fields.items():
        if declared.is_required() and required != entry.path[-1]:
            block[required] = 1 if entry.owner in TYPE_OF else {"optimizer": "adam", "scheduler": "WarmupLR"}[path[0]]
    block[name] = value
    if entry.owner in TYPE_OF:
        raw[path[0]]["type"] = TYPE_OF[entry.owner]
        if entry.owner is TorchAdamParams:
            block.setdefault("torch_adam", True)
    return ".".join(path), raw


def wrong_type(entry: Entry) -> Any:
    """A value that no reading makes sense of."""
    leaf = leaf_of(entry.declared.annotation)
    if entry.block is not None or entry.info.form is Form.PARAMS or leaf.type in (bool, int, float) or leaf.choices:
        return "none such"
    if leaf.type is Any:
        return None
    return 5 if get_origin(leaf.type) is dict else {"a": 1}


def out_of_range(entry: Entry) -> list[float]:
    """One value beyond every limit of a key."""
    values = []
    for item in entry.declared.metadata:
        if isinstance(item, Ge):
            values.append(-1 if entry.info.form is Form.STEPS else item.ge - 1)
        if isinstance(item, Gt):
            values.append(item.gt)
        if isinstance(item, Le):
            values.append(item.le + 1)
        if isinstance(item, Lt):
            values.append(item.lt)
    return [value for value in values if isinstance(value, int | float)]


def bad_configurations() -> dict[str, tuple[str, str]]:
    """Case -> the key to be named and the text of a bad configuration. Keys of refused blocks come after the block."""
    cases: dict[str, tuple[str, str]] = {}

    def add(kind: str, key: str, text: Any) -> None:
        cases[f"{kind} {key} {len(cases)}"] = (key, text if isinstance(text, str) else json.dumps(text, indent=1))

    for entry in all_entries():
        name = entry.path[-1]
        typo = name[: len(name) // 2] + "q" + name[len(name) // 2 :]
        assert typo not in names_of(entry.owner)
        add("typo", *placed(entry, typo, True))
        if wrong_type(entry) is not None:
            add("type", *placed(entry, name, wrong_type(entry)))
        for value in out_of_range(entry):
            add("range", *placed(entry, name, value))
        if leaf_of(entry.declared.annotation).type is float:
            add("not a number", *placed(entry, name, float("nan")))
    for total, micro, steps in [(33, 4, 1), (8, 4, 4), (7, 2, None), (9, None, 2), (31, None, None)]:
        sizes = {
            "train_batch_size": total,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": steps,
        }
        add("batch", "train_batch_size", {"bf16": {"enabled": True}} | sizes)
    add("duplicate", "fp16", '{"fp16": {},\n"zero_optimization": {"stage": 1},\n"fp16": {}}')
    add("duplicate", "zero_optimization.stage", '{"zero_optimization": {"stage": 1, "stage": 2}}')
    return cases


CASES = bad_configurations()


def test_at_least_400_bad_configurations_are_refused_with_exit_code_2_naming_key_and_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(CASES) >= 400
    path = tmp_path / "ds_config.json"
    for case, (key, text) in CASES.items():
        path.write_text(text)
        code = check([str(path), "--world_size", "8"])
        lines = capsys.readouterr().out.splitlines()
        assert code == 2, case
        assert any(f": {key} = " in line and "Fix: " in line for line in lines), (case, lines)
        first = lines[0].removeprefix(f"{path}:").split(": ")[1]
        named = first.split(" = ")[0]
        assert named == key or (key.startswith(f"{named}.") and named in REFUSED_BLOCKS), (case, lines)


REFUSED_BLOCKS = {
    ".".join(entry.path)
    for entry in all_entries()
    if entry.block is not None and entry.info.status is Status.NOT_YET and not entry.info.part_of
}


def test_a_comma_too_many_is_no_reason_to_refuse() -> None:
    for path in CONFIGS:
        text = path.read_text().rstrip()
        load_text = text[:-1].rstrip().rstrip(",") + ",}"
        assert text.endswith("}")
        assert load(base64.b64encode(load_text.encode()).decode()).model_dump() == load(path).model_dump()
