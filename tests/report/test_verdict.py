"""The verdict: what it says, how often it is wrong, and what would settle it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bratune.errors import UsageError
from bratune.report.verdict import decide, process_of_interval, process_of_samples, student_t
from bratune.studies.verdict import simulate_side, study, table


def side(median: float, processes: int = 5, sd: float = 0.002, seed: int = 0) -> list:  # type: ignore[type-arg]
    rng = np.random.default_rng([seed, round(median * 1e6)])
    return [
        process_of_samples((median * np.exp(rng.normal(0, sd) + rng.normal(0, 0.004, 40))).tolist())
        for _ in range(processes)
    ]


@pytest.mark.parametrize(
    ("other", "expected"), [(0.90, "FASTER"), (1.10, "SLOWER"), (1.0, "SAME"), (1.005, "SAME")]
)
def test_a_clear_difference_is_named_and_a_small_one_is_the_same(other: float, expected: str) -> None:
    found = decide(side(1.0), side(other, seed=1))
    assert found.verdict == expected
    assert found.lo < found.ratio < found.hi
    assert found.ratio == pytest.approx(other, rel=0.01)


def test_an_interval_on_both_sides_of_the_margin_is_undecided_and_says_what_would_settle_it() -> None:
    found = decide(side(1.0, 3, 0.03), side(1.03, 3, 0.03, seed=1))
    assert found.verdict == "UNDECIDED"
    assert "fresh processes per side would settle it (3 and 3 now)" in found.settles


def test_more_processes_of_the_same_noise_settle_it() -> None:
    few = decide(side(1.0, 3, 0.03), side(1.06, 3, 0.03, seed=1))
    many = decide(side(1.0, 60, 0.03), side(1.06, 60, 0.03, seed=1))
    assert few.verdict == "UNDECIDED"
    assert many.verdict == "SLOWER"


def test_a_thousand_samples_of_one_process_do_not_replace_a_second_process() -> None:
    rng = np.random.default_rng(0)
    a = process_of_samples(np.exp(rng.normal(0, 0.01, 1000)).tolist())
    b = process_of_samples((1.04 * np.exp(rng.normal(0, 0.01, 1000))).tolist())
    found = decide([a], [b])
    assert found.verdict == "UNDECIDED"
    assert found.assumed


def test_swapping_the_sides_mirrors_the_verdict() -> None:
    a, b = side(1.0), side(0.9, seed=1)
    there, back = decide(a, b), decide(b, a)
    assert (there.verdict, back.verdict) == ("FASTER", "SLOWER")
    assert there.ratio == pytest.approx(1 / back.ratio)


def test_the_same_data_gives_the_same_verdict() -> None:
    a, b = side(1.0, 3, 0.03), side(1.03, 3, 0.03, seed=1)
    assert decide(a, b) == decide(a, b)


def test_only_a_stored_interval_is_enough() -> None:
    fast, slow = process_of_interval(1.0, 0.99, 1.01), process_of_interval(2.0, 1.98, 2.02)
    found = decide([fast] * 3, [slow] * 3)
    assert found.verdict == "SLOWER"
    assert found.ratio == pytest.approx(2)


def test_a_wide_modelled_interval_decides_nothing() -> None:
    a, b = process_of_interval(1.0, 0.33, 3.0), process_of_interval(1.5, 0.5, 4.5)
    assert decide([a], [b]).verdict == "UNDECIDED"


@pytest.mark.parametrize("samples", [[], [1.0, 0.0], [-1.0]])
def test_samples_that_are_no_times_are_refused(samples: list[float]) -> None:
    with pytest.raises(UsageError, match="above 0"):
        process_of_samples(samples)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042), (math.inf, 1.96)]
)
def test_quantiles_of_students_t_are_the_tabulated_ones(degrees: float, quantile: float) -> None:
    assert student_t(0.975, degrees) == pytest.approx(quantile, rel=1e-3)


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("process_sd", [0.01, 0.03])
def test_false_claims_stay_below_the_promised_share(processes: int, process_sd: float) -> None:
    row = study(processes, 0.0, process_sd=process_sd, repetitions=100, seed=1)
    assert row.faster + row.slower <= 0.05 + 0.03


def test_one_process_per_side_claims_falsely_no_more_often_than_promised() -> None:
    row = study(1, 0.0, process_sd=0.03, repetitions=200, seed=1)
    assert row.faster + row.slower <= 0.05 + 0.03


def test_five_processes_see_five_per_cent() -> None:
    assert study(5, 0.05, repetitions=60, seed=1).faster >= 0.95


def test_ten_processes_tell_that_nothing_changed() -> None:
    assert study(10, 0.0, repetitions=60, seed=1).same >= 0.85


def test_a_simulated_side_has_the_truth_that_it_was_given() -> None:
    rng = np.random.default_rng(0)
    medians = [math.exp(p.log_median) for p in simulate_side(rng, 200, 0.1, 0.01)]
    assert float(np.median(medians)) == pytest.approx(0.9, rel=0.01)


def test_the_published_table_has_a_line_per_number_of_processes() -> None:
    found = [study(n, e, repetitions=3) for n in (1, 2) for e in (0.0, 0.1)]
    lines = table(found).splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("| FASTER, truly by 10 % |")
    assert lines[2].startswith("| 1 % | 1 | ")
