"""Resolution: how does time grow with the image?"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import (
    milliseconds,
    provenance,
    timed,
)
from bratune.report.figures.panel import (
    Key,
    Panel,
    by,
    most_telling,
    safe,
)
from bratune.report.figures.section import Section, Source

__all__ = ["ComplexityPoint", "ScalingPoint", "complexity", "infos", "is_sweep", "panels", "section"]


SIDES = (128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)


# Fields that make another series of a backend where they differ, with the word in front of each.
TOLD = {
    "topk": "k",
    "dtype": "",
    "direction": "",
    "regime": "",
    "l2": "cache",
    "route_distribution": "routes",
}


class ComplexityPoint(NamedTuple):
    """Multiply-adds of one attention block by the paper's formula, at one image side."""

    rule: str
    side: int
    tokens: int
    gmacs: float


class ScalingPoint(NamedTuple):
    """A time at one image side."""

    gpu: str
    model: str
    series: str
    side: int
    tokens: int
    ms: float
    lo: float
    hi: float
    evidence: str
    note: str


def complexity(channels: int = 64, topk: int = 1, sides: Sequence[int] = SIDES) -> list[ComplexityPoint]:
    """Multiply-adds of one stage-1 block over image side, by the paper's formula.

    ``3 N C^2 + 2 S^4 C + 2 k N^2 C / S^2`` with N tokens (BiFormer, arXiv 2303.08810, eq. 7), for S fixed at
    7, for S that minimises it, ``(k N^2 / 2)^(1/6)``, which grows as ``N^(1/3)``, and for dense attention
    (``2 N^2 C`` instead of the last two terms).
    """
    found = []
    for side in sides:
        tokens = (side // 4) ** 2
        best = (topk * tokens**2 / 2) ** (1 / 6)
        linear = 3 * tokens * channels**2
        rules = {
            "S = 7": 2 * 7**4 * channels + 2 * topk * tokens**2 * channels / 7**2,
            "S ~ N^(1/3)": 2 * best**4 * channels + 2 * topk * tokens**2 * channels / best**2,
            "dense": 2 * tokens**2 * channels,
        }
        found += [ComplexityPoint(r, side, tokens, (linear + macs) / 1e9) for r, macs in rules.items()]
    return found


def infos(records: Sequence[Record]) -> list[ScalingPoint]:
    """Attention time of one block of stage 1 over image side, where a series has three sides or more.

    A series has one setting: top-k, dtype, direction and cache are named where they differ on a machine.
    """
    groups: dict[tuple[str, str, str], list[ScalingPoint]] = defaultdict(list)
    rows = [
        r
        for r in timed(records, "attention")
        if r.stage == 1 and r.image_height and r.image_height == r.image_width
    ]
    varying = {name for name in TOLD if len({getattr(r, name) for r in rows}) > 1}
    for r in rows:
        ms, lo, hi = milliseconds(r)
        rule = _window_rule(r)
        told = [f"{TOLD[name]} {getattr(r, name)}".strip() for name in TOLD if name in varying]
        backend = r.backend if rule in ("", r.backend) else f"{r.backend}, {rule}"
        series = ", ".join([backend, *told, f"batch {r.batch}"])
        point = ScalingPoint(
            r.gpu_key,
            r.model,
            series,
            r.image_height or 0,
            (r.height or 0) * (r.width or 0),
            ms,
            lo,
            hi,
            r.evidence,
            provenance(r),
        )
        groups[(r.gpu_key, r.model, series)].append(point)
    return sorted(p for points in groups.values() if len({p.side for p in points}) >= 3 for p in points)


def is_sweep(record: Record) -> bool:
    """Whether the record belongs to a sweep over resolution, which has a figure of its own."""
    return bool(_extra(record).get("window_rule"))


def _window_rule(record: Record) -> str:
    """How S was chosen: ``S = 7``, or that it grows with the image."""
    return str(_extra(record).get("window_rule") or f"S = {record.n_win}")


def _extra(record: Record) -> dict[str, object]:
    try:
        extra = json.loads(record.cell).get("extra", "{}") if record.cell else "{}"
        return dict(json.loads(extra))
    except (AttributeError, RecursionError, TypeError, ValueError):  # it describes no cell
        return {}


def panels(formula: Sequence[ComplexityPoint], times: Sequence[ScalingPoint]) -> list[Panel]:
    """The paper's complexity formula over image side, and times over the same axis."""
    panels = [_formula(formula)]
    panels += [_scaling(gpu, rows) for gpu, rows in most_telling(by(times, "gpu", "model"))]
    return panels


RULE_COLOURS = {"S = 7": "#4677b8", "S ~ N^(1/3)": "#16877a", "dense": "#c8603c"}


def _sides(points: Sequence[Any]) -> dict[str, Any]:
    sides = sorted({p.side for p in points})
    shown = sides if len(sides) <= 8 else [s for s in sides if s in (128, 224, 384, 512, 768, 1024, 2048)]
    return style.axis("image side, pixels", type="log", tickvals=shown, ticktext=[str(s) for s in shown])


def _formula(points: Sequence[ComplexityPoint]) -> Panel:
    palette = RULE_COLOURS
    data: list[dict[str, Any]] = []
    for rule, colour in palette.items():
        rows = [p for p in points if p.rule == rule]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": rule,
                "legendgroup": rule,
                "x": [p.side for p in rows],
                "y": [p.gmacs for p in rows],
                "line": style.line(colour, "bound"),
                "customdata": [[p.tokens] for p in rows],
                "hovertemplate": (
                    f"<b>{rule}</b><br>%{{y:.3g}} GMAC at %{{customdata[0]:,}} tokens<extra>formula</extra>"
                ),
            }
        )
    layout = style.layout(
        360, _sides(points), style.axis("10<sup>9</sup> multiply-adds per block", type="log", dtick=1)
    )
    return Panel(
        "by the paper's formula, stage 1, 64 channels",
        data,
        layout,
        tuple(Key(rule, colour, "line") for rule, colour in palette.items()),
    )


def _scaling(gpu: str, points: Sequence[ScalingPoint]) -> Panel:
    palette = style.colours(sorted({p.series for p in points}))
    for series in palette:
        palette[series] = next((c for rule, c in RULE_COLOURS.items() if rule in series), palette[series])
    data: list[dict[str, Any]] = []
    for series, colour in palette.items():
        rows = sorted((p for p in points if p.series == series), key=lambda p: p.side)
        evidence = max((p.evidence for p in rows), key=EVIDENCE.index)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": series,
                "legendgroup": series,
                "x": [p.side for p in rows],
                "y": [p.ms for p in rows],
                "line": style.line(colour, evidence),
                "marker": style.point_marker(colour, evidence, 8),
                "customdata": [[p.tokens, p.note] for p in rows],
                "hovertemplate": (
                    f"<b>{series}</b><br>%{{y:.3g}} ms at %{{customdata[0]:,}} tokens"
                    "<br>%{customdata[1]}<extra></extra>"
                ),
            }
        )
    layout = style.layout(360, _sides(points), style.axis("ms per call, stage 1", type="log", dtick=1))
    return Panel(gpu, data, layout, tuple(Key(s, c, "line") for s, c in palette.items()))


def section(source: Source) -> Section:
    """The question with its figures and data."""
    rows = infos(source.records)
    formula = complexity()
    return Section(
        name="scaling",
        title="How does it grow with the resolution?",
        lead="First what the paper's formula counts for S = 7, for S growing as the cube root of the tokens, "
        "and for dense attention; then times over the same axis.",
        panels=tuple(panels(formula, safe(rows))) if rows else (),
        rows=(*rows, *formula) if rows else (),
        missing="no attention call was run at three resolutions or more",
    )
