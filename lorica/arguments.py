"""`add_config_arguments`: the command-line options that a training script takes from its launcher. Reads no config."""

from __future__ import annotations

import argparse
import os


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --deepspeed, --deepspeed_config and --local_rank to `parser`, and --lorica, --lorica_config as other names.

    A script's own --local_rank is kept, whether it was added before or is added afterwards: for that, `parser` resolves
    conflicting options from here on in favour of the later one.

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
    group.conflict_handler = "error"
    try:
        group.add_argument(
            "--local_rank",
            type=int,
            default=int(os.environ.get("LOCAL_RANK", "-1")),
            help="this process's number on its machine; the launcher passes it",
        )
    except argparse.ArgumentError:
        return parser
    parser.conflict_handler = "resolve"
    return parser
