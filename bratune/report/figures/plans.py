"""Plans: what does a faster setting cost in memory and fidelity?"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report import style
from bratune.report.figures.facts import (
    BASELINE,
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
from bratune.tune.evidence import recall_lines
from bratune.variant import VARIANTS

__all__ = ["PlanPoint", "infos", "panels", "section", "tuned_points"]


# Names under which tuning measures the paper's S and top-k.
OUR_DEFAULTS = ("default", "paper", "gather everywhere", "published")


class PlanPoint(NamedTuple):
    """One setting of a whole model: latency, memory and fidelity.

    Attributes:
        divergence: How far its outputs are from those of the setting it was trained with; None where no
            weights and images were given.
        mark: ``default`` (the paper's S and top-k), ``chosen`` (the plan), or empty.
        on_front: No other setting of the same work is better in latency and memory.
    """

    work: str
    gpu: str
    setting: str
    ms: float
    memory_mb: float
    divergence: float | None
    mark: str
    on_front: bool
    evidence: str
    note: str


def infos(records: Sequence[Record], plan: Mapping[str, object] | None = None) -> list[PlanPoint]:
    """Whole models by S, top-k and backend: latency against peak memory, the front marked.

    Args:
        records: Any; those of whole models with a peak are used.
        plan: The contents of a plan file, whose setting is marked ``chosen``.
    """
    rows = [r for r in timed(records, "model") if r.peak_alloc_mb is not None]
    settings: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in rows:
        settings[(f"{r.model}, {work_of(r)}", r.gpu_key)].append(r)
    found = []
    for (work, gpu), group in settings.items():
        if len({(r.n_win, r.topk, r.form, r.backend) for r in group}) < 2:
            continue
        for r in group:
            ms, _, _ = milliseconds(r)
            dominated = any(
                (o.median_ms or 0) <= ms
                and (o.peak_alloc_mb or 0) <= (r.peak_alloc_mb or 0)
                and ((o.median_ms or 0) < ms or (o.peak_alloc_mb or 0) < (r.peak_alloc_mb or 0))
                for o in group
            )
            found.append(
                PlanPoint(
                    work,
                    gpu,
                    ", ".join(filter(None, (f"S {r.n_win}, top-k {r.topk}", _form(r), r.backend))),
                    ms,
                    r.peak_alloc_mb or 0.0,
                    None,
                    _mark(r, plan),
                    not dominated,
                    r.evidence,
                    provenance(r),
                )
            )
    return sorted(found, key=lambda p: (p.work, p.gpu, p.ms, p.setting))


def tuned_points(plan: Mapping[str, Any]) -> list[PlanPoint]:
    """The settings that tuning verified end to end, from a plan and the ``front`` beside it."""
    height, width = plan["resolution"]
    work = f"{plan['model']}, {height}x{width}, batch {plan['batch']}, {plan['dtype']}, {plan['direction']}"
    found = []
    for row in plan["front"]:
        name = str(row.get("name") or "")
        mark = "chosen" if row["picked"] else "default" if name in OUR_DEFAULTS else ""
        found.append(
            PlanPoint(
                work,
                plan["machine"]["gpu_key"],
                row["setting"],
                row["ms"],
                row.get("peak_alloc_mb") or 0.0,
                row.get("divergence"),
                mark,
                bool(row["front"]),
                plan["measured"],
                ", ".join(filter(None, (name, plan["measured"], f"accuracy: {row['evidence']}"))),
            )
        )
    return sorted(found, key=lambda p: (p.ms, p.setting))


def _form(record: Record) -> str:
    return record.form if record.form not in ("", "plain") else ""


def _mark(record: Record, plan: Mapping[str, object] | None) -> str:
    if plan is not None and _is_plan(record, plan):
        return "chosen"
    variant = VARIANTS.get(record.model)
    published = variant is not None and record.topk == ",".join(map(str, variant.topks))
    gathers = not _form(record) and set(record.backend.split(",")) == {BASELINE}
    return "default" if published and (gathers or record.form == "published") else ""


def _is_plan(record: Record, plan: Mapping[str, object]) -> bool:
    stages = plan.get("stages")
    if not isinstance(stages, list) or plan.get("model") != record.model:
        return False
    topks = ",".join(str(s.get("topk")) for s in stages)
    windows = [str(s.get("n_win")) for s in stages if s.get("kind") == "routed"]
    routed = [str(s.get("backend")) for s in stages if s.get("kind") == "routed"]
    names = record.backend.split(",")
    names = names * len(routed) if len(names) == 1 else names
    return (
        topks == record.topk
        and windows == record.n_win.split(",")[: len(windows)]
        and names[: len(routed)] == routed
    )


def panels(points: Sequence[PlanPoint]) -> list[Panel]:
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
    places = [(p.ms, float(getattr(p, field))) for p in points]
    sides = dict(zip(points, label_sides(places), strict=True))
    for mark in marks:
        for evidence in EVIDENCE:
            rows = [p for p in points if p.mark == mark and p.evidence == evidence]
            if rows:
                data.append(_pareto_points(mark, rows, evidence, field, names, sides))
    top = max(y for _, y in places) or 1.0
    layout = style.layout(
        380,
        style.axis("latency, ms", range=[0, 1.06 * max(x for x, _ in places)]),
        style.axis(label, range=[-0.06 * top, 1.12 * top]),
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
    sides: dict[PlanPoint, str],
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text" if names else "markers",
        "name": MARK_WORDS[mark],
        "legendgroup": MARK_WORDS[mark],
        "x": [p.ms for p in rows],
        "y": [getattr(p, field) for p in rows],
        "text": [names.get(p.setting, "") for p in rows],
        "textposition": [sides[p] for p in rows],
        "textfont": {"size": 11},
        "cliponaxis": False,
        "marker": style.point_marker(MARKS[mark], evidence, 13 if mark else 8),
        "customdata": [[p.setting, p.note, p.memory_mb] for p in rows],
        "hovertemplate": (
            "<b>%{customdata[0]}</b><br>%{x:.3g} ms, %{customdata[2]:.3g} MB"
            "<br>%{customdata[1]}<extra></extra>"
        ),
    }


def section(source: Source) -> Section:
    """The question with its figures and data."""
    if source.plan is not None and source.plan.get("front"):
        rows = tuned_points(source.plan)
    else:
        rows = infos(source.records, source.plan)
    lead = (
        "Every setting of S, top-k and backend of one model; the line joins those that no other "
        "setting beats. Divergence is how far the outputs of trained weights move; it is no accuracy, and "
        "without weights and images nothing is known of it."
    )
    seen = recall_lines((source.plan or {}).get("diagnostics", {}))
    return Section(
        name="pareto",
        title="What does a faster setting cost in memory and fidelity?",
        lead=" ".join([lead, *(f"{line[0].upper()}{line[1:]}." for line in seen)]),
        panels=tuple(panels(safe(rows))),
        rows=tuple(rows),
        missing="fewer than two settings of one model have both a latency and a peak memory",
    )
