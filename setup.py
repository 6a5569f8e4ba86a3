"""Adds one step to the installation: compile the native CPU kernels (native/) into lorica/kernels/_native.so.

Everything else is in pyproject.toml. Without a compiler Lorica installs all the same, and says so at its first update.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError as error:  # before 70.1
    raise RuntimeError("setuptools is too old: expected 77 or newer. Fix: pip install -U setuptools.") from error

BUILDER = runpy.run_path(str(Path(__file__).parent / "native" / "build.py"))


class BuildNative(build_ext):
    """Runs native/build.py; its failure is a warning."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library is no Python module: its name says nothing of a Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            print(f"lorica: native CPU kernels built by {BUILDER['build'](target)}: {target}", file=sys.stderr)
        except BUILDER["BuildError"] as error:
            print(
                f"lorica: WARNING: the native CPU kernels were not built: {error}\n"
                "lorica: CPU updates take torch's kernels, in several passes.",
                file=sys.stderr,
            )


class AnyPython(bdist_wheel):
    """The wheel depends on the processor, not on the Python that made it."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


def build_tools() -> list[str]:
    """What to fetch for the build, which PEP 517 front ends read from `setup_requires`: nothing if it is there already,
    or if there is no compiler."""
    try:
        BUILDER["find_compiler"]()
    except BUILDER["BuildError"]:
        return []
    tools = [] if shutil.which("cmake") else ["cmake>=3.18"]
    return tools if shutil.which("ninja") or shutil.which("make") else [*tools, "ninja"]


setup(
    ext_modules=[Extension("lorica.kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
    setup_requires=build_tools(),
)
