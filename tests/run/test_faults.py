"""Every fault of `bratune.testing.faults` costs its own cell and nothing else; none of a disk costs a row.

``python tests/run/test_faults.py`` prints what became of each cell; ``fault_table.py`` beside it tries more
faults, and more often.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as a script
from preloaded import forks

from bratune import machine
from bratune.cell import Cell
from bratune.errors import StoreError
from bratune.kernels import registry
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run.isolated import IsolatedEngine
from bratune.store import Store, read_records
from bratune.testing import faults

pytestmark = pytest.mark.slow

PROBLEM = Problem(batch=1, height=8, width=8, heads=2, head_dim=8, region=(4, 4), topk=2)
SETTINGS = MeterSettings(
    min_time_s=0.0, max_noise_pct=100.0, timeout_s=2.0, min_samples=3, max_samples=3, warmup_s=0.0, l2="warm"
)
LIMIT_S = 10.0
MEMORY_LIMIT = 3 * 2**30

# Fault -> outcome of its cell and what its reason says.
EXPECTED = {
    "fault-hang": ("timeout", f"no result within {LIMIT_S:g} s; the worker was killed"),
    "fault-hang-in-c": ("timeout", f"no result within {LIMIT_S:g} s; the worker was killed"),
    "fault-segfault": ("crashed", "killed by signal 11 (SIGSEGV)"),
    "fault-abort": ("crashed", "killed by signal 6 (SIGABRT) in misbehave (faults.py"),
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
    faults.install(folder)
    sys.path.append(str(folder))
    registry._entry_points.cache_clear()
    store = Store(folder / "records.jsonl")
    mark = os.environ["BRATUNE_FAULT_RUN"] = uuid.uuid4().hex  # every process of this run inherits it
    written = 0
    with IsolatedEngine(
        machine.detect("cpu"), SETTINGS, store=store, cell_limit_s=LIMIT_S, memory_limit_bytes=MEMORY_LIMIT
    ) as engine:
        for number, fault in enumerate(faults.FAULTS):
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


# --- faults of the place where rows go --------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """What became of rows: those whose writer was told that they are on disk, and those that are."""

    fault: str
    what: str
    promised: int
    found: int


def numbered(number: int) -> Record:
    return Record(cell_id=f"{number:016x}", median_ms=float(number + 1), repro="x" * 500)


def found_in(path: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a torn last line
        return sum(1 for _ in read_records([path]))


def _write(path: Path, first: int, count: int, done: Connection) -> None:
    store = Store(path)
    for number in range(first, first + count):
        store.append(numbered(number))
        done.send(number)


def torn_line(folder: Path) -> Disk:
    store = Store(folder / "torn.jsonl")
    store.append(numbered(1))
    with store.path.open("a") as file:
        file.write(numbered(2).to_json()[:99])
    Store(store.path).append(numbered(3))
    return Disk("torn last line", "cut off by the next writer", 2, found_in(store.path))


def killed_writers(folder: Path) -> Disk:
    path, forks, chance, promised = (
        folder / "killed.jsonl",
        multiprocessing.get_context("fork"),
        random.Random(1),
        0,
    )
    for turn in range(10):
        ours, theirs = forks.Pipe(duplex=False)
        writer = forks.Process(target=_write, args=(path, 1000 * turn, 1000, theirs))
        writer.start()
        theirs.close()
        ours.recv()
        time.sleep(chance.uniform(0, 0.02))
        writer.kill()
        writer.join()
        promised += 1
        with contextlib.suppress(EOFError):
            while True:
                ours.recv()
                promised += 1
    # A row may be there that its writer did not live to be told of: that is no loss.
    return Disk(
        "ten writers killed with -9",
        "each row that was promised is there",
        promised,
        min(promised, found_in(path)),
    )


def several_writers(folder: Path) -> Disk:
    path, forks = folder / "several.jsonl", multiprocessing.get_context("fork")
    pipes = [forks.Pipe(duplex=False) for _ in range(3)]
    writers = [
        forks.Process(target=_write, args=(path, 100 * n, 20, theirs)) for n, (_, theirs) in enumerate(pipes)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    return Disk("three writers at once", "they take turns, line by line", 60, found_in(path))


def full_disk(folder: Path) -> Disk:
    store = Store(folder / "full.jsonl")
    store.append(numbered(1))
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 99, limits[1]))
        with pytest.raises(StoreError) as refused:
            store.append(numbered(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    store.append(numbered(3))
    return Disk("disk full in the middle of a line", _said(refused.value), 2, found_in(store.path))


def read_only(folder: Path) -> Disk:
    with pytest.raises(StoreError) as refused:
        Store("/sys/bratune/records.jsonl")
    return Disk("folder that cannot be written", _said(refused.value), 0, 0)


def _said(error: StoreError) -> str:
    return f"error: {str(error).rpartition(': ')[2]}"


DISKS = (torn_line, killed_writers, several_writers, full_disk, read_only)


@pytest.mark.parametrize("fault", DISKS, ids=lambda fault: fault.__name__)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_no_row_is_lost_that_was_promised_to_be_on_disk(
    fault: Callable[[Path], Disk], tmp_path: Path
) -> None:
    found = fault(tmp_path)
    assert found.promised == found.found, found.what


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    with forks():
        return {outcome.fault: outcome for outcome in run_all(tmp_path_factory.mktemp("faults"))}


def test_every_fault_is_in_the_table() -> None:
    assert set(EXPECTED) == {fault.name for fault in faults.FAULTS}


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
                    f"{found.rows_lost:>9}  {found.row.reason[:57]}".rstrip(),
                    flush=True,
                )
            else:
                print(f"processes left behind: {found.left_behind}")


if __name__ == "__main__":
    main()
