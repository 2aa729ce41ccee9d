"""Facts: what all figures say of a record, in words and numbers.

Where several records speak of one thing, the most trusted evidence wins (`bratune.record.EVIDENCE`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from bratune.cell import Cell
from bratune.errors import StoreError
from bratune.predict.fit import board_of
from bratune.predict.model import bound_cell
from bratune.record import EVIDENCE, Record
from bratune.report.answer import name_of
from bratune.variant import TASKS, VARIANTS

__all__ = [
    "BASELINE",
    "cell_of",
    "milliseconds",
    "provenance",
    "series_of",
    "settings_of",
    "timed",
    "told_apart",
    "trusted",
    "with_bounds",
    "work_of",
]

# What the paper describes and the official code does.
BASELINE = "gather"


def work_of(record: Record) -> str:
    """The work in words, without model and backend: ``512x512, batch 16, bfloat16, fwd, eager``."""
    size = f"{record.image_height}x{record.image_width}" if record.image_height else "bare call"
    parts = [size, f"batch {record.batch}", record.dtype, record.direction, record.regime]
    if record.route_distribution not in ("", "recorded"):
        parts.append(f"{record.route_distribution} routes")
    if record.amp:
        parts.append("autocast")
    return ", ".join(part for part in parts if part)


def provenance(record: Record) -> str:
    """Where a number comes from, in one line for a hover text or a table."""
    words = [record.evidence]
    if record.evidence == "measured":
        versions = [record.timestamp_utc[:10], f"torch {record.torch}" if record.torch else ""]
        words += [w for w in versions if w]
        if record.n_samples:
            words.append(f"{record.n_samples} samples")
        if record.noise_pct is not None:
            words.append(f"noise {record.noise_pct:.1f} %")
    else:
        words += [f"limited by {record.bound}"] if record.bound else []
        words += [record.reason] if record.reason else []
    return ", ".join(words)


def cell_of(record: Record) -> Cell | None:
    """The cell that a record describes; None where it describes none."""
    try:
        return record.to_cell() if record.cell else None
    except StoreError:
        return None


def told_apart(records: Iterable[Record]) -> list[Record]:
    """The records with a key of its own for every machine: of CPUs, the name of each.

    All CPUs are measured under the key ``cpu``, so that rows of one cell from two would stand for each other.
    """
    return [r.replace(gpu_key=r.gpu_name) if r.gpu_key == "cpu" and r.gpu_name else r for r in records]


def trusted(records: Iterable[Record]) -> dict[tuple[object, ...], Record]:
    """One record per machine and cell: the most trusted, and of equals the latest."""
    found: dict[tuple[object, ...], Record] = {}
    for record in records:
        if not record.ok or record.evidence == "bound":
            continue
        key = (record.gpu_key, record.cell_id or id(record))
        best = found.get(key)
        if best is None or EVIDENCE.index(record.evidence) <= EVIDENCE.index(best.evidence):
            found[key] = record
    return found


def timed(records: Iterable[Record], part: str, *, mixers: bool = False) -> list[Record]:
    """The trusted records of one part; of the comparison of mixers, or of everything else."""
    return [r for r in trusted(records).values() if r.part == part and (r.form == "mixer") is mixers]


def series_of(record: Record) -> str:
    """Model and what ran, in the answer's words; S and top-k, too, where they are not those of the paper."""
    if record.form == "timm":
        return name_of(record)
    names = record.backend.split(",")
    if record.form in ("", "plain") and len(set(names)) > 1:
        how = f"per stage: {', '.join(names)}"  # of several mixtures only one can be the best
    else:
        how = name_of(record) if record.form or record.backend else ""
    return " · ".join(filter(None, (f"{record.model}{_changed_setting(record)}", how)))


def settings_of(records: Iterable[Record]) -> dict[tuple[int, str, str], str]:
    """What tells the settings of a stage apart, by stage, S and top-k; empty where a stage has only one.

    E.g. ``S 7`` and ``S 14`` where only S differs, ``S 7, k 4`` where both do.
    """
    seen: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for r in records:
        seen[r.stage or 0].add((r.n_win, r.topk))
    found = {}
    for stage, pairs in seen.items():
        by_s, by_k = (len({pair[i] for pair in pairs}) > 1 for i in (0, 1))
        for n_win, topk in pairs:
            words = [f"S {n_win}"] if by_s else []
            words += [f"k {topk}"] if by_k else []
            found[(stage, n_win, topk)] = ", ".join(words)
    return found


def _changed_setting(record: Record) -> str:
    variant, task = VARIANTS.get(record.model), TASKS.get(record.task)
    if record.part != "model" or variant is None or task is None or not record.topk:
        return ""
    routed = [s for s, k in zip(record.n_win.split(","), record.topk.split(","), strict=False) if int(k) > 0]
    changed = [f"S {'/'.join(dict.fromkeys(routed))}"] if set(routed) - {str(task.n_win)} else []
    if record.topk != ",".join(map(str, variant.topks)):
        changed.append(f"k {record.topk.replace(',', '/')}")
    return f" ({', '.join(changed)})" if changed else ""


def milliseconds(record: Record) -> tuple[float, float, float]:
    """Median and interval of a record that has a time; the interval is the point where none is stored."""
    assert record.median_ms is not None
    lo = record.ci_lo_ms if record.ci_lo_ms is not None else record.median_ms
    hi = record.ci_hi_ms if record.ci_hi_ms is not None else record.median_ms
    return record.median_ms, lo, hi


def with_bounds(records: Sequence[Record]) -> list[Record]:
    """The records and, for every whole model on a board whose peaks are published, its bound."""
    have = {(r.gpu_key, r.cell_id) for r in records if r.evidence == "bound"}
    found = list(records)
    for r in timed(records, "model"):
        board = board_of(r)
        if board is None or board.architecture == "CPU" or (r.gpu_key, r.cell_id) in have:
            continue
        cell = cell_of(r)
        if cell is not None and cell.model in VARIANTS and board.memory_gbps and board.peak_tflops(r.dtype):
            found.append(bound_cell(cell, board).replace(gpu_key=r.gpu_key, cell_id=r.cell_id))
    return found
