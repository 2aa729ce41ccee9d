"""Order statistics of timing samples: no distribution is assumed anywhere.

Timing samples are skewed (interrupts only ever add time), so the centre is the median, its interval
comes from order statistics and the spread from deciles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from bratune.errors import MeasureError

__all__ = ["interval_ranks", "median", "median_interval", "paired_ratio", "quantile", "relative_noise_pct"]

CONFIDENCE = 0.95
# Up to here the binomial sum is exact; above, its normal approximation is within one rank.
_EXACT_UP_TO = 200


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """The value below which a fraction of the sorted samples lies, interpolated linearly.

    Args:
        ordered: Samples in ascending order, at least one.
        fraction: 0 to 1; 0.5 is the median.

    Raises:
        MeasureError: there are no samples.
    """
    if not ordered:
        raise MeasureError("there are no samples to summarise; at least one is needed")
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def median(samples: Sequence[float]) -> float:
    """The middle of the samples; raises `MeasureError` when there are none."""
    return quantile(sorted(samples), 0.5)


@functools.lru_cache(maxsize=4096)
def interval_ranks(n: int) -> tuple[int, int]:
    """Ranks, from 0, of the two sorted samples that enclose the median with 95 % confidence.

    The number of samples below the true median is binomial with chance one half, whatever the
    distribution; the ranks are the innermost pair that leaves at most 2.5 % on either side. Under six
    samples no pair does, and the interval is the whole range with ``1 - 2 ** (1 - n)`` confidence.

        >>> interval_ranks(10)  # the 2nd to the 9th of ten samples: 97.9 %
        (1, 8)
    """
    tail = (1 - CONFIDENCE) / 2
    if n > _EXACT_UP_TO:
        low = math.floor((n - 1.959964 * math.sqrt(n)) / 2) - 1
        return low, n - 1 - low
    low, below = 0, 1
    # `below` is C(n, 0) + ... + C(n, low): the ways in which the median falls under sample `low`.
    while (below + math.comb(n, low + 1)) / 2**n <= tail:
        low += 1
        below += math.comb(n, low)
    return low, n - 1 - low


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The interval of the median, distribution-free, at 95 % (see `interval_ranks`).

    Args:
        ordered: Independent samples in ascending order, at least one.

    Raises:
        MeasureError: there are no samples.
    """
    if not ordered:
        raise MeasureError("there are no samples to summarise; at least one is needed")
    low, high = interval_ranks(len(ordered))
    return ordered[low], ordered[high]


def relative_noise_pct(ordered: Sequence[float]) -> float:
    """How well the median is known: half the width of its interval, in percent of it.

    One sample says nothing about noise and gives infinity, as does a median of zero.

    Args:
        ordered: Samples in ascending order, at least one.
    """
    low, high = median_interval(ordered)
    middle = quantile(ordered, 0.5)
    if len(ordered) < 2 or middle <= 0:
        return math.inf
    return 100 * (high - low) / 2 / middle


def paired_ratio(base: Sequence[float], own: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """How many times faster than a baseline, and the 95 % interval: the median of the ratios within a round.

    Args:
        base: Times of the baseline, round by round.
        own: Times of the other in the same rounds.
    """
    ratios = sorted(b / t for b, t in zip(base, own, strict=True))
    return median(ratios), median_interval(ratios)
