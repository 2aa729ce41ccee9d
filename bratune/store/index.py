"""Index: where in a file of records the rows of each cell stand.

A run that continues a store asks it about its own cells only; an object for every row would be a waste of
time and memory, because a store may hold millions: 16 bytes are kept of each.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bratune.errors import StoreError
from bratune.record import LONGEST, SCHEMA, Record, parse_fields, parse_line

if TYPE_CHECKING:
    import numpy

__all__ = ["Index"]

_BATCH_BYTES = 1 << 23
_BEGINNING = f'{{"schema":{SCHEMA},'.encode()
_NAME = b',"cell_id":"'
_RUN = b',"run_id":"'
_STARTED = b',"outcome":"started"'
_PASS, _SAMPLING = b'"pass_number":', b'"sampling":'
# The outcome stands a few short fields behind the name of the cell.
_NEAR = 200


class Index:
    """Finished rows of a file by their cell, those included that others add meanwhile; for any thread.

    The file stays open, so that the rows are there even if somebody deletes it; one that takes its place, as
    after `bratune cache prune`, is read from its beginning.

    Args:
        path: A file of records; one that is missing holds none.

    Raises:
        StoreError: the file cannot be read. A line that is no record is left out, with a warning.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._places = _Places()
        # Of lines "started" without an outcome of the same run and pass yet: the place, by cell, run, pass
        # and how it is sampled, which tells the passes of a comparison of its own.
        self._started: dict[tuple[bytes, ...], int] = {}
        self._file: BinaryIO | None = None
        self._seen_bytes = self._seen_lines = 0
        self._lock = threading.Lock()  # the place in the file is one for all threads
        self._look_again()

    def __len__(self) -> int:
        """Cells with a finished row."""
        return len(self._places)

    def rows(self, cell_id: str) -> list[Record]:
        """The finished rows of a cell, in the order written.

        Raises:
            StoreError: the file cannot be read.
        """
        with self._lock:
            self._look_again()
            return self._read(cell_id, self._places.of(cell_id.encode()))

    def unfinished(self, cell_id: str) -> list[Record]:
        """Lines "started" of a cell that no outcome of the same run and pass follows, in the order written.

        Raises:
            StoreError: the file cannot be read.
        """
        with self._lock:
            self._look_again()
            name = cell_id.encode()
            return self._read(cell_id, [place for (cell, *_), place in self._started.items() if cell == name])

    def _read(self, cell_id: str, places: list[int]) -> list[Record]:
        rows: list[Record] = []
        if self._file is None:
            return rows
        for place in places:
            try:
                self._file.seek(place)
                row = parse_line(self._file.readline(LONGEST + 1), Record.from_json)
            except OSError as error:
                raise StoreError(f"a row of {self.path} cannot be read: {error}") from None
            except StoreError as error:
                warnings.warn(f"{self.path}, a row of {cell_id}: {error}; it is left out", stacklevel=4)
                continue
            if row.cell_id == cell_id:
                rows.append(row)
        return rows

    def _look_again(self) -> None:
        """Find the rows that were added since the last time."""
        try:
            if self._file is not None and self._was_replaced(self._file):
                self._file.close()
                self._file = None
                self._places, self._started = _Places(), {}
                self._seen_bytes = self._seen_lines = 0
            if self._file is None:
                if not self.path.exists():
                    return
                self._file = self.path.open("rb")
            if os.fstat(self._file.fileno()).st_size > self._seen_bytes:
                self._scan(self._file)
        except OSError as error:
            raise StoreError(f"records cannot be read from {self.path}: {error.strerror or error}") from None

    def _was_replaced(self, file: BinaryIO) -> bool:
        """Whether another file has the name now; not where there is none."""
        try:
            return not os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _scan(self, file: BinaryIO) -> None:
        file.seek(self._seen_bytes)
        while lines := file.readlines(_BATCH_BYTES):
            for line in lines:
                if not line.endswith(b"\n"):  # it is being written, or its writer died
                    return
                self._seen_lines += 1
                self._take_in(line, self._seen_bytes)
                self._seen_bytes += len(line)

    def _take_in(self, line: bytes, place: int) -> None:
        cell, run, started = self._names_in(line)
        if started:
            self._started[cell, run, *_pass_in(line)] = place
        elif cell:
            if self._started:
                self._started.pop((cell, run, *_pass_in(line)), None)
            self._places.add(cell, place)

    def _names_in(self, line: bytes) -> tuple[bytes, bytes, bool]:
        """Cell and run of a line, and whether it only says that the cell was started; empty for no record."""
        start = line.find(_NAME) + len(_NAME)
        if start >= len(_NAME) and line.startswith(_BEGINNING) and line.endswith(b"}\n"):
            end = line.find(b'"', start)
            begin = line.find(_RUN, 0, start) + len(_RUN)
            run = line[begin : line.find(b'"', begin)] if begin >= len(_RUN) else b""
            return line[start:end], run, line.find(_STARTED, end, end + _NEAR) >= 0
        if not line.strip():
            return b"", b"", False
        try:
            fields = parse_line(line, parse_fields)
        except StoreError as error:
            warnings.warn(
                f"{self.path}, line {self._seen_lines}: {error}; this line is left out", stacklevel=6
            )
            return b"", b"", False
        cell, run = (str(fields.get(name, "")).encode() for name in ("cell_id", "run_id"))
        return cell, run, fields.get("outcome") == "started"


def _pass_in(line: bytes) -> tuple[bytes, bytes]:
    """The number of the pass that a line is of, and how it is sampled, as written; empty where it has none.

    In a text of the line the quotation marks would be escaped, so that the names are always those of fields.
    """
    at = line.find(_PASS)
    number = b"" if at < 0 else line[at + len(_PASS) : at + _NEAR].split(b",")[0].strip(b"} \r\n")
    at = line.find(_SAMPLING)
    how = b"" if at < 0 else b'"'.join(line[at + len(_SAMPLING) :].split(b'"', 2)[1:2])
    return number, how


# So many places are looked through one by one; more are sorted first.
_FEW = 4096


class _Places:
    """Places of rows by the name of their cell, in the order added; 16 bytes each.

    Two names may be taken for one, so that what stands at a place has to be looked at.
    """

    def __init__(self) -> None:
        self._names, self._places = array("Q"), array("q")  # added since the last sorting
        self._sorted: tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]] | None = None

    def __len__(self) -> int:
        import numpy

        self._sort()
        return 0 if self._sorted is None else int(numpy.unique(self._sorted[0]).size)

    def add(self, name: bytes, place: int) -> None:
        self._names.append(_number(name))
        self._places.append(place)

    def of(self, name: bytes) -> list[int]:
        if len(self._names) > _FEW:
            self._sort()
        number, found = _number(name), []
        if self._sorted is not None:
            names, places = self._sorted
            low, high = (
                int(names.searchsorted(names.dtype.type(number), side)) for side in ("left", "right")
            )
            found += places[low:high].tolist()
        found += [place for n, place in zip(self._names, self._places, strict=True) if n == number]
        return found

    def _sort(self) -> None:
        import numpy

        if not self._names:
            return
        names, places = (numpy.array(a) for a in (self._names, self._places))
        if self._sorted is not None:
            names = numpy.concatenate([self._sorted[0], names])
            places = numpy.concatenate([self._sorted[1], places])
        order = names.argsort(kind="stable")
        self._sorted = names[order], places[order]
        self._names, self._places = array("Q"), array("q")


def _number(name: bytes) -> int:
    """The 64 bits of a cell's name; of any other text, as many that follow from it."""
    if len(name) == 16:
        try:
            return int(name, 16)
        except ValueError:
            pass
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
