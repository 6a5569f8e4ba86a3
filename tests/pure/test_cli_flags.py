"""The command line: which words are the launcher's, which the script's, and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica import cli
from lorica.launcher import flags
from lorica.launcher.flags import LaunchError, NotYetError, Options

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], Options()),
        (["--num_gpus=2"], Options(num_gpus=2)),
        (["--num-gpus", "2"], Options(num_gpus=2)),
        (["--num_accelerators", "-1"], Options()),
        (["--num_procs", "3", "--share_gpu"], Options(num_procs=3, share_gpu=True)),
        (["-i", "localhost:0,1"], Options(include="localhost:0,1")),
        (["--exclude=localhost:0"], Options(exclude="localhost:0")),
        (["--master_port", "29500", "--master_addr=127.0.0.1"], Options(master_port=29500, master_addr="127.0.0.1")),
        (["--module"], Options(module=True)),
        (["--no_python", "--no_local_rank"], Options(no_python=True, no_local_rank=True)),
        (["-q"], Options(log_level=logging.ERROR)),
        (["--log_level", "DEBUG"], Options(log_level=logging.DEBUG)),
        (["--num_nodes=1", "--node_rank", "0"], Options()),
        (["--grace", "25", "--save_pid", "--"], Options(grace=25.0, save_pid=True)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_are_read_up_to_the_script(words: list[str], options: Options) -> None:
    assert flags.read([*words, "train.py", "--num_gpus=9", "--"]) == (options, ("train.py", "--num_gpus=9", "--"))


@given(st.lists(st.text("-=qi 2\n")))
def test_nothing_after_the_script_is_looked_at(words: list[str]) -> None:
    assert flags.read(["--num_procs", "2", "train.py", *words]).target == ("train.py", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_gpu=2", "a.py"], "--num_gpu=2 is no flag of the launcher. Fix: did you mean --num_gpus?"),
        (["--lr", "1", "a.py"], "Arguments of the script go after the script"),
        (["--num_gpus"], "--num_gpus has no value"),
        (["--num_gpus=two", "a.py"], "--num_gpus=two"),
        (["--num_gpus=0", "a.py"], "at least 1"),
        (["--module=yes", "a.py"], "expected no value"),
        (["--master_port=70000", "a.py"], "between 0"),
        (["--log_level=loud", "a.py"], "debug, info, warning, error"),
        (["--module", "--no_python", "a"], "exclude each other"),
        (["--num_procs=2"], "no script"),
        ([], "no script"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_refused_with_what_to_write(words: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        flags.read(words)
    assert message in str(caught.value) and "Fix: " in str(caught.value)


@pytest.mark.parametrize("name", flags.REFUSED)
def test_flags_of_several_nodes_are_refused_by_name_with_what_works(name: str) -> None:
    words = [name, "2"] if flags.REFUSED[name].takes_value else [name]
    with pytest.raises(NotYetError, match=r"not.*yet.*Fix: ") as caught:
        flags.read([*words, "train.py"])
    assert str(caught.value).startswith(name)


def test_every_flag_of_the_table_sets_a_field_and_is_in_the_help() -> None:
    for group in flags.GROUPS.values():
        for flag in group:
            assert flag.field in Options.__dataclass_fields__
            assert all(name in cli.usage() for name in flag.names)
    assert all(name in cli.usage() for name in flags.REFUSED)


def test_sub_commands_come_from_the_table_and_run_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def load(command: cli.Command) -> object:
        return lambda words: calls.append((command.function, list(words))) or 5

    monkeypatch.setattr(cli.Command, "load", load)
    for words in (["run", "a.py", "check"], ["check", "c.json"], ["report"], ["a.py", "run"], ["./check"]):
        assert cli.main(words) == 5
    assert calls == [
        ("run", ["a.py", "check"]),
        ("check", ["c.json"]),
        ("report", []),
        ("run", ["a.py", "run"]),
        ("run", ["./check"]),
    ]


def test_help_and_version_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert cli.main(["--help"]) == 0
    assert cli.main(["run", "--help"]) == 0
    assert cli.main([]) == cli.USAGE_ERROR
    out = capsys.readouterr().out
    assert out.startswith("lorica ") and out.count("Examples:") == 3


def test_a_misspelt_sub_command_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chekc", "ds.json"]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "script 'chekc' does not exist" in error and "did you mean: lorica check CONFIG" in error


def test_the_command_line_and_the_launcher_import_no_torch() -> None:
    code = (
        "import sys, lorica.cli, lorica.arguments, lorica.launcher.run\n"
        "assert not {'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_file_of_the_launcher_hides_a_module_of_the_standard_library() -> None:
    names = {path.stem for path in (ROOT / "lorica/launcher").glob("*.py")}
    assert not names & sys.stdlib_module_names, "bootstrap.py and reaper.py are run from this folder"
