"""Speed-up: how much faster than gather-then-dense is each backend, stage by stage?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import (
    BASELINE,
    milliseconds,
    provenance,
    settings_of,
    timed,
    work_of,
)
from bratune.report.figures.panel import (
    Panel,
    by,
    most_telling,
    safe,
)
from bratune.report.figures.section import Section, Source

__all__ = ["SpeedupCell", "infos", "panels", "section"]


class SpeedupCell(NamedTuple):
    """How much faster a backend is than gather-then-dense at a stage, with its interval."""

    work: str
    gpu: str
    backend: str
    stage: int
    setting: str
    speedup: float
    lo: float
    hi: float
    evidence: str
    note: str


def infos(records: Sequence[Record]) -> list[SpeedupCell]:
    """Every backend against gather-then-dense on the same call, stage by stage."""
    works: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in timed(records, "attention"):
        works[(f"{r.model or 'call'}, {work_of(r)}, {r.l2} cache", r.gpu_key)].append(r)
    groups: dict[tuple[str, str, int, str], dict[str, Record]] = defaultdict(dict)
    for (work, gpu), rows in works.items():
        names = settings_of(rows)
        for r in rows:
            stage = r.stage or 0
            groups[(work, gpu, stage, names[(stage, r.n_win, r.topk)])][r.backend] = r
    found = []
    for (work, gpu, stage, setting), by_backend in groups.items():
        base = by_backend.get(BASELINE)
        if base is None:
            continue
        for backend, r in by_backend.items():
            value, lo, hi = _speedup(base, r)
            weaker = max((base.evidence, r.evidence), key=EVIDENCE.index)
            found.append(
                SpeedupCell(
                    work,
                    gpu,
                    backend,
                    stage,
                    setting,
                    value,
                    lo,
                    hi,
                    weaker,
                    provenance(r),
                )
            )
    return sorted(found)


def _speedup(base: Record, r: Record) -> tuple[float, float, float]:
    """The ratio that was measured in turn, else that of two medians, with its interval."""
    if r.ratio is not None:
        return r.ratio, r.ratio_lo or r.ratio, r.ratio_hi or r.ratio
    (base_ms, base_lo, base_hi), (ms, lo, hi) = milliseconds(base), milliseconds(r)
    return base_ms / ms, base_lo / hi, base_hi / lo


def panels(cells: Sequence[SpeedupCell]) -> list[Panel]:
    """Speedup over gather-then-dense, backend by stage, one panel per work and machine."""
    return [_heat(title, rows) for title, rows in most_telling(by(cells, "gpu", "work"))]


def _heat(title: str, cells: Sequence[SpeedupCell]) -> Panel:
    columns = sorted({(c.stage, c.setting) for c in cells})
    found = {(c.backend, c.stage, c.setting): c for c in cells}
    backends = _slowest_last(cells)
    grid = [[found.get((b, *column)) for column in columns] for b in backends]
    # Logarithms, so that half as fast and twice as fast are equally far from 1.
    data = [
        {
            "type": "heatmap",
            "x": ["<br>".join(filter(None, (f"stage {stage}", setting))) for stage, setting in columns],
            "y": backends,
            "z": [[math.log2(c.speedup) if c else None for c in row] for row in grid],
            "zmid": 0,
            "zmin": -3,
            "zmax": 3,
            "xgap": 3,
            "ygap": 3,
            "colorscale": [[0, "#d98b69"], [0.5, "#eef1f3"], [1, "#55b3a5"]],
            "showscale": False,
            "text": [[_heat_text(c) for c in row] for row in grid],
            "texttemplate": "%{text}",
            "textfont": {"color": "#18222c", "size": 13},
            "customdata": [[_heat_hover(c) for c in row] for row in grid],
            "hovertemplate": "<b>%{y}</b> %{x}<br>%{customdata}<extra></extra>",
            "hoverongaps": False,
        }
    ]
    layout = style.layout(
        56 + 36 * len(backends),
        style.axis("", side="top", showgrid=False),
        style.axis("", showgrid=False),
        margin={"l": 8, "r": 20, "t": 30, "b": 8},
    )
    return Panel(title, data, layout)


def _slowest_last(cells: Sequence[SpeedupCell]) -> list[str]:
    """Backends from the bottom row up: the slowest at the bottom, by the geometric mean over stages."""
    logs: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        logs[cell.backend].append(math.log(cell.speedup))
    return sorted(logs, key=lambda b: (sum(logs[b]) / len(logs[b]), b))


def _heat_text(cell: SpeedupCell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.speedup:.2f}x" if cell.speedup < 10 else f"{cell.speedup:.0f}x"
    return text if cell.evidence == "measured" else f"<i>≈ {text}</i>"


def _heat_hover(cell: SpeedupCell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.speedup:.2f}x ({cell.lo:.2f} to {cell.hi:.2f})<br>{cell.note}"


def section(source: Source) -> Section:
    """The question with its figures and data."""
    rows = infos(source.records)
    return Section(
        name="speedup",
        title="How much faster than gather-then-dense is each backend?",
        lead="The same attention call with every backend, stage by stage; 1.00x is the published "
        "composition. Values in italics are not measured.",
        panels=tuple(panels(safe(rows))),
        rows=tuple(rows),
        missing="no attention call was run with gather and another backend",
    )
