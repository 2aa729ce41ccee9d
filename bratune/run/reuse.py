"""Cache: which stored row answers a cell, and why or why not, field by field.

A row answers a cell when everything that can change its time is the same: the cell itself, the sources that
compute and time it, what is in the files that it reads, the versions of bratune, torch, triton and the
driver, the GPU, and how it is sampled. The board's serial number is not among them: a row of one H100
answers for another.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bratune.cell import Cell
from bratune.errors import StoreError, UnknownNameError
from bratune.kernels import registry
from bratune.kernels.mixers.registry import ROUTED
from bratune.kernels.tuned import plan_folders
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.record import Record
from bratune.store.index import Index
from bratune.work.contents import contents_of
from bratune.work.forms import form_modules
from bratune.work.mixers import mixer_modules

__all__ = [
    "NOT_FINISHED",
    "NOT_STARTED",
    "NO_TURN",
    "Cache",
    "Why",
    "key_fields",
    "key_fields_of",
    "key_of",
    "source_hash",
]

# Outcomes that say something about the cell and not about the run that was interrupted.
_NO_ANSWER = ("started",)
# How the reason of a row begins that the budget of its run left without a time.
NOT_STARTED, NOT_FINISHED = "not started: ", "not finished: "
NO_TURN = (NOT_STARTED, NOT_FINISHED)
_MACHINE_FIELDS = ("gpu_key", "bratune", "torch", "triton", "driver", "threads")
# What builds, checks and times every cell, whoever computes it.
_AROUND = ("bratune.work.call", "bratune.measure.meter", "bratune.measure.gate")
# What runs around the attention of a block, whichever backend computes it.
_LAYERS = "bratune.kernels.biformer"
_PACKAGE = "bratune.kernels"
_PACKAGES_AROUND = ("bratune.work", "bratune.measure")


@dataclass(frozen=True)
class Why:
    """Whether a row answers a cell, and what stands against it.

    Attributes:
        hit: A stored row answers.
        record: The row that answers, or the nearest one; None when there is none of any kind.
        differences: Field, what is stored, what is asked; of the nearest row.
    """

    hit: bool
    record: Record | None
    differences: tuple[tuple[str, str, str], ...] = ()

    def __str__(self) -> str:
        if self.record is None:
            return "miss: nothing is stored"
        where = f"run {self.record.run_id or '?'} of {self.record.timestamp_utc}"
        if self.hit:
            return f"hit: {self.record.outcome} in {where}"
        lines = [f"miss: the nearest row is from {where} and differs in"]
        lines += [
            f"  {name}: stored {stored or '(nothing)'}, asked {asked or '(nothing)'}"
            for name, stored, asked in self.differences
        ]
        return "\n".join(lines)


class Cache:
    """Stored rows by everything that can change them.

    Args:
        machine: Where a cell would be measured now.
        settings: How it would be sampled.
        records: Rows that are there already; of several for one key the last one counts.
        index: More of them, in a file; those of a cell are read when it is asked for.
        evidence: Kind of rows that may answer: a replayed or modelled one never stands for a measured one.
    """

    def __init__(
        self,
        machine: Machine,
        settings: MeterSettings,
        records: Iterable[Record] = (),
        *,
        index: Index | None = None,
        evidence: str = "measured",
    ) -> None:
        self._machine, self._settings, self._evidence = machine, settings, evidence
        self._index = index
        self._rows: dict[str, list[Record]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Take a row in, if it can answer anything."""
        if self._answers(record):
            self._rows.setdefault(record.cell_id, []).append(record)

    def find(self, cell: Cell) -> Record | None:
        """The row that answers a cell; None when it has to be measured."""
        rows = self.find_all(cell)
        return rows[-1] if rows else None

    def find_all(self, cell: Cell, *, sampling: str = "") -> list[Record]:
        """Every row that answers a cell, the oldest first; of one that is measured in passes, all of them.

        Args:
            cell: What is asked.
            sampling: How the rows are sampled; by default as the settings say.
        """
        stored = self._index.rows(cell.cell_id) if self._index is not None else ()
        rows = [row for row in stored if self._answers(row)]
        rows += [row for row in self._rows.get(cell.cell_id, []) if row not in rows]
        if not rows:
            return []
        asked = _circumstances(self._machine, cell, self._settings)
        asked["sampling"] = sampling or asked["sampling"]
        return [row for row in rows if _circumstances_of(row) == asked]

    def why(self, cell: Cell) -> Why:
        """Why a cell hits or misses, compared with the nearest row."""
        found = self.find(cell)
        if found is not None:
            return Why(True, found)
        asked = key_fields(cell, self._machine, self._settings)
        nearest: tuple[tuple[str, str, str], ...] = ()
        for record in (row for rows in self._rows.values() for row in rows):
            differences = _differences(key_fields_of(record), asked)
            if found is None or len(differences) <= len(nearest):
                found, nearest = record, differences
        return Why(False, found, nearest)

    def _answers(self, record: Record) -> bool:
        """Whether a row can answer anything."""
        silent = record.outcome in _NO_ANSWER or record.reason.startswith(NO_TURN)
        return bool(record.cell) and record.evidence == self._evidence and not silent


def key_fields(cell: Cell, machine: Machine, settings: MeterSettings) -> dict[str, str]:
    """Everything that can change the time of a cell, by name, as text."""
    return _flat(cell.to_dict()) | _circumstances(machine, cell, settings)


def key_fields_of(record: Record) -> dict[str, str]:
    """The same of a stored row; raises `StoreError` where it does not describe its cell."""
    try:
        return _flat(dict(json.loads(record.cell))) | _circumstances_of(record)
    except (RecursionError, TypeError, ValueError):
        raise StoreError(f"row {record.cell_id} holds no description of its cell") from None


def _circumstances(machine: Machine, cell: Cell, settings: MeterSettings) -> dict[str, str]:
    """What is no part of a cell and can change its time."""
    values = {name: getattr(machine, name) for name in _MACHINE_FIELDS}
    values |= {"source_hash": source_hash(cell), **contents_of(cell), "sampling": settings.sampling}
    return {name: str(value or "") for name, value in values.items()}


def _circumstances_of(record: Record) -> dict[str, str]:
    names = (*_MACHINE_FIELDS, "source_hash", "backend_package", "checkpoint_hash", "images_hash", "sampling")
    return {name: str(getattr(record, name) or "") for name in names}


def key_of(record: Record) -> str:
    """A name for everything that can change a row's time; rows of one key replace each other."""
    return _key(key_fields_of(record))


def source_hash(cell: Cell) -> str:
    """Twelve hexadecimal digits that name the sources that compute and time a cell.

    These are the modules of its backends, its form or its mixer and, for anything but a mixer and a bare
    attention call, those of the layers, with every module of kernels that they import, and the tables that
    lie beside them; and what builds, checks and times cells. ``auto`` may be any backend, as the plans say
    that are in place now. Empty for a backend that nobody has.
    """
    around: tuple[str, ...] = form_modules(cell.form)
    names = {name for name in cell.backend.split(",") if name}
    if cell.form == "mixer":  # bi-level routing by one of our backends, or by any
        around = mixer_modules(cell.backend)
        base, _, backend = cell.backend.partition(":")
        names = {backend or "auto"} if base == ROUTED else set()
    plans = _plans() if "auto" in names else ""
    if "auto" in names:
        names = (names - {"auto"}) | set(registry.BACKENDS)
    try:
        roots = {type(registry.get(name)).__module__ for name in names}
    except UnknownNameError:
        return ""
    roots |= set(around)
    if (cell.part != "attention" and cell.form != "mixer") or not roots:
        roots.add(_LAYERS)
    return _hash_of(tuple(sorted(roots)), plans)


def _plans() -> str:
    """A name for what the plans say that ``auto`` looks up."""
    digest = hashlib.sha256(os.environ.get("BRATUNE_LOOKUP", "").encode())
    for folder in plan_folders():
        for path in sorted(folder.rglob("*.json")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _hash_of(roots: tuple[str, ...], plans: str) -> str:
    found = _reached(roots, (_PACKAGE,)) | _reached(_AROUND, _PACKAGES_AROUND)
    digest = hashlib.sha256(plans.encode())
    for name in sorted(found):
        path = found[name]
        for file in (path, *_beside(path)):
            digest.update(f"{name} {file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _beside(module: Path) -> list[Path]:
    """What a module reads and no import names: tables, and the C that it compiles."""
    sources = module.parent.glob("*.[ch]") if module.name == "build.py" else ()
    return sorted({*module.parent.glob(f"{module.stem}*.json"), *sources})


def _reached(roots: Iterable[str], packages: tuple[str, ...]) -> dict[str, Path]:
    """Modules, and every module of some packages that they import, by name."""
    found: dict[str, Path] = {}
    todo = [(root, _file_of(root)) for root in roots]
    while todo:
        name, path = todo.pop()
        if name not in found and path is not None:
            found[name] = path
            todo += _imports(path, packages)
    return found


def _file_of(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _imports(path: Path, packages: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Modules of packages that a file imports anywhere, found without importing them."""
    names = _imported_names(path.read_text("utf-8"))
    files = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for name in (name for name in names if name.startswith(f"{package}.")):
                files[name] = Path(folder) / f"{name.removeprefix(f'{package}.').replace('.', '/')}.py"
    return [(name, file) for name, file in files.items() if file.is_file()]


@functools.cache  # most modules are reached from several roots
def _imported_names(source: str) -> frozenset[str]:
    """What a module imports anywhere; only statements are looked at, for expressions are most of a module."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo += getattr(node, part, ())
    return frozenset(names)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _key(fields: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _differences(stored: Mapping[str, str], asked: Mapping[str, str]) -> tuple[tuple[str, str, str], ...]:
    names = sorted(stored.keys() | asked.keys())
    return tuple(
        (name, stored.get(name, ""), asked.get(name, ""))
        for name in names
        if stored.get(name, "") != asked.get(name, "")
    )
