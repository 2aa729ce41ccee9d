"""Show: what people see of a search while it runs, and of its front and its plan in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bratune.measure.verdict import MedianOfPasses
from bratune.tables import Table, to_markdown, to_text
from bratune.tune.evidence import FROM_SCRATCH, recall_lines
from bratune.tune.plan import Plan

__all__ = ["Clock", "Pace", "Say", "duration", "front_table", "plan_text"]

Say = Callable[[str], None]
Clock = Callable[[], float]


def duration(seconds: float) -> str:
    """``"45 s"``, ``"3 min 20 s"``, ``"2 h 05 min"``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Pace:
    """How long work takes, from what it took so far.

    Attributes:
        clock: Seconds that only grow.
        budget_s: Seconds for everything; 0: no limit.
    """

    clock: Clock
    budget_s: float = 0.0

    def __post_init__(self) -> None:
        self.start = self.clock()
        self._spent: dict[str, list[float]] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the budget is spent; infinite without a budget."""
        return self.budget_s * share - self.elapsed if self.budget_s else float("inf")

    def note(self, kind: str, seconds: float) -> None:
        """Remember how long a piece of work took."""
        self._spent.setdefault(kind, []).append(seconds)

    def typical(self, kind: str) -> float:
        """Mean seconds of the last ten pieces of that kind; 0 before the first."""
        recent = self._spent.get(kind, [])[-10:]
        return sum(recent) / len(recent) if recent else 0.0

    def eta(self, kind: str, pieces: int) -> str:
        """When that many more pieces will be done, in words; empty before the first."""
        typical = self.typical(kind)
        if not typical or not pieces:
            return ""
        return f"about {duration(min(pieces * typical, max(self.left(), 0.0)))} left"


def front_table(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """Verified settings, one per line: ``*`` is on the front, ``>`` is the pick."""
    columns = (
        "<", "trial", "<setting", "ms", "+-95 %", "predicted", "peak MB", "divergence", "<what it is",
    )  # fmt: skip
    table = Table(columns, tuple(map(_front_row, rows)))
    return to_markdown(table) if markdown else to_text(table)


def _front_row(row: dict[str, Any]) -> tuple[str, ...]:
    mark = (">" if row["picked"] else "") + ("*" if row["front"] else "")
    low, high = row["ci_ms"] or (None, None)
    return (
        mark + ("" if row["feasible"] else "x"),
        str(row["trial"]),
        row["setting"],
        f"{row['ms']:.3f}",
        "" if low is None else f"{(high - low) / 2:.3f}",
        "" if row["predicted_ms"] is None else f"{row['predicted_ms']:.3f}",
        "" if row["peak_alloc_mb"] is None else f"{row['peak_alloc_mb']:.0f}",
        "" if row["divergence"] is None else f"{row['divergence']:.4f}",
        row["name"],
    )


def plan_text(plan: Plan) -> str:
    """The plan in a few lines: what, why, how much faster, on what evidence."""
    lines = [f"plan: {plan}", f"why: {plan.reason}", *_end_to_end_lines(plan)]
    lines.append(f"accuracy: {plan.evidence}")
    if plan.evidence.from_scratch:
        lines.append(FROM_SCRATCH)
    lines += recall_lines(plan.diagnostics)
    error = plan.table_error
    if error.get("n") and "mape" in error:
        text = f"table of stages against whole models: MAPE {error['mape']:.1%} over {error['n']} settings"
        if "kendall" in error and "spearman" in error:
            text += f", Kendall {error['kendall']:.2f}, Spearman {error['spearman']:.2f}"
        lines.append(text)
    if not plan.complete:
        lines.append(
            "unfinished: the search ended before everything was measured, so the plan is not put where "
            'backend="auto" finds it; the same command goes on'
        )
    return "\n".join(lines)


def _end_to_end_lines(plan: Plan) -> list[str]:
    """How the plan compares with the default and with the official composition."""
    end = plan.end_to_end
    where = f"{plan.measured} on {plan.machine.gpu_name}"
    lines = []
    if plan.setting == plan.default:
        lines.append(f"against the default: it is the default ({where})")
    elif end.speedup_vs_default is None:
        lines.append(f"against the default ({plan.default}): not compared: {end.reason}")
    else:
        text = f"{end.verdict}, {_times(end.speedup_vs_default)}"
        lines.append(f"against the default ({plan.default}): {text}, {_how(plan)}, {where}")
    if end.speedup_vs_published is not None and end.published is not None:
        lines.append(f"against the published form: {_times(end.speedup_vs_published)}, {_how(plan)}")
    return lines


def _how(plan: Plan) -> str:
    return f"in turn in {plan.end_to_end.passes} fresh processes"


def _times(found: MedianOfPasses) -> str:
    """A speed-up with its interval, in parentheses where it is not shown."""
    if found.lo is None or found.hi is None:
        return f"({found.value:.3f}x)"
    text = f"{found.value:.3f}x [{found.lo:.3f}, {found.hi:.3f}]"
    return f"({text})" if found.lo <= 1 <= found.hi else text
