"""Passes: what the rows of a run say about the machine that it ran on, once for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from bratune.measure.verdict import BUSY_PCT
from bratune.record import Record

__all__ = ["disturbance"]


def disturbance(rows: Iterable[Record]) -> str:
    """What a table says first where processes had to wait for a processor; empty on a quiet machine."""
    waits = [row.cpu_wait_pct for row in rows if row.ok and row.cpu_wait_pct is not None]
    if not waits or statistics.median(waits) <= BUSY_PCT:
        return ""
    return (
        "the machine was busy: processes waited for a processor "
        f"{statistics.median(waits):.0f} % of the time; no verdict is given, and times may be too long"
    )
