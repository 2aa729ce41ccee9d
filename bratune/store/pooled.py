"""Pooled: one row per cell over its passes, from rows of which each is one pass.

A cell is pooled over rows that were measured alike: same machine and versions, same sources, same sampling.
Rows of earlier versions have no pass; each of them is one process.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bratune.cell import Cell
from bratune.measure.verdict import MedianOfPasses, Passes, Prior, estimate, priors
from bratune.record import Record
from bratune.store.columns import Columns
from bratune.store.rows import Rows, read_rows

if TYPE_CHECKING:
    import pandas

__all__ = ["IN_TURN_WITH", "alike", "in_turn_with", "passes_of", "pool", "pool_each", "pooled", "ratios_of"]

# In how a row was sampled: it belongs to a comparison of its own, and its ratio is to that cell.
IN_TURN_WITH = ", in turn with "
# What must be the same of rows that are passes of one cell.
_ALIKE = (
    "cell_id",
    "evidence",
    "gpu_key",
    "torch",
    "triton",
    "driver",
    "threads",
    "source_hash",
    "checkpoint_hash",
    "images_hash",
    "sampling",
)
# Rates fall with the time that they were computed from.
_RATES = ("images_per_s", "tflops_s", "gb_s", "roofline_pct")
_SUMS = ("n_samples", "n_discarded")
_LARGEST = ("peak_alloc_mb", "peak_reserved_mb", "workspace_mb", "max_rel_err", "grad_rel_err", "temp_c")
_MEDIANS = ("p10_ms", "p90_ms", "host_ms", "cpu_wait_pct", "sm_clock_mhz", "power_w", "joules_per_image")


def pooled(paths: Iterable[str | os.PathLike[str]]) -> pandas.DataFrame:
    """Records as a table with one row per cell; ``passes`` says how many each stands for.

    Args:
        paths: Record files and folders.

    Returns:
        The columns of `bratune.store.read`. ``median_ms`` is the median of pass medians and ``ci_lo_ms`` to
        ``ci_hi_ms`` its interval from the scatter between passes; of a single pass, what is known within it.

    Raises:
        StoreError: a path does not exist or cannot be read.
    """
    made = Columns()
    for row in pool_each(read_rows(paths)):
        made.add_record(row)
    return made.table()


def in_turn_with(base: Cell, about: str = "") -> str:
    """What is added to how a row was sampled: it belongs to a comparison with a cell, for a purpose."""
    return f"{IN_TURN_WITH}{base.cell_id}{about and f' for {about}'}"


def alike(row: Record) -> tuple[Any, ...]:
    """What a row has in common with the other passes of its cell."""
    return tuple(getattr(row, name) for name in _ALIKE)


def pool(rows: Iterable[Record]) -> list[Record]:
    """One row per cell, in the order in which cells appear.

    "started" lines are left out, and rows of comparisons of their own (`IN_TURN_WITH`).
    """
    return list(pool_each(rows))


def pool_each(rows: Iterable[Record]) -> Iterator[Record]:
    """The rows of `pool`, made one after the other; what is read is held packed."""
    packed = pooled_among(Rows.of(rows))

    def repeated() -> Iterator[Sequence[Record]]:
        return filter(None, map(_timed, packed.groups(_ALIKE, least=2)))

    # Only cells of several passes say how passes scatter.
    times = priors(passes_of(found) for found in repeated())
    ratios: dict[str, Prior] = {}
    if packed.different("ratio") != [None]:
        ratios = priors(one for found in repeated() if (one := ratios_of(found)) is not None)
    for found in packed.groups(_ALIKE):
        yield _pooled(found, _timed(found), times, ratios)


def pooled_among(rows: Rows) -> Rows:
    """The rows that `pool` pools."""
    return rows.where("sampling", lambda sampling: IN_TURN_WITH not in sampling)


def sizes_of(rows: Rows) -> list[int]:
    """How many rows each row of `pool` stands for."""
    return pooled_among(rows).sizes(_ALIKE)


def _timed(rows: Sequence[Record]) -> Sequence[Record]:
    return rows.timed() if isinstance(rows, Rows) else [row for row in rows if row.ok]


def passes_of(rows: Sequence[Record]) -> Passes:
    """The times of a cell, each of its rows one pass, beside what it took turns with, where that is known.

    Raises:
        UsageError: no row has a time.
    """
    timed = [row for row in rows if row.median_ms is not None]
    found = Passes.of(
        [(row.median_ms or 0.0, row.ci_lo_ms, row.ci_hi_ms) for row in timed],
        kind=_kind(rows),
        wait_pct=_wait_pct(rows),
    )
    ratios = ratios_of(timed)
    if ratios is None or len(ratios.values) < len(timed):
        return found
    beside = tuple(ms * ratio for ms, ratio in zip(found.values, ratios.values, strict=True))
    return dataclasses.replace(found, beside=beside, beside_noise=ratios.noise)


def ratios_of(rows: Sequence[Record]) -> Passes | None:
    """The speed-ups of a cell that were measured in turn; None where there are none."""
    found = [(row.ratio, row.ratio_lo, row.ratio_hi) for row in rows if row.ratio is not None]
    return Passes.of(found, kind=_kind(rows), wait_pct=_wait_pct(rows)) if found else None


def _kind(rows: Sequence[Record]) -> str:
    return rows[0].part if rows else ""


def _wait_pct(rows: Sequence[Record]) -> float:
    known = [row.cpu_wait_pct for row in rows if row.cpu_wait_pct is not None]
    return statistics.median(known) if known else 0.0


def _pooled(
    rows: Sequence[Record], timed: Sequence[Record], times: dict[str, Prior], ratios: dict[str, Prior]
) -> Record:
    wrong = next((row for row in rows if row.outcome == "incorrect"), None)
    if wrong is not None or not timed:  # wrong once is wrong
        return (wrong or rows[-1]).replace(passes=len(rows), pass_number=None)
    last = timed[-1]
    if len(timed) == 1:
        found = last.replace(passes=1, pass_number=None)
    else:
        passes = passes_of(timed)
        found = _together(timed, estimate(passes, times[passes.kind]))
    measured = ratios_of(timed)
    if measured is not None and len(measured.values) > 1:
        ratio = estimate(measured, ratios[measured.kind])
        found = found.replace(ratio=ratio.value, ratio_lo=ratio.lo, ratio_hi=ratio.hi)
    failed = [row for row in rows if not row.ok]
    if failed:
        found = found.replace(
            reason=f"{len(failed)} of {len(rows)} passes: {failed[-1].outcome}: {failed[-1].reason}"
        )
    return found


def _together(rows: Sequence[Record], time: MedianOfPasses) -> Record:
    last = rows[-1]
    values: dict[str, Any] = {
        "passes": time.passes,
        "pass_number": None,
        "n_processes": time.passes,
        "median_ms": time.value,
        "ci_lo_ms": time.lo,
        "ci_hi_ms": time.hi,
        "noise_pct": time.half_width_pct,
        "throttle_reasons": ",".join(
            sorted({name for row in rows for name in row.throttle_reasons.split(",") if name})
        ),
    }
    for names, merge in ((_SUMS, sum), (_LARGEST, max), (_MEDIANS, statistics.median), (("min_ms",), min)):
        for name in names:
            known = [value for row in rows if (value := getattr(row, name)) is not None]
            values[name] = merge(known) if known else None
    assert last.median_ms is not None
    for name in _RATES:
        rate = getattr(last, name)
        values[name] = None if rate is None else rate * last.median_ms / time.value
    return last.replace(**values)
