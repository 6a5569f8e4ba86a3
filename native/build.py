"""Compiles the native CPU kernels: by cmake, or by calling the compiler where cmake cannot run. Standard library only.

Used by setup.py at install and by `python -m lorica.kernels.native --build` in a source tree; does not import lorica.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "_native.so"

# The same as in CMakeLists.txt.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-fvisibility=hidden"]
X86_FLAGS = {"update_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"], "update_avx512.cpp": ["-mavx512f"]}


class BuildError(Exception):
    """The library could not be made; the text says why."""


def build(target: Path) -> str:
    """Compile the library and put it at `target`, in one move.

    Returns:
        Which tool made it.
    Raises:
        BuildError: if there is no compiler, or if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if can_run_cmake():
            tool, made = "cmake", by_cmake(Path(scratch))
        else:
            tool, made = by_compiler(Path(scratch))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(made, beside)
        beside.replace(target)  # a process that has the old library loaded keeps it
    return tool


def can_run_cmake() -> bool:
    """Whether there is cmake, and a program for it to run."""
    return shutil.which("cmake") is not None and (shutil.which("ninja") is not None or shutil.which("make") is not None)


def by_cmake(scratch: Path) -> Path:
    """Configure and build in `scratch`."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    call(["cmake", "-S", str(HERE), "-B", str(scratch), "-DCMAKE_BUILD_TYPE=Release", *generator])
    call(["cmake", "--build", str(scratch), "--parallel"])
    return scratch / NAME


def by_compiler(scratch: Path) -> tuple[str, Path]:
    """One object for each source, then the library, by $CXX, c++, g++ or clang++."""
    compiler = find_compiler()
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for source in sorted(HERE.glob("*.cpp")):
        objects.append(str(scratch / f"{source.stem}.o"))
        extra = X86_FLAGS.get(source.name, []) if on_x86 else []
        call([*compiler, *FLAGS, *extra, "-pthread", "-c", str(source), "-o", objects[-1]])
    call([*compiler, "-shared", "-pthread", *objects, "-o", str(scratch / NAME)])
    return " ".join(compiler), scratch / NAME


def find_compiler() -> list[str]:
    """The command of a C++ compiler, or BuildError."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("expected a C++17 compiler (c++, g++, clang++ or $CXX), found none. Fix: install one, e.g. g++.")


def call(command: list[str]) -> None:
    """Run a command; BuildError with the end of its output if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` failed with exit code {done.returncode}:\n{done.stdout[-4000:]}")
