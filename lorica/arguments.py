"""`add_config_arguments`: the command-line options that a training script takes from its launcher. Reads no config."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from typing import Any


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --deepspeed, --deepspeed_config and --local_rank to `parser`, and --lorica, --lorica_config as other names.

    A --local_rank of the script's own is kept, whether it is added before or after this call: ours is added when
    parsing starts, if there is none by then.

    Returns:
        `parser`.
    Raises:
        argparse.ArgumentError: if the parser has one of the other options already.
    """
    group = parser.add_argument_group("Lorica", "the training configuration, and what the launcher passes")
    group.add_argument("--deepspeed", "--lorica", dest="deepspeed", action="store_true", help="use the engine")
    group.add_argument(
        "--deepspeed_config", "--lorica_config", dest="deepspeed_config", metavar="FILE", help="configuration (JSON)"
    )
    group.add_argument("--deepscale", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", help=argparse.SUPPRESS)
    group.conflict_handler = "error"  # never "resolve": the script's --local_rank would be the one to go
    parse = parser.parse_known_args

    def add_local_rank_and_parse(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        with contextlib.suppress(argparse.ArgumentError):
            group.add_argument(
                "--local_rank",
                type=int,
                default=int(os.environ.get("LOCAL_RANK", "-1")),
                help="this process's number on its machine; the launcher passes it",
            )
        return parse(args, namespace)

    parser.parse_known_args = add_local_rank_and_parse  # type: ignore[method-assign, assignment]
    return parser
