"""Sections: the questions of a report in reading order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bratune.record import Record
from bratune.report.figures import (
    attentions,
    energy,
    peers,
    plans,
    resolution,
    roofline,
    speedup,
    stages,
    throughput,
)
from bratune.report.figures.facts import with_bounds
from bratune.report.figures.section import Section, Source

__all__ = ["sections"]

QUESTIONS = (throughput, speedup, stages, roofline, plans, resolution, energy, peers, attentions)


def sections(
    records: Sequence[Record],
    plan: Mapping[str, Any] | None = None,
    gmacs: Mapping[str, float] | None = None,
) -> list[Section]:
    """Every question in reading order, those without an answer included.

    Args:
        records: Everything that is to be shown.
        plan: A plan file's contents, whose setting is marked; with the settings that tuning verified under
            ``front``, those are drawn.
        gmacs: Work per image of models of other libraries, in 10^9 multiply-adds.
    """
    source = Source(with_bounds(records), plan, gmacs or {})
    return [question.section(source) for question in QUESTIONS]
