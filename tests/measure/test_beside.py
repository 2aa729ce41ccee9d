"""A cell beside a reference: what the machine did is taken out, and what is not known of it is said."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bratune.measure.beside import Lines
from bratune.measure.verdict import Passes, judge_runs


def pair(
    seed: int,
    *,
    change: float = 1.0,
    count: int = 6,
    slope: float = 1.0,
    own: float = 0.01,
    shift: float = 0.0,
) -> tuple[Passes, Passes]:
    """Two runs of a cell on a machine whose speed differs by a quarter from pass to pass."""
    rng = np.random.default_rng(seed)

    def run(level: float, moved: float) -> Passes:
        machine = rng.normal(moved, 0.25, count)
        beside = np.exp(machine)
        times = level * np.exp(slope * machine + rng.normal(0, own, count))
        return Passes(
            values=tuple(map(float, times)),
            noise=(0.001,) * count,
            beside=tuple(map(float, beside)),
            beside_noise=(0.001,) * count,
        )

    return run(1.0, 0.0), run(change, shift)


def test_a_tenth_is_found_on_a_machine_that_moves_by_a_quarter() -> None:
    pairs = [pair(number, change=1.1) for number in range(6)]
    assert [v.verdict for v in judge_runs(pairs).verdicts] == ["SLOWER"] * 6
    without = [(a.alone, b.alone) for a, b in pairs]
    assert "SLOWER" not in [v.verdict for v in judge_runs(without).verdicts]


def test_intervals_hold_the_truth_whatever_the_cell_makes_of_the_machine() -> None:
    inside = total = 0
    for count, slope, number in itertools.product((2, 3, 8), (0.0, 0.4, 1.0), range(4)):
        pairs = [
            pair(100 * number + n, count=count, slope=slope, own=0.01 * 2 ** (n % 3), shift=0.2)
            for n in range(12)
        ]
        for found in judge_runs(pairs).verdicts:
            inside, total = inside + (found.lo <= 1 <= found.hi), total + 1
    assert 0.92 * total <= inside <= 0.99 * total


def test_the_same_code_is_hardly_ever_called_another() -> None:
    claims = 0
    for number in range(20):
        pairs = [pair(1000 * number + n, slope=(n % 5) / 4, own=0.005 * 2 ** (n % 4)) for n in range(8)]
        claims += any(v.verdict in ("FASTER", "SLOWER") for v in judge_runs(pairs).verdicts)
    assert claims <= 3  # one in twenty is promised


def test_a_slope_is_between_0_and_1_and_unknown_without_a_change_of_the_reference() -> None:
    steady = Lines.of([0.0, 0.01], [0.1, 0.11], [0.0, 0.0], [0.3, 0.3])
    change, variance = steady.change(1e-4)
    assert change == pytest.approx(0.1 - 0.5 * 0.3)
    assert variance == pytest.approx(1e-4 + 0.3**2 / 12)
    moving = Lines.of([0.0, 0.2], [0.3, 0.5], [0.0, 0.2], [0.3, 0.5])
    assert moving.change(1e-8)[0] == pytest.approx(0.0, abs=1e-4)
    against = Lines.of([0.2, 0.0], [0.2, 0.0], [0.0, 0.2], [0.0, 0.2])
    assert against.change(1e-8)[0] == pytest.approx(0.0)
    assert against.variance == pytest.approx(0.04)


def test_one_pass_on_a_side_has_no_line() -> None:
    a, b = pair(0, count=1)
    (found,) = judge_runs([(a, b)]).verdicts
    assert (found.verdict, found.hi) == ("UNDECIDED", math.inf)
