"""Runs of one folder share the work: no cell is measured twice, and the cells of the dead are taken over."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run import engine as engines
from bratune.run.engine import CellEngine
from bratune.run.measure_cell import Result
from bratune.store import Store, read_records
from bratune.store.claims import Claim, Claims, Holder

MACHINE = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="a CPU", threads=1)
PROBLEM = Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(4, 4), topk=2)
SETTINGS = MeterSettings.for_effort("quick")


def cells(count: int) -> list[Cell]:
    return [Cell(part="attention", problem=PROBLEM, backend="gather", seed=seed) for seed in range(count)]


class Sleeper:
    """A runner whose cells take a moment; one of them may never end."""

    evidence = "measured"
    machine = MACHINE

    def __init__(self, seconds: float, endless: int = -1) -> None:
        self.seconds, self.endless = seconds, endless

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        time.sleep(1000 if cell.seed == self.endless else self.seconds)
        return Result(Record.of(cell, MACHINE, median_ms=1.0), (1.0,))

    def interrupt(self) -> None:
        """It cannot be."""

    def close(self) -> None:
        """Nothing to close."""


def sweep(path: Path, name: str, count: int, seconds: float, endless: int = -1) -> None:
    engines._LOOK_S = 0.05
    with CellEngine(Sleeper(seconds, endless), SETTINGS, store=Store(path), run_id=name) as engine:
        found = list(engine.run(cells(count)))
    assert len(found) == count


def start(*arguments: object) -> multiprocessing.context.ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=sweep, args=arguments)
    process.start()
    return process


def measured(path: Path) -> Counter[str]:
    return Counter(row.cell_id for row in read_records([path]) if row.outcome == "measured")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("runs", [2, 5])
def test_several_runs_of_one_folder_measure_every_cell_once(tmp_path: Path, runs: int) -> None:
    path = tmp_path / "records.jsonl"
    processes = [start(path, f"run-{n}", 20, 0.02) for n in range(runs)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * runs  # each had a row for every cell
    assert measured(path) == {cell.cell_id: 1 for cell in cells(20)}
    names = {row.run_id for row in read_records([path]) if row.outcome == "measured"}
    assert len(names) > 1, "the work was shared"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_cell_of_a_run_that_died_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    first = start(path, "first", 6, 0.01, 3)
    while measured(path).total() < 3 if path.exists() else True:
        time.sleep(0.02)
    second = start(path, "second", 6, 0.01)
    while measured(path).total() < 5:
        time.sleep(0.02)
    assert second.is_alive()  # waits for the cell that the first holds
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join()
    assert second.exitcode == 0
    assert measured(path) == {cell.cell_id: 1 for cell in cells(6)}


def started(holder: Holder | str, when: datetime | None = None, **more: str) -> Record:
    cell = cells(1)[0]
    row = Record.of(cell, MACHINE, outcome="started", run_id="theirs", claimed_by=str(holder), **more)
    return row.replace(timestamp_utc=(when or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"))


ALIVE = Holder.current()
PARENT = Holder(ALIVE.host, os.getppid(), "", ALIVE.boot)


@pytest.mark.parametrize(
    ("line", "claim"),
    [
        (started(Holder("elsewhere", 1, "1", "b")), Claim.TAKEN),  # nobody can see whether it lives
        (started(Holder("elsewhere", 1, "1", "b"), datetime.now(UTC) - timedelta(hours=1)), Claim.OURS),
        (
            started(Holder(ALIVE.host, ALIVE.pid, "1", ALIVE.boot)),
            Claim.OURS,
        ),  # an earlier process of that id
        (started(Holder(ALIVE.host, ALIVE.pid, ALIVE.started, "boot")), Claim.OURS),
        (started(ALIVE), Claim.OURS),  # this process was interrupted in it
        (started(""), Claim.OURS),  # of a version that claimed nothing
        (started("a b c d e"), Claim.OURS),
        (started(Holder("elsewhere", 1, "1", "b"), torch="another"), Claim.OURS),  # asked something else
    ],
)
def test_a_claim_stands_while_its_holder_may_live(tmp_path: Path, line: Record, claim: Claim) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.append(line)
    claims = Claims(store, store.index(), engines._question)
    ours = Record.of(cells(1)[0], MACHINE, outcome="started", run_id="ours")
    before = len(store.records())
    assert claims.take(ours, answered=lambda: False, lease_s=600) is claim
    rows = store.records()[before:]
    assert [Holder.parse(row.claimed_by) for row in rows] == ([ALIVE] if claim is Claim.OURS else [])
    assert claims.take(ours, answered=lambda: True, lease_s=600) is Claim.ANSWERED


def test_an_outcome_of_another_run_ends_no_claim_but_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.append(started(Holder("elsewhere", 1, "1", "b")))
    store.append(Record.of(cells(1)[0], MACHINE, median_ms=1.0, run_id="a third"))
    index = store.index()
    assert len(index.unfinished(cells(1)[0].cell_id)) == 1
    store.append(Record.of(cells(1)[0], MACHINE, median_ms=1.0, run_id="theirs"))
    assert index.unfinished(cells(1)[0].cell_id) == []


def test_a_holder_survives_its_text() -> None:
    for holder in (ALIVE, Holder("a b", 3, "", "")):
        assert Holder.parse(str(holder)) == holder
    assert PARENT.is_alive() is False  # nothing is known of when it began
