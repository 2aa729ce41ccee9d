"""Verdict: SAME, FASTER, SLOWER or UNDECIDED, with an interval and what would settle it.

A process has an effect of its own (memory layout, clocks, algorithm choice) that more samples in it never
show. So a side is a list of fresh processes, each a list of samples, and the interval comes from a
hierarchical bootstrap: processes are drawn with replacement, then samples inside each drawn process; the
standard error of the log ratio of medians is widened by Student's t with Welch's degrees of freedom, because
three processes are few. A side of one process cannot show its own effect and is given an assumed one.

How often this is wrong is measured on data with known truth: `bratune.studies.verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bratune.errors import UsageError

__all__ = [
    "VERDICTS",
    "Process",
    "Verdict",
    "decide",
    "process_of_interval",
    "process_of_samples",
    "student_t",
]

VERDICTS = ("FASTER", "SLOWER", "SAME", "UNDECIDED")
DEFAULT_MARGIN = 0.02
DEFAULT_CONFIDENCE = 0.95
# Standard deviation of the effect of a process, relative, where only one was run: wide, because a side that
# was run once and claims more than this is wrong about every second time when processes differ by 3 %.
ASSUMED_PROCESS_SD = 0.03
# Resampled medians kept per process, and draws of processes.
INNER_DRAWS = 200
OUTER_DRAWS = 2000
# Beyond this many processes per side, "run more" is no advice.
PATIENCE = 100


@dataclass(frozen=True)
class Process:
    """One fresh process: the log of its median, and resampled logs around it."""

    log_median: float
    resampled: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of B against A.

    Attributes:
        verdict: One of `VERDICTS`; ``FASTER`` means that B takes less time than A.
        ratio: Time of B over time of A.
        lo: Lower limit of the ratio.
        hi: Upper limit of the ratio.
        processes: Fresh processes of A and of B.
        settles: What would settle an ``UNDECIDED``; empty otherwise.
        assumed: Whether a side of one process was given an assumed effect.
    """

    verdict: str
    ratio: float
    lo: float
    hi: float
    processes: tuple[int, int]
    settles: str = ""
    assumed: bool = False

    def __str__(self) -> str:
        text = f"{self.verdict} {self.ratio:.3f}x ({self.lo:.3f} to {self.hi:.3f})"
        return f"{text}; {self.settles}" if self.settles else text


def process_of_samples(samples_ms: Sequence[float], seed: int = 0) -> Process:
    """A process from its raw samples in milliseconds.

    Raises:
        UsageError: there are none, or one is not above 0.
    """
    values = np.asarray(samples_ms, dtype=np.float64)
    if values.size == 0 or not np.all(values > 0):
        raise UsageError("a process needs at least one sample, and every sample must be above 0 ms")
    rng = np.random.default_rng([seed, values.size])
    drawn = rng.choice(values, size=(INNER_DRAWS, values.size))
    return Process(float(np.log(np.median(values))), np.log(np.median(drawn, axis=1)))


def process_of_interval(median_ms: float, lo_ms: float, hi_ms: float) -> Process:
    """A process of which only the median and its 95 % interval are stored."""
    spread = max(0.0, math.log(hi_ms / lo_ms)) / (2 * 1.96)
    ranks = (np.arange(INNER_DRAWS) + 0.5) / INNER_DRAWS
    return Process(math.log(median_ms), math.log(median_ms) + spread * _normal_quantiles(ranks))


def _normal_quantiles(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    from statistics import NormalDist

    normal = NormalDist()
    return np.array([normal.inv_cdf(float(r)) for r in ranks])


def decide(
    a: Sequence[Process],
    b: Sequence[Process],
    *,
    margin: float = DEFAULT_MARGIN,
    confidence: float = DEFAULT_CONFIDENCE,
    seed: int = 0,
) -> Verdict:
    """Compare B with A.

    Args:
        a: Fresh processes of the baseline.
        b: Fresh processes of the other side.
        margin: Differences within this fraction do not matter: an interval inside it is ``SAME``.
        confidence: Of the interval.
        seed: Of the resampling; the same data and seed give the same verdict.

    Returns:
        ``SAME`` where the whole interval lies within the margin, ``FASTER`` or ``SLOWER`` where it lies on
        one side of 1, else ``UNDECIDED`` with what would settle it.

    Raises:
        UsageError: a side is empty.
    """
    if not a or not b:
        raise UsageError("a comparison needs at least one measurement on each side")
    rng = np.random.default_rng([seed, len(a), len(b)])
    center = _mean(b) - _mean(a)
    errors = [_side_error(side, rng) for side in (a, b)]
    error = math.hypot(*errors)
    reach = student_t(0.5 + confidence / 2, _degrees(errors, (len(a), len(b)))) * error
    lo, hi = center - reach, center + reach
    limit = math.log1p(margin)
    if -limit <= lo and hi <= limit:
        verdict = "SAME"
    elif hi < 0:
        verdict = "FASTER"
    elif lo > 0:
        verdict = "SLOWER"
    else:
        verdict = "UNDECIDED"
    return Verdict(
        verdict=verdict,
        ratio=math.exp(center),
        lo=math.exp(lo),
        hi=math.exp(hi),
        processes=(len(a), len(b)),
        settles=_advice(center, reach, limit, len(a), len(b)) if verdict == "UNDECIDED" else "",
        assumed=min(len(a), len(b)) == 1,
    )


def _mean(side: Sequence[Process]) -> float:
    return float(np.mean([p.log_median for p in side]))


def _side_error(side: Sequence[Process], rng: np.random.Generator) -> float:
    """Standard error of a side's mean log median: processes redrawn, then samples inside each."""
    count = len(side)
    inner = np.stack([rng.choice(p.resampled, INNER_DRAWS) for p in side])
    which = rng.integers(count, size=(OUTER_DRAWS, count))
    drawn = inner[which, rng.integers(INNER_DRAWS, size=(OUTER_DRAWS, count))].mean(axis=1)
    error = float(np.std(drawn))
    if count == 1:
        return math.hypot(error, ASSUMED_PROCESS_SD)
    return error * math.sqrt(count / (count - 1))  # a bootstrap of few draws is too narrow by this factor


def _degrees(errors: Sequence[float], counts: tuple[int, int]) -> float:
    """Welch's degrees of freedom; a side with an assumed effect does not limit them."""
    total = sum(e**2 for e in errors) ** 2
    limited = sum(e**4 / (n - 1) for e, n in zip(errors, counts, strict=True) if n > 1)
    return total / limited if limited > 0 else math.inf


def student_t(probability: float, degrees: float) -> float:
    """The quantile of Student's t; of the normal distribution for infinite degrees of freedom."""
    from statistics import NormalDist

    if degrees > 1e4:
        return NormalDist().inv_cdf(probability)
    # With t = sqrt(df) tan(x), the density is cos(x) ** (df - 1) on an interval.
    x = np.linspace(0.0, math.pi / 2, 20001)
    density = np.cos(x) ** (degrees - 1)
    grown = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    position = float(np.interp(2 * probability - 1, grown / grown[-1], x))
    return math.sqrt(degrees) * math.tan(position)


def _advice(center: float, reach: float, limit: float, count_a: int, count_b: int) -> str:
    """How many fresh processes would settle it, if the ratio stays where it is."""
    target = abs(center) if abs(center) > limit / 2 else limit - abs(center)
    factor = (reach / max(target, 1e-9)) ** 2
    needed = max(3, math.ceil(max(count_a, count_b) * factor))
    if needed > PATIENCE:
        return "the noise is too large for a difference this small; a quieter machine or a wider --threshold"
    return f"about {needed} fresh processes per side would settle it ({count_a} and {count_b} now)"
