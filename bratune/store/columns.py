"""Columns: lines of records as columns of a table, without an object per row.

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
from typing import TYPE_CHECKING, Any

from bratune.errors import StoreError, UnknownNameError
from bratune.record import LONGEST, SCHEMA, Record, check_fields, field_types
from bratune.text import printable

if TYPE_CHECKING:
    import numpy
    import pandas

__all__ = ["Columns", "Unusual", "parse_together"]

# With more columns than this, parsing whole lines is as fast.
_FEW = 16
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
        self._chunks: dict[str, list[numpy.ndarray[Any, Any]]] = {name: [] for name in self.names}
        self._known: dict[bytes, Any] = {}
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
            self._keep(values, checked=False)
        except StoreError:
            raise Unusual from None

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in fields that were parsed.

        Raises:
            StoreError: a field holds something else than it should.
        """
        kept = [row for row in rows if self._started or row.get("outcome") != "started"]
        intern = sys.intern
        values = {}
        for name, default in self._defaults.items():
            column = [row.get(name, default) for row in kept]
            if self._kinds[name] is str:
                # Most texts repeat from row to row: one object each is what lets millions of rows fit.
                column = [intern(value) if type(value) is str else value for value in column]
            values[name] = column
        self._keep(values)

    def table(self) -> pandas.DataFrame:
        """Everything that was taken in, one row per record."""
        import numpy
        import pandas

        found: dict[str, Any] = {}
        for name in self.names:
            chunks = self._chunks.pop(name, []) or [_array([], self._kinds[name], name)]
            whole = numpy.concatenate(chunks)
            chunks.clear()
            found[name] = _texts(pandas, whole) if self._kinds[name] is str else whole
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

    def _keep(self, values: Mapping[str, list[Any]], *, checked: bool = True) -> None:
        made = {name: _array(column, self._kinds[name], name) for name, column in values.items()}
        if not checked:
            for name, column in made.items():
                _require_range(name, column, values[name])
        for name, column in made.items():
            self._chunks[name].append(column)


def _is_escaped(line: bytes, quote: int) -> bool:
    """Whether the quotation mark at a place is part of a text: an odd number of backslashes precedes it."""
    start = quote
    while line[start - 1] == _BACKSLASH:
        start -= 1
    return (quote - start) % 2 == 1


def _array(values: list[Any], kind: type, name: str) -> numpy.ndarray[Any, Any]:
    """Values as an array: numbers packed, where they are all there; an absent number is NaN."""
    import numpy

    if kind is str:
        found = numpy.empty(len(values), dtype=object)
        found[:] = values
        return found
    absent = None in values
    dtype: Any = float if kind is float or (absent and kind is int) else kind
    if kind is bool and absent:
        dtype = object
    try:
        return numpy.array(values, dtype=dtype)
    except (ValueError, TypeError, OverflowError):
        wrong = next((v for v in values if v is not None and not isinstance(v, int | float)), values[0])
        raise StoreError(f"{name} of a record should be a number and is {wrong!r}") from None


def _require_range(name: str, column: numpy.ndarray[Any, Any], values: Sequence[Any]) -> None:
    """Raise `StoreError` where a column holds what `bratune.record.check_fields` refuses, or could."""
    import numpy

    if column.dtype == object:
        known = {value for value in values if value is not None}
        for value in known:
            check_fields({name: value})
    elif column.dtype.kind in "if" and column.size:
        absent = int(numpy.isnan(column).sum())
        if absent != values.count(None):  # NaN was written
            raise StoreError(f"{name} should be a finite number")
        if absent < column.size:
            for value in (numpy.nanmin(column), numpy.nanmax(column)):
                check_fields({name: value.item()})


def _texts(pandas: Any, values: numpy.ndarray[Any, Any]) -> Any:
    """Texts as pandas holds texts, but one object per different text instead of a copy per row."""
    usual = pandas.Series([""]).dtype
    if not isinstance(usual, pandas.StringDtype):
        return values  # before pandas 3 texts are objects
    return pandas.array(values, dtype=pandas.StringDtype("python", na_value=usual.na_value))
