"""Bar infos: throughput, time per part, speedup and energy, as plain numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from bratune.record import EVIDENCE, Record
from bratune.report.infos import BASELINE, milliseconds, provenance, series_of, timed, trusted, work_of

__all__ = [
    "PART_ORDER",
    "Bar",
    "EnergyBar",
    "PartTime",
    "SpeedupCell",
    "energies",
    "part_times",
    "speedups",
    "throughputs",
]

# Parts of a block in the order in which they run.
PART_ORDER = ("pos_embed", "norm", "qkv", "routing", "attention", "lepe", "proj", "mlp")


class Bar(NamedTuple):
    """Images per second of one model on one machine, for one piece of work."""

    work: str
    gpu: str
    series: str
    images_per_s: float
    lo: float
    hi: float
    bound: float | None
    evidence: str
    note: str


class PartTime(NamedTuple):
    """Milliseconds that all blocks of a stage spend in one part."""

    work: str
    gpu: str
    stage: int
    backend: str
    part: str
    ms: float
    evidence: str
    note: str


class SpeedupCell(NamedTuple):
    """How much faster a backend is than gather-then-dense at a stage, with its interval."""

    work: str
    gpu: str
    backend: str
    stage: int
    speedup: float
    lo: float
    hi: float
    evidence: str
    note: str


class EnergyBar(NamedTuple):
    """Joules per image, and how they were measured."""

    work: str
    gpu: str
    series: str
    joules: float
    method: str
    note: str


def throughputs(records: Sequence[Record]) -> list[Bar]:
    """Images per second of every whole model, by machine, with its interval and its bound.

    Of several rows of one series on one machine (other stages got other backends), the fastest is shown.
    """
    bounds = {
        (r.gpu_key, r.cell_id): r.images_per_s
        for r in records
        if r.evidence == "bound" and r.part == "model" and r.ok
    }
    found: dict[tuple[str, str, str], Bar] = {}
    for r in timed(records, "model"):
        ms, lo, hi = milliseconds(r)
        scale = 1e3 * (r.batch or 1)
        bar = Bar(
            work_of(r),
            r.gpu_key,
            series_of(r),
            scale / ms,
            scale / hi,
            scale / lo,
            bounds.get((r.gpu_key, r.cell_id)),
            r.evidence,
            provenance(r),
        )
        key = (bar.work, bar.gpu, bar.series)
        best = found.get(key)
        if best is None or (EVIDENCE.index(bar.evidence), -bar.images_per_s) < (
            EVIDENCE.index(best.evidence),
            -best.images_per_s,
        ):
            found[key] = bar
    return sorted(found.values())


def part_times(records: Sequence[Record]) -> list[PartTime]:
    """Time per stage, part by part, all blocks of the stage together."""
    found = []
    for r in trusted(records).values():
        if r.part not in PART_ORDER or not r.stage:
            continue
        ms, _, _ = milliseconds(r)
        found.append(
            PartTime(
                f"{r.model}, {work_of(r)}",
                r.gpu_key,
                r.stage,
                r.backend if r.part == "attention" else "",
                r.part,
                ms * (r.block_count or 1),
                r.evidence,
                provenance(r),
            )
        )
    return sorted(found)


def speedups(records: Sequence[Record]) -> list[SpeedupCell]:
    """Every backend against gather-then-dense on the same call, stage by stage."""
    groups: dict[tuple[str, str, int], dict[str, Record]] = defaultdict(dict)
    for r in timed(records, "attention"):
        groups[(f"{r.model or 'call'}, {work_of(r)}, {r.l2} cache", r.gpu_key, r.stage or 0)][r.backend] = r
    found = []
    for (work, gpu, stage), by_backend in groups.items():
        base = by_backend.get(BASELINE)
        if base is None:
            continue
        base_ms, base_lo, base_hi = milliseconds(base)
        for backend, r in by_backend.items():
            ms, lo, hi = milliseconds(r)
            weaker = max((base.evidence, r.evidence), key=EVIDENCE.index)
            found.append(
                SpeedupCell(
                    work,
                    gpu,
                    backend,
                    stage,
                    base_ms / ms,
                    base_lo / hi,
                    base_hi / lo,
                    weaker,
                    provenance(r),
                )
            )
    return sorted(found)


def energies(records: Sequence[Record]) -> list[EnergyBar]:
    """Joules per image of whole models, where energy was measured."""
    return sorted(
        EnergyBar(work_of(r), r.gpu_key, series_of(r), r.joules_per_image, r.energy_method, provenance(r))
        for r in timed(records, "model")
        if r.joules_per_image is not None and math.isfinite(r.joules_per_image)
    )
