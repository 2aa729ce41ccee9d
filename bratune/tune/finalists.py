"""Finalists: the last word on "faster", measured in fresh processes, side by side.

One process has one memory layout, one clock history and one set of neighbours; what is 2 % faster in it may
be slower in the next. So the candidates and the default are measured again in several new processes, one
after the other in each, in an order that changes. Each process gives one ratio per candidate; a gain is
confirmed when the interval of their median lies above 1.

    >>> for final in confirm(candidates, default, fresh=lambda: isolated_engine(...)):
    ...     print(final)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.errors import MeasureError
from bratune.measure.statistics import paired_ratio
from bratune.record import Record

__all__ = ["Final", "confirm"]

# Six processes are the fewest for which a 95 % interval of a median exists.
ROUNDS = 6
# Below one percent a difference is real at best on one board in one room.
LEAST_GAIN = 0.01
# A candidate that is this much slower than the default in its first two processes is not run again.
_CLEARLY_WORSE = 0.9
_LOOK_AFTER = 2


@dataclass(frozen=True, kw_only=True)
class Final:
    """A candidate against the default.

    Attributes:
        candidate: The cell that may replace the default.
        default: The cell that stays unless the gain is confirmed.
        candidate_ms: Its median in every process.
        default_ms: The default's median in the same processes.
        speedup: Median over processes of default / candidate; None when one of them has no time.
        ci_lo: Lower end of the interval of the speedup.
        ci_hi: Upper end.
        confidence: Of the interval; 0.95 from six processes on, less before.
        verdict: ``faster``, ``slower``, ``same`` (within 1 %), ``ambiguous`` or ``failed``.
        reason: Why there is no verdict, or why a candidate was not run to the end.
    """

    candidate: Cell
    default: Cell
    candidate_ms: tuple[float, ...] = ()
    default_ms: tuple[float, ...] = ()
    speedup: float | None = None
    ci_lo: float | None = None
    ci_hi: float | None = None
    confidence: float = 0.0
    verdict: str = "failed"
    reason: str = ""

    @property
    def confirmed(self) -> bool:
        """Whether the candidate may replace the default."""
        return self.verdict == "faster"

    @property
    def n_processes(self) -> int:
        """Processes in which both were measured."""
        return len(self.candidate_ms)

    def __str__(self) -> str:
        if self.speedup is None:
            return f"{self.candidate}: {self.verdict}, {self.reason}"
        return (
            f"{self.candidate}: {self.verdict}, {self.speedup:.3f}x ({self.ci_lo:.3f} to {self.ci_hi:.3f} at "
            f"{100 * self.confidence:.0f} %, {self.n_processes} processes)"
        )


def confirm(
    candidates: Sequence[Cell],
    default: Cell,
    fresh: Callable[[], AbstractContextManager[Engine]],
    *,
    rounds: int = ROUNDS,
    least_gain: float = LEAST_GAIN,
) -> tuple[Final, ...]:
    """Measure candidates and the default side by side in fresh processes.

    Args:
        candidates: Cells that may replace the default, the most promising first.
        default: What they are compared with.
        fresh: Makes an engine with a new process behind it, and closes it; nothing may be reused from
            stored rows.
        rounds: Processes.
        least_gain: Share by which a candidate must be faster, with the whole interval.

    Returns:
        One verdict per candidate, in the order of the candidates.

    Raises:
        MeasureError: fewer than two rounds were asked for.
    """
    if rounds < 2:
        raise MeasureError(f"finalists need at least 2 processes each, not {rounds}")
    times: dict[Cell, list[float]] = {cell: [] for cell in candidates}
    paired: dict[Cell, list[float]] = {cell: [] for cell in candidates}
    dropped: dict[Cell, str] = {}
    for turn in range(rounds):
        running = [cell for cell in candidates if cell not in dropped]
        if not running:
            break
        with fresh() as engine:
            rows = {row.cell_id: row for row in engine.run(_order(running, default, turn))}
        base_ms, base_failed = _time(rows.get(default.cell_id), "default")
        for cell in running:
            time_ms, failed = _time(rows.get(cell.cell_id), "candidate")
            if failed or base_failed:
                dropped[cell] = failed or base_failed
                continue
            times[cell].append(time_ms)
            paired[cell].append(base_ms)
            if turn + 1 == _LOOK_AFTER and _clearly_worse(times[cell], paired[cell]):
                dropped[cell] = f"clearly slower in {_LOOK_AFTER} processes, not run again"
    return tuple(
        _final(cell, default, times[cell], paired[cell], dropped.get(cell, ""), least_gain)
        for cell in candidates
    )


def _order(cells: Sequence[Cell], default: Cell, turn: int) -> list[Cell]:
    """Everyone once, starting with someone else in every turn, so that being first favours nobody."""
    everyone = [default, *cells]
    start = turn % len(everyone)
    return everyone[start:] + everyone[:start]


def _time(row: Record | None, who: str) -> tuple[float, str]:
    """The time of a row in milliseconds, or why there is none."""
    if row is None:
        return 0.0, f"the {who} gave no row"
    if not row.median_ms:
        return 0.0, f"the {who} is {row.outcome}: {row.reason}"
    return row.median_ms, ""


def _clearly_worse(times: Sequence[float], base: Sequence[float]) -> bool:
    return all(b / t < _CLEARLY_WORSE for t, b in zip(times, base, strict=True))


def _final(
    cell: Cell, default: Cell, times: list[float], base: list[float], reason: str, least_gain: float
) -> Final:
    stopped_early = reason.startswith("clearly slower")
    if len(times) < 2 or (reason and not stopped_early):
        return Final(
            candidate=cell,
            default=default,
            candidate_ms=tuple(times),
            default_ms=tuple(base),
            reason=reason or "fewer than two processes",
        )
    speedup, (low, high) = paired_ratio(base, times)
    return Final(
        candidate=cell,
        default=default,
        candidate_ms=tuple(times),
        default_ms=tuple(base),
        speedup=speedup,
        ci_lo=low,
        ci_hi=high,
        confidence=0.95 if len(times) >= ROUNDS else 1 - 2.0 ** (1 - len(times)),
        verdict="slower" if stopped_early else _verdict(low, high, least_gain),
        reason=reason,
    )


def _verdict(low: float, high: float, least_gain: float) -> str:
    if low >= 1 + least_gain:
        return "faster"
    if high <= 1 / (1 + least_gain):
        return "slower"
    if low > 1 / (1 + least_gain) and high < 1 + least_gain:
        return "same"
    return "ambiguous"
