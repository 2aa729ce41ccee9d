"""Every fault of `bratune.testing_faults` costs its own cell and nothing else.

``python tests/test_faults.py`` prints the table: fault x outcome x rows lost.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bratune import machine, testing_faults
from bratune.cell import Cell
from bratune.kernels import registry
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.profile.isolated import IsolatedEngine
from bratune.record import Record
from bratune.store import Store

pytestmark = pytest.mark.slow

PROBLEM = Problem(batch=1, height=8, width=8, heads=2, head_dim=8, region=(4, 4), topk=2)
SETTINGS = MeterSettings(
    min_time_s=0.0, max_noise_pct=100.0, timeout_s=2.0, min_samples=3, max_samples=3, warmup_s=0.0, l2="warm"
)
LIMIT_S = 10.0
MEMORY_LIMIT = 3 * 2**30

# Fault -> outcome of its cell and what its reason says.
EXPECTED = {
    "fault-hang": ("timeout", "no result within 10 s; the worker was killed"),
    "fault-hang-in-c": ("timeout", "no result within 10 s; the worker was killed"),
    "fault-segfault": ("crashed", "killed by signal 11 (SIGSEGV)"),
    "fault-abort": ("crashed", "killed by signal 6 (SIGABRT) in misbehave (testing_faults.py"),
    "fault-exit": ("crashed", "ended by itself with exit status 0"),
    "fault-leak": ("measured", ""),
    "fault-exhaust": ("oom", "can't allocate memory"),
    "fault-index": ("error", "out of bounds"),
    "fault-raise": ("error", "this backend always raises"),
    "fault-garbage": ("measured", ""),
    "fault-fork": ("measured", ""),
    "fault-nan": ("incorrect", "NaN or infinite"),
    "fault-wrong": ("incorrect", "differs from the reference"),
}


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    fault: str
    row: Record
    neighbour: Record
    rows_lost: int
    left_behind: int


def running(mark: str) -> int:
    """Processes that carry a mark in their environment and still run."""
    count = 0
    for folder in Path("/proc").iterdir():
        try:
            alive = folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes()
            count += alive and "\nState:\tZ" not in (folder / "status").read_text()
        except OSError:
            continue
    return count


def run_all(folder: Path) -> Iterator[Outcome]:
    """Each fault in one long run, a sound cell after each; then what is on disk is counted."""
    testing_faults.install(folder)
    sys.path.append(str(folder))
    registry._entry_points.cache_clear()
    store = Store(folder / "records.jsonl")
    mark = os.environ["BRATUNE_FAULT_RUN"] = uuid.uuid4().hex  # every process of this run inherits it
    written = 0
    with IsolatedEngine(
        machine.detect("cpu"), SETTINGS, store=store, cell_limit_s=LIMIT_S, memory_limit_bytes=MEMORY_LIMIT
    ) as engine:
        for number, fault in enumerate(testing_faults.FAULTS):
            sick = Cell(part="attention", problem=PROBLEM, backend=fault.name, l2="warm")
            sound = sick.replace(backend="gather", seed=number)
            row, neighbour = engine.run([sick, sound])
            written += 4  # two cells, each with its "started" line and its outcome
            lost = written - len(store.records())
            yield Outcome(fault.name, row, neighbour, lost, 0)
    deadline = time.monotonic() + 10
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = running(mark)
    sys.path.remove(str(folder))
    del os.environ["BRATUNE_FAULT_RUN"]
    for known in (registry._entry_points, registry.get, registry._chosen_name):
        known.cache_clear()
    yield Outcome("(after the run)", row, neighbour, written - len(store.records()), left)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return {outcome.fault: outcome for outcome in run_all(tmp_path_factory.mktemp("faults"))}


def test_every_fault_is_in_the_table() -> None:
    assert set(EXPECTED) == {fault.name for fault in testing_faults.FAULTS}


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_has_its_outcome_and_reason(outcomes: dict[str, Outcome], fault: str) -> None:
    outcome, reason = EXPECTED[fault]
    row = outcomes[fault].row
    assert row.outcome == outcome, row.reason
    assert reason in row.reason
    assert (row.median_ms is not None) is (outcome == "measured")


@pytest.mark.parametrize("fault", EXPECTED)
def test_the_next_cell_is_measured_and_no_row_is_lost(outcomes: dict[str, Outcome], fault: str) -> None:
    assert outcomes[fault].neighbour.outcome == "measured", outcomes[fault].neighbour.reason
    assert outcomes[fault].rows_lost == 0


def test_no_process_is_left_behind(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["(after the run)"].left_behind == 0


def main() -> None:
    """Print the table."""
    print(f"{'fault':<16}  {'outcome':<9}  {'next cell':<9}  rows lost  reason")
    with tempfile.TemporaryDirectory() as folder:
        for found in run_all(Path(folder)):
            if found.fault in EXPECTED:
                print(
                    f"{found.fault:<16}  {found.row.outcome:<9}  {found.neighbour.outcome:<9}  "
                    f"{found.rows_lost:>9}  {found.row.reason[:90]}",
                    flush=True,
                )
            else:
                print(f"processes left behind: {found.left_behind}")


if __name__ == "__main__":
    main()
