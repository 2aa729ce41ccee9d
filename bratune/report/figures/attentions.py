"""Attentions: which attention, in one layout, at which resolution?"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import milliseconds, provenance, timed
from bratune.report.figures.panel import MOST_PANELS, ROW_PX, Key, Panel, by, most_telling, safe
from bratune.report.figures.section import Section, Source

__all__ = ["PUBLISHED_TOP1", "AttentionModel", "AttentionTime", "growth", "infos", "panels", "section"]

# Top-1 on ImageNet-1K in this layout as somebody published it, in percent, and where; no other attention has
# a number of this layout that could be found in a source.
PUBLISHED_TOP1 = {
    "bi-level-routing": (82.7, "BiFormer-STL, README of its official repository"),
    "shifted-window": (
        81.3,
        "Swin-T itself, whose merging of patches is larger; arXiv 2103.14030, Table 1",
    ),
}
PUBLISHED_AT = (224, 224)
# Marks of attentions in the order of their names: there are more of them than colours.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


class AttentionTime(NamedTuple):
    """Both attentions of two blocks of the first stage, at one resolution."""

    gpu: str
    work: str
    attention: str
    image: str
    tokens: int
    ms: float
    lo: float
    hi: float
    mb: float | None
    time_exponent: float | None
    memory_exponent: float | None
    evidence: str
    note: str


class AttentionModel(NamedTuple):
    """The network of one attention, at one resolution; accuracy where somebody published it."""

    gpu: str
    work: str
    attention: str
    image: str
    images_per_s: float
    lo: float
    hi: float
    peak_mb: float | None
    vs_window: float | None
    top1_published: float | None
    evidence: str
    note: str


def infos(records: Sequence[Record]) -> list[AttentionTime | AttentionModel]:
    """Times of the first stage's attentions with the exponents of their growth, and of whole networks."""
    alone: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for r in timed(records, "mixer", mixers=True):
        if r.stage == 1:
            alone[(r.gpu_key, _work(r), r.backend)].append(r)
    found: list[AttentionTime | AttentionModel] = []
    for (gpu, work, name), rows in sorted(alone.items()):
        rows.sort(key=_tokens)
        times = growth([(_tokens(r), milliseconds(r)[0]) for r in rows])
        memory = growth([(_tokens(r), r.workspace_mb) for r in rows if r.workspace_mb])
        for r in rows:
            where = (gpu, work, name, _image(r), _tokens(r), *milliseconds(r), r.workspace_mb)
            found.append(AttentionTime(*where, times, memory, r.evidence, provenance(r)))
    models = []
    for r in timed(records, "model", mixers=True):
        ms, lo, hi = milliseconds(r)
        scale = 1e3 * (r.batch or 1)
        known = PUBLISHED_TOP1 if (r.image_height, r.image_width) == PUBLISHED_AT else {}
        top1, source = known.get(r.backend.partition(":")[0], (None, ""))
        note = provenance(r) + (f"; published top-1 of {source}" if source else "")
        rates = (scale / ms, scale / hi, scale / lo)
        who = (r.gpu_key, _work(r), r.backend, _image(r))
        models.append(AttentionModel(*who, *rates, r.peak_alloc_mb, r.ratio, top1, r.evidence, note))
    return found + sorted(models, key=lambda m: (*m[:2], len(m.image), m.image, -m.images_per_s))


def growth(points: Sequence[tuple[int, float]]) -> float | None:
    """The exponent of the number of tokens in a cost, by least squares on logarithms; None of one map."""
    x = [math.log(tokens) for tokens, _ in points]
    if len(set(x)) < 2:
        return None
    return statistics.linear_regression(x, [math.log(cost) for _, cost in points]).slope


def _tokens(record: Record) -> int:
    return (record.height or 0) * (record.width or 0)


def _image(record: Record) -> str:
    return f"{record.image_height}x{record.image_width}"


def _work(record: Record) -> str:
    amp = "autocast " if record.amp else ""
    return f"batch {record.batch}, {amp}{record.dtype}, {record.direction}, {record.regime}"


def panels(rows: Sequence[AttentionTime | AttentionModel]) -> list[Panel]:
    """Time and memory of attentions over tokens, and networks' images per second, per machine and work."""
    alone = [row for row in rows if isinstance(row, AttentionTime)]
    models = [row for row in rows if isinstance(row, AttentionModel)]
    found = []
    for where, group in most_telling(by(alone, "gpu", "work"))[: MOST_PANELS // 2]:
        found.append(_growing(f"{where}: time of attentions, two blocks of stage 1", group, "ms"))
        if any(row.mb for row in group):
            found.append(_growing(f"{where}: memory beside inputs, the same", group, "mb"))
    found += [_rates(where, group) for where, group in most_telling(by(models, "gpu", "work", "image"))]
    return found


def _growing(title: str, rows: Sequence[AttentionTime], what: str) -> Panel:
    """A cost over the number of tokens on logarithmic axes, its exponent in the name of its line."""
    names = sorted({row.attention for row in rows})
    palette = style.colours(names)
    data: list[dict[str, Any]] = []
    keys = []
    for number, name in enumerate(names):
        own = [row for row in rows if row.attention == name and getattr(row, what)]
        if not own:
            continue
        exponent = own[0].time_exponent if what == "ms" else own[0].memory_exponent
        label = name if exponent is None else f"{name}, N^{exponent:.2f}"
        evidence = max((row.evidence for row in own), key=EVIDENCE.index)
        symbol = SYMBOLS[number // len(style.OTHER_COLOURS) % len(SYMBOLS)]
        marker = style.point_marker(palette[name], evidence, 8)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "legendgroup": label,
                "x": [row.tokens for row in own],
                "y": [getattr(row, what) for row in own],
                "line": style.line(palette[name], evidence),
                "marker": marker | {"symbol": marker["symbol"].replace("circle", symbol)},
                "customdata": [[row.image, row.note] for row in own],
                "hovertemplate": (
                    f"<b>{label}</b><br>%{{y:.3g}} {'ms' if what == 'ms' else 'MB'} at %{{x:,}} tokens"
                    " (%{customdata[0]})<br>%{customdata[1]}<extra></extra>"
                ),
            }
        )
        keys.append(Key(label, palette[name], "line"))
    tokens = {row.tokens: row.image for row in rows}
    x = style.axis("tokens of stage 1", type="log", tickvals=sorted(tokens))
    x["ticktext"] = [f"{n:,} ({tokens[n]})".replace(",", " ") for n in sorted(tokens)]
    unit = "ms" if what == "ms" else "MB beside inputs"
    return Panel(title, data, style.layout(420, x, style.axis(unit, type="log", dtick=1)), tuple(keys))


def _rates(title: str, rows: Sequence[AttentionModel]) -> Panel:
    """Images per second of networks, the fastest on top, with the accuracy that was published."""
    ordered = sorted(rows, key=lambda row: row.images_per_s)
    data = []
    for evidence in EVIDENCE:
        own = [row for row in ordered if row.evidence == evidence]
        if own:
            data.append(_rate_bars(own, evidence))
    axes = (
        style.axis("images per second", range=[0, 1.08 * max(row.hi for row in rows)]),
        style.axis("", categoryorder="array", categoryarray=[row.attention for row in ordered]),
    )
    return Panel(title, data, style.layout(74 + ROW_PX * len(ordered), *axes, bargap=0.28))


def _rate_bars(rows: Sequence[AttentionModel], evidence: str) -> dict[str, Any]:
    rates = [row.images_per_s for row in rows]
    published = [f"{row.top1_published:.1f} % published" if row.top1_published else "" for row in rows]
    return {
        "type": "bar",
        "orientation": "h",
        "name": evidence,
        "y": [row.attention for row in rows],
        "x": rates,
        "text": published,
        "textposition": "inside",
        "error_x": style.error_bars(rates, [row.lo for row in rows], [row.hi for row in rows]),
        "marker": style.bar_marker(style.OTHER_COLOURS[0], evidence),
        "customdata": [[row.note] for row in rows],
        "hovertemplate": "<b>%{y}</b><br>%{x:,.3g} images/s<br>%{customdata[0]}<extra></extra>",
    }


def section(source: Source) -> Section:
    """The question with its figures and data."""
    rows = infos(source.records)
    return Section(
        name="attentions",
        title="Which attention?",
        lead="Attentions in one layout, that of Swin-T. Axes are logarithmic: a slope is the exponent of "
        "the number of tokens N, fitted where two resolutions or more were run. Then whole networks. "
        "Accuracy stands only where somebody published it for this layout.",
        panels=tuple(panels(safe(rows))),
        rows=tuple(rows),
        missing="no attentions were compared: bratune profile --suite attentions-224 would",
    )
