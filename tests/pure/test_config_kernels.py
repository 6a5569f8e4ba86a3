"""The block `kernels`: off, all, or a list of ops; and the library."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from lorica.config import ConfigError, check, load, schema_json
from lorica.config.features import KernelOp

OPS = get_args(KernelOp)


def test_nothing_is_injected_unless_asked_for() -> None:
    kernels = load({}).kernels
    assert (kernels.inject, kernels.library) == (False, "auto")
    assert "kernels" not in load({}).summary_line()


@pytest.mark.parametrize(
    ("written", "read", "remark"),
    [
        (False, False, ""),
        (None, False, "null was read as not given"),
        ("auto", "auto", ""),
        ("AUTO", "auto", ""),
        (["rms_norm", "swiglu"], ("rms_norm", "swiglu"), ""),
        (["RMS_Norm", "rms_norm"], ("rms_norm",), ""),
        (list(OPS), OPS, ""),
        ([], (), ""),
        ("gelu", ("gelu",), "one name was read as a list of one"),
        ("false", False, "a string was read as true or false"),
        (0, False, "a number was read as true or false"),
    ],
)
def test_inject_is_false_auto_or_a_list_of_ops(written: Any, read: Any, remark: str) -> None:
    config = load({"kernels": {"inject": written}})
    assert config.kernels.inject == read and type(config.kernels.inject) is type(read)
    assert len(config.warnings) == bool(remark) and all(remark in warning for warning in config.warnings)
    assert config.auto_keys == frozenset()
    assert ("fused kernels" in config.summary_line()) is bool(read)


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        (True, 'write "auto" for all that there are'),
        (1, 'write "auto" for all that there are'),
        (["rmsnorm"], 'write "rms_norm" for "rmsnorm"'),
        ("swigglu", 'write "swiglu" for "swigglu"'),
        (["rope"], "remove the key (default: false)"),
        ([3], "remove the key (default: false)"),
        ({"rms_norm": True}, "remove the key (default: false)"),
        (2.5, "remove the key (default: false)"),
    ],
)
def test_anything_else_is_refused_with_what_is_expected(written: Any, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"kernels": {"inject": written}})
    (problem,) = caught.value.problems
    assert problem.key == "kernels.inject" and problem.fix == fix
    assert 'expected false, "auto", or a list out of "layer_norm", "rms_norm"' in problem.message


@pytest.mark.parametrize(
    ("raw", "key", "fix"),
    [
        ({"inject": "auto", "libary": "liger"}, "kernels.libary", 'write "library"'),
        ({"library": "lige"}, "kernels.library", 'write "liger"'),
    ],
)
def test_misspelt_names_are_told_the_nearest_known_one(raw: dict[str, Any], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"kernels": raw})
    (problem,) = caught.value.problems
    assert (problem.key, problem.fix) == (key, fix)


def test_a_library_without_injection_is_listed_as_without_effect() -> None:
    ignored = load({"kernels": {"library": "liger"}}).provenance.ignored
    assert ignored == {"kernels.library": "only means something with kernels.inject"}
    assert load({"kernels": {"library": "liger", "inject": ["swiglu"]}}).provenance.ignored == {}


def test_a_check_shows_the_block_as_json(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text('{"train_batch_size": 8, "kernels": {"inject": ["rms_norm", "rotary"]}}')
    assert check([str(path)]) == 0
    out = capsys.readouterr().out
    assert '["rms_norm", "rotary"]' in out and "default: false" in out


def test_editors_learn_the_names_from_the_json_schema() -> None:
    assert all(f'"{op}"' in schema_json() for op in OPS)
