"""Guard: a pick is only exported when it beats the default in a comparison of its own.

The search chose the pick because it looked fast, so its own measurement flatters it. Pick and default are
therefore measured again, in turns and in swapped order, and only fresh numbers decide. With n pairs the
interval of the median ratio is distribution-free: eight pairs that all favour a pick without any true
gain happen once in 256 comparisons.
"""

from __future__ import annotations

from collections.abc import Callable

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.measure.statistics import median, median_interval
from bratune.tune.plan import EndToEnd

__all__ = ["Pairs", "compare", "in_turns"]

# Medians of default and pick of one round, in milliseconds.
Pairs = list[tuple[float, float]]


def in_turns(
    engine: Engine,
    default: Cell,
    pick: Cell,
    rounds: int,
    *,
    keep_going: Callable[[], bool] = lambda: True,
) -> Pairs:
    """Measure two cells in turns, the order swapped every round.

    Args:
        engine: Must measure anew whenever it is asked.
        default: Cell of the default.
        pick: Cell of the pick.
        rounds: Pairs.
        keep_going: Asked before every round; False stops early.

    Returns:
        The pairs measured; rounds in which a cell failed are left out.
    """
    pairs: Pairs = []
    for turn in range(rounds):
        if not keep_going():
            break
        order = (default, pick) if turn % 2 == 0 else (pick, default)
        records = {cell.cell_id: record for cell in order for record in engine.run([cell])}
        a, b = records.get(default.cell_id), records.get(pick.cell_id)
        if a and b and a.median_ms is not None and b.median_ms is not None:
            pairs.append((a.median_ms, b.median_ms))
    return pairs


def compare(pairs: Pairs, *, needed: int = 6) -> EndToEnd:
    """What pairs of (default, pick) say: ``faster`` only if the whole interval of the ratio is above 1.

    Args:
        pairs: Medians in milliseconds.
        needed: Pairs below which nothing is decided.
    """
    if not pairs:
        return EndToEnd(reason="no pair of measurements succeeded")
    ratios = sorted(a / b for a, b in pairs)
    low, high = median_interval(ratios)
    speedup = median(ratios)
    text = f"speed-up {speedup:.3f} [{low:.3f}, {high:.3f}] over {len(pairs)} interleaved pairs"
    if len(pairs) < needed:
        verdict, reason = "default kept", f"{text}: fewer than the {needed} that a 95 % interval needs"
    elif low > 1.0:
        verdict, reason = "faster", text
    else:
        verdict, reason = "default kept", f"{text}: a gain is not shown"
    return EndToEnd(
        default_ms=median([a for a, _ in pairs]),
        tuned_ms=median([b for _, b in pairs]),
        speedup=speedup,
        speedup_ci=(low, high),
        rounds=len(pairs),
        verdict=verdict,
        reason=reason,
    )
