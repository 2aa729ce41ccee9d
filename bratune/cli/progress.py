"""Progress on stderr: a bar on a terminal, a line per cell otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from bratune.cell import Cell
from bratune.record import Record

__all__ = ["Progress"]


# What takes less was answered by a stored row, and says nothing about cells that have to be measured.
_MEASURED_S = 0.02


class Progress:
    """Counts cells and says how long the rest may take, from what those took that were measured.

    Args:
        total: Cells that are expected.
        budget_s: Seconds after which no cell is started; None without a limit.
        clock: Seconds that only grow.
    """

    def __init__(
        self, total: int, *, budget_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.done = 0
        self._clock = clock
        self._last = clock()
        self._end = None if budget_s is None else self._last + budget_s
        self._costs: list[float] = []
        self._bar = sys.stderr.isatty()

    def start(self, cell: Cell) -> None:
        """Show what is being measured (on a terminal only: elsewhere a line follows when it is done)."""
        if self._bar:
            self._draw(str(cell))

    def finish(self, record: Record) -> None:
        """Count a cell and, where there is no bar, write its line."""
        now = self._clock()
        if now - self._last > _MEASURED_S:
            self._costs.append(now - self._last)
        self._last = now
        self.done += 1
        self.total = max(self.total, self.done)
        if self._bar:
            self._draw(_name(record))
        else:
            print(
                f"[{self.done}/{self.total}] {_name(record)}: {_result(record)}{self._eta()}", file=sys.stderr
            )

    def close(self) -> None:
        """Clear the bar."""
        if self._bar:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _eta(self) -> str:
        left = self.total - self.done
        if not left or not self._costs:
            return ""
        # Over all cells: those that were measured in turn come together, the first after the time of all.
        seconds = sum(self._costs) / self.done * left
        if self._end is not None:
            seconds = min(seconds, self._end - self._clock())
        if seconds < 0:  # the budget is spent: what comes now has no time to wait for
            return ""
        return f"  ({seconds:.0f} s left)" if seconds < 120 else f"  ({seconds / 60:.0f} min left)"

    def _draw(self, name: str) -> None:
        filled = 24 * self.done // max(1, self.total)
        bar = "#" * filled + "." * (24 - filled)
        line = f"[{bar}] {self.done}/{self.total}{self._eta()}  {name}"
        print(f"\r\x1b[K{line[:110]}", end="", file=sys.stderr, flush=True)


def _name(record: Record) -> str:
    where = f"stage {record.stage} " if record.stage and record.part != "model" else ""
    by = f" by {record.backend}" if record.backend else ""
    if record.form not in ("", "plain", "mixer"):
        by = f" ({record.form})"
    return f"{record.model} {where}{record.part}{by}"


def _result(record: Record) -> str:
    if record.median_ms is None:
        return f"{record.outcome}: {record.reason}"
    noise = f" ±{record.noise_pct:.1f} %" if record.noise_pct is not None else ""
    return f"{record.median_ms:.3f} ms{noise}"
