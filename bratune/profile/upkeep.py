"""Upkeep of stored records: merging, importing, pruning, and a compact copy for reading."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bratune.errors import MissingPackageError, StoreError
from bratune.profile.cache import key_of
from bratune.record import Record
from bratune.store import Store, read_fields, read_records

__all__ = ["compact", "import_records", "merge", "prune"]

Paths = Iterable[str | os.PathLike[str]]

# Rows per write of the compact copy: bounds memory, and is large enough for columns to compress.
_BATCH = 65_536


def merge(into: Path, paths: Paths) -> int:
    """Append rows that a file does not hold yet; returns how many. Raw samples stay where they are.

    Raises:
        StoreError: a file cannot be read or written.
    """
    return _add(into / "records.jsonl" if into.is_dir() or not into.suffix else into, read_records(paths))


def import_records(into: Path, paths: Paths) -> dict[Path, int]:
    """Take in rows of other machines: one folder per GPU key, so that each stays a store of one kind.

    Returns:
        Rows added, by file.

    Raises:
        StoreError: a file cannot be read or written, or a row does not say which machine it is of.
    """
    by_machine: dict[str, list[Record]] = defaultdict(list)
    for row in read_records(paths):
        if not row.gpu_key:
            raise StoreError(f"row {row.cell_id or '(without an id)'} does not say which machine it is of")
        by_machine[row.gpu_key].append(row)
    return {
        path: _add(path, rows)
        for path, rows in ((into / key / "records.jsonl", rows) for key, rows in by_machine.items())
    }


def prune(path: Path, *, keep: int = 1, rewrite: bool = True) -> tuple[int, int]:
    """Drop what says nothing any more; returns how many rows go and how many stay.

    These are lines "started" whose cell has an outcome in the same run, and rows that ``keep`` later rows of
    the same key replace. The new file takes the place of the old one in one step.

    Raises:
        StoreError: the file cannot be read or written.
    """
    rows = list(read_records([path]))
    done = {(row.run_id, row.cell_id) for row in rows if row.outcome != "started"}
    later: dict[str, int] = defaultdict(int)
    kept: list[Record] = []
    for row in reversed(rows):
        if row.outcome == "started":
            if (row.run_id, row.cell_id) in done:
                continue
        elif row.cell:
            key = key_of(row)
            later[key] += 1
            if later[key] > keep:
                continue
        kept.append(row)
    kept.reverse()
    if rewrite and len(kept) < len(rows):
        _replace(path, (row.to_json() for row in kept))
    return len(rows) - len(kept), len(kept)


def compact(paths: Paths, output: Path) -> int:
    """Write the rows of records, "started" lines left out, as one Parquet file; returns how many.

    ``pandas.read_parquet`` reads it with the columns of `bratune.store.read`.

    Raises:
        MissingPackageError: pyarrow is not installed.
        StoreError: a file cannot be read or written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "a compact copy of records", extra="parquet") from None
    fields = dataclasses.fields(Record)
    schema = pyarrow.schema([(f.name, _arrow_type(pyarrow, f)) for f in fields])
    count = 0
    try:
        with parquet.ParquetWriter(output, schema, compression="zstd") as writer:
            finished = (row for row in read_fields(paths) if row.get("outcome") != "started")
            for rows in _batches(finished):
                columns = {f.name: [row.get(f.name, f.default) for row in rows] for f in fields}
                writer.write_table(pyarrow.Table.from_pydict(columns, schema=schema))
                count += len(rows)
    except OSError as error:
        raise StoreError(f"records cannot be written to {output}: {error.strerror or error}") from None
    return count


def _add(path: Path, rows: Iterable[Record]) -> int:
    """Append the rows that a file does not hold yet; returns how many."""
    store = Store(path)
    new = {row.to_json(): row for row in rows}
    for row in store.records():
        new.pop(row.to_json(), None)
    store.extend(new.values())
    return len(new)


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _arrow_type(pyarrow: Any, field: dataclasses.Field[Any]) -> Any:
    hint = typing.get_type_hints(Record)[field.name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind, made in ((bool, pyarrow.bool_), (int, pyarrow.int64), (float, pyarrow.float64)):
        if kind in kinds:
            return made()
    return pyarrow.string()


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Put new content in the place of a file, all or nothing."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, path.stat().st_mode)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        raise StoreError(f"records cannot be written to {path}: {error.strerror or error}") from None
