"""Summary: what the rows of a run say together. Reads records only, measures nothing."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bratune.measure.verdict import Passes, Verdict, judge_ratios
from bratune.record import Record
from bratune.store.pooled import alike
from bratune.work.cells import BASELINE, MIXER_BASELINE

__all__ = [
    "UNSETTLED_PCT",
    "BlockResidual",
    "best_attention",
    "differ",
    "fastest",
    "group",
    "is_base",
    "judged",
    "paired",
    "residual",
    "scene_of",
]

# What the rows of one table have in common.
SCENE = (
    "gpu_name",
    "model",
    "task",
    "image_height",
    "image_width",
    "batch",
    "dtype",
    "amp",
    "layout",
    "direction",
    "regime",
    "l2",
    "evidence",
    "seed",
)


def scene_of(record: Record) -> tuple[object, ...]:
    """What a row has in common with the rows that it may be compared with."""
    return tuple(getattr(record, name) for name in SCENE)


def group(records: Iterable[Record]) -> list[list[Record]]:
    """Records of one scene together, in the order in which scenes appear; "started" lines are left out.

    A model of timm belongs to the first scene of ours on the same images, with which it took turns.
    """
    found: dict[tuple[object, ...], list[Record]] = {}
    peers: list[Record] = []
    for record in records:
        if record.form == "timm":
            peers.append(record)
        elif record.outcome != "started":
            found.setdefault(scene_of(record), []).append(record)
    for peer in (row for row in peers if row.outcome != "started"):
        own = next((rows for rows in found.values() if _images_of(rows[0]) == _images_of(peer)), None)
        if own is None:
            own = found.setdefault(scene_of(peer), [])
        own.append(peer)
    return list(found.values())


def _images_of(row: Record) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in SCENE if name != "model")


# --- which is faster ---------------------------------------------------------------------------------


def judged(pairs: Sequence[tuple[Record, Record]], passes: Iterable[Record]) -> list[Verdict | None]:
    """Which of each pair is faster, as their passes say; all are judged together.

    Args:
        pairs: A row, and the one that it is compared with; pooled over their passes.
        passes: Rows of single passes, of these cells and any others.

    Returns:
        A verdict for each pair, ``FASTER`` meaning that the first takes less time; None where no pass has
        both.
    """
    behind: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for row in passes:
        behind[alike(row)].append(row)
    found = [paired(behind[alike(row)], behind[alike(other)]) for row, other in pairs]
    verdicts = iter(judge_ratios([one for one in found if one is not None]).verdicts)
    return [None if one is None else next(verdicts) for one in found]


def paired(rows: Sequence[Record], others: Sequence[Record]) -> Passes | None:
    """How many times faster one cell was than another, pass by pass; None where no pass says.

    Both took turns with the baseline, so what the machine did in a pass is in neither ratio. Without a
    baseline in their group, it is the ratio of their medians in the same process.
    """
    theirs: dict[tuple[str, int | None], list[Record]] = defaultdict(list)
    for other in others:
        theirs[(other.run_id, other.pass_number)].append(other)
    found, left = [], []
    for row in rows:
        same = theirs[(row.run_id, row.pass_number)]
        if same:
            found.append(_speedup(row, same.pop(0), in_turn=row.pass_number is not None))
        else:  # measured later, beside the baseline too
            left.append(row)
    spare = [other for rest in theirs.values() for other in rest]
    found += [_speedup(row, other, in_turn=False) for row, other in zip(left, spare, strict=False)]
    known = [one for one in found if one is not None]
    if not known:
        return None
    waits = [row.cpu_wait_pct for row in (*rows, *others) if row.cpu_wait_pct is not None]
    wait = statistics.median(waits) if waits else 0.0
    return Passes(
        values=tuple(value for value, _ in known),
        noise=tuple(error for _, error in known),
        kind=rows[0].part,
        wait_pct=wait,
    )


def _speedup(row: Record, other: Record, *, in_turn: bool) -> tuple[float, float] | None:
    """How many times faster a row is than another, and the standard error of its logarithm."""
    if not (row.ok and other.ok):
        return None
    own, base = _to_baseline(row), _to_baseline(other)
    if own is not None and base is not None:
        return own[0] / base[0], math.hypot(own[1], base[1])
    if not in_turn:
        return None
    times = [(r.median_ms or 0.0, _error(r.median_ms, r.ci_lo_ms, r.ci_hi_ms)) for r in (row, other)]
    return times[1][0] / times[0][0], math.hypot(times[0][1], times[1][1])


def _to_baseline(row: Record) -> tuple[float, float] | None:
    """The ratio to the baseline within rounds, which of the baseline itself is 1."""
    if row.ratio is not None:
        return row.ratio, _error(row.ratio, row.ratio_lo, row.ratio_hi)
    return (1.0, 0.0) if is_base(row) else None


def _error(value: float | None, lo: float | None, hi: float | None) -> float:
    return Passes.of([(value or 0.0, lo, hi)]).noise[0]


def is_base(row: Record) -> bool:
    """Whether ratios within rounds are relative to this row's cell: see `bratune.run.groups.is_baseline`."""
    if row.form == "mixer":
        return row.backend == MIXER_BASELINE
    if row.form == "yours":
        return row.backend == ("" if row.part == "model" else BASELINE)
    plain = row.form in ("", "plain") and row.config in ("", "{}")
    return plain and set(row.backend.split(",")) == {BASELINE}


def differ(a: Record, b: Record) -> bool:
    """Whether the 95 % intervals of two rows part; without intervals, whether the medians differ."""
    if a.median_ms is None or b.median_ms is None:
        return False
    a_lo, a_hi = a.ci_lo_ms or a.median_ms, a.ci_hi_ms or a.median_ms
    b_lo, b_hi = b.ci_lo_ms or b.median_ms, b.ci_hi_ms or b.median_ms
    return a_hi < b_lo or b_hi < a_lo


def best_attention(records: Sequence[Record], stage: int) -> Record | None:
    """The fastest backend of a stage on the first kind of routes that was measured; None without a time.

    Rows that failed the gate have no time and cannot win. Ratios within rounds decide where all have one.
    """
    rows = [r for r in records if r.part == "attention" and r.stage == stage and r.median_ms is not None]
    return fastest([r for r in rows if r.route_distribution == rows[0].route_distribution])


def fastest(rows: Sequence[Record]) -> Record | None:
    """The row of the largest ratio within rounds, of the least median where some have none."""
    ratios = [_to_baseline(row) for row in rows]
    known = [ratio[0] for ratio in ratios if ratio is not None]
    if len(known) < len(rows):
        return min(rows, key=lambda row: row.median_ms or math.inf, default=None)
    return max(zip(known, rows, strict=True), key=lambda pair: pair[0], default=(0.0, None))[1]


# A median whose half interval is more than this share of it says little about a residual.
UNSETTLED_PCT = 10.0


@dataclass(frozen=True, kw_only=True)
class BlockResidual:
    """The parts of a block beside the block that they make up.

    Attributes:
        parts_ms: Median of each part by name; ``attention`` is that of the block's backend.
        block_ms: Median of the block.
        backend: Who computed its attention.
        unsettled: Parts, or ``block``, whose interval is wider than `UNSETTLED_PCT`: their time ran out.
    """

    parts_ms: dict[str, float]
    block_ms: float
    backend: str
    unsettled: frozenset[str] = frozenset()

    @property
    def sum_ms(self) -> float:
        """All parts together."""
        return sum(self.parts_ms.values())

    @property
    def relative(self) -> float:
        """Sum of the parts over the block, minus 1."""
        return self.sum_ms / self.block_ms - 1


def residual(records: Sequence[Record], stage: int) -> BlockResidual | None:
    """How far the parts of a stage's block are from the block; None where one of them has no time."""
    rows = [r for r in records if r.stage == stage and r.part != "model" and r.form != "mixer"]
    block = next((r for r in rows if r.part == "block" and r.median_ms is not None), None)
    if block is None or block.median_ms is None:
        return None
    parts: dict[str, float] = {}
    unsettled = {"block"} if _unsettled(block) else set()
    for row in rows:
        if row.part == "block" or row.part in parts:
            continue
        if row.part == "attention" and (row.backend, row.route_distribution) != (block.backend, "recorded"):
            continue
        if row.median_ms is None:
            return None
        parts[row.part] = row.median_ms
        if _unsettled(row):
            unsettled.add(row.part)
    if "attention" not in parts or "mlp" not in parts:
        return None
    return BlockResidual(
        parts_ms=parts, block_ms=block.median_ms, backend=block.backend, unsettled=frozenset(unsettled)
    )


def _unsettled(row: Record) -> bool:
    seen = row.evidence in ("measured", "replayed")
    return seen and row.noise_pct is not None and row.noise_pct > UNSETTLED_PCT
