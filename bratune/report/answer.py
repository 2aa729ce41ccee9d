"""Answer: what to run, in words, from the whole models of a run that were measured in turn.

Every statement rests on ratios within rounds (`bratune.record.Record.ratio`) of several fresh processes;
where the interval holds 1, nothing is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bratune.measure.verdict import BUSY_PCT
from bratune.record import Record
from bratune.run.summary import group

__all__ = ["Ratio", "against", "answer", "name_of"]


@dataclass(frozen=True)
class Ratio:
    """How many times faster one model is than another, with its 95 % interval."""

    value: float
    lo: float
    hi: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 1 out."""
        return not self.lo <= 1 <= self.hi

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.lo:.2f} to {self.hi:.2f})"


def name_of(row: Record) -> str:
    """What ran, in words: ``runtime``, ``gather everywhere``, ``per stage: dense, triton``."""
    if row.form == "timm":
        return f"{row.model} (timm)"
    if row.form not in ("", "plain"):
        return row.form
    names = row.backend.split(",")
    if row.backend == "auto":
        return "auto"
    return f"{names[0]} everywhere" if len(set(names)) == 1 else "per stage: " + ", ".join(names)


def against(row: Record, other: Record) -> Ratio | None:
    """How many times faster a row is than another of the same rounds; None where one process cannot say.

    Both ratios are to the same baseline. Their errors are added as if they were independent, which does not
    make the interval too narrow: what they have in common is the baseline's.
    """
    ratios = [(_ratio(r), r.passes or 1) for r in (row, other)]
    if any(ratio is None or passes < 2 for ratio, passes in ratios):
        return None
    (a, _), (b, _) = ratios
    assert a is not None
    assert b is not None
    value = a.value / b.value
    reach = math.hypot(*(math.log(r.hi / r.lo) / 2 for r in (a, b)))
    return Ratio(value, value / math.exp(reach), value * math.exp(reach))


def _ratio(row: Record) -> Ratio | None:
    """To the baseline; the baseline itself has the ratio 1."""
    if row.ratio is not None and row.ratio_lo and row.ratio_hi:
        return Ratio(row.ratio, row.ratio_lo, row.ratio_hi)
    return Ratio(1.0, 1.0, 1.0) if row.backend and row.backend == row.baseline else None


def answer(rows: Sequence[Record]) -> list[str]:
    """A sentence per model, batch and regime: what to use, and how much faster it is; then one per peer."""
    models = [row for row in rows if row.part == "model" and row.evidence in ("measured", "replayed")]
    lines = []
    for scene in group(row for row in models if row.form != "timm"):
        timed = [row for row in scene if row.ok]
        if not timed:
            continue
        best = min(timed, key=lambda row: row.median_ms or 0.0)
        where = f"{best.model}, batch {best.batch}, {best.regime}"
        rivals = {
            "published": next((row for row in timed if row.form == "published"), None),
            "auto": next((row for row in timed if row.backend == "auto" and row.form == "plain"), None),
        }
        found = {
            name: against(best, row) for name, row in rivals.items() if row is not None and row is not best
        }
        known = {name: ratio for name, ratio in found.items() if ratio is not None}
        if (best.passes or 1) < 2 or (found and not known):
            few = (best.passes or 1) < 2
            why = "in one process" if few else "without a baseline in the same rounds (--forms gather,...)"
            lines.append(f"{where}: {name_of(best)} had the least median, {why}: nothing is shown")
            continue
        if (best.cpu_wait_pct or 0.0) > BUSY_PCT:
            lines.append(f"{where}: the machine was busy, no answer is given")
            continue
        faster = [f"{ratio} as fast as {name}" for name, ratio in known.items() if ratio.shown]
        open_ones = [f"{name}, {ratio}" for name, ratio in known.items() if not ratio.shown]
        text = f"{where}: use {name_of(best)}"
        text += f", {' and '.join(faster)}" if faster else ""
        if open_ones and not faster:
            text = f"{where}: {name_of(best)} had the least median"
        text += f"; nothing is shown against {' and '.join(open_ones)}" if open_ones else ""
        lines.append(text)
        for peer in (row for row in models if row.form == "timm" and row.ok and _beside(row, best)):
            ratio = against(best, peer)
            if ratio is not None:
                word = "nothing is shown" if not ratio.shown else "faster" if ratio.value > 1 else "slower"
                lines.append(f"{where}: {name_of(best)} is {ratio} as fast as {name_of(peer)}: {word}")
    return lines


def _beside(peer: Record, own: Record) -> bool:
    names = ("batch", "image_height", "image_width", "dtype", "amp", "layout", "direction", "regime", "l2")
    return all(getattr(peer, name) == getattr(own, name) for name in (*names, "gpu_name", "seed"))
