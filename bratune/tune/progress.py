"""Progress: one line per measurement, with the best so far and when it will be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Clock", "Pace", "Say", "duration"]

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
