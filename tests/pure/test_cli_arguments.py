"""`add_config_arguments` beside the options that scripts bring along."""

from __future__ import annotations

import argparse

import pytest

from lorica.arguments import add_config_arguments


def test_the_launchers_options_are_read_and_the_parser_is_returned() -> None:
    parser = argparse.ArgumentParser()
    assert add_config_arguments(parser) is parser
    args = parser.parse_args(["--local_rank=3", "--deepspeed", "--deepspeed_config", "ds.json"])
    assert (args.deepspeed, args.deepspeed_config, args.local_rank) == (True, "ds.json", 3)
    assert (args.deepscale, args.deepscale_config) == (False, None)


def test_lorica_is_another_name_for_deepspeed() -> None:
    args = add_config_arguments(argparse.ArgumentParser()).parse_args(["--lorica", "--lorica_config=l.json"])
    assert (args.deepspeed, args.deepspeed_config) == (True, "l.json")


@pytest.mark.parametrize(("environ", "expected"), [({}, -1), ({"LOCAL_RANK": "2"}, 2)])
def test_local_rank_defaults_to_the_environment(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: int
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert add_config_arguments(argparse.ArgumentParser()).parse_args([]).local_rank == expected


@pytest.mark.parametrize("conflict_handler", ["error", "resolve"])
@pytest.mark.parametrize("when", ["before", "after", "after, in a group"])
def test_a_scripts_own_local_rank_is_kept(when: str, conflict_handler: str) -> None:
    parser = argparse.ArgumentParser(conflict_handler=conflict_handler)
    if when == "before":
        parser.add_argument("--local_rank", type=str, default="mine")
    add_config_arguments(parser)
    if when != "before":
        place = parser if when == "after" else parser.add_argument_group("distributed")
        place.add_argument("--local_rank", type=str, default="mine")
    assert parser.parse_args(["--local_rank=3"]).local_rank == "3"
    assert parser.parse_args([]).local_rank == "mine"


def test_other_options_that_are_there_already_are_an_error() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed")
    with pytest.raises(argparse.ArgumentError):
        add_config_arguments(parser)


def test_the_old_names_are_accepted_but_not_advertised() -> None:
    text = add_config_arguments(argparse.ArgumentParser()).format_help()
    assert "--deepspeed_config" in text and "deepscale" not in text
