"""Rows: records of files of millions of lines, packed; an object is made of each when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, overload

from bratune.errors import StoreError
from bratune.record import Record, completed, field_types
from bratune.store.columns import Columns, Unusual, parse_together
from bratune.store.lines import batches

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

__all__ = ["Rows", "read_rows"]

# Objects that are made at a time.
_TOGETHER = 4096
# Rows of one group that are held as objects, 1.7 KiB each.
_MOST_OBJECTS = 100_000


class Rows(Sequence[Record]):
    """Records in the order written, without an object for each.

    A field that was not read has its default. Whole numbers among times come back as floats.

    Args:
        columns: Where they are.
        places: Which of them, and in which order; None for all.
    """

    def __init__(self, columns: Columns, places: Array | None = None) -> None:
        import numpy

        self._columns = columns
        self._by_name: tuple[Array, Array] | None = None
        columns.flush()
        count = len(next(iter(columns.packed.values())).whole())
        self.places: Array = numpy.arange(count, dtype=numpy.uint32) if places is None else places

    @classmethod
    def of(cls, records: Iterable[Record]) -> Rows:
        """Records, packed; those that were only started are left out."""
        if isinstance(records, Rows):
            return records
        columns = Columns()
        for record in records:
            columns.add_record(record)
        return cls(columns)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> Record | Rows:
        if isinstance(at, slice):
            return Rows(self._columns, self.places[at])
        return self._made(self.places[[at]])[0]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self.places), _TOGETHER):
            yield from self._made(self.places[start : start + _TOGETHER])

    def where(self, name: str, holds: Callable[[Any], bool]) -> Rows:
        """The rows of which a field holds what is asked for; asked once for each different value."""
        import numpy

        packed = self._columns.packed[name]
        found, first, back = numpy.unique(packed.ids()[self.places], return_index=True, return_inverse=True)
        values = packed.values(packed.whole()[self.places[first]])
        good = numpy.fromiter(map(holds, values), bool, len(found))
        return Rows(self._columns, self.places[good[back]])

    def named(self, cell_id: str) -> list[Record]:
        """The rows of a cell, in the order written."""
        import numpy

        if self._by_name is None:
            names = self._columns.packed["cell_id"].whole()[self.places]
            order = names.argsort(kind="stable")
            self._by_name = names[order], self.places[order]
        names, places = self._by_name
        try:
            name: Any = cell_id.encode() if names.dtype == object else numpy.bytes_(cell_id, "ascii")
        except UnicodeEncodeError:
            return []
        low, high = (int(names.searchsorted(name, side)) for side in ("left", "right"))
        return self._made(places[low:high])

    def different(self, name: str) -> list[Any]:
        """The values of a field, each once."""
        import numpy

        packed = self._columns.packed[name]
        first = numpy.unique(packed.ids()[self.places], return_index=True)[1]
        return packed.values(packed.whole()[self.places[first]])

    def timed(self) -> Rows:
        """The rows that hold a time; see `Record.ok`."""
        known = self.where("median_ms", lambda value: value is not None)
        return known.where("outcome", lambda value: value in ("measured", "modelled"))

    def groups(self, names: Sequence[str], *, least: int = 1) -> Iterator[Sequence[Record]]:
        """The rows that agree in some fields, in the order in which groups begin.

        Args:
            names: The fields.
            least: Rows that a group must have to be among them.

        Returns:
            Lists; of a group that is too large to be held as objects, `Rows`.
        """
        order, starts = self._sorted_by(names)
        ends = [*starts.tolist(), len(order)][1:]
        waiting: list[tuple[int, int]] = []
        size = 0
        for start, end in zip(starts.tolist(), ends, strict=True):
            if end - start > _MOST_OBJECTS:
                yield from self._several(order, waiting)
                waiting, size = [], 0
                yield Rows(self._columns, order[start:end])
            elif end - start >= least:
                waiting.append((start, end))
                size += end - start
            if size >= _TOGETHER:
                yield from self._several(order, waiting)
                waiting, size = [], 0
        yield from self._several(order, waiting)

    def sizes(self, names: Sequence[str]) -> list[int]:
        """How many rows each of `groups` has."""
        import numpy

        order, starts = self._sorted_by(names)
        return [int(size) for size in numpy.diff(starts, append=len(order))]

    def _several(self, order: Array, spans: list[tuple[int, int]]) -> Iterator[list[Record]]:
        import numpy

        if not spans:
            return
        rows = iter(self._made(numpy.concatenate([order[start:end] for start, end in spans])))
        for start, end in spans:
            yield [next(rows) for _ in range(end - start)]

    def _sorted_by(self, names: Sequence[str]) -> tuple[Array, Array]:
        """Places by group, groups in the order of their first row; and where each group starts."""
        import numpy

        ids: Array = numpy.zeros(len(self.places), dtype=numpy.int64)
        for name in names:
            packed = self._columns.packed[name]
            if packed.whole().strides == (0,):  # one value
                continue
            own = packed.ids()[self.places].astype(numpy.int64)
            # Both are below the number of rows or of values, so that their product fits.
            ids = ids * (int(own.max(initial=0)) + 1) + own
            ids = numpy.unique(ids, return_inverse=True)[1].astype(numpy.int64)
        order = ids.argsort(kind="stable")
        starts = numpy.flatnonzero(numpy.diff(ids[order], prepend=-1))
        # Each group begins with its first row; in their order the groups appeared.
        appeared = order[starts].argsort(kind="stable")
        lengths = numpy.diff(starts, append=len(order))[appeared]
        new_starts = numpy.concatenate([[0], lengths.cumsum()[:-1]]) if len(starts) else starts
        shift = numpy.repeat(starts[appeared] - new_starts, lengths)
        return self.places[order[numpy.arange(len(order)) + shift]], new_starts

    def _made(self, places: Array) -> list[Record]:
        """Objects of the rows at some places of the columns."""
        if not len(places):
            return []
        names: list[str] = []
        columns: list[Iterable[Any]] = []
        for name, packed in self._columns.packed.items():
            whole = packed.whole()
            names.append(name)
            if whole.strides == (0,):
                columns.append(repeat(packed.values(whole[:1])[0], len(places)))
            else:
                columns.append(packed.values(whole[places]))
        return [Record(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]


def read_rows(
    paths: Iterable[str | os.PathLike[str]],
    *,
    without: Sequence[str] = (),
) -> Rows:
    """Every finished record of files and folders, in the order written, packed.

    Args:
        paths: Files and folders.
        without: Fields that are not needed.

    Raises:
        StoreError: see `bratune.store.read_records`.
    """
    packed = Columns([name for name in field_types() if name not in without])
    for batch in batches(paths):
        try:
            rows = [completed(fields) for fields in parse_together(batch.lines)]
            batch.all_good()
        except (Unusual, StoreError):
            rows = [record.to_dict() for record in batch.one_by_one(Record.from_json)]
        packed.add_rows(rows)
    return Rows(packed)
