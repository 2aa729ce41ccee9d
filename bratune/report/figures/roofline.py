"""Roofline: how close to the hardware is an attention call?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bratune.predict.fit import board_of
from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import (
    cell_of,
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
from bratune.report.figures.resolution import is_sweep
from bratune.report.figures.section import Section, Source

__all__ = ["Roof", "RoofPoint", "infos", "panels", "section"]


class Roof(NamedTuple):
    """The roof of one machine: peak arithmetic and bandwidth."""

    gpu: str
    tflops: float
    gb_s: float


class RoofPoint(NamedTuple):
    """One attention call under the roof: useful operations per least byte, and operations per second."""

    gpu: str
    stage: int
    backend: str
    setting: str
    batch: int
    intensity: float
    tflops: float
    evidence: str
    note: str


def infos(records: Sequence[Record]) -> tuple[list[Roof], list[RoofPoint]]:
    """The roofs of the machines whose peaks are published, and the attention calls under them."""
    roofs: dict[str, Roof] = {}
    points = []
    for r in timed(records, "attention"):
        board = board_of(r)
        if board is None or board.architecture == "CPU" or is_sweep(r):
            continue
        peak, cell = board.peak_tflops(r.dtype), cell_of(r)
        if cell is None or not peak or not board.memory_gbps:
            continue
        problem = cell.problem
        ms, _, _ = milliseconds(r)
        flops, moved = 2 * problem.attention_macs, problem.io_bytes
        if problem.backward:
            flops, moved = 3 * flops, int(2.5 * moved)
        roofs[f"{r.gpu_key} {r.dtype}"] = Roof(f"{r.gpu_key} {r.dtype}", peak, board.memory_gbps)
        points.append(
            RoofPoint(
                f"{r.gpu_key} {r.dtype}",
                r.stage or 0,
                r.backend,
                f"S {r.n_win}, k {r.topk}",
                r.batch or 1,
                flops / moved,
                flops / ms / 1e9,
                r.evidence,
                provenance(r),
            )
        )
    return sorted(roofs.values()), sorted(points)


def panels(roofs: Sequence[Roof], points: Sequence[RoofPoint]) -> list[Panel]:
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
        "customdata": [[p.stage, p.setting, p.batch, p.note] for p in rows],
        "hovertemplate": (
            f"<b>{backend}</b> stage %{{customdata[0]}}, %{{customdata[1]}}, batch %{{customdata[2]}}"
            "<br>%{y:.3g} TFLOP/s at %{x:.3g} op/byte<br>%{customdata[3]}<extra></extra>"
        ),
    }


def section(source: Source) -> Section:
    """The question with its figures and data."""
    roofs, rows = infos(source.records)
    return Section(
        name="roofline",
        title="How close to the hardware is it?",
        lead="Useful operations only: padding to whole tiles and masked products lower a point. "
        "The roof is the published peak; what stays in the cache can lie above its slope.",
        panels=tuple(panels(safe(roofs), safe(rows))) if rows else (),
        rows=tuple(rows),
        missing="no attention call ran on a board whose peaks are published",
    )
