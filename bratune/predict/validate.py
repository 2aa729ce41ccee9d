"""Validate: how far the model is off on records that were measured.

Every measured record is predicted without itself: with several GPUs, a GPU is predicted from the others
alone (what a user without that GPU would have seen), and so is a CPU; with one, a tenth of its cells from the
other nine tenths, which says nothing about another one, and the verdict says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bratune.predict.coefficients import Coefficients
from bratune.predict.fit import FitSample, calibrate, combine, samples_of
from bratune.record import Record

__all__ = ["Checked", "ErrorRow", "check", "error_rows", "rank_correlation", "verdict"]

FOLDS = 10
Z95 = 1.96


class Checked(NamedTuple):
    """One record, predicted without itself."""

    gpu_key: str
    name: str
    measured_ms: float
    predicted_ms: float
    covered: bool


class ErrorRow(NamedTuple):
    """The model's error on a group of records.

    Attributes:
        median_pct: Median of the absolute error, in per cent of the measured time.
        worst_factor: The largest ratio between the two times, either way.
        bias_factor: Predicted over measured, geometric mean.
        covered_pct: How many measured times lie in the 95 % interval.
        rank: Spearman's correlation of predicted and measured times; None below 3 records.
    """

    gpu_key: str
    name: str
    records: int
    median_pct: float
    worst_factor: float
    bias_factor: float
    covered_pct: float
    rank: float | None


def check(records: Iterable[Record]) -> list[Checked]:
    """Every usable measured record beside its prediction from the others."""
    samples = samples_of(records)
    found: list[Checked] = []
    for cpu in (False, True):
        group = [s for s in samples if s.cpu == cpu]
        keys = sorted({s.machine for s in group})
        if len(keys) > 1:
            parts = [[s for s in group if s.machine == key] for key in keys]
        else:
            parts = [[s for s in group if _fold(s) == fold] for fold in range(FOLDS)]
        for held_out in parts:
            ids = {id(s) for s in held_out}
            rest = [s for s in group if id(s) not in ids]
            found += [_checked(s, calibrate(rest, cpu=cpu)) for s in held_out]
    return found


def _fold(sample: FitSample) -> int:
    return int(sample.cell.cell_id[:8], 16) % FOLDS


def _checked(sample: FitSample, c: Coefficients) -> Checked:
    predicted = combine(sample, c)
    reach = Z95 * c.spread(sample.name, sample.gpu_key)
    return Checked(
        sample.machine,
        sample.name,
        sample.measured_ms,
        predicted,
        abs(math.log(sample.measured_ms / predicted)) <= reach,
    )


def error_rows(checked: Sequence[Checked]) -> list[ErrorRow]:
    """The error by machine and backend or part, and over each machine (name empty)."""
    found = []
    for key in sorted({c.gpu_key for c in checked}):
        own = [c for c in checked if c.gpu_key == key]
        found.append(_row(key, "", own))
        found += [
            _row(key, name, [c for c in own if c.name == name]) for name in sorted({c.name for c in own})
        ]
    return found


def _row(key: str, name: str, own: Sequence[Checked]) -> ErrorRow:
    ratios = [c.predicted_ms / c.measured_ms for c in own]
    return ErrorRow(
        gpu_key=key,
        name=name,
        records=len(own),
        median_pct=100 * statistics.median(abs(r - 1) for r in ratios),
        worst_factor=max(max(r, 1 / r) for r in ratios),
        bias_factor=math.exp(statistics.fmean(map(math.log, ratios))),
        covered_pct=100 * sum(c.covered for c in own) / len(own),
        rank=rank_correlation([c.measured_ms for c in own], [c.predicted_ms for c in own]),
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's coefficient of two rows of numbers; None where there are too few to rank."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return statistics.correlation(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in order; equal values share the mean of their places."""
    ordered = sorted(values)
    first = {v: i for i, v in reversed(list(enumerate(ordered)))}
    last = {v: i for i, v in enumerate(ordered)}
    return [(first[v] + last[v]) / 2 for v in values]


def verdict(checked: Sequence[Checked]) -> str:
    """What the check does and does not say, in one or two sentences."""
    boards = sorted({c.gpu_key for c in checked if not c.gpu_key.startswith("cpu-")})
    cpus = {c.gpu_key for c in checked} - set(boards)
    if not checked:
        return "no measured record that the model can be compared with: it is uncalibrated and unchecked"
    if not boards:
        how = (
            "only a CPU was measured, and each tenth of its cells was predicted from the rest"
            if len(cpus) == 1
            else f"{len(cpus)} CPUs were measured, each predicted from the others alone, and no GPU"
        )
        return (
            f"{how}: the error below is of the counts and of a CPU's coefficients; for GPUs the model rests "
            "on published rates and is unchecked here"
        )
    if len(boards) == 1:
        return (
            f"only one GPU was measured ({boards[0]}): each tenth of its cells was predicted from the rest, "
            "which says nothing about carrying over to another GPU"
        )
    return f"{len(boards)} GPUs were measured; each was predicted from the others alone"
