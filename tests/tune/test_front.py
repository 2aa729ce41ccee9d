"""Fronts, levels and hypervolume against brute force."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import pytest

from bratune.errors import UnknownNameError, UsageError
from bratune.measure import ranks as stats
from bratune.tune.pick import Verified, pick
from bratune.tune.setting import Setting
from bratune.tune.space import Space
from bratune.tune.table import Entry, OptionTable, Point, combine, dominates, hypervolume, layers, pareto


def random_options(rng: random.Random, count: int) -> list[Point[int]]:
    # Whole numbers make ties, which is where pruning goes wrong.
    return [Point((float(rng.randint(1, 9)), float(rng.randint(0, 9))), i) for i in range(count)]


def brute_levels(points: Iterable[tuple[float, ...]], depth: int) -> set[tuple[float, ...]]:
    left, kept = set(points), set()
    for _ in range(depth):
        front = {p for p in left if not any(dominates(q, p) for q in left)}
        kept |= front
        left -= front
    return kept


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rules", [("sum", "sum"), ("sum", "max")])
@pytest.mark.parametrize("depth", [1, 3])
def test_combined_levels_equal_brute_force(seed: int, rules: tuple[str, str], depth: int) -> None:
    rng = random.Random(seed)
    stages = [random_options(rng, rng.randint(1, 12)) for _ in range(3)]
    seconds = max if rules[1] == "max" else math.fsum
    every = [
        (sum(p.costs[0] for p in combo), float(seconds([p.costs[1] for p in combo])))
        for combo in itertools.product(*stages)
    ]
    found = combine(stages, rules, depth=depth)
    if rules[1] == "sum" or depth == 1:
        assert {p.costs for p in found} == brute_levels(every, depth)
    else:  # a maximum can hide a difference, so that levels may be lost, but never the front
        assert brute_levels(every, 1) <= {p.costs for p in found} <= set(every)


def test_combination_names_the_items_that_cost_this_much() -> None:
    stages = [random_options(random.Random(1), 9) for _ in range(3)]
    for point in combine(stages, ("sum", "sum")):
        chosen = [stage[item] for stage, item in zip(stages, point.item, strict=True)]
        assert sum(p.costs[0] for p in chosen) == point.costs[0]
        assert sum(p.costs[1] for p in chosen) == point.costs[1]


def test_stage_without_options_leaves_nothing() -> None:
    assert combine([[Point((1.0, 1.0), "a")], []], ("sum", "sum")) == []


def test_equal_costs_keep_the_first() -> None:
    assert [p.item for p in pareto([Point((1.0, 1.0), "a"), Point((1.0, 1.0), "b")])] == ["a"]


def test_levels_are_peeled_like_an_onion() -> None:
    points = [Point((float(i), float(j)), (i, j)) for i in range(4) for j in range(4)]
    assert {p.costs for p in layers(points, 2)} == {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)}


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0.0),
        ([(1.0, 1.0)], 1.0),
        ([(0.0, 1.0), (1.0, 0.0)], 3.0),
        ([(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.5, 1.5)], 3.0),
        ([(5.0, 0.0)], 0.0),
    ],
)
def test_hypervolume_is_the_area_below_the_reference(points: list[tuple[float, float]], area: float) -> None:
    assert hypervolume(points, (2.0, 2.0)) == area


def test_hypervolume_equals_counting_cells() -> None:
    rng = random.Random(3)
    points = [(float(rng.randint(0, 19)), float(rng.randint(0, 19))) for _ in range(15)]
    cells = sum(any(x <= i and y <= j for x, y in points) for i in range(20) for j in range(20))
    assert hypervolume(points, (20.0, 20.0)) == cells


# --- table ---------------------------------------------------------------------------------


def small_table(*, per_stage: bool, seed: int = 0) -> OptionTable:
    space = Space(model="biformer_tiny", height=224, width=224, per_stage=per_stage)
    rng = random.Random(seed)
    entries = [
        Entry(
            stage=i,
            n_win=s,
            topk=k,
            backend=b,
            ms=rng.uniform(1, 9),
            memory_mb=rng.uniform(1, 9),
            loss=rng.random(),
        )
        for i in space.routed
        for s in (7, 14)
        for k in (1, 4)
        for b in ("gather", "dense")
    ]
    return OptionTable(space, entries, rest_ms=2.0)


@pytest.mark.parametrize("per_stage", [False, True])
@pytest.mark.parametrize("limit", [None, 6.0])
def test_table_candidates_equal_enumerating_every_setting(per_stage: bool, limit: float | None) -> None:
    table = small_table(per_stage=per_stage)
    stages = [[e for e in table.entries.values() if e.stage == i] for i in table.space.routed]
    every = [
        (2.0 + sum(e.ms for e in combo), sum(e.loss for e in combo))
        for combo in itertools.product(*stages)
        if (per_stage or len({e.n_win for e in combo}) == 1)
        and (limit is None or max(e.memory_mb or 0.0 for e in combo) <= limit)
    ]
    expected = brute_levels(every, 1)
    found = {(c.ms, c.loss) for c in table.candidates(max_memory_mb=limit)}
    assert {(round(a, 9), round(b, 9)) for a, b in found} == {(round(a, 9), round(b, 9)) for a, b in expected}


def test_table_predicts_its_own_candidates() -> None:
    table = small_table(per_stage=False)
    for candidate in table.candidates(depth=2):
        assert table.predict_ms(candidate.setting) == pytest.approx(candidate.ms)


def test_calibration_meets_the_measured_setting() -> None:
    table = small_table(per_stage=False)
    setting = table.candidates()[0].setting
    assert table.calibrated(setting, 50.0).predict_ms(setting) == pytest.approx(50.0)


def test_table_error_is_zero_for_an_additive_world_and_says_so() -> None:
    table = small_table(per_stage=True)
    measured = [(c.setting, c.ms) for c in table.candidates(depth=4)]
    error = table.error(measured)
    assert error.mape == pytest.approx(0.0)
    assert error.kendall == pytest.approx(1.0)
    assert error.trustworthy
    assert "MAPE 0.0%" in str(error)
    assert not table.error([(s, ms * 1.3) for s, ms in measured]).trustworthy


# --- pick ----------------------------------------------------------------------------------


def verified(
    trial: int, ms: float, loss: float | None, mb: float | None = None, feasible: bool = True
) -> Verified:
    setting = Setting(n_win=(7,), topks=(trial + 1,))
    return Verified(
        trial=trial, setting=setting, ms=ms, ci=(ms, ms), loss=loss, memory_mb=mb, feasible=feasible
    )


FRONT = [
    verified(0, 10.0, 0.0, 90.0),
    verified(1, 8.0, 0.002, 80.0),
    verified(2, 6.0, 0.008, 95.0),
    verified(3, 5.0, 0.02, 60.0),
    verified(4, 4.9, 0.9, 70.0),
    verified(5, 1.0, 0.0, 1.0, feasible=False),
]


@pytest.mark.parametrize(
    ("rule", "trial"),
    [("safe", 1), ("balanced", 2), ("fast", 3), ("fastest", 4), ("lightest", 3), ("knee", 3), ("trial:0", 0)],
)
def test_each_rule_picks_its_setting(rule: str, trial: int) -> None:
    found = pick(rule, FRONT, limits={"safe": 0.003, "balanced": 0.01, "fast": 0.03})
    assert found.chosen.trial == trial
    assert found.reason


def test_without_fidelity_the_balanced_pick_is_the_fastest_and_says_why() -> None:
    found = pick("balanced", [verified(0, 2.0, None), verified(1, 1.0, None)])
    assert found.chosen.trial == 1
    assert "fidelity was not measured" in found.reason


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ("best", UnknownNameError, "no pick rule is called 'best'"),
        ("trial:9", UsageError, "no finished trial '9'"),
    ],
)
def test_unknown_rules_say_what_would_work(rule: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pick(rule, FRONT)


def test_nothing_feasible_is_an_error() -> None:
    with pytest.raises(UsageError, match="none of 1 measured settings"):
        pick("fastest", [FRONT[-1]])


# --- statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        (128, 128, (0.9716, 1.0)),  # 0.025 ** (1 / 128)
        (0, 10, (0.0, 0.3085)),
        (8, 10, (0.4439, 0.9748)),
        (126, 128, (0.9447, 0.9981)),
    ],
)
def test_exact_interval_of_a_proportion(successes: int, n: int, expected: tuple[float, float]) -> None:
    assert stats.clopper_pearson(successes, n) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "rho", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0, 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0, -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8, 2 / 3),
        ([1, 1, 2], [1, 2, 3], 0.8660254, 0.8164966),
    ],
)
def test_rank_correlations_with_and_without_ties(
    a: list[float], b: list[float], rho: float, tau: float
) -> None:
    assert stats.spearman(a, b) == pytest.approx(rho)
    assert stats.kendall(a, b) == pytest.approx(tau)


def test_search_study_judges_by_the_true_front() -> None:
    from bratune.studies.search import Contest, markdown

    contest = Contest(seed=0, coupling=0.05)
    order = contest.by_table(6)
    assert order[0] == contest.start
    volumes = [contest.volume(order[:n]) for n in (1, 3, 6)]
    assert volumes == sorted(volumes)
    assert contest.volume(contest.by_sampler("random", 4)) > 0
    study = {"rows": [{"method": "table", "coupling": 0.05, "trials": 6, "mean": 0.9, "worst": 0.8}]}
    assert markdown(study).endswith("| table | 5% | 0.900 (0.800) |")
