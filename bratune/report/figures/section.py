"""Section: one question of a report, with its figures, its data and why it may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bratune.record import Record
from bratune.report.figures.panel import Panel

__all__ = ["Section", "Source"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question.

    Attributes:
        name: Identifier of its figures, its table and its file of data.
        title: The question.
        lead: What is drawn, in a sentence or two.
        panels: Its figures; empty when there is nothing to draw.
        rows: Its data, one named tuple per mark.
        missing: Why there is nothing to draw.
    """

    name: str
    title: str
    lead: str
    panels: tuple[Panel, ...]
    rows: tuple[Any, ...]
    missing: str = ""


class Source(NamedTuple):
    """What a report is drawn from: records, a plan's contents, the work of other libraries' models."""

    records: Sequence[Record]
    plan: Mapping[str, Any] | None
    gmacs: Mapping[str, float]
