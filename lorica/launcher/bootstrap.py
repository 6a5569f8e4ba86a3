"""The first code inside a rank: ties it to the launcher, runs the script as python would, records why it failed.

Run as a file, `python bootstrap.py SPEC TARGET ARGS`, and from the standard library only: a script must find the same
`sys.path` and the same modules as without it. Starts no process, opens no port and prints nothing of its own, but for
the traceback that python would print.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
import types
from typing import Any

PR_SET_PDEATHSIG = 1

# A rank that only saw another one vanish is not the culprit. These are the words that transports have for it, and a
# word that tells a transport's error from that of a connection of the script's own. Firmer is `error.lost_peer = True`.
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "failed to recv, got 0 bytes",
    "remote process exited",
    "ncclRemoteError",
    "Connection refused",
    "Socket closed",
    "socket closed without a goodbye",
    "has closed its transport",
    "gave up:",
)
PEER_LOST_SOURCES = ("gloo", "nccl", "c10d", "tcpstore", "torch.distributed", "shm", "(pid ", "transport")


def main() -> None:
    """Run the target that the command line names, in this process."""
    spec = json.loads(sys.argv[1])
    target = sys.argv[2:]
    die_with_launcher(spec["launcher_pid"])
    if spec["cpus"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec["cpus"])
    if spec["kind"] == "command":
        os.execvp(target[0], target)
    if sys.stderr is not None:
        faulthandler.enable()  # a crash in native code says where Python was
    pid = os.getpid()
    try:
        run_module(target) if spec["kind"] == "module" else run_script(target)
    except BaseException as error:
        if os.getpid() == pid:  # not in a child that the script forked
            record_failure(error, spec)
        raise


def die_with_launcher(launcher_pid: int) -> None:
    """Ask the kernel to kill this process when the launcher ends, however that happens (not Linux: the reaper does)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher_pid:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGKILL)


# -- running the target as python would ------------------------------------------------------------------------------


def run_script(target: list[str]) -> None:
    """Do what `python target...` does: run a source file, a compiled one, or a folder or zip file with a `__main__`."""
    sys.argv = target
    path = os.path.join(os.getcwd(), target[0])  # like python: absolute, but not normalised
    head = b"" if os.path.isdir(path) else _first_bytes(path)
    if os.path.isdir(path) or head.startswith(b"PK"):
        _set_import_folder(path)
        _run_spec(importlib.machinery.PathFinder.find_spec("__main__", [path]), target[0])
        return
    _set_import_folder(os.path.dirname(os.path.realpath(path)))
    names: dict[str, Any] = {"__file__": path, "__spec__": None, "__package__": None, "__cached__": None}
    if head == importlib.util.MAGIC_NUMBER:
        compiled = importlib.machinery.SourcelessFileLoader("__main__", path)
        _run(compiled.get_code("__main__"), __loader__=compiled, **names)
    else:
        source = importlib.machinery.SourceFileLoader("__main__", path)
        _run(source.source_to_code(source.get_data(path), path), __loader__=source, **names)


def run_module(target: list[str]) -> None:
    """Do what `python -m target...` does."""
    _set_import_folder(os.getcwd())
    sys.argv = ["-m", *target[1:]]
    spec = importlib.util.find_spec(target[0])
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{target[0]}.__main__")
    sys.argv[0] = (spec.origin if spec is not None else None) or target[0]
    _run_spec(spec, target[0])


def _run_spec(spec: importlib.machinery.ModuleSpec | None, name: str) -> None:
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{name!r} cannot be run: expected a module, or a package or folder with __main__.py")
    code = spec.loader.get_code(spec.name)  # type: ignore[attr-defined]
    _run(
        code,
        __file__=spec.origin,
        __loader__=spec.loader,
        __spec__=spec,
        __package__=spec.parent,
        __cached__=spec.cached,
    )


def _run(code: Any, **names: Any) -> None:
    """Execute `code` in a `__main__` that stays (runpy's is gone when threads and atexit functions still need it)."""
    main_module = types.ModuleType("__main__")
    vars(main_module).update(names, __builtins__=__builtins__)
    sys.modules["__main__"] = main_module
    exec(code, vars(main_module))


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def _set_import_folder(folder: str | None) -> None:
    """Replace this file's folder at the front of sys.path by the script's; python puts none there in safe-path mode."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [] if folder is None else [folder]


# -- why it failed ---------------------------------------------------------------------------------------------------


def record_failure(error: BaseException, spec: dict[str, Any]) -> None:
    """Write the reason to this rank's report before anything is torn down, and keep our frames out of the traceback."""
    seconds = time.monotonic()
    if isinstance(error, KeyboardInterrupt):
        sys.excepthook = lambda *_: None  # the user knows; python still dies by SIGINT
        return
    if isinstance(error, SystemExit) and exit_code(error) == 0:
        return
    lost_peer = is_peer_loss(error)
    if not isinstance(error, SystemExit):
        _print_once_without_our_frames(quiet=lost_peer)
    frames = own_frames_removed(error.__traceback__)
    report = {
        "rank": spec["rank"],
        "pid": os.getpid(),
        "monotonic": seconds,
        "type": type(error).__name__,
        "message": str(error),
        "where": where(frames),
        "traceback": "".join(traceback.format_exception(type(error), error, frames)),
        "exit_code": exit_code(error),
        "lost_peer": lost_peer,
    }
    write_durably(spec["report"], json.dumps(report).encode())


def exit_code(error: BaseException) -> int:
    """What python will exit with: 1, or what `sys.exit` was given."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return (error.code or 0) & 0xFF
    return 1


def _print_once_without_our_frames(*, quiet: bool) -> None:
    """Let python's own handling of an uncaught exception call the script's hook with a clean traceback.

    The launcher sends SIGTERM to everybody as soon as it sees the report, so that signal has no effect until the
    traceback is out. A rank that only lost a peer is `quiet`: the launcher prints its traceback if nobody has a better
    reason.
    """
    hook = sys.excepthook
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def print_and_let_go(kind: type[BaseException], error: BaseException, frames: types.TracebackType | None) -> None:
        frames = own_frames_removed(frames)
        if not quiet:
            hook(kind, error.with_traceback(frames), frames)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)

    sys.excepthook = print_and_let_go


def is_peer_loss(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is a transport's way to say that another rank is gone."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if getattr(current, "lost_peer", False):  # Lorica's own transports say so themselves
            return True
        text = str(current)
        origin = f"{type(current).__module__}.{type(current).__name__} {text}".lower()
        if any(words in text for words in PEER_LOST) and any(source in origin for source in PEER_LOST_SOURCES):
            return True
        current = current.__cause__ or current.__context__
    return False


def own_frames_removed(frames: types.TracebackType | None) -> types.TracebackType | None:
    """Skip the frames of this file and of the import system at the top of a traceback."""
    while frames is not None and (
        frames.tb_frame.f_code.co_filename == __file__ or frames.tb_frame.f_code.co_filename.startswith("<frozen ")
    ):
        frames = frames.tb_next
    return frames


def where(frames: types.TracebackType | None) -> str:
    """The innermost place that is the user's: `file:line in function`, libraries skipped if anything is left."""
    stack = traceback.extract_tb(frames)
    own = [
        frame for frame in stack if "site-packages" not in frame.filename and not _in_standard_library(frame.filename)
    ]
    chosen = (own or list(stack))[-1:]
    return "".join(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in chosen)


def _in_standard_library(filename: str) -> bool:
    return filename.startswith("<") or os.path.dirname(filename).startswith(os.path.dirname(os.__file__))


def write_durably(path: str, content: bytes) -> None:
    """Write a file that is either whole or not there; a disk that is full loses the report but not the exception."""
    try:
        file = os.open(f"{path}.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(file, content)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(f"{path}.part", path)
    except OSError as error:
        print(f"lorica: the report of this failure could not be written to {path}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
