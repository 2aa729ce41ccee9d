"""Small statistics that tuning needs: rank correlations, exact intervals, a paired bootstrap.

Plain Python and numpy; every interval is two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "bootstrap_interval",
    "clopper_pearson",
    "kendall",
    "mape",
    "ranks",
    "spearman",
]

Floats = NDArray[np.float64]


def ranks(values: Sequence[float]) -> Floats:
    """Ranks from 1, ties sharing their mean rank."""
    x = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = last - (counts - 1) / 2.0
    return np.asarray(mean_rank[inverse], dtype=np.float64)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one side is constant or has fewer than two values."""
    if len(a) != len(b):
        raise ValueError(f"a rank correlation needs pairs: {len(a)} values against {len(b)}")
    if len(a) < 2:
        return math.nan
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b; NaN where one side is constant or has fewer than two values."""
    if len(a) != len(b):
        raise ValueError(f"a rank correlation needs pairs: {len(a)} values against {len(b)}")
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    dx, dy = np.sign(x[:, None] - x[None, :]), np.sign(y[:, None] - y[None, :])
    norm = math.sqrt(float((dx**2).sum()) * float((dy**2).sum()))
    return float((dx * dy).sum()) / norm if norm else math.nan


def mape(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean absolute error of predictions, as a fraction of what was measured."""
    p, m = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    return float(np.mean(np.abs(p / m - 1.0))) if len(m) else math.nan


def _binomial_tail(successes: int, n: int, p: float) -> float:
    """P(X >= successes) for X ~ Binomial(n, p)."""
    if successes <= 0:
        return 1.0
    if p <= 0.0:
        return 0.0
    if p >= 1.0:
        return 1.0
    if successes <= n * p:  # the other tail is the smaller one
        return 1.0 - _binomial_tail(n - successes + 1, n, 1.0 - p)
    log = math.lgamma(n + 1) - math.lgamma(successes + 1) - math.lgamma(n - successes + 1)
    term = total = math.exp(log + successes * math.log(p) + (n - successes) * math.log1p(-p))
    for i in range(successes, n):  # beyond the mean, every term is smaller than the one before
        term *= (n - i) / (i + 1) * p / (1.0 - p)
        total += term
        if term < 1e-17 * total:
            break
    return min(1.0, total)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a proportion: ``(0.9717, 1.0)`` for 129 of 129 (two-sided, 95 %)."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is not a proportion")
    alpha = (1.0 - confidence) / 2.0

    def solve(holds: Callable[[float], bool]) -> float:
        lo, hi = 0.0, 1.0
        for _ in range(60):
            middle = (lo + hi) / 2.0
            lo, hi = (middle, hi) if holds(middle) else (lo, middle)
        return (lo + hi) / 2.0

    low = 0.0 if successes == 0 else solve(lambda p: _binomial_tail(successes, n, p) < alpha)
    high = 1.0 if successes == n else solve(lambda p: 1.0 - _binomial_tail(successes + 1, n, p) > alpha)
    return low, high


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    n: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic under resampling of its n rows.

    Args:
        statistic: Takes row indices (with repetition) and gives the value; NaNs are left out.
        n: Rows.
        confidence: Coverage.
        resamples: How often to resample.
        seed: Makes the interval the same in every run.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(resamples)], dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)
