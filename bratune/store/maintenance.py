"""Upkeep of stored records: merging, importing, pruning, and a compact copy for reading."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bratune.errors import MissingPackageError, StoreError
from bratune.files import new_file_beside
from bratune.record import SCHEMA, Record, field_types, parse_fields, parse_line
from bratune.store import SAMPLES_SUFFIX, Store, batches, locked, mend_end, read_fields, read_records
from bratune.store.lines import require_records
from bratune.text import is_name

__all__ = ["BAD_SUFFIX", "append_new", "compact", "import_records", "merge", "prune", "repair"]

# Where `repair` puts lines that are no records: after the name of their file.
BAD_SUFFIX = ".bad-lines"

Paths = Iterable[str | os.PathLike[str]]

# Rows per write of the compact copy: bounds memory, and is large enough for columns to compress.
_BATCH = 65_536
# Bytes of lines that Arrow parses at a time, with every core.
_PARSED_BYTES = 1 << 24
# Rows per write of a merge, each of which goes to the disk before the next.
_AT_ONCE = 4096


def append_new(path: Path, rows: Iterable[Record]) -> int:
    """Append rows that a file does not hold yet, whenever and in whichever run; returns how many.

    For rows that nobody measured: asked again, a model says the same again.

    Raises:
        StoreError: the file cannot be read or written.
    """
    store = Store(path)
    held = {_timeless(row) for row in store.records()}
    new = [row for row in rows if _timeless(row) not in held]
    store.extend(new)
    return len(new)


def _timeless(row: Record) -> str:
    return row.replace(timestamp_utc="", run_id="").to_json()


def merge(into: Path, paths: Paths) -> int:
    """Append rows that a file does not hold yet; returns how many. Raw samples stay where they are.

    Raises:
        StoreError: a file cannot be read or written.
    """
    additions = _Additions(into / "records.jsonl" if into.is_dir() or not into.suffix else into)
    for row in read_records(paths):
        additions.add(row)
    return additions.finish()


def import_records(into: Path, paths: Paths) -> dict[Path, int]:
    """Take in rows of other machines: one folder per GPU key, so that each stays a store of one kind.

    Returns:
        Rows added, by file.

    Raises:
        StoreError: a file cannot be read or written, or a row does not say which machine it is of, or says it
            so that it would lead out of the folder.
    """
    several = list(paths)
    for fields in read_fields(several):
        key = fields.get("gpu_key")
        if not key or not is_name(key):
            named = fields.get("cell_id") or "(without an id)"
            said = (
                f"says that it is of {key!r}, which is no key"
                if key
                else "does not say which machine it is of"
            )
            raise StoreError(f"row {named} {said}")
    added: dict[Path, _Additions] = {}
    for row in read_records(several):
        path = into / row.gpu_key / "records.jsonl"
        if path not in added:
            added[path] = _Additions(path)
        added[path].add(row)
    return {path: additions.finish() for path, additions in added.items()}


def prune(
    path: Path, *, key_of: Callable[[Record], str], keep: int = 1, rewrite: bool = True
) -> tuple[int, int]:
    """Drop what says nothing any more; returns how many rows go and how many stay.

    These are lines "started" that have an outcome of the same run and pass, and rows that ``keep`` later rows
    of the same key (``key_of``, see `bratune.run.reuse.key_of`) replace. The new file takes the place of the
    old one in one step.

    Raises:
        StoreError: the file cannot be read or written, or it holds something else than records.
    """
    if not rewrite:
        keeps = _keeps(path, keep, key_of)
        return keeps.count(False), keeps.count(True)
    try:
        with locked(path) as fd:  # nobody appends between reading and replacing
            require_records(fd, path)
            mend_end(fd)
            keeps = _keeps(path, keep, key_of)
            if not all(keeps):
                with path.open("rb") as file:
                    _replace(path, (line for line, kept in zip(file, keeps, strict=True) if kept))
    except OSError as error:
        raise StoreError(f"records cannot be written to {path}: {error.strerror or error}") from None
    return keeps.count(False), keeps.count(True)


def repair(path: Path, *, rewrite: bool = True) -> list[tuple[int, str]]:
    """Set lines aside that are no records, so that the file holds records only.

    They go, as they are, to the end of a file beside it (`BAD_SUFFIX`), before they leave this one. A record
    at the end that lacks its newline is completed, half a record there is set aside too.

    Args:
        path: The file.
        rewrite: False only looks.

    Returns:
        The number of every such line and why it is no record.

    Raises:
        StoreError: the file cannot be read or written, or no line of it is a record.
    """
    if path.name.endswith(SAMPLES_SUFFIX):
        raise StoreError(f"{path} holds samples, not records")
    try:
        with locked(path) if rewrite else contextlib.nullcontext():
            found, good = [], 0
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if why := _why_no_record(line):
                        found.append((number, why))
                    else:
                        good += bool(line.strip())
            if found and not good:
                raise StoreError(f"{path} is left as it is: none of its lines is a record ({found[0][1]})")
            if found and rewrite:
                bad = {number for number, _ in found}
                with path.open("rb") as file, open(f"{path}{BAD_SUFFIX}", "ab") as aside:
                    for number, line in enumerate(file, start=1):
                        if number in bad:
                            aside.write(line if line.endswith(b"\n") else line + b"\n")
                    aside.flush()
                    os.fsync(aside.fileno())
                    file.seek(0)
                    _replace(path, (_ended(line) for n, line in enumerate(file, start=1) if n not in bad))
            return found
    except OSError as error:
        raise StoreError(f"records cannot be written to {path}: {error.strerror or error}") from None


def _why_no_record(line: bytes) -> str:
    """Why a line is no record; empty for one, and for an empty line."""
    if not line.strip():
        return ""
    try:
        parse_line(line, Record.from_json)
    except StoreError as error:
        return str(error)
    return ""


def _ended(line: bytes) -> bytes:
    line = line.removeprefix(b"\xef\xbb\xbf")
    return line if line.endswith(b"\n") else line + b"\n"


def _keeps(path: Path, keep: int, key_of: Callable[[Record], str]) -> list[bool]:
    """Of every line of a file, whether it stays; one that is no record does."""
    # Of a line "started", its run, cell and pass; of any other, what replaces it.
    keys: list[tuple[str, str, int | None] | str] = []
    done: set[tuple[str, str, int | None]] = set()
    with path.open("rb") as file:
        for line in file:
            try:
                row = parse_line(line, Record.from_json)
                if row.outcome == "started":
                    keys.append((row.run_id, row.cell_id, row.pass_number))
                else:
                    keys.append(key_of(row) if row.cell else "")
                    done.add((row.run_id, row.cell_id, row.pass_number))
            except (StoreError, ValueError):  # no record, or none of a cell: `repair` is for these
                keys.append("")
    keeps: list[bool] = []
    later: dict[str, int] = defaultdict(int)
    for key in reversed(keys):
        if isinstance(key, tuple):
            keeps.append(key not in done)
            continue
        later[key] += bool(key)
        keeps.append(later[key] <= keep)
    keeps.reverse()
    return keeps


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
    count = 0
    try:
        with (
            _in_place_of(output) as name,
            parquet.ParquetWriter(name, _schema(pyarrow), compression="zstd") as writer,
        ):
            for group in _groups(_tables(pyarrow, paths)):
                writer.write_table(pyarrow.concat_tables(group))
                count += sum(table.num_rows for table in group)
    except OSError as error:
        raise StoreError(f"records cannot be written to {output}: {error.strerror or error}") from None
    return count


def _schema(pyarrow: Any) -> Any:
    """Names and kinds of the columns of a compact copy."""
    arrow = {str: pyarrow.string(), bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    return pyarrow.schema([(name, arrow[kind]) for name, kind in field_types().items()])


def _tables(pyarrow: Any, paths: Paths) -> Iterator[Any]:
    """Finished rows as Arrow tables, some thousand in each, parsed by Arrow where it can."""
    from pyarrow import compute, json

    schema = _schema(pyarrow)
    parse = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    defaults = {f.name: f.default for f in dataclasses.fields(Record) if f.default is not None}
    for batch in batches(paths, _PARSED_BYTES):
        try:
            whole = b"".join(batch.lines) if batch.lines[-1].endswith(b"\n") else b""
            found = json.read_json(io.BytesIO(whole), parse_options=parse)
            schemas = found["schema"]
            if schemas.null_count or compute.max(schemas).as_py() not in (None, *range(SCHEMA + 1)):
                raise pyarrow.ArrowInvalid
        except (
            pyarrow.ArrowInvalid
        ):  # a line that is torn, of a newer schema or no record: which, is said here
            rows = list(batch.one_by_one(parse_fields))
            columns = {name: [row.get(name) for row in rows] for name in schema.names}
            try:
                found = pyarrow.Table.from_pydict(columns, schema=schema)
            except pyarrow.ArrowException as error:
                raise StoreError(f"a record of {batch.path} holds what it should not: {error}") from None
        else:
            batch.all_good()
        for name, default in defaults.items():
            place = schema.get_field_index(name)
            found = found.set_column(place, schema.field(place), compute.fill_null(found[name], default))
        yield found.filter(compute.not_equal(found["outcome"], "started"))


def _groups(tables: Iterable[Any]) -> Iterator[list[Any]]:
    """Tables, as many together as are written at once."""
    group: list[Any] = []
    for table in tables:
        group.append(table)
        if sum(table.num_rows for table in group) >= _BATCH:
            yield group
            group = []
    if group:
        yield group


class _Additions:
    """Appends to a file the rows that it does not hold yet, some thousand at a time."""

    def __init__(self, path: Path) -> None:
        self._store = Store(path)
        self._held = {_digest(row) for row in read_records([path])}
        self._waiting: list[Record] = []
        self._count = 0

    def add(self, row: Record) -> None:
        digest = _digest(row)
        if digest not in self._held:
            self._held.add(digest)
            self._waiting.append(row)
            if len(self._waiting) >= _AT_ONCE:
                self._write()

    def finish(self) -> int:
        """Write what waits; returns how many rows were added."""
        self._write()
        return self._count

    def _write(self) -> None:
        self._store.extend(self._waiting)
        self._count += len(self._waiting)
        self._waiting.clear()


def _digest(row: Record) -> bytes:
    return hashlib.blake2b(row.to_json().encode(), digest_size=16).digest()


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """Put new content in the place of a file, all or nothing."""
    with _in_place_of(path) as name, open(name, "wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _in_place_of(path: Path) -> Iterator[str]:
    """A name to write under; what was written there takes the place of a file if nothing goes wrong.

    Of the file itself, where the path is a link to it.
    """
    path = path.resolve()
    name = new_file_beside(path)
    try:
        yield name
        if path.exists():
            os.chmod(name, path.stat().st_mode)
        os.replace(name, path)
    except BaseException:  # Ctrl-C too leaves nothing behind
        os.unlink(name)
        raise
