"""Bars: figures whose length is the message: throughput, time per stage, speedup, energy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bratune.record import EVIDENCE
from bratune.report import style
from bratune.report.bar_infos import PART_ORDER, Bar, EnergyBar, PartTime, SpeedupCell
from bratune.report.panel import MOST_PANELS, ROW_PX, Key, Panel, by, most_telling, trust

__all__ = ["energy_panels", "heat_panels", "stack_panels", "throughput_panels"]


def _number(value: float) -> str:
    """Three significant digits, without exponents."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


# --- throughput ---------------------------------------------------------------------------------------


def throughput_panels(bars: Sequence[Bar]) -> list[Panel]:
    """Images per second by GPU and architecture, one panel per piece of work."""
    groups = sorted(
        by(bars, "work").items(),
        key=lambda g: (-len({b.gpu for b in g[1]}), trust(g[1]), -len(g[1]), g[0]),
    )
    return [_throughput(work, rows) for work, rows in groups[:MOST_PANELS]]


def _throughput(work: str, bars: Sequence[Bar]) -> Panel:
    names = sorted({b.series for b in bars})
    palette = style.colours(names)
    title, short = _without_shared_model(work, names)
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


def _without_shared_model(work: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A title and short names: the model moves into the title where all series share it."""
    models = {name.partition(" · ")[0] for name in names}
    if len(models) != 1 or len(names) == 1:
        return work, {name: name for name in names}
    return f"{models.pop()}, {work}", {name: name.partition(" · ")[2] or name for name in names}


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
        "customdata": [[b.note, _number(b.bound) if b.bound else "not known"] for b in rows],
        "hovertemplate": (
            f"<b>%{{y}}</b> {series}<br>%{{x:,.0f}} images/s"
            "<br>no more than %{customdata[1]} possible<br>%{customdata[0]}<extra></extra>"
        ),
    }


# --- latency per stage --------------------------------------------------------------------------------


def stack_panels(times: Sequence[PartTime]) -> list[Panel]:
    """Latency per stage, stacked by part, one panel per work and machine."""
    return [_stack(title, rows) for title, rows in most_telling(by(times, "gpu", "work"))]


def _stack(title: str, times: Sequence[PartTime]) -> Panel:
    lanes = sorted({(t.stage, t.backend) for t in times if t.backend}, reverse=True)
    if not lanes:
        lanes = sorted({(t.stage, "") for t in times}, reverse=True)
    names = {lane: f"stage {lane[0]}  {lane[1]}" for lane in lanes}
    data: list[dict[str, Any]] = []
    used = []
    for part in PART_ORDER:
        found = [
            (names[lane], t)
            for lane in lanes
            for t in times
            if t.part == part and t.stage == lane[0] and (not t.backend or t.backend == lane[1])
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
        style.axis("milliseconds, all blocks of the stage"),
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


# --- speedup ------------------------------------------------------------------------------------------


def heat_panels(cells: Sequence[SpeedupCell]) -> list[Panel]:
    """Speedup over gather-then-dense, backend by stage, one panel per work and machine."""
    return [_heat(title, rows) for title, rows in most_telling(by(cells, "gpu", "work"))]


def _heat(title: str, cells: Sequence[SpeedupCell]) -> Panel:
    stages = sorted({c.stage for c in cells})
    found = {(c.backend, c.stage): c for c in cells}
    backends = _slowest_last(cells)
    grid = [[found.get((b, s)) for s in stages] for b in backends]
    # Logarithms, so that half as fast and twice as fast are equally far from 1.
    data = [
        {
            "type": "heatmap",
            "x": [f"stage {s}" for s in stages],
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


# --- energy ------------------------------------------------------------------------------------------


def energy_panels(bars: Sequence[EnergyBar]) -> list[Panel]:
    """Joules per image by machine, one panel per piece of work."""
    return [_energy(work, rows) for work, rows in sorted(by(bars, "work").items())[:MOST_PANELS]]


def _energy(work: str, bars: Sequence[EnergyBar]) -> Panel:
    names = sorted({b.series for b in bars})
    palette = style.colours(names)
    title, short = _without_shared_model(work, names)
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
