"""The study of coverage, on runs whose truth is known."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bratune import store
from bratune.cell import Cell
from bratune.errors import StoreError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.store import Store
from bratune.studies import delayed
from bratune.studies.coverage import main, study_of
from bratune.studies.delayed import DELAYED

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU")
PROBLEM = Problem(batch=1, height=8, width=8, heads=2, head_dim=32, region=(4, 4), topk=2)
CELLS = 12


def write(
    folder: Path, *, seed: int, scatter: float = 0.02, run_effect: float = 0.0, slower: float = 0.0
) -> None:
    """A run of three passes of twelve cells and no baseline; the last one has a slower form, if asked for."""
    rng = np.random.default_rng(seed)
    levels = np.exp(rng.normal(0, run_effect, CELLS))
    target = Store(folder / "records.jsonl")
    for number in range(CELLS):
        last = number == CELLS - 1
        forms = {"dense": 1.0} | ({"delayed-dense": slower} if last and slower else {})
        for (name, factor), which in itertools.product(forms.items(), (1, 2, 3)):
            cell = Cell(part="attention", problem=PROBLEM, backend=name, model="m", stage=number)
            t = float(levels[number] * np.exp(rng.normal(0, scatter))) * factor
            row = Record.of(cell, CPU, median_ms=t, ci_lo_ms=0.999 * t, ci_hi_ms=1.001 * t, pass_number=which)
            target.append(row.replace(ratio=2 * t, ratio_lo=1.998 * t, ratio_hi=2.002 * t))


def write_beside(folder: Path, ratio: float, hopeless: int = 0) -> None:
    """Three stages of `gather`, `dense` and its delayed form, ``ratio`` times as fast in every round.

    Args:
        folder: Of the run.
        ratio: Of the delayed form to the other.
        hopeless: A stage where the delayed form was given up.
    """
    target = Store(folder / "records.jsonl")
    for stage, which in itertools.product((1, 2, 3), (1, 2, 3)):
        for name, own in (("gather", None), ("dense", 1.0), ("delayed-dense", ratio)):
            cell = Cell(part="attention", problem=PROBLEM, backend=name, model="m", stage=stage)
            given_up = stage == hopeless and name.startswith("delayed")
            why = "worse: every sample is above 3 ms" if given_up else "noise: known to 2 %"
            row = Record.of(cell, CPU, median_ms=1.0 + which, pass_number=which, passes=3, run_id="r")
            row = row.replace(stop_reason=why)
            if own is not None:
                own *= 1 + 0.001 * which
                row = row.replace(ratio=own, ratio_lo=0.998 * own, ratio_hi=1.002 * own)
            target.append(row)


def figures(folder: Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["show", "-o", str(folder)])
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(main, ["table", str(folder / "coverage-study.json")])
    assert again.output == result.output
    found: dict[str, Any] = json.loads((folder / "coverage-study.json").read_text())["kinds"]
    return found


def test_intervals_cover_where_runs_differ_by_what_passes_show(tmp_path: Path) -> None:
    for number in range(8):
        write(tmp_path / f"quiet-{number}", seed=number)
    seen = figures(tmp_path)
    assert seen["quiet"]["times"]["n"] == seen["quiet"]["ratios"]["n"] == 8 * CELLS
    assert seen["quiet"]["times"]["inside"] >= 0.9 * 8 * CELLS
    assert (seen["quiet"]["pairs"]["n"], seen["quiet"]["pairs"]["wrong"] <= 2) == (20, True)


def test_intervals_do_not_cover_where_runs_differ_by_more(tmp_path: Path) -> None:
    for number in range(8):
        write(tmp_path / f"busy-{number}", seed=number, scatter=0.002, run_effect=0.2)
    seen = figures(tmp_path)
    assert seen["busy"]["times"]["inside"] < 0.8 * 8 * CELLS
    assert seen["busy"]["pairs"]["wrong"] > 10


def test_a_true_slowdown_is_counted_where_another_run_is_found_slower(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"delay10-{number}", seed=10 + number, scatter=0.005, slower=1.1)
        write(tmp_path / f"delay0.1-{number}", seed=20 + number, scatter=0.005, slower=1.001)
    seen = figures(tmp_path)
    found = seen["delay10"]["compared"]
    assert (found["n"], found["slower"], found["comparisons"]) == (6, 6, 6)  # every ordered pair of them
    assert found["wrong"] <= 1
    assert (seen["delay0.1"]["compared"]["n"], seen["delay0.1"]["compared"]["slower"]) == (6, 0)


def test_a_true_slowdown_is_counted_in_turn_within_a_run(tmp_path: Path) -> None:
    for delay, ratio in ((0.1, 0.999), (10, 1 / 1.1)):
        for number in range(2):
            write_beside(tmp_path / f"delay{delay}-{number}", ratio)
    seen = figures(tmp_path)
    counted = [
        (seen[kind]["in_turn"]["n"], seen[kind]["in_turn"]["slower"]) for kind in ("delay0.1", "delay10")
    ]
    assert counted == [(6, 0), (6, 6)]


def test_a_backend_that_was_given_up_is_not_counted_as_missed(tmp_path: Path) -> None:
    for number in range(2):
        write_beside(tmp_path / f"delay10-{number}", 1 / 1.1, hopeless=2)
    seen = figures(tmp_path)["delay10"]
    for how in ("in_turn", "compared"):
        assert (seen[how]["n"], seen[how]["left_out"]) == (4, 2)


def test_a_run_that_was_cut_short_is_left_out_and_named(tmp_path: Path) -> None:
    for number in range(2):
        write_beside(tmp_path / f"delay10-{number}", 1 / 1.1)
    cut = tmp_path / "delay10-1" / "records.jsonl"
    lines = cut.read_text().splitlines(keepends=True)
    cut.write_text("".join(line for line in lines if '"pass_number":3' not in line))
    result = CliRunner().invoke(main, ["show", "-o", str(tmp_path)])
    assert "delay10-1 was cut short and is left out" in result.stderr
    assert "1 x 3 | 3 of 3 (100 %) SLOWER" in result.stdout


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no runs; `coverage run -o"):
        study_of(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_run_is_taken_in_processes_of_its_own_and_shown(tmp_path: Path) -> None:
    short = ["--runs=1", "--smoke", "--res=64", "--stage=3", "--passes=2"]
    result = CliRunner().invoke(main, ["run", "-o", str(tmp_path), "--delay=10", *short])
    assert result.exit_code == 0, result.output
    seen = figures(tmp_path)
    assert (seen["delay10"]["runs"], seen["delay10"]["passes"]) == (1, 2)
    assert seen["delay10"]["in_turn"]["n"] + seen["delay10"]["in_turn"]["left_out"] == 2
    rows = store.read_records([tmp_path / "delay10-1"])
    assert {row.backend for row in rows if row.ok} == {"gather", *DELAYED, *DELAYED.values()}


def test_a_delayed_backend_takes_that_much_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.setenv(delayed.DELAY_VARIABLE, "900")
    wait = delayed._and_wait(lambda: now[0])
    assert wait() == 1.0
    assert now[0] == 11.0  # one second of work, nine of waiting


def test_too_few_runs_or_nothing_in_common_is_said(tmp_path: Path) -> None:
    from bratune.studies.coverage import coverage

    with pytest.raises(StoreError, match="three runs or more, not 0"):
        coverage([], lambda row: None)
    with pytest.raises(StoreError, match="no cell has an interval in all runs"):
        coverage([[], [], []], lambda row: None)
