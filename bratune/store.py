"""Store: append-only JSON Lines, one record per line, written the moment it is known.

Writers take a file lock and flush to disk, so that several processes may share a file and a killed
process loses at most the cell in flight. A torn last line (a process died while writing) is cut off by the
next writer and skipped by readers. Raw samples go to ``<name>.samples.jsonl`` beside the records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bratune.errors import StoreError, UnknownNameError
from bratune.record import Record, parse_fields

if TYPE_CHECKING:
    import pandas

__all__ = ["Store", "read", "read_fields", "read_records", "record_files"]

SAMPLES_SUFFIX = ".samples.jsonl"


class Store:
    """A file of records that is only ever appended to.

    Args:
        path: The ``.jsonl`` file; it and its folder are made when missing.

    Raises:
        StoreError: the file cannot be written. Raised here, before anything is measured.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(self.path) as fd:
                _cut_torn_line(fd)
        except OSError as error:
            raise self._failure("be written", error) from None

    def append(self, record: Record, samples_ms: Sequence[float] | None = None) -> None:
        """Write one record, and its raw samples beside it; on return both are on disk.

        Raises:
            StoreError: the disk is full or the file went away; earlier records are intact.
        """
        if samples_ms:
            line = {
                "run_id": record.run_id,
                "cell_id": record.cell_id,
                "timestamp_utc": record.timestamp_utc,
                "samples_ms": [float(f"{s:.6g}") for s in samples_ms],
            }
            self._append_line(self.samples_path, json.dumps(line, separators=(",", ":")))
        self._append_line(self.path, record.to_json())

    def extend(self, records: Iterable[Record]) -> None:
        """Write several records in one step; on return all are on disk.

        Raises:
            StoreError: the disk is full or the file went away; earlier records are intact.
        """
        lines = [record.to_json() for record in records]
        if lines:
            self._append_line(self.path, "\n".join(lines))

    @property
    def samples_path(self) -> Path:
        """Where raw samples go."""
        return self.path.with_name(self.path.name.removesuffix(".jsonl") + SAMPLES_SUFFIX)

    def records(self) -> list[Record]:
        """Everything written so far, by anyone."""
        return list(read_records([self.path])) if self.path.exists() else []

    def _append_line(self, path: Path, line: str) -> None:
        data = line.encode() + b"\n"
        try:
            with self._locked(path) as fd:
                end = _cut_torn_line(fd)
                try:
                    written = 0
                    while written < len(data):
                        written += os.write(fd, data[written:])
                    os.fsync(fd)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(fd, end)  # a full disk leaves no half line behind
                    raise
        except OSError as error:
            raise self._failure("be written", error) from None

    @staticmethod
    @contextlib.contextmanager
    def _locked(path: Path) -> Iterator[int]:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # releases the lock

    def _failure(self, verb: str, error: OSError) -> StoreError:
        return StoreError(f"records cannot {verb} to {self.path}: {error.strerror or error}")


def _cut_torn_line(fd: int) -> int:
    """Drop what follows the last newline; returns the length of the file after it."""
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        chunk = os.pread(fd, end - start, start)
        at = chunk.rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    if end != size:
        os.ftruncate(fd, end)
    return end


def record_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The record files behind files and folders; a folder stands for every ``.jsonl`` below it.

    Raises:
        StoreError: a path does not exist, or a folder holds no records.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*.jsonl") if not p.name.endswith(SAMPLES_SUFFIX))
            if not found:
                raise StoreError(f"the folder {path} holds no records (.jsonl files)")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise StoreError(f"there are no records at {path}: no such file or folder")
    return files


def read_records(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Record]:
    """Every record of files and folders, in the order written, "started" lines included.

    Raises:
        StoreError: a path cannot be read, or a line that is not the last is not a record.
    """
    return _parsed(paths, Record.from_json)


def read(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    columns: Sequence[str] | None = None,
    started: bool = False,
) -> pandas.DataFrame:
    """Records as a table, one row per record.

    Rows are not held as text, so that files may be larger than memory as long as the columns fit.

    Args:
        paths: Files and folders.
        columns: Fields of `Record`, in this order; by default all.
        started: Keep the lines that were written before a cell was launched.

    Raises:
        StoreError: see `read_records`.
        UnknownNameError: a column is not a field of `Record`.
    """
    import pandas

    defaults = {field.name: field.default for field in dataclasses.fields(Record)}
    wanted = list(defaults) if columns is None else list(columns)
    for name in wanted:
        if name not in defaults:
            raise UnknownNameError("column", name, defaults)
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    targets = [(name, defaults[name], values[name].append) for name in wanted]
    for fields in read_fields(several):
        if started or fields.get("outcome") != "started":
            for name, default, append in targets:
                value = fields.get(name, default)
                # Most texts repeat from row to row: one object each is what lets millions of rows fit.
                append(sys.intern(value) if type(value) is str else value)
    return pandas.DataFrame(values, columns=wanted)


def read_fields(paths: Iterable[str | os.PathLike[str]]) -> Iterator[dict[str, Any]]:
    """The fields of every record as they were written, empty ones left out; several times as fast.

    Raises:
        StoreError: see `read_records`.
    """
    return _parsed(paths, parse_fields)


T = TypeVar("T")


def _parsed(paths: Iterable[str | os.PathLike[str]], parse: Callable[[str], T]) -> Iterator[T]:
    """What ``parse`` makes of every line of files and folders; a torn last line is skipped with a warning."""
    for path in record_files(paths):
        try:
            with path.open("rb") as file:
                for number, raw in enumerate(file, start=1):
                    if not raw.strip():
                        continue
                    try:
                        yield parse(raw.decode("utf-8"))
                    except (StoreError, TypeError, UnicodeDecodeError) as error:
                        if not raw.endswith(b"\n"):  # only a writer that died leaves such a line
                            warnings.warn(f"{path}: the last line is torn and was skipped", stacklevel=3)
                            continue
                        raise StoreError(f"{path}, line {number}: {error}") from None
        except OSError as error:
            raise StoreError(f"records cannot be read from {path}: {error.strerror or error}") from None
