"""Building the kernels for CPUs: plain C into one library, once per machine, wherever a compiler is found.

A wheel may bring the library along (``make wheels``). Else it is built at first use, with the system's
``cc`` or with the compiler of the package ``ziglang`` (the extra ``native``), into the user's cache folder.
Its name there is a digest of sources, flags and compiler, so that nothing stale is ever loaded; one process
builds, the others wait; it is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bratune.files import lock

__all__ = ["BuildError", "bundled", "compile_library", "compilers", "find_or_build", "source_digest"]

SOURCES = Path(__file__).parent
# -fno-math-errno and -fno-trapping-math change no result; the kernels handle NaN and infinity themselves.
FLAGS = (
    "-std=gnu11",
    "-O2",
    "-fPIC",
    "-shared",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
LIBRARIES = ("-lm",)
TIMEOUT_S = 300
INSTALL = "pip install 'bratune[native]' brings one"

Compiler = tuple[str, ...]


class BuildError(Exception):
    """There is no library, and why: one sentence."""


def find_or_build() -> Path:
    """The library for this machine: the one that came along, one built before, or a new one.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    ready = bundled()
    if ready is not None:
        return ready
    found = compilers()
    if not found:
        raise BuildError(f"needs a C compiler and finds none (cc, gcc, clang, ziglang); {INSTALL}")
    said = []
    for compiler in found:
        try:
            return _cached(compiler)
        except BuildError as error:
            said.append(str(error))
    raise BuildError("; ".join(said))


def bundled() -> Path | None:
    """The library that was installed with these sources, where one was."""
    path = SOURCES / f"bratune-{source_digest()}.so"
    return path if path.exists() else None


def compilers() -> tuple[Compiler, ...]:
    """Commands that compile C here, the preferred first: ``$CC``, the system's, that of ``ziglang``."""
    own = os.environ.get("CC", "").split()
    if own:
        return (tuple(own),)
    found: list[Compiler] = []
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            found.append((path,))
            break
    if importlib.util.find_spec("ziglang") is not None:
        found.append((sys.executable, "-m", "ziglang", "cc"))
    return tuple(found)


def compile_library(compiler: Compiler, target: Path, *flags: str) -> None:
    """Compile the sources into a library.

    Args:
        compiler: The command.
        target: Where the library goes; its folder exists.
        flags: Beyond `FLAGS`, e.g. those that cross-compile.

    Raises:
        BuildError: the compiler cannot be started, fails or takes too long.
    """
    files = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    # That of ziglang is clang with checks, which would be most of the time.
    unchecked = ("-fno-sanitize=undefined",) if "ziglang" in compiler else ()
    command = [*compiler, *FLAGS, *unchecked, *flags, "-o", str(target), *files, *LIBRARIES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"the compiler {' '.join(compiler)} took more than {TIMEOUT_S} s; {INSTALL}"
        ) from None
    except OSError as error:
        raise BuildError(f"the compiler {' '.join(compiler)} cannot be started: {error}; {INSTALL}") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise BuildError(f"the compiler {' '.join(compiler)} fails: {errors[0]}; {INSTALL}")


@functools.cache
def source_digest() -> str:
    """What identifies the sources and the flags of `compile_library`."""
    digest = hashlib.sha256(" ".join((*FLAGS, *LIBRARIES)).encode())
    for path in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where libraries that were built are kept: ``$XDG_CACHE_HOME/bratune/native``, else in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "bratune" / "native"


def _cached(compiler: Compiler) -> Path:
    folder = cache_folder()
    name = f"{source_digest()}-{_identity(compiler)}"
    target = folder / f"{name}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f"{name}.lock"):
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
                    fresh = Path(scratch) / target.name
                    compile_library(compiler, fresh)
                    fresh.replace(target)
    except OSError as error:
        raise BuildError(
            f"the library is built into {folder}, which cannot be written ({error.strerror}); "
            "XDG_CACHE_HOME=DIR names another place"
        ) from None
    return target


def _identity(compiler: Compiler) -> str:
    """What tells one compiler from another, or from itself after an update, without starting it."""
    about = [*compiler, platform.machine()]
    if "ziglang" in compiler:
        about.append(importlib.metadata.version("ziglang"))
    else:
        with contextlib.suppress(OSError):
            facts = os.stat(os.path.realpath(shutil.which(compiler[0]) or compiler[0]))
            about += [str(facts.st_size), str(facts.st_mtime_ns)]
    return hashlib.sha256("\0".join(about).encode()).hexdigest()[:8]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock between processes."""
    with path.open("w") as file:
        lock(file.fileno())
        yield
