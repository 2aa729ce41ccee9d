"""The verdict: what it says, how often it is wrong, and what would settle it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bratune.errors import UsageError
from bratune.measure import verdict
from bratune.measure.verdict import Passes, estimate, judge_ratios, judge_runs, priors, student_t
from bratune.studies.verdict import study, table


def passes(level: float, count: int = 5, sd: float = 0.002, seed: int = 0, **values: float) -> Passes:
    rng = np.random.default_rng([seed, round(level * 1e6)])
    times = level * np.exp(rng.normal(0, sd, count))
    return Passes.of([(float(t), float(t) * 0.999, float(t) * 1.001) for t in times], **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "expected"), [(0.90, "FASTER"), (1.10, "SLOWER"), (1.0, "SAME"), (1.005, "SAME")]
)
def test_a_clear_difference_is_named_and_a_small_one_is_the_same(other: float, expected: str) -> None:
    (found,) = judge_runs([(passes(1.0), passes(other, seed=1))]).verdicts
    assert found.verdict == expected
    assert found.lo < found.ratio < found.hi
    assert found.ratio == pytest.approx(other, rel=0.01)


def test_a_ratio_measured_in_turn_is_judged_by_its_passes() -> None:
    ratios = [passes(1.2, 6), passes(1.001, 6, seed=1), passes(0.8, 6, seed=2), passes(1.1, 2, 0.1, seed=3)]
    found = judge_ratios(ratios).verdicts
    assert [v.verdict for v in found] == ["FASTER", "SAME", "SLOWER", "UNDECIDED"]
    assert found[0].speedup == pytest.approx(1.2, rel=0.01)
    low, high = found[0].speedup_interval
    assert low < found[0].speedup < high


def test_an_undecided_pair_says_what_would_settle_it() -> None:
    (found,) = judge_runs([(passes(1.0, 3, 0.03), passes(1.03, 3, 0.03, seed=1))]).verdicts
    assert found.verdict == "UNDECIDED"
    assert "passes per side would settle it (3 and 3 now)" in found.settles


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 6), (6, 1)])
def test_one_process_on_a_side_is_never_faster_or_slower(a: int, b: int) -> None:
    (found,) = judge_runs([(passes(1.0, a), passes(9.0, b))]).verdicts
    assert found.verdict == "UNDECIDED"
    assert "one process on a side" in found.settles
    assert (found.lo, found.hi) == (0.0, math.inf)


def test_nothing_is_claimed_of_processes_that_waited_for_a_processor() -> None:
    (found,) = judge_runs([(passes(1.0), passes(2.0, wait_pct=11.0))]).verdicts
    assert found.verdict == "UNDECIDED"
    assert "waited for a processor 11 % of the time" in found.settles
    (quiet,) = judge_runs([(passes(1.0), passes(2.0, wait_pct=9.0))]).verdicts
    assert quiet.verdict == "SLOWER"


def test_what_everything_moved_by_is_named_and_divided_out() -> None:
    levels = [1.4, 1.41, 1.4, 1.39, 1.4, 1.4, 1.4 * 1.2]
    pairs = [(passes(1.0, seed=i), passes(level, seed=10 + i)) for i, level in enumerate(levels)]
    found = judge_runs(pairs)
    assert found.drift == pytest.approx(1.4, rel=0.01)
    assert "everything moved by 1.40x: the machine?" in found.sentence
    assert [v.verdict for v in found.verdicts[:-1]].count("SLOWER") == 0
    assert found.verdicts[-1].verdict == "SLOWER"
    assert found.verdicts[-1].ratio == pytest.approx(1.2, rel=0.02)


def test_a_change_of_a_few_cells_is_no_drift() -> None:
    levels = [1.0, 1.0, 1.0, 1.0, 1.4, 1.4]
    pairs = [(passes(1.0, seed=i), passes(level, seed=10 + i)) for i, level in enumerate(levels)]
    found = judge_runs(pairs)
    assert (found.drift, found.sentence) == (1.0, "")
    assert [v.verdict for v in found.verdicts[-2:]] == ["SLOWER", "SLOWER"]


def test_many_cells_judged_at_once_need_more_than_one_cell_alone() -> None:
    parted, among = [], []
    noisy = [(passes(1.0, 6, 0.01, i), passes(1.0, 6, 0.01, 100 + i)) for i in range(80)]
    for level in (1.021, 1.025, 1.03, 1.04, 1.06):
        pair = (passes(1.0, 6, 0.01, 900), passes(level, 6, 0.01, 901))
        many = judge_runs([*noisy, pair]).verdicts[-1]
        among.append(many.verdict == "SLOWER")
        parted.append(many.lo > 1)
    assert sum(among) < sum(parted)  # intervals part that are not claimed: one in forty would by chance
    assert among[-1]


def test_the_cells_of_a_kind_lend_their_scatter_to_one_of_two_passes() -> None:
    cells = [passes(1.0, 2, 0.01, i, kind="block") for i in range(40)]  # type: ignore[arg-type]
    prior = priors(cells)["block"]
    assert prior.degrees > 10
    assert math.sqrt(prior.variance) == pytest.approx(0.01, rel=0.3)
    alone, moderated = estimate(cells[0]), estimate(cells[0], prior)
    assert moderated.half_width_pct == pytest.approx(100 * 1.96 * 0.01 / math.sqrt(2), rel=0.5)
    assert alone.hi is not None
    assert moderated.hi is not None
    lucky = Passes.of([(1.0, None, None), (1.0, None, None)], kind="block")
    assert (estimate(lucky).half_width_pct, (estimate(lucky, prior).half_width_pct or 0) > 0.5) == (0, True)


def test_an_interval_is_never_narrower_than_the_noise_within_passes() -> None:
    noisy = Passes.of([(1.0, 0.9, 1.1), (1.0, 0.9, 1.1), (1.0, 0.9, 1.1)])
    found = estimate(noisy)
    assert found.lo is not None
    assert found.lo < 0.9


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = total = 0
    for _ in range(30):
        cells = [
            Passes.of([(float(np.exp(rng.normal(0, sd))), None, None) for _ in range(3)])
            for sd in 0.01 * np.exp(rng.normal(0, 0.7, 30))
        ]
        prior = priors(cells)[""]
        for cell in cells:
            found = estimate(cell, prior)
            assert found.lo is not None
            assert found.hi is not None
            inside += found.lo < 1 < found.hi
            total += 1
    assert 0.92 <= inside / total <= 0.98


def test_swapping_the_sides_mirrors_the_verdict() -> None:
    a, b = passes(1.0), passes(0.9, seed=1)
    (there,), (back,) = judge_runs([(a, b)]).verdicts, judge_runs([(b, a)]).verdicts
    assert (there.verdict, back.verdict) == ("FASTER", "SLOWER")
    assert there.ratio == pytest.approx(1 / back.ratio)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [-1.0]])
def test_values_that_are_no_times_are_refused(values: list[float]) -> None:
    with pytest.raises(UsageError, match="above 0"):
        Passes.of([(value, None, None) for value in values])


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042), (math.inf, 1.96)]
)
def test_quantiles_of_students_t_are_the_tabulated_ones(degrees: float, quantile: float) -> None:
    assert student_t(0.975, degrees) == pytest.approx(quantile, rel=1e-3)


@pytest.mark.parametrize("x", [0.5, 1.0, 3.3, 20.0])
def test_digamma_and_trigamma_are_those_of_torch(x: float) -> None:
    at = torch.tensor(x, dtype=torch.float64)
    assert verdict._digamma(x) == pytest.approx(float(torch.digamma(at)), abs=1e-8)
    assert verdict._trigamma(x) == pytest.approx(float(torch.special.polygamma(1, at)), abs=1e-7)
    assert verdict._inverse_trigamma(verdict._trigamma(x)) == pytest.approx(x, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sd", [0.01, 0.03])
def test_false_claims_stay_below_the_promised_share(count: int, sd: float) -> None:
    assert study(count, 0.0, pass_sd=sd, repetitions=60, seed=1).false_runs <= 0.05 + 0.05


def test_three_passes_see_ten_per_cent_and_six_see_five() -> None:
    assert study(3, 0.10, pass_sd=0.01, repetitions=20, seed=1).found >= 0.95
    assert study(6, 0.05, pass_sd=0.01, repetitions=20, seed=1).found >= 0.95


def test_the_published_table_has_a_line_per_number_of_passes() -> None:
    found = [study(n, e, pass_sd=0.01, repetitions=2) for n in (1, 2) for e in (0.0, 0.1)]
    lines = table(found).splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("| FASTER, truly by 10 % |")
    assert lines[2].startswith("| 1 % | 1 | 0.0 % |")
