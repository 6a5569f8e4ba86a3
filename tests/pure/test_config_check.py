"""What people read: `lorica check`, the summary line, the documentation, the JSON schema, and what they import."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorica.config import Config, check, load, schema_json
from lorica.config.docs import markdown
from lorica.config.jsonc import parse
from lorica.config.keys import Status
from lorica.config.names import all_entries, entries
from lorica.config.optimizer import OPTIMIZERS, SCHEDULERS

ROOT = Path(__file__).parent.parent.parent
APPENDIX = ROOT / "tests" / "data" / "ds_configs" / "issue_appendix.json"
HEAVY = ("torch", "numpy", "rich", "transformers")


def modules_after(code: str) -> set[str]:
    """The modules that are loaded after running `code` in a fresh interpreter."""
    ending = "\nimport sys; print('MODULES', *sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code + ending], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("MODULES")[2].split())


def test_the_configuration_imports_nothing_heavy() -> None:
    assert not modules_after("import lorica.config").intersection(HEAVY)


def test_checking_a_file_imports_nothing_heavy() -> None:
    code = f"from lorica.config import check; assert check([{str(APPENDIX)!r}, '--world_size', '8']) == 0"
    assert not modules_after(code).intersection(HEAVY)


def test_the_module_can_be_run_and_exits_with_2_for_a_bad_file(tmp_path: Path) -> None:
    bad = tmp_path / "ds_config.json"
    bad.write_text('{"zero_optimization": {\n"stge": 2}}')
    run = subprocess.run([sys.executable, "-m", "lorica.config", str(bad)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout.startswith(f"{bad}:2: zero_optimization.stge = 2: ")


def test_a_check_prints_batch_sizes_deviations_and_what_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert check([str(APPENDIX), "--world_size", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{APPENDIX} is valid.\nZeRO stage 2 | bf16 | AdamW lr 0.00015 | WarmupLR | batch 512 = ")
    assert "train_batch_size 512 = train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 16 x 8" in out
    assert re.search(r"^  \* +stage +2 +default: 0$", out, re.MULTILINE)
    assert re.search(r"^  \* +lr +0.00015$", out, re.MULTILINE)
    assert re.search(r"^    gradient_clipping +1.0$", out, re.MULTILINE)
    assert re.search(r"^    fp16 +off$", out, re.MULTILINE)
    assert "zero_optimization.contiguous_gradients: gradients are always packed" in out
    assert "Warnings" not in out and "stage3_" not in out


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({}, "not given; training needs train_batch_size or train_micro_batch_size_per_gpu"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_batch_size = 4 x 1 x ranks = 4 x ranks"),
        ({"train_batch_size": 32}, "batch 32; the rest follows from the number of ranks"),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            "train_batch_size 32 = 4 x 2 x ranks: needs 4 ranks",
        ),
    ],
)
def test_without_a_world_size_a_check_says_what_the_batch_sizes_ask_for(
    raw: dict[str, int], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(raw))
    assert check([str(path)]) == 0
    assert line in capsys.readouterr().out


def test_a_check_lists_warnings_and_what_is_left_to_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text('{"bf16": {"enabled": 1}, "optimizer": {"type": "Adam", "params": {"lr": "auto"}}}')
    assert check([str(path)]) == 0
    out = capsys.readouterr().out
    assert "bf16.enabled = 1: a number was read as true or false: true" in out
    assert re.search(r'^  \* +lr +"auto"$', out, re.MULTILINE)
    assert "\n    optimizer.params.lr\n" in out


def test_all_settings_are_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    assert check([str(APPENDIX), "--all"]) == 0
    out = capsys.readouterr().out
    for entry in entries(Config):
        if entry.block is None and entry.info.status is Status.SUPPORTED:
            assert re.search(rf"^  [ *] +{entry.path[-1]}( |$)", out, re.MULTILINE), entry.path


@pytest.mark.parametrize("world_size", ["0", "-3", "many"])
def test_a_world_size_that_is_no_number_of_ranks_is_refused(world_size: str) -> None:
    with pytest.raises(SystemExit) as caught:
        check([str(APPENDIX), "--world_size", world_size])
    assert caught.value.code == 2


def test_the_summary_line_names_what_runs_where() -> None:
    raw = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "zero_optimization": {
            "stage": 3,
            "mics_shard_size": 2,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        },
        "fp16": {"enabled": True},
    }
    assert load(raw, world_size=4).summary_line() == (
        "ZeRO stage 3 | fp16 | client optimizer | batch 8 = 2 x 1 accumulated x 4 ranks | no clipping | "
        "optimizer on cpu | parameters on cpu | sharded over 2 ranks"
    )


def test_the_documentation_is_what_the_schema_says() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown()


def test_every_key_is_documented_with_a_meaning_and_a_reason_for_its_status() -> None:
    text = markdown()
    for entry in all_entries():
        assert entry.declared.description, entry.path
        assert f"| `{entry.path[-1]}`" in text
        if entry.info.status is not Status.SUPPORTED:
            assert entry.info.note or entry.info.part_of, entry.path


def test_the_example_in_the_documentation_is_legal() -> None:
    example = re.search(r"```json\n(.*?)```", markdown(), re.DOTALL)
    assert example is not None
    assert load(parse(example.group(1)).value, world_size=8).train_batch_size == 512


def test_the_json_schema_knows_every_key_and_its_status() -> None:
    schema = json.loads(schema_json())
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False
    zero = schema["$defs"]["ZeroOptimization"]["properties"]
    assert zero["stage"]["x-status"] == "supported" and zero["zenflow"]["x-status"] == "not yet"


def test_the_engines_optimizers_and_schedules_take_every_argument_that_is_supported() -> None:
    from lorica.optim.registry import OPTIMIZERS as MAKERS
    from lorica.schedules.registry import SCHEDULES

    chosen_here = {"adam_w_mode", "torch_adam", "maximize"}  # read by the registry, before an optimizer is made
    for name, kind in OPTIMIZERS.items():
        if kind.params is not None:
            supported = {entry.path[-1] for entry in entries(kind.params) if entry.info.status is Status.SUPPORTED}
            assert supported - chosen_here <= set(inspect.signature(MAKERS[name]).parameters), name
    for name, params in SCHEDULERS.items():
        assert set(params.model_fields) <= set(inspect.signature(SCHEDULES[name]).parameters), name
