"""Opening: the sentence that a report begins with: what to run, how fast, against what, by what evidence."""

from __future__ import annotations

from collections.abc import Sequence

from bratune.cell import RUNTIME_FORMS
from bratune.record import Record
from bratune.report.answer import answer
from bratune.report.figures import speedup, throughput
from bratune.report.figures.facts import timed, work_of
from bratune.report.figures.panel import number
from bratune.report.figures.throughput import OTHERS, PUBLISHED, Bar

__all__ = ["opening"]


def opening(records: Sequence[Record], passes: Sequence[Record] = ()) -> str:
    """What the first chart shows, in a sentence with a number and its evidence.

    Args:
        records: Those of the report, pooled, machines told apart (`bratune.report.figures.facts.told_apart`).
        passes: Rows of single passes, machines told apart.
    """
    ours = [r for r in records if r.form not in RUNTIME_FORMS]  # the answer names no runtime of others
    charts = throughput.chart(throughput.infos(ours))
    if not charts:
        return _of_calls(records)
    first = charts[0]
    best = max(first, key=_weight)
    rows = [r for r in timed(records, "model") if r.gpu_key == best.gpu and work_of(r) == best.work]
    words = answer([r for r in rows if r.form == "timm" or r.model == best.model], passes)
    rate = f"{number(best.images_per_s)} images/s ({number(best.lo)} to {number(best.hi)})"
    where = f"{best.evidence} on {best.gpu}"
    if words:
        return f"{words[0]}. It does {rate}, {where}."
    beside = next(
        (b for b in first if _same_scene(b, best) and b.meaning == PUBLISHED and b is not best), None
    )
    against = ""
    if beside is not None:
        ratio = best.images_per_s / beside.images_per_s
        against = f", {ratio:.2f}x the {number(beside.images_per_s)} of {beside.series} ({beside.evidence})"
    return f"{best.series}: {rate}{against}, {where}; {best.work}."


def _weight(bar: Bar) -> tuple[bool, bool, float]:
    """What to run comes from BiFormer where there is one, and from measurements where there are some."""
    return bar.meaning != OTHERS, bar.evidence in ("measured", "replayed"), bar.images_per_s


def _same_scene(bar: Bar, other: Bar) -> bool:
    return (bar.gpu, bar.model) == (other.gpu, other.model)


def _of_calls(records: Sequence[Record]) -> str:
    """Without whole models: the fastest backend of each stage against gather."""
    cells = speedup.infos(records)
    if not cells:
        return "Nothing here has both a time and something to stand against."
    first = cells[0]
    best: dict[tuple[int, str], speedup.SpeedupCell] = {}
    for cell in cells:
        if (cell.work, cell.gpu) == (first.work, first.gpu):
            key = (cell.stage, cell.setting)
            best[key] = max(best.get(key, cell), cell, key=lambda c: c.speedup)
    parts = [
        f"stage {stage}{f' ({setting})' if setting else ''} {c.backend} {c.speedup:.2f}x"
        f" ({c.lo:.2f} to {c.hi:.2f}, {c.evidence})"
        for (stage, setting), c in sorted(best.items())
    ]
    return f"Fastest attention against gather on {first.gpu}: {', '.join(parts)}; {first.work}."
