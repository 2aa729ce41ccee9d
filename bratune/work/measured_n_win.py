"""Measured S: which number of regions per side was fastest where several were measured on a machine."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bratune.errors import StoreError
from bratune.kernels.tuned import machine_key
from bratune.machine import Machine
from bratune.record import Record
from bratune.store import read_records
from bratune.variant import Stage

__all__ = ["MeasuredNWin", "measured_n_win", "stored_blocks"]


@dataclass(frozen=True, kw_only=True)
class MeasuredNWin:
    """The fastest S of a stage among those measured with its top-k, everything else being equal.

    Attributes:
        n_win: That S; with only one measured there is nothing to compare.
        ms: Median time of one block with its fastest backend.
        backend: That backend.
        tried: Every S that was measured, rising.
    """

    n_win: int
    ms: float
    backend: str
    tried: tuple[int, ...]


def stored_blocks(machine: Machine, paths: Iterable[str | Path] = ()) -> tuple[Record, ...]:
    """Measured blocks of a machine.

    Args:
        machine: Rows count that were measured on the same architecture, processors and memory.
        paths: Record files and folders; by default ``runs`` below the current folder and the records that
            come with the package.
    """
    chosen = [Path(path) for path in paths]
    if not chosen:
        chosen = [Path("runs"), Path(str(importlib.resources.files("bratune").joinpath("results")))]
        chosen = [path for path in chosen if path.is_dir()]
    found: list[Record] = []
    here = machine_key(machine)
    for path in chosen:
        try:
            rows = [
                row for row in read_records([path]) if row.part == "block" and row.form != "mixer" and row.ok
            ]
        except StoreError:
            if paths:
                raise
            continue  # a folder of that name without records is somebody else's
        found += [row for row in rows if row.evidence == "measured" and machine_key(row.machine) == here]
    return tuple(found)


def measured_n_win(
    blocks: Iterable[Record],
    *,
    model: str,
    image: tuple[int, int],
    batch: int,
    dtype: str,
    direction: str,
    stage: Stage,
) -> MeasuredNWin | None:
    """The fastest measured S of a routed stage with its top-k; None where none was measured.

    Rows are compared within one way to measure (regime, cache state, layout, autocast): the one with most S.
    """
    if stage.kind != "routed":
        return None
    ways: dict[tuple[object, ...], dict[int, Record]] = {}
    wanted = model, *image, batch, dtype, direction, stage.index, str(stage.topk)
    for row in blocks:
        what = row.model, row.image_height, row.image_width, row.batch, row.dtype, row.direction
        if (*what, row.stage, row.topk) != wanted or row.median_ms is None:
            continue
        best = ways.setdefault((row.regime, row.l2, row.layout, row.amp), {})
        other = best.get(int(row.n_win))
        if other is None or row.median_ms < (other.median_ms or 0.0):
            best[int(row.n_win)] = row
    if not ways:
        return None
    most = max(ways.values(), key=len)
    n_win, row = min(most.items(), key=lambda pair: pair[1].median_ms or 0.0)
    return MeasuredNWin(n_win=n_win, ms=row.median_ms or 0.0, backend=row.backend, tried=tuple(sorted(most)))
