"""Stages: where does the time go, part by part?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import (
    milliseconds,
    provenance,
    settings_of,
    trusted,
    work_of,
)
from bratune.report.figures.panel import (
    ROW_PX,
    Key,
    Panel,
    by,
    most_telling,
    safe,
)
from bratune.report.figures.resolution import is_sweep
from bratune.report.figures.section import Section, Source

__all__ = ["PART_ORDER", "PartTime", "infos", "panels", "section"]


# Parts of a block in the order in which they run.
PART_ORDER = ("pos_embed", "norm", "qkv", "routing", "attention", "lepe", "proj", "mlp")


class PartTime(NamedTuple):
    """Milliseconds that all blocks of a stage spend in one part."""

    work: str
    gpu: str
    stage: int
    setting: str
    backend: str
    part: str
    ms: float
    evidence: str
    note: str


def infos(records: Sequence[Record]) -> list[PartTime]:
    """Time per stage, part by part, all blocks of the stage together; every S and top-k by itself.

    Of several rows of one part (e.g. settings of a backend), the fastest is shown.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in trusted(records).values():
        if r.part in PART_ORDER and r.stage and r.form != "mixer" and not is_sweep(r):
            groups[(f"{r.model}, {work_of(r)}, {r.l2} cache", r.gpu_key)].append(r)
    found: dict[tuple[object, ...], PartTime] = {}
    for (work, gpu), rows in groups.items():
        names = settings_of(rows)
        for r in rows:
            stage = r.stage or 0
            time = PartTime(
                work,
                gpu,
                stage,
                names[(stage, r.n_win, r.topk)],
                r.backend if r.part == "attention" else "",
                r.part,
                milliseconds(r)[0] * (r.block_count or 1),
                r.evidence,
                provenance(r),
            )
            found[time[:6]] = min(found.get(time[:6], time), time, key=_rank)
    return sorted(found.values())


def _rank(time: PartTime) -> tuple[int, float]:
    return EVIDENCE.index(time.evidence), time.ms


def panels(times: Sequence[PartTime]) -> list[Panel]:
    """Latency per stage, stacked by part, one panel per work and machine."""
    return [_stack(title, rows) for title, rows in most_telling(by(times, "gpu", "work"))]


def _stack(title: str, times: Sequence[PartTime]) -> Panel:
    lanes = sorted({(t.stage, t.setting, t.backend) for t in times if t.backend}, reverse=True)
    if not lanes:
        lanes = sorted({(t.stage, t.setting, "") for t in times}, reverse=True)
    names = {lane: "  ".join(filter(None, (f"stage {lane[0]}", *lane[1:]))) for lane in lanes}
    data: list[dict[str, Any]] = []
    used = []
    for part in PART_ORDER:
        found = [
            (names[lane], t)
            for lane in lanes
            for t in times
            if t.part == part and (t.stage, t.setting) == lane[:2] and t.backend in ("", lane[2])
        ]
        if not found:
            continue
        used.append(part)
        colour = style.PART_COLOURS[part]
        for evidence in EVIDENCE:
            rows = [(name, t) for name, t in found if t.evidence == evidence]
            if rows:
                data.append(_stack_bars(part, rows, colour, evidence))
    order = _spaced([(lane[0], names[lane]) for lane in lanes])
    layout = style.layout(
        64 + ROW_PX * len(lanes) + ROW_PX // 2 * (len(order) - len(lanes)),
        style.axis("ms per stage"),
        style.axis(
            "",
            type="category",
            categoryorder="array",
            categoryarray=order,
            range=[-0.7, len(order) - 0.3],
            tickvals=[name for name in order if name.strip()],
            showgrid=False,
        ),
        barmode="stack",
        bargap=0.3,
    )
    return Panel(title, data, layout, tuple(Key(p, style.PART_COLOURS[p]) for p in used))


def _spaced(lanes: Sequence[tuple[int, str]]) -> list[str]:
    """The names of the lanes with an empty one between stages."""
    found: list[str] = []
    for number, (stage, name) in enumerate(lanes):
        if number and lanes[number - 1][0] != stage:
            found.append(" " * stage)
        found.append(name)
    return found


def _stack_bars(
    part: str, rows: Sequence[tuple[str, PartTime]], colour: str, evidence: str
) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": part,
        "legendgroup": part,
        "y": [name for name, _ in rows],
        "x": [t.ms for _, t in rows],
        "marker": style.bar_marker(colour, evidence),
        "customdata": [[t.note] for _, t in rows],
        "hovertemplate": f"<b>{part}</b> %{{y}}<br>%{{x:.3g}} ms<br>%{{customdata[0]}}<extra></extra>",
    }


def section(source: Source) -> Section:
    """The question with its figures and data."""
    rows = infos(source.records)
    return Section(
        name="stages",
        title="Where does the time go?",
        lead="Time per stage, part by part, all blocks of the stage together.",
        panels=tuple(panels(safe(rows))),
        rows=tuple(rows),
        missing="no part of a block was measured or modelled",
    )
