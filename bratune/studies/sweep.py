"""Sweep cost: how long a sweep of many cells takes and what it leaves on disk, simulated from measured cells.

    python -m bratune.studies sweep results/cpu-epyc-biformer-tiny-224.jsonl

Records say when a cell started and when its outcome was written. The simulation draws such times for as many
cells as are asked for and hands each to the first free device, as `bratune.run.parallel.ParallelEngine`
does. It loses devices at random: the cell in flight runs again elsewhere, and the device is back after a
while. The tables of docs/scale.md come from it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

from bratune.errors import StoreError
from bratune.record import Record
from bratune.store import read_records

__all__ = ["SweepCost", "cell_bytes", "cell_seconds", "simulate"]

# A sample as it is written, with its comma.
_SAMPLE_BYTES = 8
# A line of samples without the samples.
_SAMPLES_LINE_BYTES = 110


@dataclass(frozen=True)
class SweepCost:
    """What a sweep takes.

    Attributes:
        wall_s: From the first cell to the last.
        device_s: Time of all devices that was spent on cells, repeated ones included.
        repeated: Cells that ran again because their device was lost.
    """

    wall_s: float
    device_s: float
    repeated: int


def cell_seconds(rows: Iterable[Record]) -> list[float]:
    """Wall time of every cell that was measured, from its line "started" to its outcome, to the second.

    Raises:
        StoreError: no cell has both lines.
    """
    started: dict[tuple[str, str], float] = {}
    found = []
    for row in rows:
        key = row.run_id, row.cell_id
        moment = datetime.fromisoformat(row.timestamp_utc.replace("Z", "+00:00")).timestamp()
        if row.outcome == "started":
            started[key] = moment
        elif row.outcome == "measured" and key in started:
            found.append(moment - started.pop(key))
    if not found or not sum(found):
        raise StoreError("the records hold no cell with a line from its start and one from its end")
    return found


def cell_bytes(rows: Iterable[Record]) -> float:
    """Bytes that a cell leaves on disk: its two lines, and its samples beside them."""
    sizes = []
    for row in rows:
        if row.outcome == "measured":
            begun = row.replace(outcome="started", median_ms=None, n_samples=None)
            samples = _SAMPLES_LINE_BYTES + _SAMPLE_BYTES * (row.n_samples or 0)
            sizes.append(len(row.to_json()) + len(begun.to_json()) + 2 + samples)
    return sum(sizes) / len(sizes)


def simulate(
    seconds: Sequence[float],
    cells: int,
    devices: int,
    *,
    hours_between_losses: float = 0.0,
    hours_away: float = 0.25,
    seed: int = 0,
) -> SweepCost:
    """A sweep over devices that come and go.

    Args:
        seconds: Times of cells, each as likely.
        cells: How many to measure.
        devices: How many there are.
        hours_between_losses: Of one device, on average; 0 never loses any.
        hours_away: Until a lost device is back.
        seed: Of everything that is drawn.
    """
    chance = random.Random(seed)

    def next_loss(now: float) -> float:
        mean = 3600 * hours_between_losses
        return now + chance.expovariate(1 / mean) if mean else float("inf")

    free = [(0.0, number) for number in range(devices)]
    losses = [next_loss(0.0) for _ in range(devices)]
    waiting, spent, repeated, end = cells, 0.0, 0, 0.0
    while waiting:
        now, number = heapq.heappop(free)
        done = now + chance.choice(seconds)
        if losses[number] < done:  # lost with this cell in flight, or while it was idle
            lost = max(losses[number], now)
            spent += lost - now
            repeated += losses[number] > now
            back = lost + 3600 * hours_away
            losses[number] = next_loss(back)
            heapq.heappush(free, (back, number))
            continue
        waiting -= 1
        spent += done - now
        end = max(end, done)
        heapq.heappush(free, (done, number))
    return SweepCost(end, spent, repeated)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@click.command("sweep")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--cells", multiple=True, type=click.IntRange(1), default=(10, 1_000, 100_000), show_default=True
)
@click.option("--devices", multiple=True, type=click.IntRange(1), default=(1, 8, 128), show_default=True)
@click.option(
    "--hours-between-losses",
    type=float,
    default=24.0,
    show_default=True,
    help="How long a device lasts, on average.",
)
def main(
    paths: tuple[Path, ...], cells: tuple[int, ...], devices: tuple[int, ...], hours_between_losses: float
) -> None:
    """Print what sweeps would take whose cells cost what those of PATHS did."""
    rows = list(read_records(paths))
    seconds, size = cell_seconds(rows), cell_bytes(rows)
    click.echo(
        f"{len(seconds)} measured cells: {sum(seconds) / len(seconds):.2f} s each on average, "
        f"{max(seconds):.0f} s at most, {size / 1e3:.1f} kB on disk each\n"
    )
    columns = ("cells", "devices", "from first to last", "time of all devices", "run again", "on disk")
    click.echo(_line(columns) + "\n" + _line(["---"] * len(columns)))
    for count in cells:
        for number in devices:
            cost = simulate(seconds, count, number, hours_between_losses=hours_between_losses)
            times = _duration(cost.wall_s), _duration(cost.device_s)
            click.echo(_line((count, number, *times, cost.repeated, f"{count * size / 1e6:.3g} MB")))


def _line(values: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"
