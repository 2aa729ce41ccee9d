"""Scale study: how large records become and how long they take to read, measured.

``python -m bratune.profile.scale_study 1000000 -o FOLDER`` writes that many rows, each with numbers and an
identity of its own, and times what a user does with them. The figures of docs/scale.md come from it.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import click

from bratune import store
from bratune.cell import Cell
from bratune.machine import detect
from bratune.problem import Problem
from bratune.profile import upkeep
from bratune.record import Record

__all__ = ["COLUMNS", "rows"]

T = TypeVar("T")

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


def _timed(what: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = what()
    return time.perf_counter() - start, found


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@click.command()
@click.argument("count", type=click.IntRange(1))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@click.option("--parquet/--no-parquet", default=True, help="Time the compact copy too (needs pyarrow).")
def main(count: int, output: Path, parquet: bool) -> None:
    """Write COUNT rows and print, as JSON, what their size and reading cost."""
    import pandas

    output.mkdir(parents=True, exist_ok=True)
    path = output / f"records-{count}.jsonl"
    kinds = list(rows(min(count, 10_000)))  # making rows is not what is timed
    seconds, _ = _timed(lambda: _write(path, kinds, count))
    found: dict[str, object] = {"rows": count, "write_s": round(seconds, 1)}
    found["jsonl_gb"] = round(path.stat().st_size / 1e9, 2)
    seconds, table = _timed(lambda: store.read(path, columns=COLUMNS))
    assert len(table) == count
    found |= {"read_10_columns_s": round(seconds, 1), "read_10_columns_peak_gib": round(_peak_gib(), 2)}
    del table
    if count <= _MOST_OBJECTS:  # what every run does with the store that it continues
        seconds, held = _timed(lambda: store.Store(path).records())
        found |= {"records_s": round(seconds, 1), "records_peak_gib": round(_peak_gib(), 2)}
        del held
    if parquet:
        copy = path.with_suffix(".parquet")
        seconds, _ = _timed(lambda: upkeep.compact([path], copy))
        found |= {"compact_s": round(seconds, 1), "parquet_gb": round(copy.stat().st_size / 1e9, 3)}
        seconds, table = _timed(lambda: pandas.read_parquet(copy, columns=list(COLUMNS)))
        assert len(table) == count
        found["read_parquet_10_columns_s"] = round(seconds, 2)
    click.echo(json.dumps(found))


def _write(path: Path, kinds: list[Record], count: int) -> None:
    """Lines of all kinds in turn; each round has another name for its runs."""
    lines = [kind.to_json() for kind in kinds]
    with path.open("w") as file:
        for number in range(count):
            line = lines[number % len(lines)]
            round_ = number // len(lines)
            file.write(line.replace('"run_id":"', f'"run_id":"{round_}-', 1) + "\n")


if __name__ == "__main__":
    main()
