"""Points: figures with two axes of numbers: roofline, plans, resolution, other models."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from bratune.record import EVIDENCE
from bratune.report import style
from bratune.report.panel import Key, Panel, by, most_telling
from bratune.report.point_infos import (
    ComplexityPoint,
    PeerPoint,
    PlanPoint,
    Roof,
    RoofPoint,
    ScalingPoint,
)

__all__ = ["pareto_panels", "peer_panels", "roofline_panels", "scaling_panels"]


# --- roofline -----------------------------------------------------------------------------------------


def roofline_panels(roofs: Sequence[Roof], points: Sequence[RoofPoint]) -> list[Panel]:
    """Attention calls under the roof of their machine, one panel per machine and dtype."""
    by_gpu = {roof.gpu: roof for roof in roofs}
    chosen = most_telling(by(points, "gpu"))
    return [_roofline(by_gpu[gpu], rows) for gpu, rows in chosen]


def _roofline(roof: Roof, points: Sequence[RoofPoint]) -> Panel:
    ridge = roof.tflops * 1e3 / roof.gb_s
    low = min([p.intensity for p in points] + [ridge / 4]) / 2
    high = max([p.intensity for p in points] + [ridge * 4]) * 2
    floor = min([p.tflops for p in points]) / 2
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [low, ridge, high],
            "y": [low * roof.gb_s / 1e3, roof.tflops, roof.tflops],
            "line": style.line("#8b98a8", "bound"),
            "hovertemplate": f"{roof.tflops:g} TFLOP/s, {roof.gb_s:g} GB/s<extra>roof</extra>",
        }
    ]
    palette = style.colours(sorted({p.backend for p in points}))
    for backend, colour in palette.items():
        for evidence in EVIDENCE:
            rows = [p for p in points if p.backend == backend and p.evidence == evidence]
            if rows:
                data.append(_roof_points(backend, rows, colour, evidence))
    layout = style.layout(
        380,
        style.axis(
            "useful operations per least byte", type="log", dtick=1, range=[math.log10(low), math.log10(high)]
        ),
        style.axis(
            "TFLOP/s",
            type="log",
            dtick=1,
            range=[math.log10(floor), math.log10(roof.tflops * 3)],
        ),
    )
    keys = (*(Key(b, c, "dot") for b, c in palette.items()), Key("roof", "#8b98a8", "line"))
    return Panel(roof.gpu, data, layout, keys)


def _roof_points(backend: str, rows: Sequence[RoofPoint], colour: str, evidence: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": backend,
        "legendgroup": backend,
        "x": [p.intensity for p in rows],
        "y": [p.tflops for p in rows],
        "marker": style.point_marker(colour, evidence),
        "customdata": [[p.stage, p.batch, p.note] for p in rows],
        "hovertemplate": (
            f"<b>{backend}</b> stage %{{customdata[0]}}, batch %{{customdata[1]}}"
            "<br>%{y:.3g} TFLOP/s at %{x:.3g} op/byte<br>%{customdata[2]}<extra></extra>"
        ),
    }


# --- plans --------------------------------------------------------------------------------------------


def pareto_panels(points: Sequence[PlanPoint]) -> list[Panel]:
    """Latency against memory, and against divergence where it is known, for every setting of a model."""
    panels = []
    for title, rows in most_telling(by(points, "gpu", "work")):
        panels.append(_pareto(title, rows, "memory_mb", "peak memory, MB"))
        known = [p for p in rows if p.divergence is not None]
        if len({p.divergence for p in known}) > 1:
            panels.append(_pareto(title, known, "divergence", "divergence of the outputs"))
    return panels


MARKS = {"default": "#c8603c", "chosen": "#16877a", "": "#8b98a8"}
MARK_WORDS = {"default": "the paper's default", "chosen": "the chosen plan", "": "other settings"}
# So few settings are named in the figure.
FEW = 8


def _pareto(title: str, points: Sequence[PlanPoint], field: str, label: str) -> Panel:
    front = _front([(p.ms, float(getattr(p, field))) for p in points])
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "front",
            "legendgroup": "front",
            "x": [x for x, _ in front],
            "y": [y for _, y in front],
            "line": {"color": "#8b98a8", "width": 1.5, "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    marks = [mark for mark in MARKS if any(p.mark == mark for p in points)]
    names = _differences([p.setting for p in points]) if len(points) <= FEW else {}
    ranks = {p.setting: rank for rank, p in enumerate(sorted(points, key=lambda p: p.ms))}
    for mark in marks:
        for evidence in EVIDENCE:
            rows = [p for p in points if p.mark == mark and p.evidence == evidence]
            if rows:
                data.append(_pareto_points(mark, rows, evidence, field, names, ranks))
    layout = style.layout(
        380,
        style.axis("latency, ms", rangemode="tozero"),
        style.axis(label, rangemode="tozero"),
    )
    keys = (*(Key(MARK_WORDS[m], MARKS[m], "dot") for m in marks), Key("front", "#8b98a8", "line"))
    return Panel(title, data, layout, keys)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both, by rising latency."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def _differences(settings: Sequence[str]) -> dict[str, str]:
    """What of a setting's text tells it from the others."""
    parts = [re.split(r",? ", setting) for setting in settings]
    if len({len(p) for p in parts}) != 1:
        return {setting: setting for setting in settings}
    varying = [i for i in range(len(parts[0])) if len({p[i] for p in parts}) > 1]
    return {s: " ".join(p[i] for i in varying) for s, p in zip(settings, parts, strict=True)}


def _pareto_points(
    mark: str,
    rows: Sequence[PlanPoint],
    evidence: str,
    field: str,
    names: dict[str, str],
    ranks: dict[str, int],
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text" if names else "markers",
        "name": MARK_WORDS[mark],
        "legendgroup": MARK_WORDS[mark],
        "x": [p.ms for p in rows],
        "y": [getattr(p, field) for p in rows],
        "text": [names.get(p.setting, "") for p in rows],
        # Neighbours put their names on different sides.
        "textposition": ["top center" if ranks[p.setting] % 2 else "bottom center" for p in rows],
        "textfont": {"size": 11},
        "cliponaxis": False,
        "marker": style.point_marker(MARKS[mark], evidence, 13 if mark else 8),
        "customdata": [[p.setting, p.note, p.memory_mb] for p in rows],
        "hovertemplate": (
            "<b>%{customdata[0]}</b><br>%{x:.3g} ms, %{customdata[2]:.3g} MB"
            "<br>%{customdata[1]}<extra></extra>"
        ),
    }


# --- scaling ------------------------------------------------------------------------------------------


def scaling_panels(formula: Sequence[ComplexityPoint], times: Sequence[ScalingPoint]) -> list[Panel]:
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


# --- other models -------------------------------------------------------------------------------------


def peer_panels(points: Sequence[PeerPoint]) -> list[Panel]:
    """Images per second against work per image, ours and others, one panel per machine."""
    found = {gpu: rows for gpu, rows in by(points, "gpu").items() if len({p.model for p in rows}) > 1}
    return [_peers(gpu, rows) for gpu, rows in most_telling(found)]


def _peers(gpu: str, points: Sequence[PeerPoint]) -> Panel:
    data: list[dict[str, Any]] = []
    groups = {"BiFormer": "#16877a", "others": "#8b98a8"}
    for group, colour in groups.items():
        for evidence in EVIDENCE:
            rows = [
                p
                for p in points
                if (p.model.startswith("biformer")) == (group == "BiFormer") and p.evidence == evidence
            ]
            if rows:
                data.append(_peer_points(group, rows, colour, evidence))
    layout = style.layout(
        420,
        style.axis("10<sup>9</sup> multiply-adds per image", rangemode="tozero"),
        style.axis("images per second", rangemode="tozero"),
    )
    return Panel(gpu, data, layout, tuple(Key(g, c, "dot") for g, c in groups.items()))


def _peer_points(group: str, rows: Sequence[PeerPoint], colour: str, evidence: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": group,
        "legendgroup": group,
        "x": [p.gmacs for p in rows],
        "y": [p.images_per_s for p in rows],
        "text": [p.model for p in rows],
        "textposition": "top center",
        "textfont": {"size": 11},
        "cliponaxis": False,
        "marker": style.point_marker(colour, evidence, 11),
        "customdata": [[p.note] for p in rows],
        "hovertemplate": (
            "<b>%{text}</b><br>%{y:,.0f} images/s at %{x:.3g} GMAC<br>%{customdata[0]}<extra></extra>"
        ),
    }
