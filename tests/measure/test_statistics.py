"""Order statistics against exact binomial sums and worked examples."""

from __future__ import annotations

import math
import random

import pytest

from bratune.errors import MeasureError
from bratune.measure.statistics import (
    interval_ranks,
    median,
    median_interval,
    quantile,
    relative_noise_pct,
)


@pytest.mark.parametrize(
    ("samples", "fraction", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([1.0, 2.0, 4.0], 0.5, 2.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.1, 1.4),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.9, 4.6),
        ([1.0, 2.0], 0.0, 1.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_quantiles_interpolate_between_samples(
    samples: list[float], fraction: float, expected: float
) -> None:
    assert quantile(samples, fraction) == pytest.approx(expected)


def test_the_median_needs_no_sorting_by_the_caller() -> None:
    assert median([5.0, 1.0, 3.0]) == 3.0


def coverage(n: int, low: int, high: int) -> float:
    """Chance that the true median lies between two order statistics of n samples."""
    ways: int = sum(math.comb(n, i) for i in range(low + 1, high + 1))
    return float(ways / 2**n)


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 11, 20, 33, 100, 200, 201, 250, 500, 1001])
def test_the_interval_of_the_median_covers_95_percent(n: int) -> None:
    low, high = interval_ranks(n)
    assert coverage(n, low, high) >= 0.95


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 11, 20, 33, 100, 200])
def test_the_interval_of_the_median_is_the_narrowest_that_does(n: int) -> None:
    low, high = interval_ranks(n)
    assert coverage(n, low + 1, high - 1) < 0.95


@pytest.mark.parametrize("n", [201, 500, 1001])
def test_the_approximation_for_many_samples_is_at_most_two_ranks_wide_of_exact(n: int) -> None:
    low, high = interval_ranks(n)
    assert coverage(n, low + 2, high - 2) < 0.95


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_few_samples_give_their_whole_range(n: int) -> None:
    assert interval_ranks(n) == (0, n - 1)


def test_the_interval_of_ten_samples_is_the_second_to_the_ninth() -> None:
    assert median_interval([float(i) for i in range(1, 11)]) == (2.0, 9.0)


def test_noise_is_half_the_interval_in_percent_of_the_median() -> None:
    assert relative_noise_pct([float(i) for i in range(96, 106)]) == pytest.approx(100 * 3.5 / 100.5)


@pytest.mark.parametrize("samples", [[1.0], [0.0, 0.0, 0.0]])
def test_noise_without_a_scale_is_infinite_and_not_an_error(samples: list[float]) -> None:
    assert relative_noise_pct(samples) == math.inf


@pytest.mark.parametrize("summarise", [median, median_interval, relative_noise_pct])
def test_no_samples_are_an_error(summarise: object) -> None:
    with pytest.raises(MeasureError, match="at least one"):
        summarise([])  # type: ignore[operator]


def test_the_interval_holds_the_true_median_of_skewed_noise_about_95_times_in_100() -> None:
    draw = random.Random(7)
    hits = 0
    for _ in range(2000):
        low, high = median_interval(sorted(draw.expovariate(1.0) for _ in range(25)))
        hits += low <= math.log(2) <= high
    assert 0.94 <= hits / 2000 <= 0.99
