"""The `lorica` command: a table of sub-commands, `run` if none is named. Each is imported when it is called."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

USAGE_ERROR = 2
PIPE_CLOSED = 141  # what a shell makes of SIGPIPE


class Command(NamedTuple):
    """One sub-command: `function` of `module` takes the remaining words and returns the exit code."""

    module: str
    function: str
    summary: str
    usage: str

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the module and return the function."""
        loaded: Callable[[Sequence[str]], int] = getattr(import_module(self.module), self.function)
        return loaded


COMMANDS: dict[str, Command] = {
    "run": Command(
        "lorica.launcher.run", "run", "start a script on this machine's devices", "[flags] script.py [args]"
    ),
    "check": Command("lorica.config.report", "check", "validate a configuration file", "CONFIG [--world_size N]"),
    "report": Command("lorica.launcher.report", "report", "versions, devices, kernels and transports", ""),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough (`lorica check FILE | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else USAGE_ERROR
    if words[0] in ("-V", "--version"):
        from lorica import __version__

        print(f"lorica {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        return _launch(words)
    if words[0] == "run":
        return _run(["--help"]) if words[1:2] in (["-h"], ["--help"]) else _launch(words[1:])
    return command.load()(words[1:])


def _launch(words: Sequence[str]) -> int:
    from lorica.launcher.flags import LaunchError, NotYetError

    try:
        return COMMANDS["run"].load()(words)
    except (LaunchError, NotYetError) as error:
        print(f"lorica: {error}{_perhaps_a_command(words)}", file=sys.stderr)
        return USAGE_ERROR


def _perhaps_a_command(words: Sequence[str]) -> str:
    """A hint if the first word looks like a misspelt sub-command."""
    near = difflib.get_close_matches(words[0], COMMANDS, n=1) if words else []
    return f" (Or did you mean: lorica {near[0]} {COMMANDS[near[0]].usage})" if near else ""


def usage() -> str:
    """What `lorica --help` prints."""
    from lorica.launcher.flags import EXAMPLES
    from lorica.launcher.flags import usage as launcher_flags

    commands = "\n".join(
        f"  lorica {name:<7} {command.usage:<26} {command.summary}" for name, command in COMMANDS.items()
    )
    return (
        "usage: lorica [flags] script.py [script arguments]\n\n"
        f"Commands (`run` may be left out; a script called like one is reached as ./run):\n{commands}\n"
        "  lorica --version | --help\n\n"
        f"Examples:\n{EXAMPLES}\n\n{launcher_flags()}"
    )
