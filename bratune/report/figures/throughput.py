"""Throughput: how many images per second, by architecture and machine?"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import (
    BASELINE,
    milliseconds,
    provenance,
    series_of,
    timed,
    work_of,
)
from bratune.report.figures.panel import (
    MOST_PANELS,
    Key,
    Panel,
    by,
    number,
    safe,
    trust,
    without_shared_model,
)
from bratune.report.figures.section import Section, Source

__all__ = [
    "BIFORMER",
    "COLOURS",
    "MOST_BARS",
    "OTHERS",
    "PUBLISHED",
    "Bar",
    "Lane",
    "chart",
    "infos",
    "lanes",
    "panels",
    "section",
    "value_text",
]

# What a colour means in this chart.
BIFORMER, PUBLISHED, OTHERS = "BiFormer", "BiFormer as published", "other models"
COLOURS = {BIFORMER: "#16877a", PUBLISHED: "#8b98a8", OTHERS: "#d99a2b"}
# More bars than this are left to the table.
MOST_BARS = 8
LABEL_CHARACTERS = 26
# Height of a line of a label, and of what is free between two bars.
LINE_PX, GAP_PX = 16, 10


class Bar(NamedTuple):
    """Images per second of one model on one machine, for one piece of work."""

    work: str
    gpu: str
    series: str
    model: str
    meaning: str
    images_per_s: float
    lo: float
    hi: float
    bound: float | None
    evidence: str
    note: str


class Lane(NamedTuple):
    """A line of the chart: a bar with its name, or the name of a machine above its bars."""

    name: str
    bar: Bar | None


def infos(records: Sequence[Record]) -> list[Bar]:
    """Images per second of every whole model, by machine, with its interval and its bound.

    Of several rows of one series on one machine, the fastest is shown.
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
            r.model,
            _meaning(r),
            scale / ms,
            scale / hi,
            scale / lo,
            bounds.get((r.gpu_key, r.cell_id)),
            r.evidence,
            provenance(r),
        )
        key = (bar.work, bar.gpu, bar.series)
        found[key] = min(found.get(key, bar), bar, key=_rank)
    return sorted(found.values())


def _meaning(record: Record) -> str:
    """What its colour says: another model, the published composition (or gather everywhere), or ours."""
    if record.form == "timm" or not record.model.startswith("biformer"):
        return OTHERS
    gathers = record.form in ("", "plain") and set(record.backend.split(",")) == {BASELINE}
    return PUBLISHED if record.form == "published" or gathers else BIFORMER


def _rank(bar: Bar) -> tuple[int, float]:
    return EVIDENCE.index(bar.evidence), -bar.images_per_s


def chart(bars: Sequence[Bar]) -> list[list[Bar]]:
    """The bars of each chart, one per piece of work, best evidence and most machines first.

    At most eight: of every machine in turn the fastest BiFormer, the published one, the fastest of other
    BiFormers, other models, and the rest. Machines by their fastest bar, bars by their speed.
    """
    groups = sorted(
        by(bars, "work").items(),
        key=lambda g: (trust(g[1]), -len({b.gpu for b in g[1]}), -len(g[1]), g[0]),
    )
    return [_chosen(rows) for _, rows in groups[:MOST_PANELS]]


def _chosen(bars: Sequence[Bar]) -> list[Bar]:
    queues = {gpu: _most_telling(rows) for gpu, rows in by(bars, "gpu").items()}
    machines = sorted(
        queues, key=lambda gpu: (trust(queues[gpu]), -max(b.images_per_s for b in queues[gpu]), gpu)
    )
    turns = [queues[gpu][turn] for turn in range(len(bars)) for gpu in machines if turn < len(queues[gpu])]
    found = turns[:MOST_BARS]
    return sorted(found, key=lambda b: (machines.index(b.gpu), -b.images_per_s, b.series))


def _most_telling(bars: Sequence[Bar]) -> list[Bar]:
    """The bars of one machine, those that answer most first."""
    ranked = sorted(bars, key=_rank)
    models = by([b for b in ranked if b.meaning != OTHERS], "model")
    order = sorted(models, key=lambda m: (-len(models[m]), m))
    heads = [models[m][0] for m in order]
    published = [_published(models[m]) for m in order]
    first = [
        *heads[:1],
        *published[:1],
        *heads[1:],
        *(b for b in ranked if b.meaning == OTHERS),
        *published[1:],
        *ranked,
    ]
    return list(dict.fromkeys(b for b in first if b is not None))


def _published(bars: Sequence[Bar]) -> Bar | None:
    """The official composition where it ran, else gather everywhere."""
    found = [b for b in bars if b.meaning == PUBLISHED]
    return min(found, key=lambda b: not b.series.endswith("published"), default=None)


def lanes(bars: Sequence[Bar]) -> tuple[str, list[Lane]]:
    """A title and the lines of a chart from the top; several machines have their names between the bars."""
    title, short = without_shared_model(bars[0].work, sorted({b.series for b in bars}))
    machines = list(dict.fromkeys(b.gpu for b in bars))
    if len(machines) == 1:
        return f"{machines[0]} · {title}", [Lane(short[b.series], b) for b in bars]
    found: list[Lane] = []
    for gpu in machines:
        found += [Lane(gpu, None), *(Lane(short[b.series], b) for b in bars if b.gpu == gpu)]
    return title, found


def value_text(bar: Bar) -> str:
    """A bar's value with what it rests on: ``23.3 measured``."""
    return f"{number(bar.images_per_s)} {bar.evidence}"


def panels(bars: Sequence[Bar]) -> list[Panel]:
    """Images per second by architecture and machine, one panel per piece of work."""
    return [_panel(chosen) for chosen in chart(bars)]


def _panel(bars: Sequence[Bar]) -> Panel:
    title, found = lanes(bars)
    places: list[float] = []
    texts = []
    height = 0
    for lane in found:
        lines = textwrap.wrap(lane.name, LABEL_CHARACTERS, break_long_words=False, break_on_hyphens=False)
        lines = [f"<b>{line}</b>" for line in lines] if lane.bar is None else [*lines, value_text(lane.bar)]
        size = LINE_PX * len(lines) + GAP_PX
        places.append(height + size / 2)
        texts.append("<br>".join(lines))
        height += size
    data: list[dict[str, Any]] = []
    placed = [(lane, place) for lane, place in zip(found, places, strict=True) if lane.bar is not None]
    meanings = [m for m in COLOURS if any(b.meaning == m for b in bars)]
    for meaning in meanings:
        for evidence in EVIDENCE:
            rows = [
                (lane.name, lane.bar, place)
                for lane, place in placed
                if lane.bar is not None and (lane.bar.meaning, lane.bar.evidence) == (meaning, evidence)
            ]
            if rows:
                data.append(_bars(meaning, rows, evidence))
    layout = style.layout(
        height + 64,
        style.axis("images per second", range=[0, 1.04 * max(b.hi for b in bars)]),
        style.axis("", range=[height, 0], tickvals=places, ticktext=texts, showgrid=False, zeroline=False),
        barmode="overlay",
    )
    return Panel(title, data, layout, tuple(Key(m, COLOURS[m]) for m in meanings))


def _bars(meaning: str, rows: Sequence[tuple[str, Bar, float]], evidence: str) -> dict[str, Any]:
    bars = [bar for _, bar, _ in rows]
    rates = [b.images_per_s for b in bars]
    return {
        "type": "bar",
        "orientation": "h",
        "name": meaning,
        "legendgroup": meaning,
        "y": [place for _, _, place in rows],
        "x": rates,
        "width": LINE_PX + GAP_PX / 2,
        "error_x": style.error_bars(rates, [b.lo for b in bars], [b.hi for b in bars]),
        "marker": style.bar_marker(COLOURS[meaning], evidence),
        "customdata": [
            [name, bar.gpu, number(bar.bound) if bar.bound else "not known", bar.note]
            for name, bar, _ in rows
        ],
        "hovertemplate": (
            "<b>%{customdata[0]}</b>, %{customdata[1]}<br>%{x:,.3g} images/s"
            "<br>no more than %{customdata[2]} possible<br>%{customdata[3]}<extra></extra>"
        ),
    }


def section(source: Source) -> Section:
    """The question with its figures and data."""
    rows = infos(source.records)
    return Section(
        name="throughput",
        title="How many images per second?",
        lead=(
            f"Whole models at the same work, at most {MOST_BARS} in a chart; the data hold all. "
            "Solid bars are measured, hatched ones are not. Whiskers are 95 % intervals."
        ),
        panels=tuple(panels(safe(rows))),
        rows=tuple(rows),
        missing="no whole model was measured or modelled",
    )
