"""Scale study: how large records become, how long they take to read and in how much memory, measured.

``python -m bratune.studies scale 1000000 -o FOLDER`` writes that many rows, each with numbers of its own and
ten to a cell, and does with them what a user does. The figures of docs/scale.md come from it.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

import click

from bratune import store
from bratune.cell import Cell
from bratune.errors import BratuneError
from bratune.machine import detect
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run.measure_cell import Result
from bratune.run.parallel import ParallelEngine
from bratune.store import maintenance as upkeep

__all__ = ["COLUMNS", "rows"]

T = TypeVar("T")

# What a user does with records, in an order in which each finds its files.
# `drive` is what the driver of a cluster does: 128 devices that take no time hand it their rows.
STEPS = (
    "drive",
    "write",
    "read",
    "read-all",
    "resume",
    "pooled",
    "report",
    "compare",
    "replay",
    "records",
    "compact",
    "read-parquet",
)
# What a run does that continues a store, beside what every run does.
_RESUME = """
from bratune.store import Store
assert len(Store(sys.argv[1]).index().rows("0" * 16)) == int(sys.argv[2])
"""
_COMMAND = """
from bratune.cli import run
sys.exit(run())
"""
# The peak of a process, told by itself: the system's account of a child begins with the peak of its parent.
_TELL_PEAK = """
import atexit, re, sys
@atexit.register
def tell():
    print("peak:", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""
_REPLAY = ("profile", "--replay", "{folder}", "--model", "biformer_small", "-o", "{folder}-replayed")
# Rows of a cell.
_PASSES = 10
# Those that are run as a user does, or that need a process without what the study imports.
VERBS = {
    "resume": (_RESUME, "{folder}/before.jsonl", str(_PASSES // 2)),
    "report": (_COMMAND, "report", "{folder}", "-o", "{folder}-report.html"),
    "compare": (_COMMAND, "compare", "{folder}/before.jsonl", "{folder}/after.jsonl"),
    "replay": (_COMMAND, *_REPLAY),
}

_MOST_DRIVEN = 2_000
# More rows than this as objects would not fit a small machine.
_MOST_OBJECTS = 1_000_000
# What differs from row to row.
_TIMES = ("median_ms", "ci_lo_ms", "ci_hi_ms", "p10_ms", "p90_ms", "min_ms", "images_per_s")

# What a comparison or a figure asks for.
COLUMNS = (
    "gpu_key",
    "model",
    "stage",
    "backend",
    "batch",
    "dtype",
    "regime",
    "median_ms",
    "ci_lo_ms",
    "ci_hi_ms",
)


def rows(count: int) -> Iterator[Record]:
    """Rows as a sweep writes them: a few hundred different cells, every time with other numbers."""
    machine = detect("cpu")
    backends = ("gather", "gather-sdpa", "dense", "sparse", "triton")
    for number in range(count):
        problem = Problem(
            batch=1 + number % 7,
            height=56,
            width=56,
            heads=2,
            head_dim=32,
            region=(8, 8),
            topk=1 + number % 48,
        )
        cell = Cell(
            part="attention",
            problem=problem,
            backend=backends[number % len(backends)],
            model="biformer_small",
            task="classification",
            image=(224, 224),
            stage=1 + number % 4,
            n_win="7",
            topk=str(problem.topk),
        )
        median = 1 + (number % 9973) / 9973
        yield Record.of(
            cell,
            machine,
            run_id=f"run-{number // 1000}",
            n_samples=50,
            n_discarded=0,
            median_ms=median,
            ci_lo_ms=median * 0.99,
            ci_hi_ms=median * 1.01,
            p10_ms=median * 0.98,
            p90_ms=median * 1.05,
            min_ms=median * 0.97,
            noise_pct=1.0,
            stop_reason="noise",
            images_per_s=1e3 / median,
            peak_alloc_mb=100.0,
            max_rel_err=3e-7,
            tolerance=1e-5,
            repro="bratune profile --model biformer_small --res 224 -b 1",
        )


class _Instant:
    """A runner of devices that take no time."""

    evidence = "measured"

    def __init__(self) -> None:
        self.machine = detect("cpu")

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        return Result(Record.of(cell, self.machine, median_ms=1.0, n_samples=50), (1.0,) * 50)

    def interrupt(self) -> None:
        """Nothing runs long enough."""

    def close(self) -> None:
        """Nothing is held."""


def _driver(path: Path) -> ParallelEngine:
    path.unlink(missing_ok=True)
    settings = MeterSettings.for_effort("standard")
    return ParallelEngine(_Instant(), settings, slots=128, store=store.Store(path))


def _cells(count: int) -> list[Cell]:
    return [row.to_cell().replace(seed=i) for i, row in enumerate(rows(count))]


def _timed(what: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = what()
    return time.perf_counter() - start, found


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@click.command("scale")
@click.argument("count", type=click.IntRange(1))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@click.option(
    "--step",
    "steps",
    type=click.Choice(STEPS),
    multiple=True,
    help="Only this, on the files of an earlier call; repeatable.  [default: all, one after the other]",
)
def main(count: int, output: Path, steps: tuple[str, ...]) -> None:
    """Write COUNT rows and print what their size and reading cost, a line of JSON per step.

    Each step runs in a process of its own, so that peaks of memory are its own.
    """
    folder = output / f"records-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps or STEPS:
        if step == "records" and not steps and count > _MOST_OBJECTS:
            continue
        if step in VERBS:
            click.echo(json.dumps(_verb(step, folder, count)))
            continue
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            click.echo(json.dumps(pool.submit(_step, step, folder, count).result()))


def _verb(step: str, folder: Path, count: int) -> dict[str, object]:
    """What a command takes, as `_step` says it."""
    code, *arguments = (part.format(folder=folder) for part in VERBS[step])
    start = time.perf_counter()
    log = folder.with_name(f"{folder.name}-{step}.out")
    with log.open("w") as out:
        command = [sys.executable, "-c", _TELL_PEAK + code, *arguments]
        child = subprocess.Popen(command, stdout=out, stderr=out)
        _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    peak = re.findall(r"^peak: (\d+)$", log.read_text(), re.MULTILINE)
    if os.waitstatus_to_exitcode(status) != 0 or not peak:
        raise BratuneError(f"{step} of the records in {folder} failed; {log} says why")
    return {
        "step": step,
        "rows": count if step != "resume" else count // 2,
        "wall_s": round(wall, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(int(peak[-1]) / 2**20, 2),
    }


def _step(step: str, folder: Path, count: int) -> dict[str, object]:
    """What a step takes: wall time, time of all cores, peak of memory, size of what it wrote."""
    import pandas

    copy = folder / "records.parquet"
    held: object
    match step:
        case "drive":
            count = min(count, _MOST_DRIVEN)
            seconds, held = _timed(lambda: list(_driver(folder.parent / "driven.jsonl").run(_cells(count))))
        case "write":
            kinds = list(rows(min(count, 10_000)))  # making rows is not what is timed
            seconds, held = _timed(lambda: _write(folder, kinds, count))
        case "read":
            seconds, held = _timed(lambda: store.read(folder, columns=COLUMNS))
        case "read-all":
            seconds, held = _timed(lambda: store.read(folder))
        case "pooled":
            seconds, held = _timed(lambda: store.pooled([folder]))
            count = -(-count // _PASSES)
        case "records":
            seconds, held = _timed(lambda: list(store.read_records([folder])))
        case "compact":
            seconds, held = _timed(lambda: upkeep.compact([folder], copy))
        case _:
            seconds, held = _timed(lambda: pandas.read_parquet(copy, columns=list(COLUMNS)))
    if isinstance(held, Sized):
        assert len(held) == count
    found: dict[str, object] = {"step": step, "rows": count, "wall_s": round(seconds, 1)}
    found |= {"cpu_s": round(time.process_time(), 1), "peak_gib": round(_peak_gib(), 2)}
    if step in ("write", "compact"):
        written = [copy] if step == "compact" else list(folder.glob("*.jsonl"))
        found["gb"] = round(sum(path.stat().st_size for path in written) / 1e9, 3)
    return found


def _write(folder: Path, kinds: list[Record], count: int) -> None:
    """Lines of all kinds in turn, ten passes of each cell; the first half of all in a file of its own."""
    templates = [_template(kind) for kind in kinds]
    cells = -(-count // _PASSES)
    with (folder / "before.jsonl").open("w") as before, (folder / "after.jsonl").open("w") as after:
        for number in range(count):
            one, cell = divmod(number, cells)
            median = (1 + (number * 7919 % 9973) / 9973) * (1 + cell % 101)
            times = *(median * factor for factor in (1, 0.99, 1.01, 0.98, 1.05, 0.97)), 1e3 / median
            names = f"run-{one}-{cell // 1000}", f"{cell:016x}"
            line = templates[cell % len(templates)] % (*names, one + 1, *times)
            (before if number < count // 2 else after).write(line)


def _template(row: Record) -> str:
    """A line of a kind, with a place for its run, its cell, its pass and its times."""
    line = row.replace(run_id="-", pass_number=1).to_json().replace("%", "%%")
    for name in ("run_id", "cell_id"):
        line = re.sub(rf'"{name}":"[^"]*"', f'"{name}":"%s"', line, count=1)
    for name in ("pass_number", *_TIMES):
        line = re.sub(rf'"{name}":[^,}}]*', f'"{name}":%s', line, count=1)
    return line + "\n"
