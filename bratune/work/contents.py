"""Contents: names for what stands in the files that a cell reads, weights and pictures.

A cell names its files by their path. What is measured depends on what is in them, so that a stored row
answers only while that is the same.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path

from bratune.cell import Cell
from bratune.errors import UsageError
from bratune.kernels import registry
from bratune.kernels.mixers import registry as mixers
from bratune.work.deploy import RUNTIMES
from bratune.work.factory import source_of

__all__ = ["contents_of"]


def contents_of(cell: Cell) -> dict[str, str]:
    """Twelve hexadecimal digits for each kind of file: ``checkpoint_hash`` and ``images_hash``.

    Empty for a kind that the cell does not read, and for files that are not there. ``backend_package`` is the
    package of somebody else, with its version, that backends of the cell, its runtime or its model come from.
    """
    package_of = mixers.package_of if cell.form == "mixer" else registry.package_of
    packages = [package_of(name) for name in dict.fromkeys(cell.backend.split(","))]
    if cell.form in RUNTIMES:
        packages.append(_installed(RUNTIMES[cell.form].package))
    if cell.form == "yours":
        packages.append(source_of(cell.model))
    found = {"backend_package": ", ".join(filter(None, packages))}
    for kind, name in (
        ("checkpoint", _of_file),
        ("images", functools.partial(_of_folder, cell.problem.batch)),
    ):
        path = json.loads(cell.extra).get(kind, "")
        found[f"{kind}_hash"] = _named(name, Path(path)) if path else ""
    return found


def _installed(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _named(name: Callable[[Path], str], path: Path) -> str:
    try:
        return name(path)
    except (OSError, UsageError):
        return ""


def _of_file(path: Path) -> str:
    state = os.stat(path)
    return _digest(str(path.resolve()), state.st_mtime_ns, state.st_size)


def _of_folder(count: int, folder: Path) -> str:
    """Of the first pictures of a folder, those that a batch is made of."""
    from bratune.work.inputs import picture_files

    names = "".join(_of_file(path) for path in picture_files(folder)[:count])
    return hashlib.sha256(names.encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=4096)
def _digest(path: str, mtime_ns: int, size: int) -> str:
    """Of a file in the state that the arguments describe: it is read again only when they change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
