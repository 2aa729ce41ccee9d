"""What pyproject.toml cannot say: the C kernels are compiled when a wheel is made, where a compiler is.

A compiler that is missing or fails stops nothing: the wheel is pure Python then, and the kernels are built at
their first use. With the library inside, a wheel names the machines that it is for. An editable installation
builds at first use, since its sources change.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel, get_platform
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# By its file: a source distribution has no links, so kernels/ is no part of the package `bratune` there.
sys.path.insert(0, str(HERE))
spec = importlib.util.spec_from_file_location("build", HERE / "kernels" / "native" / "build.py")
assert spec is not None and spec.loader is not None  # noqa: PT018
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildKernels(build_py):
    """Copies the package, and compiles the library beside its sources."""

    def run(self) -> None:
        """See `setuptools.Command.run`."""
        super().run()
        if self.editable_mode or build.bundled() is not None:
            return
        target = Path(self.build_lib, "bratune", "kernels", "native", f"bratune-{build.source_digest()}.so")
        for compiler in build.compilers():
            try:
                build.compile_library(compiler, target)
                return
            except build.BuildError as error:
                self.warn(f"the C kernels will be built at their first use: {error}")


class MarkedWheel(bdist_wheel):
    """A wheel for every Python 3, and where it holds the library, for one kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform; asked for when the files are in place."""
        python, abi, platform = super().get_tag()
        holds = any(Path(self.bdist_dir or "").glob("bratune/kernels/native/*.so"))
        here = get_platform(None).replace(".", "_")
        return python, abi, here if holds and platform == "any" else platform


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": MarkedWheel})
