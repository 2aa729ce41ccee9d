"""Runs of one folder share the work: no cell is measured twice, and the cells of the dead are taken over."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.context
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
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
from bratune.run.parallel import ParallelEngine
from bratune.run.runner import Turns
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
    CellEngine.look_s = 0.05
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


COLLECTED = datetime.now(UTC)
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
        # in another container of this machine, whose processes nobody here sees
        (started(dataclasses.replace(ALIVE, pid=1, container="7")), Claim.TAKEN),
        (
            started(dataclasses.replace(ALIVE, container="7"), datetime.now(UTC) - timedelta(hours=1)),
            Claim.OURS,
        ),
        (started(dataclasses.replace(ALIVE, started="1")), Claim.OURS),
        (started("host \u00b2 1 b"), Claim.OURS),  # a digit, and no number
        (
            started(Holder("elsewhere", 1, "1", "b")).replace(cell="{"),
            Claim.OURS,
        ),  # it does not say what it asks
        (started(""), Claim.OURS),  # of a version that claimed nothing
        (started("a b c d e"), Claim.OURS),
        (started(Holder("elsewhere", 1, "1", "b"), torch="another"), Claim.OURS),  # asked something else
    ],
)
def test_a_claim_stands_while_its_holder_may_live(tmp_path: Path, line: Record, claim: Claim) -> None:
    store = Store(tmp_path / "records.jsonl")
    written = datetime.fromisoformat(line.timestamp_utc) + (datetime.now(UTC) - COLLECTED)  # as old as then
    store.append(line.replace(timestamp_utc=written.strftime("%Y-%m-%dT%H:%M:%SZ")))
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


def test_the_next_pass_of_a_cell_is_no_end_of_the_claim_on_this_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    lines = [started(Holder("elsewhere", 1, "1", "b")).replace(pass_number=n, passes=2) for n in (1, 2)]
    store.extend(lines)
    index = store.index()
    (cell,) = cells(1)
    assert index.unfinished(cell.cell_id) == lines
    row = Record.of(cell, MACHINE, median_ms=1.0, run_id="theirs", pass_number=2, passes=2)
    store.append(row.replace(sampling="a comparison of its own"))
    assert index.unfinished(cell.cell_id) == lines
    store.append(row)
    assert index.unfinished(cell.cell_id) == lines[:1]


def test_what_waits_for_a_device_is_claimed_again_until_it_has_an_outcome(tmp_path: Path) -> None:
    store, now = Store(tmp_path / "records.jsonl"), [datetime.now(UTC)]
    (cell,) = cells(1)
    claims = Claims(store, store.index(), engines._question, now=lambda: now[0])
    ours = Record.of(cell, MACHINE, outcome="started", run_id="ours")
    assert claims.take(ours, answered=lambda: False, lease_s=600) is Claim.OURS
    theirs = Claims(store, store.index(), engines._question, now=lambda: now[0])
    theirs._own = Holder("elsewhere", 1, "1", "b")

    def tried() -> Claim:
        return theirs.take(ours.replace(run_id="theirs"), answered=lambda: False, lease_s=600)

    for _ in range(3):
        now[0] += timedelta(seconds=400)
        claims.renew(200)
        assert tried() is Claim.TAKEN
    assert len(store.records()) == 4
    store.append(Record.of(cell, MACHINE, median_ms=1.0, run_id="ours"))
    claims.renew(200)
    assert len(store.records()) == 5
    now[0] += timedelta(seconds=400)
    claims.renew(200)
    assert len(store.records()) == 5
    assert tried() is Claim.OURS


class Slow(Sleeper):
    """Takes turns, one cell after the other."""

    def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
        for cell in turns.cells:
            yield cell, self.run(cell, limit_s=1.0)

    def fresh(self) -> None: ...


def drive(path: Path, name: str, slots: int, passes: int) -> None:
    CellEngine.look_s = 0.05
    with ParallelEngine(
        Slow(0.05), SETTINGS, slots=slots, store=Store(path), run_id=name, passes=passes
    ) as engine:
        assert len(list(engine.run(cells(12)))) == 12


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("passes", [1, 3])
def test_two_drivers_of_one_name_do_every_pass_once(tmp_path: Path, passes: int) -> None:
    """A name is any text: what tells two drivers apart is the process that holds a cell."""
    path = tmp_path / "records.jsonl"
    fork = multiprocessing.get_context("fork")
    drivers = [fork.Process(target=drive, args=(path, "now", slots, passes)) for slots in (3, 4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0, 0]
    done = [(row.cell_id, row.pass_number) for row in read_records([path]) if row.outcome == "measured"]
    assert len(done) == len(set(done)) == 12 * passes


def test_a_driver_goes_on_while_another_has_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    first, *others = cells(4)
    holder = str(Holder("elsewhere", 1, "1", "b"))
    with ParallelEngine(Slow(0.0), SETTINGS, slots=1, store=Store(path), run_id="ours") as engine:
        line = engine._signed(first, Record.of(first, MACHINE, outcome="started"))
        Store(path).append(line.replace(claimed_by=holder, run_id="theirs"))
        rows = engine.run([first, *others])
        assert [next(rows).seed for _ in others] == [1, 2, 3]
        Store(path).append(engine._signed(first, Record.of(first, MACHINE, median_ms=2.0)))
        assert [row.median_ms for row in rows] == [2.0]


def test_cells_that_take_turns_may_be_held_as_long_as_all_of_them_take(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with CellEngine(Slow(0.0), SETTINGS, store=Store(path), passes=2, cell_limit_s=100) as engine:
        (cell,) = cells(1)
        line = engine._signed(cell, Record.of(cell, MACHINE, outcome="started"))
        when = (datetime.now(UTC) - timedelta(seconds=500)).strftime("%Y-%m-%dT%H:%M:%SZ")
        holder = str(Holder("elsewhere", 1, "1", "b"))
        Store(path).append(
            line.replace(claimed_by=holder, run_id="theirs", timestamp_utc=when, pass_number=1, passes=2)
        )
        assert not engine._claim(cell, engine._which(1), 8)
        assert engine._claim(cell, engine._which(1), 2)


def compare(path: Path, name: str) -> None:
    CellEngine.look_s = 0.05
    with CellEngine(Slow(0.02), SETTINGS, store=Store(path), run_id=name) as engine:
        base, *others = cells(3)
        found = engine.in_turn([base, *others], base, 6)
    assert {cell.seed: [row.pass_number for row in rows] for cell, rows in found.items()} == {
        n: [*range(1, 7)] for n in range(3)
    }


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_runs_that_make_one_comparison_share_its_passes(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=compare, args=(path, name)) for name in ("one", "other")]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    assert [process.exitcode for process in runs] == [0, 0]
    rows = [row for row in read_records([path]) if row.outcome == "measured"]
    assert len(rows) == len({(row.cell_id, row.pass_number) for row in rows}) == 18
    assert len({row.run_id for row in rows}) == 2


def test_a_holder_survives_its_text() -> None:
    for holder in (ALIVE, Holder("a b", 3, "", ""), Holder("h", 3, "1", "b", "4026531836")):
        assert Holder.parse(str(holder)) == holder
    assert PARENT.is_alive() is False  # nothing is known of when it began
