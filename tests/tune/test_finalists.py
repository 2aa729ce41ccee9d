"""Verdicts of finalists from made-up processes with known times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import pytest

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.errors import MeasureError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.tune.finalists import Final, confirm

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU")
PROBLEM = Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(2, 2), topk=2)
DEFAULT, A, B = (Cell(part="attention", problem=PROBLEM, backend=name) for name in ("gather", "a", "b"))


class Processes:
    """Gives out engines; each answers with the next time of a cell, a string being a failure."""

    machine = CPU

    def __init__(self, times: dict[Cell, list[float | str]]) -> None:
        self.times = times
        self.orders: list[list[str]] = []
        self.open = 0

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Engine]:
        self.open += 1
        yield self
        self.open -= 1

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        cells = list(cells)
        self.orders.append([cell.backend for cell in cells])
        for cell in cells:
            several = self.times[cell]
            value = several[(len(self.orders) - 1) % len(several)]
            if isinstance(value, str):
                yield Record.of(cell, CPU, outcome=value, reason="as told")
            else:
                yield Record.of(cell, CPU, median_ms=value)


def verdict(default: list[float | str], a: list[float | str], rounds: int = 6) -> Final:
    processes = Processes({DEFAULT: default, A: a})
    (final,) = confirm([A], DEFAULT, processes.fresh, rounds=rounds)
    return final


@pytest.mark.parametrize(
    ("default", "a", "expected"),
    [
        pytest.param([2.0], [1.0], "faster", id="twice as fast"),
        pytest.param([1.0], [1.05], "slower", id="five percent slower"),
        pytest.param([1.0], [2.0], "slower", id="clearly slower"),
        pytest.param([1.0], [1.001, 0.999], "same", id="within a percent"),
        pytest.param([1.0], [0.9, 1.1], "ambiguous", id="depends on the process"),
        pytest.param([1.0], [0.995], "same", id="half a percent is no gain"),
        pytest.param([1.0, 2.0, 4.0], [0.5, 1.0, 2.0], "faster", id="drift of both cancels"),
        pytest.param([1.0], ["crashed"], "failed", id="the candidate crashes"),
        pytest.param(["oom"], [1.0], "failed", id="the default does not run"),
        pytest.param([1.0], [0.5, 0.5, "timeout"], "failed", id="one failure is enough"),
    ],
)
def test_the_verdict(default: list[float | str], a: list[float | str], expected: str) -> None:
    final = verdict(default, a)
    assert final.verdict == expected, final
    assert final.confirmed is (expected == "faster")


def test_a_confirmed_gain_has_ratios_of_every_process() -> None:
    final = verdict([2.0], [1.0, 1.25])
    assert final.candidate_ms == (1.0, 1.25) * 3
    assert final.default_ms == (2.0,) * 6
    assert (final.speedup, final.ci_lo, final.ci_hi) == (1.8, 1.6, 2.0)
    assert (final.confidence, final.n_processes) == (0.95, 6)
    assert str(final) == "call attention by a: faster, 1.800x (1.600 to 2.000 at 95 %, 6 processes)"


def test_few_processes_say_how_little_they_know() -> None:
    assert verdict([2.0], [1.0], rounds=3).confidence == 0.75


def test_a_failure_names_who_failed_and_how() -> None:
    assert verdict([1.0], ["crashed"]).reason == "the candidate is crashed: as told"
    assert verdict(["oom"], [1.0]).reason == "the default is oom: as told"


def test_every_process_is_new_and_closed_and_the_order_changes() -> None:
    processes = Processes({DEFAULT: [1.0], A: [1.0], B: [1.0]})
    confirm([A, B], DEFAULT, processes.fresh, rounds=4)
    assert processes.open == 0
    assert processes.orders == [
        ["gather", "a", "b"],
        ["a", "b", "gather"],
        ["b", "gather", "a"],
        ["gather", "a", "b"],
    ]


def test_a_clearly_worse_candidate_is_cut_short_and_the_other_is_not() -> None:
    processes = Processes({DEFAULT: [1.0], A: [3.0], B: [0.5]})
    worse, better = confirm([A, B], DEFAULT, processes.fresh)
    assert (worse.verdict, worse.n_processes) == ("slower", 2)
    assert worse.reason == "clearly slower in 2 processes, not run again"
    assert (better.verdict, better.n_processes) == ("faster", 6)
    assert [len(order) for order in processes.orders] == [3, 3, 2, 2, 2, 2]


MODEL = DEFAULT.replace(part="model", model="biformer_tiny")


def model_row(backend: str, median_ms: float, **changes: object) -> Record:
    cell = MODEL.replace(backend=backend, **changes)
    return Record.of(cell, CPU, median_ms=median_ms, baseline="gather")


def test_one_process_is_no_comparison() -> None:
    with pytest.raises(MeasureError, match="at least 2"):
        verdict([1.0], [1.0], rounds=1)
