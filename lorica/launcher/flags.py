"""The launcher's flags: one table, and the command line read by it. Decides nothing about devices or processes."""

from __future__ import annotations

import difflib
import logging
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class LaunchError(ValueError):
    """The command line or the machine does not allow this job; nothing was started."""


class NotYetError(NotImplementedError):
    """A flag of DeepSpeed's launcher that is known and refused."""


@dataclass(frozen=True)
class Options:
    """The launcher's command line. `None` and `""` mean that a flag was not given."""

    num_gpus: int | None = None
    num_procs: int | None = None
    include: str = ""
    exclude: str = ""
    share_gpu: bool = False
    hostfile: str = ""
    master_addr: str = ""
    master_port: int = 0
    module: bool = False
    no_python: bool = False
    no_local_rank: bool = False
    bind_cores_to_rank: bool = False
    bind_core_list: str = ""
    enable_each_rank_log: str = ""
    save_pid: bool = False
    log_level: int = logging.INFO
    grace: float = 1.0


class Flag(NamedTuple):
    """One flag. `read` turns its text into a value and raises ValueError; without it the flag is a switch."""

    names: tuple[str, ...]
    field: str
    help: str
    read: Callable[[str], Any] | None = None
    metavar: str = ""
    value: Any = True  # what a switch sets


class Refusal(NamedTuple):
    """A flag that is refused. `harmless` are the values with which it asks for nothing and is accepted."""

    takes_value: bool
    why: str
    harmless: tuple[str, ...] = ()


def _count(text: str) -> int | None:
    """Read a number of devices or processes; -1 is DeepSpeed's way to say "not given"."""
    number = int(text)
    if number == -1:
        return None
    if number < 1:
        raise ValueError("expected a number of at least 1")
    return number


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError("expected a port between 0 (any free port) and 65535")
    return port


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < 1e6:
        raise ValueError("expected a number of seconds, 0 or more")
    return seconds


def _level(text: str) -> int:
    levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    if text.lower() not in levels:
        raise ValueError(f"expected one of {', '.join(levels)}")
    return levels[text.lower()]


GROUPS: dict[str, tuple[Flag, ...]] = {
    "Which devices, how many processes": (
        Flag(
            ("--num_gpus", "--num_accelerators"),
            "num_gpus",
            "use the first N accelerators, one process each; on a machine without any, start N CPU processes",
            _count,
            "N",
        ),
        Flag(("--num_procs",), "num_procs", "start N processes (default: one per accelerator used, or 1)", _count, "N"),
        Flag(
            ("-i", "--include"),
            "include",
            "use these accelerators only, in this order: localhost:0,2",
            str,
            "NODE[:SLOT,...]",
        ),
        Flag(("-e", "--exclude"), "exclude", "use all accelerators but these: localhost:1", str, "NODE[:SLOT,...]"),
        Flag(("--share_gpu",), "share_gpu", "let several processes share an accelerator (also LORICA_SHARE_GPU=1)"),
        Flag(("-H", "--hostfile"), "hostfile", "lines `localhost slots=N`; other hosts are refused", str, "FILE"),
        Flag(
            ("--bind_cores_to_rank",),
            "bind_cores_to_rank",
            "give each process CPU cores of its own, and as many OpenMP threads",
        ),
        Flag(("--bind_core_list",), "bind_core_list", "the CPUs to hand out: 0-7,16-23", str, "LIST"),
    ),
    "What is run": (
        Flag(("--module",), "module", "SCRIPT is a module, as in python -m"),
        Flag(("--no_python",), "no_python", "SCRIPT is a program that is run as it is"),
        Flag(("--no_local_rank",), "no_local_rank", "do not pass --local_rank=N to the script"),
        Flag(("--master_addr",), "master_addr", "address of this machine where ranks meet (127.0.0.1)", str, "ADDR"),
        Flag(("--master_port",), "master_port", "port where ranks meet (a free one)", _port, "PORT"),
    ),
    "What is written": (
        Flag(
            ("--enable_each_rank_log",),
            "enable_each_rank_log",
            "write the output of each rank to DIR/<time>_rank<R>.log instead of here",
            str,
            "DIR",
        ),
        Flag(("--log_level",), "log_level", "debug, info, warning or error, of the launcher's own lines", _level, "L"),
        Flag(("-q", "--quiet"), "log_level", "the launcher speaks of errors only", value=logging.ERROR),
        Flag(("--save_pid",), "save_pid", "keep the launcher's pid in <temporary folder>/<pid>.lorica while it runs"),
        Flag(
            ("--grace",),
            "grace",
            "seconds between a polite signal to the ranks and SIGKILL (1)",
            _seconds,
            "SECONDS",
        ),
    ),
}

_NODES = (
    "more than one node is not launched yet. Fix: start the script on every node with torchrun, which needs nothing "
    "from this launcher: torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 "
    "script.py args"
)
_ELASTIC = "elastic training is not there yet. Fix: torchrun --nnodes=MIN:MAX --max_restarts=N restarts on fewer nodes"

REFUSED: dict[str, Refusal] = {
    "--num_nodes": Refusal(True, _NODES, ("1", "-1")),
    "--node_rank": Refusal(True, _NODES, ("0", "-1")),
    "--no_ssh": Refusal(False, _NODES),
    "--no_ssh_check": Refusal(False, _NODES),
    "--ssh_port": Refusal(True, _NODES),
    "--launcher": Refusal(True, _NODES),
    "--launcher_args": Refusal(True, _NODES),
    "--force_multi": Refusal(False, _NODES),
    "--venv_script": Refusal(True, _NODES),
    "--elastic_training": Refusal(False, _ELASTIC),
    "--min_elastic_nodes": Refusal(True, _ELASTIC, ("-1",)),
    "--max_elastic_nodes": Refusal(True, _ELASTIC, ("-1",)),
    "--autotuning": Refusal(True, "autotuning is not there yet. Fix: leave the flag out", ("",)),
}

_BY_NAME = {name: flag for flags in GROUPS.values() for flag in flags for name in flag.names}


class CommandLine(NamedTuple):
    """The launcher's options, and the script with its arguments exactly as they were given."""

    options: Options
    target: tuple[str, ...]


def read(argv: Sequence[str]) -> CommandLine:
    """Split `argv` into the launcher's flags and the script with its arguments.

    Flags may be written with dashes or underscores, as `--flag value` or `--flag=value`. The first word that is not a
    flag is the script; from there on nothing is looked at. `--` ends the flags.

    Raises:
        LaunchError: for an unknown flag, a missing or wrong value, or no script.
        NotYetError: for a flag of several nodes.
    """
    values: dict[str, Any] = {}
    words = list(argv)
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            break
        name, has_value, text = _split(word)
        takes_value = _takes_value(name, word)
        if not takes_value and has_value:
            raise LaunchError(f"{name} is a switch: expected no value, got {text!r}. Fix: write {name}.")
        if takes_value and not has_value:
            if not words:
                raise LaunchError(f"{name} has no value. Fix: write {name} {_metavar(name)}.")
            text = words.pop(0)
        _store(values, name, text)
    if not words:
        raise LaunchError(
            "there is no script to run. Fix: lorica [flags] script.py [script arguments], or lorica --help."
        )
    options = Options(**values)
    if options.module and options.no_python:
        raise LaunchError("--module and --no_python exclude each other. Fix: leave one out.")
    return CommandLine(options, tuple(words))


def _split(word: str) -> tuple[str, bool, str]:
    """`--num-gpus=2` -> ("--num_gpus", True, "2")."""
    name, equals, text = word.partition("=")
    return (f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name), bool(equals), text


def _takes_value(name: str, word: str) -> bool:
    if name in REFUSED:
        return REFUSED[name].takes_value
    if name in _BY_NAME:
        return _BY_NAME[name].read is not None
    near = difflib.get_close_matches(name, [*_BY_NAME, *REFUSED], n=1)
    hint = f"did you mean {near[0]}?" if near else "lorica --help lists the flags."
    raise LaunchError(f"{word} is no flag of the launcher. Fix: {hint} Arguments of the script go after the script.")


def _metavar(name: str) -> str:
    return _BY_NAME[name].metavar if name in _BY_NAME else "VALUE"


def _store(values: dict[str, Any], name: str, text: str) -> None:
    if name in REFUSED:
        if text not in REFUSED[name].harmless or not REFUSED[name].takes_value:
            given = f"{name}={text}" if REFUSED[name].takes_value else name
            raise NotYetError(f"{given}: {REFUSED[name].why}.")
        return
    flag = _BY_NAME[name]
    if flag.read is None:
        values[flag.field] = flag.value
        return
    try:
        values[flag.field] = flag.read(text)
    except ValueError as error:
        raise LaunchError(f"{name}={text}: {error}. Fix: write {name} {flag.metavar}.") from None


EXAMPLES = """\
  lorica train.py --deepspeed_config ds.json            all accelerators, or one CPU process
  lorica --num_gpus=8 train.py --deepspeed_config ds.json
  lorica --include localhost:0,2 train.py
  lorica --num_procs 4 train.py                         4 CPU processes on a laptop
  CUDA_VISIBLE_DEVICES= lorica --num_procs 2 train.py   CPU processes beside unused GPUs
  lorica --module package.train --lr 1e-4
  lorica --no_python ./program arguments"""


def usage() -> str:
    """The flags as text: names on the left, what they do on the right."""
    blocks = []
    for title, flags in GROUPS.items():
        lines = [f"{title}:"]
        for flag in flags:
            names = ", ".join(flag.names) + (f" {flag.metavar}" if flag.metavar else "")
            lines += textwrap.wrap(
                flag.help,
                width=100,
                initial_indent=f"  {names:<36} " if len(names) <= 36 else f"  {names}  ",
                subsequent_indent=" " * 39,
            )
        blocks.append("\n".join(lines))
    refused = textwrap.fill(", ".join(REFUSED), width=100, initial_indent="  ", subsequent_indent="  ")
    blocks.append(f"Known and refused for now (each says what works instead):\n{refused}")
    return "\n\n".join(blocks)
