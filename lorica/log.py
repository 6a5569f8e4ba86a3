"""The logger "lorica" and its default handler. What is said belongs to those who say it."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("lorica")


def make_visible() -> None:
    """Print INFO and above to stdout, unless the program has set up logging by itself."""
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[lorica] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
