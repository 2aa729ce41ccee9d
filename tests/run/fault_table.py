"""The table of docs/faults.md: every fault, how often it was tried, what was lost and what was done twice.

``python tests/run/fault_table.py`` (``make faults``) prints it and fails where a row is lost or a cell is
measured twice. It takes minutes, because most faults are tried many times; the tests try each of them once.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "run"), str(TESTS / "store")]

import test_damage as damage  # noqa: E402
import test_faults as cells_of_faults  # noqa: E402
import test_resume as resume  # noqa: E402
import test_side_by_side as side  # noqa: E402

from bratune.errors import BratuneError  # noqa: E402
from bratune.measure.worker import Worker  # noqa: E402
from bratune.store import Store, read_records  # noqa: E402
from bratune.store.maintenance import import_records, merge, prune, repair  # noqa: E402
from bratune.tune import storage  # noqa: E402
from bratune.tune.ledger import Ledger  # noqa: E402

FORKS = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        fault: What went wrong.
        ends: What the programs made of it.
        tries: How often.
        lost: Rows (of a study: trials) that were promised and are not there, of all tries.
        twice: Cells that were measured, or trials that were run, more than once.
    """

    fault: str
    ends: str
    tries: int
    lost: int
    twice: int = 0


def found_in(path: Path) -> int:
    return sum(1 for _ in read_records([path]))


def often(tries: int, fault: str, ends: str, once: Callable[[Path, random.Random], tuple[int, int]]) -> Line:
    """A fault as often as wanted, each time in a folder of its own."""
    lost = twice = 0
    for number in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            more = once(Path(folder), random.Random(number))
            lost, twice = lost + more[0], twice + more[1]
    return Line(fault, ends, tries, lost, twice)


# --- cells, and the place of the records ----------------------------------------------------------


def backends() -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as folder:
        for found in cells_of_faults.run_all(Path(folder)):
            if found.fault in cells_of_faults.EXPECTED:
                ends = f"{found.row.outcome}; the next cell is {found.neighbour.outcome}"
                yield Line(found.fault, ends, 1, found.rows_lost)
            else:
                yield Line("all of these together", f"{found.left_behind} processes left", 1, found.rows_lost)


def disks() -> Iterator[Line]:
    for fault in cells_of_faults.DISKS:
        with tempfile.TemporaryDirectory() as folder:
            found = fault(Path(folder))
        yield Line(found.fault, found.what, 1, found.promised - found.found)


def bad_line(kind: str) -> Callable[[Path, random.Random], tuple[int, int]]:
    def once(folder: Path, chance: random.Random) -> tuple[int, int]:
        path = damage.damaged(folder / "a.jsonl", damage.BAD[kind][0])
        Store(path).append(damage.GOOD[0])
        before = found_in(path)
        repair(path)
        return 2 * (len(damage.GOOD) + 1) - before - found_in(path), 0

    return once


def cut_anywhere(folder: Path, chance: random.Random) -> tuple[int, int]:
    """The file ends after any byte of its last record, its newline included."""
    path = folder / "a.jsonl"
    Store(path).extend(damage.GOOD)
    whole = path.read_bytes()
    last = len(damage.GOOD[-1].to_json()) + 1
    cut = chance.randrange(last + 1)
    path.write_bytes(whole[: len(whole) - cut])
    Store(path).append(damage.GOOD[0])
    promised = len(damage.GOOD) + (1 if cut <= 1 else 0)
    return promised - found_in(path), 0


def zeros_at_the_end(folder: Path, chance: random.Random) -> tuple[int, int]:
    path = folder / "a.jsonl"
    Store(path).extend(damage.GOOD)
    with path.open("ab") as file:
        file.write(b"\0" * chance.randrange(1, 9000))
    Store(path).append(damage.GOOD[0])
    return len(damage.GOOD) + 1 - found_in(path), 0


def no_store(folder: Path, chance: random.Random) -> tuple[int, int]:
    path, content = folder / "notes.txt", chance.randbytes(chance.randrange(1, 5000)).replace(b"{", b"(")
    path.write_bytes(content)
    Store(folder / "source.jsonl").extend(damage.GOOD)
    with contextlib.suppress(BratuneError):
        merge(path, [folder / "source.jsonl"])
    return int(path.read_bytes() != content), 0


def import_outside(folder: Path, chance: random.Random) -> tuple[int, int]:
    Store(folder / "in" / "a.jsonl").append(damage.GOOD[0].replace(gpu_key="../out"))
    with contextlib.suppress(BratuneError):
        import_records(folder / "runs", [folder / "in"])
    return int((folder / "out").exists()), 0


def killed_upkeep(work: Callable[[Path], object]) -> Callable[[Path, random.Random], tuple[int, int]]:
    def once(folder: Path, chance: random.Random) -> tuple[int, int]:
        path = damage.damaged(folder / "a.jsonl", b"not json")
        for _ in range(200):
            Store(path).extend(damage.GOOD)
        before = set(read_records([path]))
        process = FORKS.Process(target=work, args=(path,))
        process.start()
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        return len(before - set(read_records([path]))), 0

    return once


# --- runs side by side, and workers ----------------------------------------------------------------


def at_once(runs: int) -> Callable[[Path, random.Random], tuple[int, int]]:
    def once(folder: Path, chance: random.Random) -> tuple[int, int]:
        path = folder / "records.jsonl"
        for process in [side.start(path, f"run-{n}", 20, 0.01) for n in range(runs)]:
            process.join()
        return counted(side.measured(path), 20)

    return once


def killed_beside(folder: Path, chance: random.Random) -> tuple[int, int]:
    """Of three runs two are killed at random moments; the third, or the next, has every row."""
    path = folder / "records.jsonl"
    processes = [side.start(path, f"run-{n}", 20, 0.01) for n in range(3)]
    for process in processes[:2]:
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
    for process in processes:
        process.join()
    return counted(side.measured(path), 20)


def drivers(folder: Path, chance: random.Random) -> tuple[int, int]:
    """Two drivers that began in the same second, and so have one name, on several devices each, in passes."""
    path = folder / "records.jsonl"
    processes = [FORKS.Process(target=side.drive, args=(path, "now", slots, 3)) for slots in (3, 4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = [row for row in read_records([path]) if row.outcome == "measured"]
    return counted(Counter(f"{row.cell_id} {row.pass_number}" for row in rows), 36)


def pruned_beside(folder: Path, chance: random.Random) -> tuple[int, int]:
    """Another file takes the place of the records again and again while two runs share them."""
    path = folder / "records.jsonl"
    processes = [side.start(path, f"run-{n}", 20, 0.02) for n in range(2)]
    while any(process.is_alive() for process in processes):
        if path.exists():
            prune(path, key_of=lambda row: row.cell_id, keep=100)
        time.sleep(chance.uniform(0, 0.05))
    return counted(side.measured(path), 20)


def counted(times: Counter[str], wanted: int) -> tuple[int, int]:
    return wanted - len(times), sum(number > 1 for number in times.values())


def dies_while_starting(folder: Path, chance: random.Random) -> tuple[int, int]:
    (folder / "dies_at_first.py").write_text(
        "import os, pathlib, signal\n"
        "left = pathlib.Path(os.environ['DEATHS'])\n"
        "if not left.exists():\n    left.touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    sys.path.insert(0, str(folder))
    try:
        with Worker(preload=("dies_at_first",), env={"DEATHS": str(folder / "died")}) as worker:
            return int(worker.run("operator:neg", 1, limit_s=60).value != -1), 0
    finally:
        sys.path.remove(str(folder))


# --- studies -----------------------------------------------------------------------------------------


def suggest(trial: Any) -> int:
    return int(trial.suggest_int("x", 0, 99))


def items(count: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [(f"k{i}", {"x": i}, {}) for i in range(count)]


def finish(ledger: Ledger, wanted: int) -> tuple[int, int]:
    """Run what waits, as a search does; trials that are lost, and that were run twice."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ledger.reap()
        while (trial := ledger.claim(suggest)) is not None:
            ledger.complete(trial, [1.0])
        if not ledger.busy_elsewhere():
            break
        time.sleep(0.5)  # a trial that was popped and not signed is a living worker's for ten seconds
    return counted(Counter(t.user_attrs["key"] for t in ledger.trials("COMPLETE")), wanted)


def _claim_and_die(url: str, seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, 20)
    ledger = Ledger(url, "s", ["ms"])
    ledger.reap()
    ledger.claim(suggest)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def twenty_deaths(folder: Path, chance: random.Random) -> tuple[int, int]:
    url = f"journal:///{folder}/s.journal"
    Ledger(url, "s", ["ms"]).enqueue(items(1))
    for _ in range(20):
        process = FORKS.Process(target=_claim_and_die, args=(url, 0.0))
        process.start()
        process.join()
    return finish(Ledger(url, "s", ["ms"]), 1)


def _work(url: str) -> None:
    ledger = Ledger(url, "s", ["ms"])
    while True:
        ledger.reap()
        trial = ledger.claim(suggest)
        if trial is not None:
            ledger.complete(trial, [1.0])


def killed_workers(folder: Path, chance: random.Random) -> tuple[int, int]:
    """Workers are killed in the middle of whatever they do, also while they take back trials of the dead."""
    url = f"journal:///{folder}/s.journal"
    Ledger(url, "s", ["ms"]).enqueue(items(30))
    for _ in range(5):
        process = FORKS.Process(target=_work, args=(url,))
        process.start()
        time.sleep(chance.uniform(0.05, 0.4))
        process.kill()
        process.join()
    return finish(Ledger(url, "s", ["ms"]), 30)


def torn_journal(folder: Path, chance: random.Random) -> tuple[int, int]:
    url = f"journal:///{folder}/s.journal"
    ledger = Ledger(url, "s", ["ms"])
    ledger.enqueue(items(2))
    with open(folder / "s.journal", "ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "x"'[: chance.randrange(1, 30)])
    ledger.enqueue(items(4))
    return finish(Ledger(url, "s", ["ms"]), 4)


def slow_disk(folder: Path, chance: random.Random) -> tuple[int, int]:
    ledger = Ledger(f"journal:///{folder}/s.journal", "s", ["ms"])
    real, failures = os.fsync, [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]

    def fsync(fd: int) -> None:
        if failures:
            raise OSError(failures.pop(), "for a while")
        real(fd)

    with mock.patch("os.fsync", fsync), mock.patch.object(storage, "_FIRST_PAUSE_S", 0.001):
        ledger.enqueue(items(3))
    return finish(ledger, 3)


def _second(url: str) -> None:
    with contextlib.suppress(BratuneError):
        _work(url)


def second_on_sqlite(folder: Path, chance: random.Random) -> tuple[int, int]:
    url = f"sqlite:///{folder}/s.db"
    ledger = Ledger(url, "s", ["ms"])
    ledger.enqueue(items(5))
    process = FORKS.Process(target=_second, args=(url,))
    process.start()
    process.join(20)
    return finish(ledger, 5)


def commands() -> Iterator[Line]:
    for story, name in ((resume.profile_story, "profile"), (resume.tune_story, "tune")):
        with tempfile.TemporaryDirectory() as folder:
            found = story(Path(folder))  # raises where the end is not that of an undisturbed run
        again = sum(number > 1 for number in found.times.values())
        yield Line(
            f"{name} killed with -9 at random moments",
            "the end of an undisturbed run",
            found.killed,
            0,
            again,
        )


def lines() -> Iterator[Line]:
    """Every line of the table, as it is known."""
    yield from disks()
    yield often(50, "file cut after any byte of its last record", "completed or cut off", cut_anywhere)
    yield often(20, "zeros at the end of a file", "cut off by the next writer", zeros_at_the_end)
    for kind in damage.BAD:
        yield often(1, f"line in the middle: {kind}", "named, left out, set aside by repair", bad_line(kind))
    yield often(20, "merge into a file that is no store", "refused; the file is as it was", no_store)
    yield often(1, "import of a row that leads out of the folder", "refused", import_outside)
    yield often(10, "repair killed with -9", "the old file or the new one", killed_upkeep(repair))
    pruned = killed_upkeep(lambda path: prune(path, key_of=lambda row: row.cell_id, keep=1000))
    yield often(10, "prune killed with -9", "the old file or the new one", pruned)
    yield often(5, "two runs of one folder at once", "they share the cells", at_once(2))
    yield often(5, "five runs of one folder at once", "they share the cells", at_once(5))
    yield often(10, "two of three runs at once killed with -9", "the third takes over", killed_beside)
    yield often(5, "two drivers of one name, in passes", "they share the passes", drivers)
    yield often(5, "records pruned under two runs at once", "they share the cells", pruned_beside)
    yield often(2, "worker killed while it starts", "started again", dies_while_starting)
    yield often(2, "20 workers die with one trial of a study", "queued again each time", twenty_deaths)
    yield often(5, "5 workers of a study killed at random moments", "queued again", killed_workers)
    yield often(10, "half a line in a journal under a living worker", "cut off", torn_journal)
    yield often(3, "disk of a journal fails three times", "waited for", slow_disk)
    yield often(3, "second process on a study in SQLite", "refused", second_on_sqlite)
    yield from commands()
    yield from backends()


def main() -> int:
    """Print the table; 1 where something was lost or done twice."""
    warnings.simplefilter("ignore")
    print(f"{'fault':<50}  {'what happens':<42}  tries  rows lost  cells twice")
    wrong = 0
    for line in lines():
        print(
            f"{line.fault:<50}  {line.ends:<42}  {line.tries:>5}  {line.lost:>9}  {line.twice:>11}",
            flush=True,
        )
        wrong += line.lost + line.twice
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
