"""The closing comparison: what ratios within rounds of several processes say of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.tune.closing import Closing, compare

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU")
PROBLEM = Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(2, 2), topk=2)
DEFAULT, A, B = (Cell(part="model", problem=PROBLEM, backend=name) for name in ("gather", "a", "b"))
PUBLISHED = DEFAULT.replace(backend="", form="published")


class Told:
    """An engine whose passes are told: speed-ups over the default, a text being a failure."""

    machine = CPU
    slots = passes = 1
    turns = False

    def __init__(self, speedups: Mapping[Cell, Sequence[float | str]], wait_pct: float = 0.0) -> None:
        self.speedups, self.wait_pct = speedups, wait_pct

    def run(self, cells: Any) -> Any:
        raise AssertionError("cells of a comparison take turns")

    def in_turn(
        self, cells: Sequence[Cell], base: Cell, passes: int, **_: object
    ) -> dict[Cell, list[Record]]:
        assert cells[0] == base == DEFAULT
        return {cell: [self._row(cell, number) for number in range(1, passes + 1)] for cell in cells}

    def _row(self, cell: Cell, number: int) -> Record:
        told = self.speedups.get(cell, [1.0])
        value = told[(number - 1) % len(told)]
        if isinstance(value, str):
            return Record.of(cell, CPU, outcome=value, reason="as told", pass_number=number)
        drift = 1.0 + 0.3 * number  # of the whole machine, from pass to pass
        return Record.of(
            cell,
            CPU,
            median_ms=drift / value,
            ratio=value,
            pass_number=number,
            cpu_wait_pct=self.wait_pct,
        )


def closing(candidates: Mapping[Cell, Sequence[float | str]], passes: int = 6, **more: Any) -> Closing:
    engine = Told({PUBLISHED: [0.5, 0.51], **candidates}, **more)
    return compare(engine, DEFAULT, list(candidates), PUBLISHED, passes)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        pytest.param([2.0, 2.02], "FASTER", id="twice as fast, whatever the machine does"),
        pytest.param([0.9, 0.91], "SLOWER", id="a tenth slower"),
        pytest.param([1.001, 0.999], "SAME", id="within the threshold"),
        pytest.param([0.9, 1.2], "UNDECIDED", id="depends on the process"),
        pytest.param([1.014, 1.016], "SAME", id="a difference that does not matter"),
    ],
)
def test_the_verdict_is_that_of_every_command(speedups: list[float | str], expected: str) -> None:
    found = closing({A: speedups})
    assert found.verdicts[A].verdict == expected
    assert (found.fastest() == A) is (expected == "FASTER")
    assert found.passes == 6


def test_speedups_have_intervals_and_that_over_the_published_form_is_within_passes() -> None:
    found = closing({A: [1.5, 1.53, 1.51]})
    for speedup, value in ((found.speedup(A), 1.51), (found.speedup_over(A, PUBLISHED), 3.0)):
        assert speedup is not None
        assert speedup.lo is not None
        assert speedup.hi is not None
        assert speedup.lo < speedup.value < speedup.hi
        assert speedup.value == pytest.approx(value, rel=0.01)
        assert speedup.hi / speedup.lo < 1.1  # the drift of the machine is in neither
    own = found.speedup_over(DEFAULT, PUBLISHED)
    assert own is not None
    assert own.value == pytest.approx(1 / 0.505, rel=0.002)


def test_the_fastest_of_several_that_are_faster_is_chosen() -> None:
    found = closing({A: [1.2, 1.21], B: [1.4, 1.41]})
    assert found.fastest() == B
    assert found.fastest() not in (PUBLISHED, DEFAULT)


def test_the_published_form_is_chosen_by_nobody() -> None:
    found = compare(Told({PUBLISHED: [3.0, 3.1], A: [0.9, 0.91]}), DEFAULT, [A], PUBLISHED, 6)
    assert found.fastest() is None
    assert PUBLISHED not in found.verdicts


@pytest.mark.parametrize(
    ("candidates", "passes", "more", "words"),
    [
        ({A: [2.0]}, 1, {}, "in one process, which shows no scatter"),
        ({A: [2.0, 2.1]}, 6, {"wait_pct": 40.0}, "waited for a processor 40 % of the time"),
        ({A: ["oom"]}, 6, {}, "it was not compared: oom: as told"),
        ({A: [0.9, 1.2]}, 6, {}, "UNDECIDED, "),
        ({A: [1.5, 1.52]}, 6, {}, "FASTER, 1.510x ("),
    ],
)
def test_words_say_what_was_seen_and_what_would_settle_it(
    candidates: dict[Cell, list[float | str]], passes: int, more: dict[str, float], words: str
) -> None:
    found = closing(candidates, passes, **more)
    assert words in found.words(A)
    assert (found.fastest() is None) is ("FASTER" not in words)


def test_a_failed_default_leaves_nothing_to_say() -> None:
    found = compare(Told({DEFAULT: ["timeout"]}), DEFAULT, [], None, 6)
    assert (found.times, found.fastest(), found.passes) == ({}, None, 0)
    assert found.failed == {DEFAULT: "timeout: as told"}
