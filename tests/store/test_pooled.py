"""One row per cell over its passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bratune import store
from bratune.cell import Cell
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.store import Store

MACHINE = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="Some CPU")
PROBLEM = Problem(batch=1, height=8, width=8, heads=2, head_dim=32, region=(4, 4), topk=2)


def row(seed: int, median: float | None, number: int | None, **values: object) -> Record:
    cell = Cell(part="attention", problem=PROBLEM, backend="gather", seed=seed)
    timed = {} if median is None else {"ci_lo_ms": 0.99 * median, "ci_hi_ms": 1.01 * median}
    return Record.of(cell, MACHINE, median_ms=median, pass_number=number, **{**timed, **values})


def test_a_cell_is_the_median_of_its_passes_with_the_scatter_between_them(tmp_path: Path) -> None:
    target = Store(tmp_path / "r.jsonl")
    for number, median in enumerate((1.0, 1.2, 1.1), start=1):
        target.append(row(0, None, number, outcome="started"))
        target.append(row(0, median, number, n_samples=10, images_per_s=1000 / median, cpu_wait_pct=number))
    table = store.pooled([tmp_path])
    assert len(table) == 1
    (cell,) = table.to_dict("records")
    assert cell["median_ms"] == pytest.approx(1.1)
    assert cell["images_per_s"] == pytest.approx(1000 / 1.1)
    assert (cell["passes"], cell["n_samples"], cell["cpu_wait_pct"]) == (3, 30, 2)
    assert cell["ci_lo_ms"] < 0.95 < 1.25 < cell["ci_hi_ms"]  # wider than the 1 % that each pass knows
    assert cell["noise_pct"] == pytest.approx(50 * (cell["ci_hi_ms"] - cell["ci_lo_ms"]) / 1.1)


def test_one_process_keeps_what_is_known_within_it(tmp_path: Path) -> None:
    Store(tmp_path / "r.jsonl").append(row(0, 1.0, None))
    (cell,) = store.pooled([tmp_path]).to_dict("records")
    assert (cell["passes"], cell["ci_lo_ms"], cell["ci_hi_ms"]) == (1, 0.99, 1.01)


def test_ratios_within_rounds_are_pooled_over_passes() -> None:
    rows = [row(0, t, n, ratio=r) for n, (t, r) in enumerate(((1.0, 2.0), (3.0, 2.04), (2.0, 2.02)), 1)]
    (cell,) = store.pool(rows)
    assert cell.ratio == pytest.approx(2.02)
    assert cell.ratio_lo is not None
    assert cell.ratio_hi is not None
    assert 1.9 < cell.ratio_lo < 2.02 < cell.ratio_hi < 2.15  # times scatter threefold, their ratios do not


def test_a_failure_is_told_and_a_wrong_result_is_no_time() -> None:
    crashed = row(0, None, 2, outcome="crashed", reason="a signal")
    (cell,) = store.pool([row(0, 1.0, 1), crashed, row(0, 1.1, 3)])
    assert cell.ok
    assert cell.reason == "1 of 3 passes: crashed: a signal"
    wrong = row(0, None, 2, outcome="incorrect", reason="zeros")
    (cell,) = store.pool([row(0, 1.0, 1), wrong, row(0, 1.1, 3)])
    assert (cell.outcome, cell.median_ms) == ("incorrect", None)


def test_what_was_measured_otherwise_is_another_cell() -> None:
    rows = [row(0, 1.0, 1, source_hash="a"), row(0, 2.0, 1, source_hash="b"), row(1, 3.0, 1, source_hash="a")]
    assert [found.median_ms for found in store.pool(rows)] == [1.0, 2.0, 3.0]


def test_passes_of_a_cell_that_disagree_on_its_part_are_pooled() -> None:
    rows = [row(0, median, number, ratio=2.0 + median) for number, median in enumerate((1.0, 1.2, 1.1), 1)]
    (cell,) = store.pool([*rows[:2], rows[2].replace(part="something else")])
    assert cell.median_ms == pytest.approx(1.1)
    assert cell.ratio == pytest.approx(3.1)
