"""Summary: what the rows of a run say together. Reads records only, measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bratune.record import Record

__all__ = ["UNSETTLED_PCT", "Residual", "best_attention", "differ", "group", "residual", "scene_of"]

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

    A row without a time takes the evidence of its scene's others: nothing was measured in it.
    """
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.outcome != "started":
            found.setdefault(scene_of(record), []).append(record)
    return list(found.values())


def differ(a: Record, b: Record) -> bool:
    """Whether the 95 % intervals of two rows part; without intervals, whether the medians differ."""
    if a.median_ms is None or b.median_ms is None:
        return False
    a_lo, a_hi = a.ci_lo_ms or a.median_ms, a.ci_hi_ms or a.median_ms
    b_lo, b_hi = b.ci_lo_ms or b.median_ms, b.ci_hi_ms or b.median_ms
    return a_hi < b_lo or b_hi < a_lo


def best_attention(records: Sequence[Record], stage: int) -> Record | None:
    """The fastest backend of a stage on the first kind of routes that was measured; None without a time.

    Rows that failed the gate have no time and cannot win.
    """
    rows = [r for r in records if r.part == "attention" and r.stage == stage and r.median_ms is not None]
    if not rows:
        return None
    first = rows[0].route_distribution
    return min((r for r in rows if r.route_distribution == first), key=lambda r: r.median_ms or 0.0)


# A median whose half interval is more than this share of it says little about a residual.
UNSETTLED_PCT = 10.0


@dataclass(frozen=True, kw_only=True)
class Residual:
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


def residual(records: Sequence[Record], stage: int) -> Residual | None:
    """How far the parts of a stage's block are from the block; None where one of them has no time."""
    rows = [r for r in records if r.stage == stage and r.part != "model"]
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
    return Residual(
        parts_ms=parts, block_ms=block.median_ms, backend=block.backend, unsettled=frozenset(unsettled)
    )


def _unsettled(row: Record) -> bool:
    seen = row.evidence in ("measured", "replayed")
    return seen and row.noise_pct is not None and row.noise_pct > UNSETTLED_PCT
