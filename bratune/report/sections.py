"""Sections: the questions of a report, each with its panels, its data and why it may be missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bratune.record import Record
from bratune.report import bar_infos, bars, infos, point_infos, points
from bratune.report.panel import Panel
from bratune.tune.layer_recall import recall_lines

__all__ = ["Section", "sections"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question.

    Attributes:
        name: Identifier of its figures, its table and its file of data.
        title: The question.
        lead: What is drawn, in a sentence or two.
        panels: Its figures; empty when there is nothing to draw.
        rows: Its data, one named tuple per mark.
        missing: Why there is nothing to draw.
    """

    name: str
    title: str
    lead: str
    panels: tuple[Panel, ...]
    rows: tuple[Any, ...]
    missing: str = ""


class _Source(NamedTuple):
    records: Sequence[Record]
    plan: Mapping[str, Any] | None
    gmacs: Mapping[str, float]


def sections(
    records: Sequence[Record],
    plan: Mapping[str, Any] | None = None,
    gmacs: Mapping[str, float] | None = None,
) -> list[Section]:
    """Every question in reading order, those without an answer included.

    Args:
        records: Everything that is to be shown.
        plan: A plan file's contents, whose setting is marked; with the settings that tuning verified under
            ``front``, those are drawn.
        gmacs: Work per image of models of other libraries, in 10^9 multiply-adds.
    """
    source = _Source(infos.with_bounds(records), plan, gmacs or {})
    return [make(source) for make in _MAKERS]


def _throughput(source: _Source) -> Section:
    rows = bar_infos.throughputs(source.records)
    return Section(
        name="throughput",
        title="How many images per second, on which GPU?",
        lead="Whole models, the same work on every machine. Whiskers are 95 % intervals.",
        panels=tuple(bars.throughput_panels(rows)),
        rows=tuple(rows),
        missing="no whole model was measured or modelled",
    )


def _speedup(source: _Source) -> Section:
    rows = bar_infos.speedups(source.records)
    return Section(
        name="speedup",
        title="How much faster than gather-then-dense is each backend?",
        lead="The same attention call with every backend, stage by stage; 1.00x is the published "
        "composition. Values in italics are not measured.",
        panels=tuple(bars.heat_panels(rows)),
        rows=tuple(rows),
        missing="no attention call was run with gather and another backend",
    )


def _stages(source: _Source) -> Section:
    rows = bar_infos.part_times(source.records)
    return Section(
        name="stages",
        title="Where does the time go?",
        lead="Time per stage, part by part, all blocks of the stage together.",
        panels=tuple(bars.stack_panels(rows)),
        rows=tuple(rows),
        missing="no part of a block was measured or modelled",
    )


def _roofline(source: _Source) -> Section:
    roofs, rows = point_infos.roofline(source.records)
    return Section(
        name="roofline",
        title="How close to the hardware is it?",
        lead="Useful operations only: padding to whole tiles and masked products lower a point. "
        "The roof is the published peak; what stays in the cache can lie above its slope.",
        panels=tuple(points.roofline_panels(roofs, rows)) if rows else (),
        rows=tuple(rows),
        missing="no attention call ran on a board whose peaks are published",
    )


def _pareto(source: _Source) -> Section:
    if source.plan is not None and source.plan.get("front"):
        rows = point_infos.tuned_points(source.plan)
    else:
        rows = point_infos.plan_points(source.records, source.plan)
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
        panels=tuple(points.pareto_panels(rows)),
        rows=tuple(rows),
        missing="fewer than two settings of one model have both a latency and a peak memory",
    )


def _scaling(source: _Source) -> Section:
    rows = point_infos.scaling(source.records)
    formula = point_infos.complexity()
    return Section(
        name="scaling",
        title="How does it grow with the resolution?",
        lead="First what the paper's formula counts for S = 7, for S growing as the cube root of the tokens, "
        "and for dense attention; then times over the same axis.",
        panels=tuple(points.scaling_panels(formula, rows)) if rows else (),
        rows=(*rows, *formula) if rows else (),
        missing="no attention call was run at three resolutions or more",
    )


def _energy(source: _Source) -> Section:
    rows = bar_infos.energies(source.records)
    return Section(
        name="energy",
        title="How much energy does an image take?",
        lead="Energy of the whole board, its idle share included, over windows of at least one second.",
        panels=tuple(bars.energy_panels(rows)),
        rows=tuple(rows),
        missing="no record has an energy (it needs a GPU whose driver reports power)",
    )


def _peers(source: _Source) -> Section:
    rows = point_infos.peers(source.records, source.gmacs)
    return Section(
        name="peers",
        title="How does it compare with other models?",
        lead="Throughput over work. Two models on one vertical line do the same number of multiply-adds.",
        panels=tuple(points.peer_panels(rows)),
        rows=tuple(rows),
        missing="fewer than two models with a known amount of work ran on one machine",
    )


_MAKERS: tuple[Callable[[_Source], Section], ...] = (
    _throughput,
    _speedup,
    _stages,
    _roofline,
    _pareto,
    _scaling,
    _energy,
    _peers,
)
