"""`lorica run`: from the command line to the exit code of the job. The steps themselves are the other files."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lorica.launcher import flags
from lorica.launcher.cores import share_cores
from lorica.launcher.devices import find_accelerators
from lorica.launcher.job import make_job, require_target, target_kind
from lorica.launcher.slots import choose_slots, parse_hostfile
from lorica.launcher.supervise import pid_file, supervise

logger = logging.getLogger("lorica.launcher")

DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's


def run(argv: Sequence[str]) -> int:
    """Start the script that `argv` names on this node's devices and return the job's exit code.

    Raises:
        LaunchError: if the command line or the machine does not allow it.
        NotYetError: for a flag of several nodes.
    """
    options, target = flags.read(argv)
    _speak(options.log_level)
    require_target(target_kind(options), target[0])
    slots = choose_slots(options, find_accelerators(), os.environ, hostfile_slots(options.hostfile))
    for note in slots.notes:
        logger.info(note)
    shares = share_cores(slots.num_procs, bind=options.bind_cores_to_rank, core_list=options.bind_core_list)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="lorica-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        job = make_job(options, target, slots, shares, os.environ, folder)
        stack.callback(job.store.close)
        if options.save_pid:
            path = stack.enter_context(pid_file(Path(tempfile.gettempdir())))
            logger.info("pid file: %s", path)
        if options.enable_each_rank_log:
            logger.info("output of the ranks: %s", job.ranks[0].log)
        logger.debug("devices %s, %d processes, cores %s", slots.devices, slots.num_procs, shares)
        return supervise(job, grace=options.grace)


def hostfile_slots(path: str) -> int | None:
    """Slots of this machine in the hostfile at `path` ("": DeepSpeed's default place); None if there is no hostfile."""
    place = Path(path or DEFAULT_HOSTFILE)
    if place.is_file():
        return parse_hostfile(place.read_text(encoding="utf-8"), str(place))
    if path:
        logger.warning("hostfile %s does not exist: this machine's own devices are used", path)
    return None


def _speak(level: int) -> None:
    """Let the launcher's own lines, and no other logger's, go to the standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("lorica: %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
