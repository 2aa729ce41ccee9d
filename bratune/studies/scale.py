"""Scale study: how large records become and how long they take to read, measured.

``python -m bratune.studies scale 1000000 -o FOLDER`` writes that many rows, each with numbers and an
identity of its own, and times what a user does with them. The figures of docs/scale.md come from it.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

import click

from bratune import store
from bratune.cell import Cell
from bratune.machine import detect
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run.engine import ParallelEngine
from bratune.run.measure_cell import Result
from bratune.store import maintenance as upkeep

__all__ = ["COLUMNS", "rows"]

T = TypeVar("T")

# What a user does with records, in an order in which each finds its files.
# `drive` is what the driver of a cluster does: 128 devices that take no time hand it their rows.
STEPS = ("drive", "write", "read", "read-all", "resume", "records", "compact", "read-parquet")

_MOST_DRIVEN = 2_000
# More rows than this as objects would not fit a small machine.
_MOST_OBJECTS = 1_000_000

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
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"records-{count}.jsonl"
    for step in steps or STEPS:
        if step == "records" and not steps and count > _MOST_OBJECTS:
            continue
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            click.echo(json.dumps(pool.submit(_step, step, path, count).result()))


def _step(step: str, path: Path, count: int) -> dict[str, object]:
    """What a step takes: wall time, time of all cores, peak of memory, size of what it wrote."""
    import pandas

    copy = path.with_suffix(".parquet")
    held: object
    match step:
        case "drive":
            count = min(count, _MOST_DRIVEN)
            seconds, held = _timed(lambda: list(_driver(path.parent / "driven.jsonl").run(_cells(count))))
        case "write":
            kinds = list(rows(min(count, 10_000)))  # making rows is not what is timed
            seconds, held = _timed(lambda: _write(path, kinds, count))
        case "read":
            seconds, held = _timed(lambda: store.read(path, columns=COLUMNS))
        case "read-all":
            seconds, held = _timed(lambda: store.read(path))
        case "resume":
            seconds, held = _timed(lambda: store.Store(path).index())
        case "records":
            seconds, held = _timed(lambda: store.Store(path).records())
        case "compact":
            seconds, held = _timed(lambda: upkeep.compact([path], copy))
        case _:
            seconds, held = _timed(lambda: pandas.read_parquet(copy, columns=list(COLUMNS)))
    if isinstance(held, Sized):
        assert len(held) == count
    found: dict[str, object] = {"step": step, "rows": count, "wall_s": round(seconds, 1)}
    found |= {"cpu_s": round(time.process_time(), 1), "peak_gib": round(_peak_gib(), 2)}
    written = {"write": path, "compact": copy}.get(step)
    if written:
        found["gb"] = round(written.stat().st_size / 1e9, 3)
    return found


def _write(path: Path, kinds: list[Record], count: int) -> None:
    """Lines of all kinds in turn, each row a run and a cell of its own."""
    lines = [kind.to_json() for kind in kinds]
    with path.open("w") as file:
        for number in range(count):
            line = lines[number % len(lines)]
            start = line.index('"run_id":"') + len('"run_id":"')
            cell = line.index('"cell_id":"') + len('"cell_id":"')
            file.write(
                f"{line[:start]}{number // len(lines)}-{line[start:cell]}{number:016x}{line[cell + 16 :]}\n"
            )
