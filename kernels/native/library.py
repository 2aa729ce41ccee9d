"""The library of kernels for CPUs as it is loaded: its variants, which of them run here, and its calls.

A variant is the same C compiled for one instruction set: ``amx`` (AVX-512 and, for bfloat16, matrix tiles),
``avx512``, ``avx2``, ``portable`` (SSE2 or NEON). The fastest that the processor has is used;
``BRATUNE_NATIVE=avx2`` in the environment asks for another one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bratune.errors import UnsupportedError
from bratune.kernels.native.build import BuildError, find_or_build

__all__ = ["Library", "find", "loaded", "variant_number"]

VARIABLE = "BRATUNE_NATIVE"
# Entry points that take a variant and one structure.
_CALLS = (
    "forward", "backward", "norm", "depthwise", "route", "linear",
    "kept_mlp", "linear_grad", "depthwise_grad", "panels",
)  # fmt: skip


@dataclass(frozen=True)
class Library:
    """The library and what it can do here.

    Attributes:
        path: Where it was loaded from.
        variants: Every variant that was compiled, the fastest first, and whether this processor runs it.
        default: The variant that is used where nobody names one.
        openmp: The OpenMP library whose threads are used; empty where there is none and one thread works.
        functions: The entry points by name.
    """

    path: Path
    variants: tuple[tuple[str, bool], ...]
    default: str
    openmp: str
    functions: Any

    @property
    def runnable(self) -> tuple[str, ...]:
        """The variants that this processor runs, the fastest first."""
        return tuple(name for name, here in self.variants if here)


def loaded() -> Library:
    """The library.

    Raises:
        UnsupportedError: there is none here; the message says why.
    """
    found = find()
    if isinstance(found, str):
        raise UnsupportedError("native", (found,), "a CPU")
    return found


@functools.cache
def find() -> Library | str:
    """The library, built where it must be, or the sentence that says why there is none."""
    try:
        path = find_or_build()
    except BuildError as error:
        return str(error)
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the library {path} cannot be loaded: {error}"
    functions.bratune_variant.restype = ctypes.c_char_p
    functions.bratune_variant.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    for name in _CALLS:
        function = getattr(functions, f"bratune_{name}")
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64, ctypes.c_char_p]
    functions.bratune_block.restype = ctypes.c_int64
    functions.bratune_block.argtypes = [ctypes.c_int64, ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    functions.bratune_large_pages.restype = None
    functions.bratune_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    variants = _variants(functions)
    runnable = [name for name, here in variants if here]
    default = os.environ.get(VARIABLE) or runnable[0]
    if default not in runnable:
        known = dict(variants)
        what = "is not a variant" if default not in known else "does not run on this processor"
        return f"{VARIABLE}={default} {what}; these run here: {', '.join(runnable)}"
    return Library(path, variants, default, _use_openmp(functions), functions)


@functools.cache
def variant_number(name: str) -> int:
    """The number under which the library knows a variant; that of the default for an empty name.

    Raises:
        UnsupportedError: the variant does not run here.
    """
    library = loaded()
    wanted = name or library.default
    if wanted not in library.runnable:
        raise UnsupportedError(
            "native",
            (f"the variant {wanted!r} does not run here; these do: {', '.join(library.runnable)}",),
            "a CPU",
        )
    return [known for known, _ in library.variants].index(wanted)


def _variants(functions: Any) -> tuple[tuple[str, bool], ...]:
    found: list[tuple[str, bool]] = []
    here = ctypes.c_int64()
    while (name := functions.bratune_variant(len(found), ctypes.byref(here))) is not None:
        found.append((name.decode(), bool(here.value)))
    return tuple(found)


def _use_openmp(functions: Any) -> str:
    """Let the library use the threads of the OpenMP that torch has loaded; gives its file name."""
    for path in _openmp_libraries():
        try:
            openmp = ctypes.CDLL(path)
            entries = openmp.GOMP_parallel, openmp.omp_get_thread_num
        except (OSError, AttributeError):
            continue
        functions.bratune_use_openmp(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entries))
        return Path(path).name
    return ""


def _openmp_libraries() -> list[str]:
    """OpenMP libraries in this process, those that torch brought first."""
    if sys.platform == "darwin":
        return [str(path) for path in Path(torch.__file__).parent.glob("lib/lib*omp*.dylib")]
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if re.search(r"/lib(g|i)?omp[^/]*\.so", line)}
    return sorted(paths, key=lambda path: ("torch" not in path, path))
