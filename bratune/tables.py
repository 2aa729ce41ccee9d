"""Tables: rows of text as aligned columns, Markdown or CSV, at most a hundred characters wide."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from bratune.text import for_spreadsheet, one_line, printable

__all__ = ["WIDTH", "Note", "Table", "to_csv", "to_markdown", "to_text"]

WIDTH = 100


@dataclass(frozen=True)
class Note:
    """A sentence in place of the last cells of a row.

    Args:
        before: Cells in front of the sentence.
        text: The sentence; wrapped to the width that is left.
    """

    before: tuple[str, ...]
    text: str


Row = tuple[str, ...] | Note


@dataclass(frozen=True)
class Table:
    """Columns and rows.

    Attributes:
        columns: Headings; one that starts with ``<`` has a left-aligned column.
        rows: Cells, or a `Note`.
        title: A line above; may be empty.
        notes: Sentences below, each wrapped to the width.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings without their mark."""
        return tuple(c.removeprefix("<") for c in self.columns)


def to_text(table: Table, *, width: int = WIDTH) -> str:
    """Aligned columns for a terminal; they move closer where they would be wider than the width."""
    heads = table.headings
    sizes = [len(head) for head in heads]
    rows = [_on_lines(row) for row in table.rows]
    for row in rows:
        cells = row.before if isinstance(row, Note) else row
        sizes = [max(size, len(cell)) for size, cell in zip(sizes, _filled(cells, len(heads)), strict=True)]
    gap = "  " if sum(sizes) + 2 * (len(sizes) - 1) <= width else " "
    left = [column.startswith("<") for column in table.columns]

    def line(cells: Sequence[str]) -> str:
        parts = [
            c.ljust(s) if is_left else c.rjust(s) for c, s, is_left in zip(cells, sizes, left, strict=False)
        ]
        return gap.join(parts)

    lines = [printable(table.title)] if table.title else []
    lines.append(line(heads).rstrip())
    for row in rows:
        if isinstance(row, Note):
            start = line(row.before) + gap
            pieces = textwrap.wrap(row.text, max(30, width - len(start))) or [""]
            lines.append((start + pieces[0]).rstrip())
            lines += [" " * len(start) + piece for piece in pieces[1:]]
        else:
            lines.append(line(row).rstrip())
    for note in table.notes:
        lines += textwrap.wrap(one_line(note), width, subsequent_indent="  ")
    return "\n".join(lines)


def to_markdown(table: Table) -> str:
    """A Markdown table under its title."""
    heads = table.headings
    marks = ["---" if column.startswith("<") else "---:" for column in table.columns]
    lines = [f"**{printable(table.title)}**", ""] if table.title else []
    lines += [_bar(heads), _bar(marks)]
    for row in map(_on_lines, table.rows):
        cells = (*row.before, row.text) if isinstance(row, Note) else row
        lines.append(_bar(_filled(cells, len(heads))))
    for note in table.notes:
        lines += ["", one_line(note)]
    return "\n".join(lines)


def to_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values with a heading; an absent value is an empty cell.

    A text that a spreadsheet would take for a formula begins with a quote.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[_shown(value) for value in row] for row in rows])
    return buffer.getvalue().rstrip("\n")


def _shown(value: object) -> object:
    return "" if value is None else for_spreadsheet(value) if isinstance(value, str) else value


def _on_lines(row: Row) -> Row:
    """A row whose cells are on one line each and hold nothing that a terminal would obey."""
    if isinstance(row, Note):
        return Note(tuple(map(one_line, row.before)), one_line(" ".join(row.text.split())))
    return tuple(map(one_line, row))


def _filled(cells: Sequence[str], count: int) -> tuple[str, ...]:
    return (*cells, *[""] * (count - len(cells)))


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
