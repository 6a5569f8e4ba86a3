"""Where a configuration comes from: dict, file, base64, and the relaxed JSON in it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.config import Config, ConfigError, load
from lorica.config.jsonc import SyntaxProblem, parse

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def write(folder: Path, text: str) -> str:
    path = folder / "ds_config.json"
    path.write_text(text)
    return str(path)


def refusal(source: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(source)
    return caught.value


@given(JSON_VALUES, st.sampled_from([None, 2]))
def test_plain_json_is_read_as_the_standard_library_reads_it(value: Any, indent: int | None) -> None:
    assert parse(json.dumps(value, indent=indent)).value == value


@given(st.text())
def test_any_text_is_either_read_or_refused_with_a_line(text: str) -> None:
    try:
        parse(text)
    except SyntaxProblem as problem:
        assert problem.line >= 1 and problem.fix


@given(st.text(alphabet='{}[]":,/*# \n\\tfn0-9.eE"a'))
def test_any_sequence_of_json_signs_is_either_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except SyntaxProblem as problem:
        assert 1 <= problem.line <= text.count("\n") + 1


def test_comments_trailing_commas_and_bare_keys_are_accepted() -> None:
    text = """
    # one
    { // two
      "a": 1, /* three
      lines */ b: [1, 2,], "url": "http://x/#y", c: Infinity,
    } // end
    """
    assert parse(text).value == {"a": 1, "b": [1, 2], "url": "http://x/#y", "c": float("inf")}


def test_the_line_of_every_key_is_known() -> None:
    document = parse('{\n"a": 1,\n\n"b": {"c":\n 2,\n"d": [\n{"e": 3}]}}')
    assert document.lines == {
        ("a",): 2,
        ("b",): 4,
        ("b", "c"): 4,
        ("b", "d"): 6,
        ("b", "d", "0", "e"): 7,
    }


@pytest.mark.parametrize(
    ("text", "line", "fix"),
    [
        ('{"a": 1', 1, "bracket"),
        ('{\n"a": True}', 2, "write true"),
        ('{"a": cpu}', 1, "double quotes"),
        ('{"a": 1}\n}', 2, "closing bracket"),
        ('{"a" 1}', 1, "':'"),
        ('{"a": 1\n"b": 2}', 2, "comma"),
        ('{"a": "no end}', 1, "double quote"),
        ('{"a": 1 /* open', 1, "*/"),
        ('{"a": "\\x"}', 1, "\\\\"),
        ("[" * 100 + "]" * 100, 1, "flatten"),
        ('{"a": ' + "9" * 5000 + "}", 1, "shorter"),
        ("", 1, "bracket"),
    ],
)
def test_a_syntax_error_names_its_line_and_a_way_out(text: str, line: int, fix: str) -> None:
    with pytest.raises(SyntaxProblem) as caught:
        parse(text)
    assert caught.value.line == line
    assert fix in caught.value.fix


def test_dict_path_and_both_alphabets_of_base64_give_the_same_configuration(tmp_path: Path) -> None:
    raw = {"train_micro_batch_size_per_gpu": 4, "csv_monitor": {"job_name": "???>>>~~~"}}
    text = json.dumps(raw)
    path = write(tmp_path, text)
    standard = base64.b64encode(text.encode()).decode()
    urlsafe = base64.urlsafe_b64encode(text.encode()).decode()
    assert standard != urlsafe
    sources: list[Any] = [raw, path, Path(path), standard, urlsafe, urlsafe.rstrip("=")]
    dumps = [load(source).model_dump() for source in sources]
    assert all(dump == dumps[0] for dump in dumps)


def test_a_config_is_returned_as_it_is() -> None:
    config = load({"train_batch_size": 4})
    assert load(config) is config
    assert load(config, world_size=2).train_micro_batch_size_per_gpu == 2


def test_the_callers_dict_may_change_afterwards() -> None:
    raw: dict[str, Any] = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {"lr": 1.0}}}
    config = load(raw)
    raw["zero_optimization"]["stage"] = 3
    raw["optimizer"]["params"]["lr"] = 2.0
    assert config.zero_optimization.stage == 2
    assert config.raw["zero_optimization"] == {"stage": 2}
    assert config.optimizer is not None and config.optimizer.params == {"lr": 1.0}


def test_duplicate_keys_are_refused_in_files_and_in_base64(tmp_path: Path) -> None:
    text = '{\n"fp16": {"enabled": false},\n"train_batch_size": 4,\n"fp16": {"enabled": true,\n"enabled": false}}'
    path = write(tmp_path, text)
    for source, name in ((path, path), (base64.b64encode(text.encode()).decode(), "<base64>")):
        problems = refusal(source).problems
        assert [(problem.key, problem.where) for problem in problems] == [
            ("fp16", f"{name}:4"),
            ("fp16.enabled", f"{name}:5"),
        ]
        assert "lines 2 and 4" in problems[0].message


def test_problems_are_listed_in_the_order_of_the_file_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{\n  "gradient_clipping": -1,\n'
        '  "zero_optimization": {\n    "stge": 2,\n    "reduce_bucket_size": "big"\n  },\n'
        '  "bf16": {"enabled": true}, "fp16": {"enabled": true}\n}',
    )
    problems = refusal(path).problems
    assert [(problem.key, problem.where) for problem in problems] == [
        ("gradient_clipping", f"{path}:2"),
        ("zero_optimization.stge", f"{path}:4"),
        ("zero_optimization.reduce_bucket_size", f"{path}:5"),
        ("bf16.enabled", f"{path}:7"),
    ]
    assert str(problems[1]) == (
        f'{path}:4: zero_optimization.stge = 2: unknown key of zero_optimization. Fix: write "stage".'
    )


@pytest.mark.parametrize("source", [3, None, 1.5, [("a", 1)], b"{}"])
def test_a_source_of_another_type_is_refused(source: Any) -> None:
    assert "expected a dict, a path or a base64 string" in str(refusal(source))


def test_unreadable_files_are_refused_with_their_name(tmp_path: Path) -> None:
    assert "is a folder" in str(refusal(tmp_path))
    assert "expected an existing file" in str(refusal("no/such/ds_config.json"))
    assert "got JSON text" in str(refusal('{"train_batch_size": 4}'))
    assert "expected an existing file" in str(refusal("nul\0byte"))
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    assert "not UTF-8" in str(refusal(tmp_path / "latin.json"))
    assert "expected a JSON object" in str(refusal(write(tmp_path, "[1, 2]")))
    assert f"{tmp_path}/ds_config.json:2" in str(refusal(write(tmp_path, '{"a": 1,\n b}')))


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"train_batch_size": 4}')
    assert isinstance(load(tmp_path / "bom.json"), Config)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(max_size=12), JSON_VALUES, max_size=5))
def test_any_dict_is_either_read_or_refused_with_its_keys(raw: dict[str, Any]) -> None:
    try:
        load(raw)
    except ConfigError as error:
        assert all(any(problem.key.startswith(key) for key in raw) for problem in error.problems)
