"""Store: append-only JSON Lines, one record per line, written the moment it is known.

Writers take a file lock and flush to disk, so that several processes may share a file and a killed
process loses at most the cell in flight. The beginning of a record at the end of a file (a process died
while writing) is cut off by the next writer and skipped by readers; nothing else is ever deleted, and a file
that holds no records is not written to. A line that is no record costs that line: readers name it and go on,
`bratune cache repair` sets it aside. Raw samples go to ``<name>.samples.jsonl`` beside the records.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from bratune.errors import StoreError
from bratune.files import BINARY, lock, read_at
from bratune.record import LONGEST, TOO_LONG, Record, check_fields, parse_fields, parse_line
from bratune.store.index import Index

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Batch",
    "Store",
    "batches",
    "locked",
    "mend_end",
    "read",
    "read_fields",
    "read_records",
    "record_files",
    "require_records",
]

SAMPLES_SUFFIX = ".samples.jsonl"


class Store:
    """A file of records that is only ever appended to.

    Args:
        path: The ``.jsonl`` file; it and its folder are made when missing.

    Raises:
        StoreError: the file cannot be written, or it holds something else than records. Raised here, before
            anything is measured.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path) as fd:
                require_records(fd, self.path)
                mend_end(fd)
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
        self._append_line(self.path, _line_of(record))

    def extend(self, records: Iterable[Record]) -> None:
        """Write several records in one step; on return all are on disk.

        Raises:
            StoreError: the disk is full or the file went away; earlier records are intact.
        """
        lines = [_line_of(record) for record in records]
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

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[Callable[[Record], None]]:
        """What writes a record while no other process can write one; for looking before writing.

        Raises:
            StoreError: the file cannot be written.
        """
        try:
            with locked(self.path) as fd:
                mend_end(fd)
                yield lambda record: _write_whole(fd, _line_of(record).encode() + b"\n")
        except OSError as error:
            raise self._failure("be written", error) from None

    def _append_line(self, path: Path, line: str) -> None:
        try:
            with locked(path) as fd:
                _write_whole(fd, line.encode() + b"\n")
        except OSError as error:
            raise self._failure("be written", error) from None

    def _failure(self, verb: str, error: OSError) -> StoreError:
        return StoreError(f"records cannot {verb} to {self.path}: {error.strerror or error}")


def _write_whole(fd: int, data: bytes) -> None:
    """Add whole lines to a file that is locked, all or nothing; on return they are on disk."""
    end = mend_end(fd)
    try:
        written = 0
        while written < len(data):
            written += os.write(fd, data[written:])
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, end)  # a full disk leaves no half line behind
        raise


def _line_of(record: Record) -> str:
    """A record as a line; raises `StoreError` for one that no reader would take."""
    try:
        check_fields(record.to_dict())
    except StoreError as error:
        raise StoreError(f"the row of cell {record.cell_id} is no record: {error}") from None
    return record.to_json()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """The descriptor of a file, made when missing, that no other writer touches meanwhile.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o666)
        try:
            try:
                lock(fd)
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


def mend_end(fd: int) -> int:
    """Make a file end with a whole line; returns the length of the file after it.

    What follows the last newline is completed where it is a whole record, cut off where it is the beginning
    of one or a block of zeros (which a crash of the machine leaves), and otherwise kept as a line of its own.
    """
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        chunk = read_at(fd, end - start, start)
        at = chunk.rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    if end == size:
        return size
    if size - end <= LONGEST and _is_torn(read_at(fd, size - end, end)):
        os.ftruncate(fd, end)
        return end
    os.write(fd, b"\n")  # at the end: the file is open for appending
    return size + 1


def _is_torn(tail: bytes) -> bool:
    """Whether bytes are the beginning of a record, or nothing, with no whole value in them."""
    if not tail.strip(b"\0 \t\r"):
        return True
    if not tail.startswith(b"{"):
        return False
    try:
        json.JSONDecoder().raw_decode(tail.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return True
    return False


def require_records(fd: int, path: Path) -> None:
    """Raise `StoreError` where a file holds something, and nothing at its beginning is a record."""
    head = read_at(fd, _HEAD_BYTES, 0)
    *lines, last = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    only = not any(lines) and len(head) < _HEAD_BYTES  # a writer may have died in its first line
    if not head.strip() or (only and any(b.startswith(last) for b in _BEGINNINGS)):
        return
    if not any(line.lstrip(b"\0 ").startswith(_BEGINNINGS) for line in (*lines, last)):
        raise StoreError(
            f"{path} holds something else than records and is left as it is; another file name would work"
        )


def record_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The record files behind files and folders; a folder stands for every ``.jsonl`` file below it.

    Raises:
        StoreError: a path does not exist, or a folder holds no records.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*.jsonl") if not p.name.endswith(SAMPLES_SUFFIX))
            found = [p for p in found if p.is_file()]  # editors leave links of that name that lead nowhere
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

    Lines that are no records are left out, with a warning that names them; so are files of a folder that hold
    something else.

    Raises:
        StoreError: a path cannot be read, or what was named holds lines and none is a record.
    """
    for batch in batches(paths):
        yield from batch.one_by_one(Record.from_json)


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
    for batch in batches(several):
        try:
            made.add_lines(batch.lines)
            batch.all_good()
        except Unusual:
            made.add_rows(batch.one_by_one(parse_fields))
    return made.table()


def read_fields(paths: Iterable[str | os.PathLike[str]]) -> Iterator[dict[str, Any]]:
    """The fields of every record as they were written, empty ones left out; several times as fast.

    Raises:
        StoreError: see `read_records`.
    """
    from bratune.store.columns import Unusual, parse_together

    for batch in batches(paths):
        try:
            rows = parse_together(batch.lines)
            batch.all_good()
        except Unusual:
            rows = list(batch.one_by_one(parse_fields))
        yield from rows


T = TypeVar("T")

# Bytes of lines that are read at a time.
_BATCH_BYTES = 1 << 21
# What is looked at to tell records from other files, and how lines of records and of samples begin.
_HEAD_BYTES = 1 << 16
_BEGINNINGS = (b'{"schema":', b'{"schema" :', b'{"run_id":', b'{"cell_id":', b'{"outcome":')
# Lines of a file that are named, each in a warning of its own; of more, the number.
_NAMED = 3


@dataclass
class _Tally:
    """Lines of one file so far: records, and others, the first of them in words."""

    good: int = 0
    bad: int = 0
    first: str = ""


@dataclass(frozen=True)
class Batch:
    """Lines of a file.

    Attributes:
        path: The file.
        number: Of the first line, from 1.
        lines: As they are, with their ends.
    """

    path: Path
    number: int
    lines: list[bytes]
    _tally: _Tally = field(default_factory=_Tally)

    def all_good(self) -> None:
        """Say that every line is a record."""
        self._tally.good += len(self.lines)

    def one_by_one(self, parse: Callable[[str], T]) -> Iterator[T]:
        """What ``parse`` makes of every line; those that are no records are left out with a warning."""
        for number, raw in enumerate(self.lines, start=self.number):
            if not raw.strip():
                continue
            try:
                value = parse_line(raw, parse)
            except StoreError as error:
                if not raw.endswith(b"\n") and _is_torn(raw):  # only a writer that died leaves such a line
                    warnings.warn(f"{self.path}: the last line is torn and was skipped", stacklevel=3)
                    continue
                self._tally.bad += 1
                text = f"{self.path}, line {number}: {error}"
                self._tally.first = self._tally.first or text
                if self._tally.bad <= _NAMED:
                    warnings.warn(f"{text}; this line is left out", stacklevel=3)
                continue
            self._tally.good += 1
            yield value


def batches(paths: Iterable[str | os.PathLike[str]], size: int | None = None) -> Iterator[Batch]:
    """Lines of files and folders, many at a time.

    Raises:
        StoreError: see `read_records`.
    """
    several = [*map(Path, paths)]
    good, strange = 0, ""
    for path in record_files(several):
        tally, number = _Tally(), 1
        try:
            with path.open("rb") as file:
                for lines in _lines(file, size or _BATCH_BYTES):
                    yield Batch(path, number, lines, tally)
                    number += len(lines)
        except OSError as error:
            raise StoreError(f"records cannot be read from {path}: {error.strerror or error}") from None
        good += tally.good
        if tally.bad and not tally.good:
            if path in several:
                raise StoreError(tally.first)
            strange = strange or tally.first
            warnings.warn(f"{path} holds something else than records and is left out", stacklevel=3)
            continue
        if tally.bad > _NAMED:
            warnings.warn(f"{path}: {tally.bad} lines are no records and are left out", stacklevel=3)
        if tally.bad:
            warnings.warn(f"bratune cache repair {path} sets lines aside that are no records", stacklevel=3)
    if strange and not good:
        raise StoreError(strange)


def _lines(file: BinaryIO, size: int) -> Iterator[list[bytes]]:
    """Lines of a file, as many together as have about so many bytes; an endless one is not held."""
    rest, skipping = b"", False
    while block := file.read(size):
        if skipping:
            _, newline, block = block.partition(b"\n")
            skipping = not newline
        whole, newline, tail = (rest + block).rpartition(b"\n")
        if newline:
            yield io.BytesIO(whole + newline).readlines()
        rest = tail
        if len(rest) > LONGEST:
            yield [TOO_LONG]
            rest, skipping = b"", True
    if rest:
        yield [rest]
