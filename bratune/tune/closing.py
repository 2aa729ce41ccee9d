"""Closing comparison: whether a plan may say "faster", measured after the search and apart from it.

The search chose its candidates because they looked fast, so its own measurements flatter them. They, the
default and the published form therefore take turns in several fresh processes
(`bratune.engine.ComparingEngine.in_turn`), and only the ratios within rounds decide, by the one verdict of
every command (`bratune.measure.verdict`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bratune.cell import Cell
from bratune.engine import ComparingEngine
from bratune.measure.verdict import MedianOfPasses, Verdict, estimate, judge_ratios, priors
from bratune.record import Record
from bratune.run.summary import paired
from bratune.store.pooled import passes_of

__all__ = ["Closing", "compare"]


@dataclass(frozen=True)
class Closing:
    """What a comparison showed.

    Attributes:
        times: In milliseconds, of every cell that has one.
        verdicts: Of every candidate that has a ratio to the default.
        rows: The passes of every cell.
        passes: Of the cell that has the most.
        failed: Why a cell has no time.
    """

    times: Mapping[Cell, MedianOfPasses]
    verdicts: Mapping[Cell, Verdict] = field(default_factory=dict)
    rows: Mapping[Cell, Sequence[Record]] = field(default_factory=dict)
    passes: int = 0
    failed: Mapping[Cell, str] = field(default_factory=dict)

    def speedup(self, cell: Cell) -> MedianOfPasses | None:
        """How many times faster than the default a candidate is."""
        found = self.verdicts.get(cell)
        if found is None:
            return None
        lo, hi = found.speedup_interval if found.lo else (None, None)
        return MedianOfPasses(found.speedup, lo, hi, found.passes[0])

    def speedup_over(self, cell: Cell, other: Cell) -> MedianOfPasses | None:
        """How many times faster a cell is than another one, from the passes that measured both."""
        found = paired(self.rows.get(cell, ()), self.rows.get(other, ()))
        return None if found is None else estimate(found)

    def fastest(self) -> Cell | None:
        """The fastest of the candidates that are faster than the default; None where none is shown to be."""
        faster = [cell for cell, found in self.verdicts.items() if found.verdict == "FASTER"]
        return min(faster, key=lambda cell: self.verdicts[cell].ratio, default=None)

    def words(self, cell: Cell) -> str:
        """What the comparison says of a candidate, in one sentence."""
        found = self.verdicts.get(cell)
        if found is None:
            return f"it was not compared: {self.failed.get(cell, 'no pass measured it beside the default')}"
        lo, hi = found.speedup_interval
        passes = found.passes[0]
        if passes < 2:
            return (
                f"{found.verdict}, {found.speedup:.3f}x in one process, which shows no scatter; "
                "several fresh processes would"
            )
        text = f"{found.verdict}, {found.speedup:.3f}x ({lo:.3f} to {hi:.3f}) in turn over {passes} processes"
        return f"{text}; {found.settles}" if found.settles else text


def compare(
    engine: ComparingEngine,
    default: Cell,
    candidates: Sequence[Cell],
    published: Cell | None,
    passes: int,
    *,
    enough: Callable[[int], bool] = lambda made: False,
) -> Closing:
    """Let candidates, the default and the published form take turns.

    Args:
        engine: Measures.
        default: What the others are compared with.
        candidates: Cells that may replace it.
        published: The official composition, which is timed and chosen by nobody; None where there is none.
        passes: Fresh processes.
        enough: See `bratune.engine.ComparingEngine.in_turn`.
    """
    cells = list(dict.fromkeys([default, *candidates, *([published] if published else ())]))
    rows = engine.in_turn(cells, default, passes, enough=enough)
    timed = {cell: passes_of(found) for cell in cells if (found := [row for row in rows[cell] if row.ok])}
    known = priors(timed.values())
    judged = {cell: one for cell in candidates if (one := paired(rows[cell], rows[default])) is not None}
    verdicts = judge_ratios(list(judged.values())).verdicts
    return Closing(
        times={cell: estimate(found, known[found.kind]) for cell, found in timed.items()},
        verdicts=dict(zip(judged, verdicts, strict=True)),
        rows=rows,
        passes=max((len(found.values) for found in timed.values()), default=0),
        failed={cell: f"{row.outcome}: {row.reason}" for cell in cells for row in rows[cell] if not row.ok},
    )
