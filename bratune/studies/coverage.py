"""Coverage: whether printed intervals hold the next run's median, and whether changes are found.

    $ python -m bratune.studies coverage run -o out              # eight runs of `make profile`'s cells
    $ python -m bratune.studies coverage run -o out --busy       # the same beside one busy process
    $ python -m bratune.studies coverage run -o out --delay 0    # what the next is compared with
    $ python -m bratune.studies coverage run -o out --delay 10   # a backend that really is 10 % slower
    $ python -m bratune.studies coverage tune -o out             # how much slower plans are than the best
    $ python -m bratune.studies coverage show -o out

Every run is a `bratune profile` in processes and a folder of its own; the same command goes on
where it ended. A delay is waited inside a backend, not multiplied into samples.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click
from torch import Tensor

from bratune import store
from bratune.backend import Config
from bratune.errors import StoreError
from bratune.kernels.gather import GatherBackend
from bratune.measure.verdict import Passes, estimate, priors
from bratune.problem import Problem
from bratune.record import Record
from bratune.report.compare import RecordSet, compare
from bratune.studies import regret

__all__ = ["Coverage", "Delayed", "Found", "Pairs", "coverage", "found", "pairs"]

DELAY_VARIABLE = "BRATUNE_STUDY_DELAY"
_PAIRS = 20


class Delayed(GatherBackend):
    """`gather`, and then a wait of so many percent of the time that it took."""

    name = "delayed"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        """The result of `gather`."""
        begin = time.perf_counter()
        out = super().forward(q, k, v, routes, problem, config)
        end = begin + (time.perf_counter() - begin) * (1 + float(os.environ.get(DELAY_VARIABLE, "0")) / 100)
        while time.perf_counter() < end:
            pass
        return out


@dataclass(frozen=True)
class Coverage:
    """How many intervals of single runs contain the median of the other runs.

    Attributes:
        n: Intervals.
        inside: Those that do, the noise of the others' median counted in.
        half_width_pct: Median half-width of an interval.
        scatter_pct: Median standard deviation between runs, of a cell.
    """

    n: int
    inside: int
    half_width_pct: float
    scatter_pct: float


@dataclass(frozen=True)
class Pairs:
    """Runs of the same code compared with each other: pairs, those with any claim, and all cells compared."""

    n: int
    wrong: int
    cells: int
    claimed: int


@dataclass(frozen=True)
class Found:
    """A true slowdown: cells compared, and those that were SLOWER."""

    n: int
    slower: int


Interval = tuple[float, float, float]


def _time(row: Record) -> Interval | None:
    if row.median_ms is None or row.ci_lo_ms is None or row.ci_hi_ms is None:
        return None
    return row.median_ms, row.ci_lo_ms, row.ci_hi_ms


def _ratio(row: Record) -> Interval | None:
    if row.ratio is None or row.ratio_lo is None or row.ratio_hi is None:
        return None
    return row.ratio, row.ratio_lo, row.ratio_hi


def coverage(runs: Sequence[Sequence[Record]], value: Callable[[Record], Interval | None]) -> Coverage:
    """Coverage of what a row says, over cells that every run has.

    Args:
        runs: Pooled rows of each run, see `bratune.store.pool`; at least three runs.
        value: A number of a row and its interval.

    Raises:
        StoreError: no cell is in all runs, or there are fewer than three.
    """
    if len(runs) < 3:
        raise StoreError(f"coverage needs three runs or more, not {len(runs)}")
    by_cell = [{row.cell_id: (row.part, said) for row in run if (said := value(row))} for run in runs]
    common = [cell for cell in by_cell[0] if all(cell in run for run in by_cell)]
    if not common:
        raise StoreError("no cell has an interval in all runs")
    inside, widths, scatters = 0, [], []
    for number, own in enumerate(by_cell):
        others = {
            cell: Passes.of(
                [(run[cell][1][0], None, None) for n, run in enumerate(by_cell) if n != number],
                kind=own[cell][0],
            )
            for cell in common
        }
        prior = priors(others.values())
        for cell in common:
            kind, (middle, low, high) = own[cell]
            truth = estimate(others[cell], prior[kind])
            assert truth.lo is not None
            assert truth.hi is not None
            reach = math.hypot(math.log(high / low) / 2, math.log(truth.hi / truth.lo) / 2)
            inside += abs(math.log(middle / truth.value)) <= reach
            widths.append(50 * (high - low) / middle)
            scatters.append(100 * math.sqrt(others[cell].variance))
    return Coverage(len(widths), inside, median(widths), median(scatters))


def pairs(runs: Sequence[RecordSet], most: int = _PAIRS) -> Pairs:
    """Verdicts on runs of the same code: each FASTER or SLOWER is wrong."""
    wrong = cells = claimed = n = 0
    for a, b in itertools.islice(itertools.combinations(runs, 2), most):
        verdicts = [row.verdict.verdict for row in compare([a, b]).rows]
        claims = sum(verdict in ("FASTER", "SLOWER") for verdict in verdicts)
        n, wrong, cells, claimed = n + 1, wrong + (claims > 0), cells + len(verdicts), claimed + claims
    return Pairs(n, wrong, cells, claimed)


def found(before: Sequence[RecordSet], after: Sequence[RecordSet]) -> Found:
    """How often the backend `delayed` is SLOWER after than before."""
    n = slower = 0
    for a, b in zip(before, after, strict=False):
        for row in compare([a, b]).rows:
            if Delayed.name in row.what.split():
                n += 1
                slower += row.verdict.verdict == "SLOWER"
    return Found(n, slower)


def _folders(output: Path, kind: str) -> list[Path]:
    return sorted(path for path in output.glob(f"{kind}-*") if path.is_dir())


def _sets(output: Path, kind: str) -> list[RecordSet]:
    sets = []
    for path in _folders(output, kind):
        rows = tuple(row for row in store.read_records([path]) if row.ok)
        if rows:
            sets.append(RecordSet(path.name, rows))
    return sets


@contextmanager
def _neighbour(busy: bool) -> Iterator[None]:
    """One process beside that computes without end."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _install(folder: Path) -> None:
    """Describe `Delayed` as a package in a folder, so that a process with it on its path has it."""
    info = folder / "bratune_study-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bratune-study\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bratune.backends]\n{Delayed.name} = {__name__}:Delayed\n")


@click.group()
def main() -> None:
    """Whether intervals hold what they promise."""


main.add_command(regret.tune_command)


@main.command("run")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--runs", default=8, show_default=True, type=click.IntRange(1), help="Fresh runs.")
@click.option("--busy", is_flag=True, help="With one busy process beside.")
@click.option(
    "--delay",
    type=float,
    metavar="PERCENT",
    help="Only attention by gather and by `delayed`, which waits this much; 0 is what it is compared with.",
)
@click.argument("profile_options", nargs=-1, type=click.UNPROCESSED)
def run_command(
    output: Path, runs: int, busy: bool, delay: float | None, profile_options: tuple[str, ...]
) -> None:
    """Take the measurements; options after ``--`` go to `bratune profile`."""
    kind = "busy" if busy else "quiet" if delay is None else f"delay{delay:g}"
    env = dict(os.environ)
    options = list(profile_options)
    if delay is not None:
        _install(output / "package")
        env |= {DELAY_VARIABLE: f"{delay:g}", "BRATUNE_BACKENDS": Delayed.name}
        here = [str((output / "package").resolve()), *sys.path]
        env["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in here)
        options += ["--no-whole-model", "--backend", "gather", "--backend", Delayed.name]
    with _neighbour(busy):
        for number in range(1, runs + 1):
            folder = output / f"{kind}-{number}"
            click.echo(f"{folder} ...", err=True)
            command = [sys.executable, "-m", "bratune", "profile", "-o", str(folder), *options]
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


@main.command("show")
@click.option("-o", "--output", type=click.Path(path_type=Path, exists=True), required=True)
def show_command(output: Path) -> None:
    """What the runs that are there say; also written to figures.json in the folder."""
    figures: dict[str, object] = {}
    for kind in ("quiet", "busy"):
        sets = _sets(output, kind)
        if len(sets) < 3:
            continue
        runs = [store.pool(one.records) for one in sets]
        for name, value in (("times", _time), ("ratios", _ratio)):
            result = coverage(runs, value)
            figures[f"{kind} {name}"] = asdict(result)
            share = 100 * result.inside / result.n
            click.echo(
                f"{kind:6} {name:7} {result.inside} of {result.n} intervals ({share:.0f} %)"
                f" hold the median of the other runs; half-width {result.half_width_pct:.1f} %, "
                f"scatter between runs {result.scatter_pct:.1f} %"
            )
        same = pairs(sets)
        figures[f"{kind} pairs"] = asdict(same)
        click.echo(
            f"{kind:6} same code: {same.wrong} of {same.n} pairs with a claim "
            f"({same.claimed} of {same.cells} cells)"
        )
    before = _sets(output, "delay0")
    for delay in sorted({float(p.name.split("-")[0][5:]) for p in _folders(output, "delay*")} - {0.0}):
        seen = found(before, _sets(output, f"delay{delay:g}"))
        figures[f"delay {delay:g} %"] = asdict(seen)
        click.echo(f"a true +{delay:g} %: SLOWER in {seen.slower} of {seen.n} cells")
    if rows := regret.stored_regrets(output):
        if busy := regret.disturbed(output):
            click.echo(busy)
        figures["tune"] = seen_plans = regret.summary(rows)
        for row in rows:
            against = f"{row.speedup:.3f}x the default {row.verdict}".rstrip()
            click.echo(f"tune seed {row.seed}: regret {100 * row.regret:.1f} %, {against}: {row.plan}")
        click.echo(
            f"tune: regret of {seen_plans['within']} of {seen_plans['n']} plans at most "
            f"{100 * regret.LIMIT:g} %, {seen_plans['slower']} slower than the default; best: {rows[0].best}"
        )
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
