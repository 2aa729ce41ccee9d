"""Peers: how does it compare with other models at the same work?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import (
    milliseconds,
    provenance,
    timed,
    work_of,
)
from bratune.report.figures.panel import (
    Key,
    Panel,
    by,
    label_sides,
    most_telling,
    safe,
)
from bratune.report.figures.section import Section, Source
from bratune.variant import VARIANTS

__all__ = ["PeerPoint", "infos", "panels", "section"]


class PeerPoint(NamedTuple):
    """A model among others: work per image and images per second."""

    gpu: str
    model: str
    gmacs: float
    images_per_s: float
    evidence: str
    note: str


def infos(records: Sequence[Record], gmacs: Mapping[str, float]) -> list[PeerPoint]:
    """The best throughput of every model whose work per image is known, on its machine.

    Args:
        records: Any; those of whole models are used.
        gmacs: Multiply-adds per image in 10^9, by model; BiFormer's are known, and what was counted while a
            model was measured stands in its record.
    """
    known = {name: v.gmacs_224 for name, v in VARIANTS.items()} | dict(gmacs)
    best: dict[tuple[str, str, str], PeerPoint] = {}
    for r in timed(records, "model"):
        ms, batch = milliseconds(r)[0], r.batch or 1
        rate = 1e3 * batch / ms
        work = known.get(r.model) or (r.tflops_s or 0.0) * ms / batch / 2
        if not work:
            continue
        key = (r.gpu_key, r.model, r.evidence)
        if key not in best or rate > best[key].images_per_s:
            note = f"{work_of(r)}, {provenance(r)}"
            best[key] = PeerPoint(r.gpu_key, r.model, work, rate, r.evidence, note)
    return sorted(best.values())


def panels(points: Sequence[PeerPoint]) -> list[Panel]:
    """Images per second against work per image, ours and others, one panel per machine."""
    found = {gpu: rows for gpu, rows in by(points, "gpu").items() if len({p.model for p in rows}) > 1}
    return [_peers(gpu, rows) for gpu, rows in most_telling(found)]


def _peers(gpu: str, points: Sequence[PeerPoint]) -> Panel:
    data: list[dict[str, Any]] = []
    groups = {"BiFormer": "#16877a", "others": "#8b98a8"}
    sides = dict(zip(points, label_sides([(p.gmacs, p.images_per_s) for p in points]), strict=True))
    for group, colour in groups.items():
        for evidence in EVIDENCE:
            rows = [
                p
                for p in points
                if (p.model.startswith("biformer")) == (group == "BiFormer") and p.evidence == evidence
            ]
            if rows:
                data.append(
                    _peer_points(group, rows, colour, evidence) | {"textposition": [sides[p] for p in rows]}
                )
    layout = style.layout(
        420,
        style.axis("10<sup>9</sup> multiply-adds per image", range=[0, 1.06 * max(p.gmacs for p in points)]),
        style.axis("images per second", range=[0, 1.12 * max(p.images_per_s for p in points)]),
    )
    drawn = {trace["legendgroup"] for trace in data}
    keys = tuple(Key(g, c, "dot") for g, c in groups.items() if g in drawn)
    return Panel(gpu, data, layout, keys)


def _peer_points(group: str, rows: Sequence[PeerPoint], colour: str, evidence: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": group,
        "legendgroup": group,
        "x": [p.gmacs for p in rows],
        "y": [p.images_per_s for p in rows],
        "text": [p.model for p in rows],
        "textfont": {"size": 11},
        "cliponaxis": False,
        "marker": style.point_marker(colour, evidence, 11),
        "customdata": [[p.note] for p in rows],
        "hovertemplate": (
            "<b>%{text}</b><br>%{y:,.0f} images/s at %{x:.3g} GMAC<br>%{customdata[0]}<extra></extra>"
        ),
    }


def section(source: Source) -> Section:
    """The question with its figures and data."""
    rows = infos(source.records, source.gmacs)
    return Section(
        name="peers",
        title="How does it compare with other models?",
        lead="Throughput over work. Two models on one vertical line do the same number of multiply-adds.",
        panels=tuple(panels(safe(rows))),
        rows=tuple(rows),
        missing="fewer than two models with a known amount of work ran on one machine",
    )
