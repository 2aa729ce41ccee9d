"""Columns: lines of records as columns of a table, without an object per row.

Numbers are packed, of everything else each different value is held once, and what is the same in a whole
batch of lines takes no room: a row of 90 fields needs some 200 bytes, where an object needs 1,700.

A few columns are cut out of the lines by searching for their names, which takes a fraction of the time of
parsing. That is sound because of how `bratune.record.Record.to_json` writes: flat, without blanks, the schema
first; and because a quotation mark inside a text is escaped, so that ``,"name":`` is always a field. A line
that looks otherwise is parsed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bratune.errors import StoreError, UnknownNameError
from bratune.record import LONGEST, SCHEMA, Record, check_fields, field_types, require_known
from bratune.text import printable

if TYPE_CHECKING:
    import numpy
    import pandas

    Array = numpy.ndarray[Any, Any]

__all__ = ["Coded", "Columns", "Names", "PackedNumbers", "Unusual", "parse_together"]

# With more columns than this, parsing whole lines is as fast.
_FEW = 16
# Rows that are packed at a time.
_TOGETHER = 1024
# Different values whose texts are remembered, so that each is decoded once.
_MEMORY = 100_000
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_BEGINNING = f'{{"schema":{SCHEMA},'.encode()
_ANOTHER = b'{"schema":'
# What only damaged lines hold, or lines that have to be looked at: zeros, and halves of characters.
_SUSPECT = (b"\0", b"\\ud", b"\\uD")


class Unusual(Exception):
    """Lines that have to be looked at one by one."""


def parse_together(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The fields of lines, parsed in one go: names of fields are then made once and not once per line.

    Raises:
        Unusual: one of them is not a record of a schema that this version reads.
    """
    if max(map(len, lines), default=0) > LONGEST:
        raise Unusual
    try:
        found = json.loads(b"[%b]" % b",".join(lines))
        if len(found) != len(lines) or not all(type(fields) is dict for fields in found):
            raise Unusual
        for fields in found:
            require_known(fields)
        return [check_fields(fields) for fields in found]
    except (ValueError, RecursionError, StoreError):
        raise Unusual from None


class Columns:
    """Collects lines and becomes a table.

    Args:
        names: Fields of `Record`, in this order; None for all.
        started: Keep the lines that were written before a cell was launched.

    Raises:
        UnknownNameError: a name is not a field of `Record`.
    """

    def __init__(self, names: Sequence[str] | None = None, *, started: bool = False) -> None:
        kinds = field_types()
        defaults = {field.name: field.default for field in dataclasses.fields(Record)}
        self.names = list(kinds) if names is None else list(names)
        for name in self.names:
            if name not in kinds:
                raise UnknownNameError("column", name, kinds)
        self._started = started
        self._kinds = {name: kinds[name] for name in self.names}
        self._defaults = {name: defaults[name] for name in self.names}
        self.packed: dict[str, Packed] = {name: _packed(name, kinds[name]) for name in self.names}
        self._known: dict[bytes, Any] = {}
        self._waiting: list[Record] = []
        self._searched = len(self.names) <= _FEW and "schema" not in self.names

    def add_lines(self, lines: Sequence[bytes]) -> None:
        """Take in whole lines.

        Raises:
            Unusual: one of them is not an ordinary record; nothing was taken in.
        """
        if not self._searched:
            self.add_rows(parse_together(lines))
            return
        values: dict[str, list[Any]] = {name: [] for name in self.names}
        together = b"".join(lines)
        if len(together) > LONGEST and max(map(len, lines)) > LONGEST:
            raise Unusual
        if any(mark in together for mark in _SUSPECT):
            raise Unusual
        targets = [
            (f',"{name}":'.encode(), len(name) + 4, kind is float, self._defaults[name], values[name].append)
            for name, kind in self._kinds.items()
        ]
        for line in lines:
            find = line.find
            if not line.startswith(_BEGINNING) or not line.endswith(b"}\n") or find(_ANOTHER, 1) >= 0:
                raise Unusual
            if not self._started and find(b',"outcome":"started"') >= 0:
                continue
            for key, length, number, default, append in targets:
                at = find(key)
                append(default if at < 0 else self._value(line, at + length, number))
        try:
            self._keep(values)
        except StoreError:
            raise Unusual from None

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in fields that were parsed.

        Raises:
            StoreError: a field holds something else than it should.
        """
        kept = [row for row in rows if self._started or row.get("outcome") != "started"]
        self._keep({name: [row.get(name, d) for row in kept] for name, d in self._defaults.items()})

    def add_record(self, record: Record) -> None:
        """Take in a row; many are packed together."""
        self._waiting.append(record)
        if len(self._waiting) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Pack the rows that `add_record` left waiting."""
        waiting, self._waiting = self._waiting, []
        self.add_rows([record.to_dict() for record in waiting])

    def table(self) -> pandas.DataFrame:
        """Everything that was taken in, one row per record."""
        import pandas

        self.flush()
        found = {name: self.packed[name].column() for name in self.names}
        return pandas.DataFrame(found, columns=self.names, copy=False)

    def _value(self, line: bytes, at: int, number: bool) -> Any:
        """The value that begins at a place of a line."""
        if line[at] == _QUOTE:
            end = line.find(b'"', at + 1) + 1
            while end and line[end - 2] == _BACKSLASH and _is_escaped(line, end - 1):
                end = line.find(b'"', end) + 1
        else:
            end = line.find(b",", at)
            if end < 0:
                end = len(line) - 2
        text = line[at:end]
        try:
            if number:
                return float(text)
            value = self._known.get(text, self)
            if value is self:
                if len(self._known) >= _MEMORY:
                    self._known.clear()
                value = self._known[text] = json.loads(text)
                if type(value) is str:
                    value = self._known[text] = sys.intern(printable(value))
            return value
        except (ValueError, RecursionError):
            raise Unusual from None

    def _keep(self, values: Mapping[str, list[Any]]) -> None:
        made = {name: self.packed[name].pack(column) for name, column in values.items()}
        for name, chunk in made.items():
            if len(chunk):
                self.packed[name].chunks.append(chunk)


def _is_escaped(line: bytes, quote: int) -> bool:
    """Whether the quotation mark at a place is part of a text: an odd number of backslashes precedes it."""
    start = quote
    while line[start - 1] == _BACKSLASH:
        start -= 1
    return (quote - start) % 2 == 1


class Packed(Protocol):
    """The values of one field, packed in chunks."""

    chunks: list[Array]

    def pack(self, values: Sequence[Any]) -> Array:
        """A chunk of values, not kept yet; raises `StoreError` where one is none of this field."""

    def whole(self) -> Array:
        """All chunks in one, as they are packed."""

    def ids(self) -> Array:
        """A number for each row, equal where the values are."""

    def values(self, packed: Array) -> list[Any]:
        """What packed values stand for, None for what is absent."""

    def column(self) -> Any:
        """All values as a table holds them; an absent number is NaN."""


def _packed(name: str, kind: type) -> Packed:
    if kind is float:
        return PackedNumbers(name)
    return Names(name) if name == "cell_id" else Coded(name, kind)


class PackedNumbers:
    """A field of numbers: eight bytes each, NaN where there is none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.chunks: list[Array] = []

    def pack(self, values: Sequence[Any]) -> Array:
        """See `Packed.pack`."""
        import numpy

        try:
            found = numpy.array(values, dtype=float)
        except (ValueError, TypeError, OverflowError):
            wrong = next((v for v in values if v is not None and not isinstance(v, int | float)), values[0])
            raise StoreError(f"{self._name} of a record should be a number and is {wrong!r}") from None
        absent = int(numpy.isnan(found).sum())
        if absent != values.count(None):  # NaN was written
            raise StoreError(f"{self._name} should be a finite number")
        if absent < found.size:
            for value in (numpy.nanmin(found), numpy.nanmax(found)):
                check_fields({self._name: value.item()})
        return _folded(found)

    def whole(self) -> Array:
        """See `Packed.whole`."""
        import numpy

        return _joined(self.chunks, numpy.dtype(float))

    def ids(self) -> Array:
        """See `Packed.ids`."""
        import numpy

        return numpy.unique(self.whole(), return_inverse=True)[1]

    def values(self, packed: Array) -> list[Any]:
        """See `Packed.values`."""
        return [None if value != value else value for value in packed.tolist()]

    def column(self) -> Any:
        """See `Packed.column`."""
        return self.whole()


class Coded:
    """A field of texts, whole numbers or yes and no: each different value once, and a short code per row."""

    def __init__(self, name: str, kind: type) -> None:
        self._name, self._kind = name, kind
        self.chunks: list[Array] = []
        self.known: list[Any] = []
        self._codes: dict[Any, int] = {}

    def pack(self, values: Sequence[Any]) -> Array:
        """See `Packed.pack`."""
        import numpy

        codes = self._codes
        try:
            for value in dict.fromkeys(values):
                if value not in codes:
                    check_fields({self._name: value})
                    codes[value] = len(self.known)
                    self.known.append(sys.intern(value) if type(value) is str else value)
        except TypeError:  # a list or an object, which cannot be looked up
            raise StoreError(f"{self._name} of a record should be a {self._kind.__name__}") from None
        dtype = next(d for d in (numpy.uint8, numpy.uint16, numpy.uint32) if len(codes) <= numpy.iinfo(d).max)
        return _folded(numpy.fromiter((codes[value] for value in values), dtype, len(values)))

    def whole(self) -> Array:
        """See `Packed.whole`."""
        import numpy

        return _joined(self.chunks, numpy.dtype(numpy.uint8))

    def ids(self) -> Array:
        """See `Packed.ids`."""
        return self.whole()

    def values(self, packed: Array) -> list[Any]:
        """See `Packed.values`."""
        known = self.known
        return [known[code] for code in packed.tolist()]

    def column(self) -> Any:
        """See `Packed.column`."""
        import numpy
        import pandas

        known: Array = numpy.empty(len(self.known), dtype=object)
        known[:] = self.known
        whole = self.whole()
        if self._kind is str:
            return _texts(pandas, known[whole])
        used = [self.known[code] for code in numpy.unique(whole).tolist()]
        if None not in used:
            return known[whole].astype(self._kind)
        return known[whole] if self._kind is bool else known[whole].astype(float)


class Names:
    """A field of short names of which most are different: their bytes, without an object for each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.chunks: list[Array] = []

    def pack(self, values: Sequence[Any]) -> Array:
        """See `Packed.pack`."""
        import numpy

        for value in values:
            if type(value) is not str:
                check_fields({self._name: value})
        try:
            return numpy.array([value.encode("ascii") for value in values], dtype=bytes)
        except UnicodeEncodeError:
            found: Array = numpy.empty(len(values), dtype=object)
            found[:] = [value.encode() for value in values]
            return found

    def whole(self) -> Array:
        """See `Packed.whole`."""
        import numpy

        return _joined(self.chunks, numpy.dtype("S1"))

    def ids(self) -> Array:
        """See `Packed.ids`."""
        import numpy

        return numpy.unique(self.whole(), return_inverse=True)[1]

    def values(self, packed: Array) -> list[Any]:
        """See `Packed.values`."""
        return [value.decode() for value in packed.tolist()]

    def column(self) -> Any:
        """See `Packed.column`."""
        import numpy
        import pandas

        found: Array = numpy.empty(sum(map(len, self.chunks)), dtype=object)
        found[:] = self.values(self.whole())
        return _texts(pandas, found)


def _folded(chunk: Array) -> Array:
    """A chunk without the memory of its values where they are all the same."""
    import numpy

    same = chunk.size > 1 and ((chunk == chunk[0]).all() or (chunk != chunk).all())
    return numpy.broadcast_to(chunk[0].copy(), chunk.shape) if same else chunk


def _joined(chunks: list[Array], dtype: numpy.dtype[Any]) -> Array:
    """Chunks as one, which takes their place; a chunk of one value stays without memory where it is alone."""
    import numpy

    if not chunks:
        return numpy.empty(0, dtype)
    if len(chunks) > 1:
        first = chunks[0][:1]
        if all(c.strides == (0,) and _same(c[:1], first) for c in chunks):
            whole = numpy.broadcast_to(first[0], (sum(map(len, chunks)),))
        else:
            whole = numpy.concatenate(chunks)
        chunks[:] = [whole]
    return chunks[0]


def _same(one: Array, other: Array) -> bool:
    return bool((one == other).all() or ((one != one) & (other != other)).all())


def _texts(pandas: Any, values: numpy.ndarray[Any, Any]) -> Any:
    """Texts as pandas holds texts, but one object per different text instead of a copy per row."""
    usual = pandas.Series([""]).dtype
    if not isinstance(usual, pandas.StringDtype):
        return values  # before pandas 3 texts are objects
    return pandas.array(values, dtype=pandas.StringDtype("python", na_value=usual.na_value))
