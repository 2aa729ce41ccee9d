"""Index: where in a file of records the rows of each cell stand.

A run that continues a store asks it about its own cells only; an object for every row would be a waste of
time and memory, because a store may hold millions.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import BinaryIO

from bratune.errors import StoreError
from bratune.record import LONGEST, SCHEMA, Record, parse_fields, parse_line

__all__ = ["Index"]

_BATCH_BYTES = 1 << 23
_BEGINNING = f'{{"schema":{SCHEMA},'.encode()
_NAME = b',"cell_id":"'
_STARTED = b',"outcome":"started"'
# The outcome stands a few short fields behind the name of the cell.
_NEAR = 200


class Index:
    """Finished rows of a file by their cell, those included that others add meanwhile; for any thread.

    The file stays open, so that the rows are there even if another process puts a new one in its place.

    Args:
        path: A file of records; one that is missing holds none.

    Raises:
        StoreError: the file cannot be read. A line that is no record is left out, with a warning.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._places: dict[bytes, int | list[int]] = {}
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
            return self._rows(cell_id)

    def _rows(self, cell_id: str) -> list[Record]:
        found = self._places.get(cell_id.encode())
        if found is None or self._file is None:
            return []
        rows = []
        for place in [found] if isinstance(found, int) else found:
            try:
                self._file.seek(place)
                rows.append(parse_line(self._file.readline(LONGEST + 1), Record.from_json))
            except OSError as error:
                raise StoreError(f"a row of {self.path} cannot be read: {error}") from None
            except StoreError as error:
                warnings.warn(f"{self.path}, a row of {cell_id}: {error}; it is left out", stacklevel=4)
        return rows

    def _look_again(self) -> None:
        """Find the rows that were added since the last time."""
        try:
            if self._file is None:
                if not self.path.exists():
                    return
                self._file = self.path.open("rb")
            if os.fstat(self._file.fileno()).st_size > self._seen_bytes:
                self._scan(self._file)
        except OSError as error:
            raise StoreError(f"records cannot be read from {self.path}: {error.strerror or error}") from None

    def _scan(self, file: BinaryIO) -> None:
        file.seek(self._seen_bytes)
        while lines := file.readlines(_BATCH_BYTES):
            for line in lines:
                if not line.endswith(b"\n"):  # it is being written, or its writer died
                    return
                self._seen_lines += 1
                name = self._name_in(line)
                if name:
                    self._add(name, self._seen_bytes)
                self._seen_bytes += len(line)

    def _add(self, name: bytes, place: int) -> None:
        known = self._places.get(name)
        if known is None:
            self._places[name] = place
        elif isinstance(known, int):
            self._places[name] = [known, place]
        else:
            known.append(place)

    def _name_in(self, line: bytes) -> bytes:
        """The cell that a line is the outcome of; nothing for any other line."""
        start = line.find(_NAME) + len(_NAME)
        if start >= len(_NAME) and line.startswith(_BEGINNING) and line.endswith(b"}\n"):
            end = line.find(b'"', start)
            return b"" if line.find(_STARTED, end, end + _NEAR) >= 0 else line[start:end]
        if not line.strip():
            return b""
        try:
            fields = parse_line(line, parse_fields)
        except StoreError as error:
            warnings.warn(
                f"{self.path}, line {self._seen_lines}: {error}; this line is left out", stacklevel=5
            )
            return b""
        return b"" if fields.get("outcome") == "started" else str(fields.get("cell_id", "")).encode()
