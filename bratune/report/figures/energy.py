"""Energy: how many joules does an image take?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bratune.record import Record
from bratune.report import style
from bratune.report.figures.facts import (
    provenance,
    series_of,
    timed,
    work_of,
)
from bratune.report.figures.panel import (
    MOST_PANELS,
    ROW_PX,
    Key,
    Panel,
    by,
    safe,
    without_shared_model,
)
from bratune.report.figures.section import Section, Source

__all__ = ["EnergyBar", "infos", "panels", "section"]


class EnergyBar(NamedTuple):
    """Joules per image, and how they were measured."""

    work: str
    gpu: str
    series: str
    joules: float
    method: str
    note: str


def infos(records: Sequence[Record]) -> list[EnergyBar]:
    """Joules per image of whole models, where energy was measured."""
    return sorted(
        EnergyBar(work_of(r), r.gpu_key, series_of(r), r.joules_per_image, r.energy_method, provenance(r))
        for r in timed(records, "model")
        if r.joules_per_image is not None and math.isfinite(r.joules_per_image)
    )


def panels(bars: Sequence[EnergyBar]) -> list[Panel]:
    """Joules per image by machine, one panel per piece of work."""
    return [_energy(work, rows) for work, rows in sorted(by(bars, "work").items())[:MOST_PANELS]]


def _energy(work: str, bars: Sequence[EnergyBar]) -> Panel:
    names = sorted({b.series for b in bars})
    palette = style.colours(names)
    title, short = without_shared_model(work, names)
    data: list[dict[str, Any]] = []
    for series in reversed(names):
        rows = [b for b in bars if b.series == series]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": short[series],
                "legendgroup": short[series],
                "y": [b.gpu for b in rows],
                "x": [b.joules for b in rows],
                "marker": style.bar_marker(palette[series], "measured"),
                "customdata": [[b.method, b.note] for b in rows],
                "hovertemplate": (
                    f"<b>%{{y}}</b> {short[series]}<br>%{{x:.3g}} J per image (%{{customdata[0]}})"
                    "<br>%{customdata[1]}<extra></extra>"
                ),
            }
        )
    layout = style.layout(
        70 + ROW_PX * len(bars) + 12 * len({b.gpu for b in bars}),
        style.axis("joules per image"),
        style.axis("", showgrid=False),
        barmode="group",
        bargap=0.28,
        bargroupgap=0.12,
    )
    return Panel(title, data, layout, tuple(Key(short[n], palette[n]) for n in names))


def section(source: Source) -> Section:
    """The question with its figures and data."""
    rows = infos(source.records)
    return Section(
        name="energy",
        title="How much energy does an image take?",
        lead="Energy of the whole board, its idle share included, over windows of at least one second.",
        panels=tuple(panels(safe(rows))),
        rows=tuple(rows),
        missing="no record has an energy (it needs a GPU whose driver reports power)",
    )
