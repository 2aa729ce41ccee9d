"""Store: append-only JSON Lines, one record per line, written the moment it is known.

Writers take a file lock and flush to disk, so that several processes may share a file and a killed
process loses at most the cell in flight. A torn last line (a process died while writing) is cut off by the
next writer and skipped by readers. Raw samples go to ``<name>.samples.jsonl`` beside the records.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bratune.errors import StoreError
from bratune.record import Record, parse_fields
from bratune.store.index import Index

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Store",
    "batches",
    "cut_torn_line",
    "locked",
    "one_by_one",
    "read",
    "read_fields",
    "read_records",
    "record_files",
]

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
            with locked(self.path) as fd:
                cut_torn_line(fd)
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

    def index(self) -> Index:
        """Where the rows of each cell stand that are finished so far."""
        return Index(self.path)

    def _append_line(self, path: Path, line: str) -> None:
        data = line.encode() + b"\n"
        try:
            with locked(path) as fd:
                end = cut_torn_line(fd)
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

    def _failure(self, verb: str, error: OSError) -> StoreError:
        return StoreError(f"records cannot {verb} to {self.path}: {error.strerror or error}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """The descriptor of a file, made when missing, that no other writer touches meanwhile.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                why = (
                    f"its file system gives no locks ({error.strerror}); a folder on a local disk would work"
                )
                raise OSError(error.errno, why) from None
            if not _is_at(fd, path):  # another process put a new file in its place while this one waited
                continue
            yield fd
            return
        finally:
            os.close(fd)  # releases the lock


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def cut_torn_line(fd: int) -> int:
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
    for path, number, lines in batches(paths):
        yield from one_by_one(path, number, lines, Record.from_json)


def read(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    columns: Sequence[str] | None = None,
    started: bool = False,
) -> pandas.DataFrame:
    """Records as a table, one row per record.

    Lines are not held, so that files may be larger than memory as long as the columns fit. Asking for the
    columns that are needed is several times as fast as asking for all.

    Args:
        paths: Files and folders.
        columns: Fields of `Record`, in this order; by default all.
        started: Keep the lines that were written before a cell was launched.

    Raises:
        StoreError: see `read_records`.
        UnknownNameError: a column is not a field of `Record`.
    """
    from bratune.store.columns import Columns, Unusual

    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    made = Columns(columns, started=started)
    for path, number, lines in batches(several):
        try:
            made.add_lines(lines)
        except Unusual:
            made.add_rows(one_by_one(path, number, lines, parse_fields))
    return made.table()


def read_fields(paths: Iterable[str | os.PathLike[str]]) -> Iterator[dict[str, Any]]:
    """The fields of every record as they were written, empty ones left out; several times as fast.

    Raises:
        StoreError: see `read_records`.
    """
    from bratune.store.columns import Unusual, parse_together

    for path, number, lines in batches(paths):
        try:
            yield from parse_together(lines)
        except Unusual:
            yield from one_by_one(path, number, lines, parse_fields)


T = TypeVar("T")

# Bytes of lines that are read at a time.
_BATCH_BYTES = 1 << 21


def batches(
    paths: Iterable[str | os.PathLike[str]], size: int = _BATCH_BYTES
) -> Iterator[tuple[Path, int, list[bytes]]]:
    """Lines of files and folders, many at a time: their file, the number of the first, and the lines."""
    for path in record_files(paths):
        number = 1
        try:
            with path.open("rb") as file:
                while lines := file.readlines(size):
                    yield path, number, lines
                    number += len(lines)
        except OSError as error:
            raise StoreError(f"records cannot be read from {path}: {error.strerror or error}") from None


def one_by_one(path: Path, first: int, lines: Iterable[bytes], parse: Callable[[str], T]) -> Iterator[T]:
    """What ``parse`` makes of every line; a torn last line is skipped with a warning."""
    for number, raw in enumerate(lines, start=first):
        if not raw.strip():
            continue
        try:
            yield parse(raw.decode("utf-8"))
        except (StoreError, TypeError, UnicodeDecodeError) as error:
            if not raw.endswith(b"\n"):  # only a writer that died leaves such a line
                warnings.warn(f"{path}: the last line is torn and was skipped", stacklevel=3)
                continue
            what = "is not text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise StoreError(f"{path}, line {number}: {what}") from None
