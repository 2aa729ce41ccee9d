"""Throughput: how many images per second, on which GPU?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import (
    milliseconds,
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
    number,
    trust,
    without_shared_model,
)
from bratune.report.figures.section import Section, Source

__all__ = ["Bar", "infos", "panels", "section"]


class Bar(NamedTuple):
    """Images per second of one model on one machine, for one piece of work."""

    work: str
    gpu: str
    series: str
    images_per_s: float
    lo: float
    hi: float
    bound: float | None
    evidence: str
    note: str


def infos(records: Sequence[Record]) -> list[Bar]:
    """Images per second of every whole model, by machine, with its interval and its bound.

    Of several rows of one series on one machine (other stages got other backends), the fastest is shown.
    """
    bounds = {
        (r.gpu_key, r.cell_id): r.images_per_s
        for r in records
        if r.evidence == "bound" and r.part == "model" and r.ok
    }
    found: dict[tuple[str, str, str], Bar] = {}
    for r in timed(records, "model"):
        ms, lo, hi = milliseconds(r)
        scale = 1e3 * (r.batch or 1)
        bar = Bar(
            work_of(r),
            r.gpu_key,
            series_of(r),
            scale / ms,
            scale / hi,
            scale / lo,
            bounds.get((r.gpu_key, r.cell_id)),
            r.evidence,
            provenance(r),
        )
        key = (bar.work, bar.gpu, bar.series)
        best = found.get(key)
        if best is None or (EVIDENCE.index(bar.evidence), -bar.images_per_s) < (
            EVIDENCE.index(best.evidence),
            -best.images_per_s,
        ):
            found[key] = bar
    return sorted(found.values())


def panels(bars: Sequence[Bar]) -> list[Panel]:
    """Images per second by GPU and architecture, one panel per piece of work."""
    groups = sorted(
        by(bars, "work").items(),
        key=lambda g: (-len({b.gpu for b in g[1]}), trust(g[1]), -len(g[1]), g[0]),
    )
    return [_throughput(work, rows) for work, rows in groups[:MOST_PANELS]]


def _throughput(work: str, bars: Sequence[Bar]) -> Panel:
    names = sorted({b.series for b in bars})
    palette = style.colours(names)
    title, short = without_shared_model(work, names)
    fastest = {gpu: max(b.images_per_s for b in bars if b.gpu == gpu) for gpu in {b.gpu for b in bars}}
    gpus = sorted(fastest, key=lambda gpu: fastest[gpu])
    data: list[dict[str, Any]] = []
    for series in reversed(names):
        for evidence in EVIDENCE:
            rows = [b for b in bars if b.series == series and b.evidence == evidence]
            if rows:
                data.append(_throughput_bars(short[series], rows, palette[series], evidence))
    lanes = sum(len({b.series for b in bars if b.gpu == gpu}) for gpu in gpus)
    layout = style.layout(
        74 + ROW_PX * lanes + 12 * len(gpus),
        style.axis("images per second", range=[0, 1.04 * max(b.hi for b in bars)]),
        style.axis("", categoryorder="array", categoryarray=gpus, showgrid=False),
        barmode="group",
        bargap=0.28,
        bargroupgap=0.12,
    )
    return Panel(title, data, layout, tuple(Key(short[n], palette[n]) for n in names))


def _throughput_bars(series: str, rows: Sequence[Bar], colour: str, evidence: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": series,
        "legendgroup": series,
        "offsetgroup": series,
        "y": [b.gpu for b in rows],
        "x": [b.images_per_s for b in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [b.hi - b.images_per_s for b in rows],
            "arrayminus": [b.images_per_s - b.lo for b in rows],
            "thickness": 1,
            "width": 2.5,
            "color": "rgba(120,130,142,0.6)",
        },
        "marker": style.bar_marker(colour, evidence),
        "customdata": [[b.note, number(b.bound) if b.bound else "not known"] for b in rows],
        "hovertemplate": (
            f"<b>%{{y}}</b> {series}<br>%{{x:,.0f}} images/s"
            "<br>no more than %{customdata[1]} possible<br>%{customdata[0]}<extra></extra>"
        ),
    }


def section(source: Source) -> Section:
    """The question with its figures and data."""
    rows = infos(source.records)
    return Section(
        name="throughput",
        title="How many images per second, on which GPU?",
        lead="Whole models, the same work on every machine. Whiskers are 95 % intervals.",
        panels=tuple(panels(rows)),
        rows=tuple(rows),
        missing="no whole model was measured or modelled",
    )
