"""Text: words that come from files, made harmless where a terminal, a comment or a spreadsheet shows them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

__all__ = [
    "NAME",
    "for_spreadsheet",
    "html_table",
    "is_name",
    "is_plain",
    "is_whole_numbers",
    "one_line",
    "printable",
]

# What a name from a file may be made of: it becomes part of a path, an identifier or a comment.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
_NUMBERS = re.compile(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?(,[+-]?[0-9.]+)*")
_WHOLE = re.compile(r"-?[0-9]{1,9}(,-?[0-9]{1,9})*")


def is_name(text: str) -> bool:
    """Whether a text may name a task, a backend or a kind of machine."""
    return re.fullmatch(NAME, text) is not None


def is_whole_numbers(text: str) -> bool:
    """Whether a text is a whole number, or several with commas between: ``1,4,16,-2``."""
    return _WHOLE.fullmatch(text) is not None


def is_plain(text: str) -> bool:
    """Whether every character is printed and none moves, colours or ends a line."""
    return text.isprintable()


def one_line(text: str) -> str:
    """A text on one line, with every character that is not printed spelled out: an escape as four letters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """As `one_line`, but ends of lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" else one_line(c) for c in text)


def html_table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a page or a notebook; its texts stand for themselves."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def for_spreadsheet(text: str) -> str:
    """A text that a spreadsheet shows and does not run: one that begins like a formula gets a quote."""
    text = one_line(text)
    if text[:1] in ("=", "+", "-", "@") and not _NUMBERS.fullmatch(text):
        return f"'{text}"
    return text
