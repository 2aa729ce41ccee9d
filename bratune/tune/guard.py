"""Guard: a pick is only exported when it beats the default in a comparison of its own.

The search chose the pick because it looked fast, so its own measurement flatters it. Pick and default are
therefore measured again, side by side in fresh processes (`bratune.tune.finalists`), and only those
numbers decide.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.measure.statistics import median
from bratune.tune.finalists import Final, confirm
from bratune.tune.plan import EndToEnd

__all__ = ["Fresh", "challenge", "judged"]

# Makes an engine that measures anew, with a process of its own where there is one.
Fresh: TypeAlias = Callable[[], AbstractContextManager[Engine]]


def challenge(default: Cell, pick: Cell, fresh: Fresh, rounds: int) -> EndToEnd:
    """The comparison of a pick with the default.

    Args:
        default: Cell of the default.
        pick: Cell of the pick.
        fresh: See `bratune.tune.finalists.confirm`.
        rounds: Processes.
    """
    (final,) = confirm([pick], default, fresh, rounds=rounds)
    return judged(final)


def judged(final: Final) -> EndToEnd:
    """What a comparison means for a plan: anything but ``faster`` keeps the default."""
    if final.speedup is None or final.ci_lo is None or final.ci_hi is None:
        return EndToEnd(reason=final.reason or "the comparison gave no time")
    text = (
        f"speed-up {final.speedup:.3f} [{final.ci_lo:.3f}, {final.ci_hi:.3f}] at "
        f"{100 * final.confidence:.0f} % over {final.n_processes} interleaved processes"
    )
    if final.reason:
        text += f", {final.reason}"
    return EndToEnd(
        default_ms=median(final.default_ms),
        tuned_ms=median(final.candidate_ms),
        speedup=final.speedup,
        speedup_ci=(final.ci_lo, final.ci_hi),
        rounds=final.n_processes,
        verdict="faster" if final.confirmed else "default kept",
        reason=text if final.confirmed else f"{text}: a gain is not shown ({final.verdict})",
    )
