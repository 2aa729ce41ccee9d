"""Coverage: whether printed intervals hold the next run's median, and whether changes are found.

    $ python -m bratune.studies coverage run -o out              # eight runs of attention and whole models
    $ python -m bratune.studies coverage run -o out --busy       # the same beside one busy process
    $ python -m bratune.studies coverage run -o out --delay 10   # backends, each beside itself 10 % slower
    $ python -m bratune.studies coverage tune -o out             # how much slower plans are than the best
    $ python -m bratune.studies coverage show -o out             # what they say, and out/coverage-study.json
    $ python -m bratune.studies coverage table out/coverage-study.json

Every run is a process and a folder of its own and measures as `bratune profile` does, but for the parts of
blocks; the same command goes on where it ended. A delay is waited inside a backend, not multiplied into
samples. It is to be found within a run, beside the backend that does not wait, and between two runs: the
backend in one of them against itself, delayed, in the other.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from bratune import store
from bratune.errors import StoreError
from bratune.machine import detect
from bratune.measure.settings import EFFORTS, MeterSettings
from bratune.measure.verdict import Passes, estimate, priors
from bratune.record import Record, new_run_id
from bratune.report.compare import RecordSet, compare, describe
from bratune.run.isolated import IsolatedEngine
from bratune.run.summary import judged
from bratune.store import Store
from bratune.studies import regret
from bratune.work.cells import BASELINE, scenes
from bratune.work.request import make_request

__all__ = [
    "Coverage",
    "Found",
    "Pairs",
    "coverage",
    "found",
    "found_in_turn",
    "pairs",
    "study_of",
    "table_of",
]

_PAIRS, _FEWEST_RUNS = 20, 3
_DELAYED = "delayed-"


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
    """A true slowdown of some cells.

    Attributes:
        n: Those cells, over all comparisons.
        slower: Of them, the ones that were SLOWER.
        left_out: Others, of which a run took three samples because another backend is clearly faster.
        comparisons: How often cells were judged together.
        wrong: Comparisons in which a cell that did not change was called faster or slower.
    """

    n: int
    slower: int
    left_out: int = 0
    comparisons: int = 0
    wrong: int = 0


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
    if len(runs) < _FEWEST_RUNS:
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


def found(runs: Sequence[RecordSet]) -> Found:
    """How often `bratune compare` calls a backend of one run SLOWER that waits in another, over all pairs."""
    n = slower = left_out = comparisons = wrong = 0
    for one, other in itertools.permutations(runs, 2):
        plain = [row for row in one.records if not _delayed(row)]
        delayed = [
            row.replace(backend=name)
            for row in other.records
            if (name := _delayed(row)) not in ("", BASELINE)
        ]
        changed = {describe(row) for row in delayed}
        same = [row for row in other.records if not _delayed(row) and describe(row) not in changed]
        claimed = {
            row.what: row.verdict.verdict
            for row in compare([RecordSet(one.label, plain), RecordSet(other.label, [*same, *delayed])]).rows
        }
        hopeless = {
            describe(rows[0]) for run in (plain, delayed) for rows in _cells(run) if _is_hopeless(rows)
        }
        counted = changed & claimed.keys() - hopeless
        n += len(counted)
        slower += sum(claimed[what] == "SLOWER" for what in counted)
        left_out += len(changed & hopeless)
        comparisons += 1
        wrong += any(claimed[what] in ("FASTER", "SLOWER") for what in claimed.keys() - changed)
    return Found(n, slower, left_out, comparisons, wrong)


def found_in_turn(runs: Sequence[RecordSet]) -> Found:
    """How often one run calls a delayed backend SLOWER than the one it is, beside which it took turns."""
    n = slower = left_out = 0
    for run in runs:
        hopeless = {(rows[0].stage, rows[0].backend) for rows in _cells(run.records) if _is_hopeless(rows)}
        rows = {(row.stage, row.backend): row for row in store.pool(run.records) if row.part == "attention"}
        pairs = {
            key: (row, rows[row.stage, _delayed(row)])
            for key, row in rows.items()
            if (row.stage, _delayed(row)) in rows
        }
        known = [pair for key, pair in pairs.items() if key not in hopeless]
        verdicts = judged(known, run.records)
        n += len(verdicts)
        slower += sum(verdict is not None and verdict.verdict == "SLOWER" for verdict in verdicts)
        left_out += len(pairs) - len(known)
    return Found(n, slower, left_out, len(runs))


def _delayed(row: Record) -> str:
    """The backend that a row's is but for the wait; empty where it does not wait."""
    return row.backend.removeprefix(_DELAYED) if row.backend.startswith(_DELAYED) else ""


def _cells(rows: Iterable[Record]) -> Iterable[list[Record]]:
    """Rows by what they are of, all passes of it."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(describe(row), []).append(row)
    return found.values()


def _is_hopeless(rows: Sequence[Record]) -> bool:
    """Whether most passes of a cell were ended early because others are clearly faster."""
    return 2 * sum(row.stop_reason.startswith("worse") for row in rows) > len(rows)


def _run_files(output: Path) -> list[Path]:
    """Records of the runs of a folder; those of searches are `bratune.studies.regret`'s."""
    found = sorted(output.glob("*-*/records.jsonl"))
    return [path for path in found if path.parent.name.rpartition("-")[0] != "tune"]


def _folders(output: Path, kind: str) -> list[Path]:
    return sorted(path for path in output.glob(f"{kind}-*") if path.is_dir())


def _sets(output: Path, kind: str) -> list[RecordSet]:
    sets = []
    for path in _folders(output, kind):
        rows = list(store.read_records([path]))
        timed = tuple(row for row in rows if row.ok)
        if timed and not _is_cut_short(rows):
            sets.append(RecordSet(path.name, timed))
    return sets


def _is_cut_short(rows: Sequence[Record]) -> bool:
    """Whether a run ended before every cell had its passes: what it lacks would count as not found."""
    missing: dict[str, int] = {}
    for row in rows:
        begun = row.outcome == "started"
        left = 0 if not (begun or row.ok) else (row.passes or 1) - (0 if begun else row.pass_number or 1)
        missing[row.cell_id] = min(left, missing.get(row.cell_id, left))
    return any(left > 0 for left in missing.values())


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
    type=click.FloatRange(0, min_open=True),
    metavar="PERCENT",
    help="Only attention, by backends each of which is there again and waits this much.",
)
@click.option("--effort", type=click.Choice(EFFORTS), help="[default: quick; standard with --delay]")
@click.option("--passes", type=click.IntRange(2), help="Fresh processes.  [default: by effort]")
@click.option("--stage", "stages", type=click.IntRange(1, 4), multiple=True, help="[default: all]")
@click.option("--res", type=click.IntRange(32), default=224, show_default=True, help="Side of the images.")
@click.option("--attention-only", is_flag=True, help="No whole models.")
@click.option("--smoke", is_flag=True, help="Shorter than short: shows that it works, and nothing else.")
def run_command(output: Path, runs: int, busy: bool, delay: float | None, **how: Any) -> None:
    """Take the measurements."""
    kind = "busy" if busy else "quiet" if delay is None else f"delay{delay:g}"
    env = dict(os.environ)
    if delay is not None:
        from bratune.studies.delayed import DELAY_VARIABLE

        env[DELAY_VARIABLE] = f"{delay:g}"
    how["effort"] = how["effort"] or ("quick" if delay is None else "standard")
    options = [
        f"--{name}={value}" for name, value in how.items() if name in ("effort", "passes", "res") and value
    ]
    options += [f"--stage={stage}" for stage in how["stages"]] + ["--smoke"] * how["smoke"]
    options += ["--attention-only"] * how["attention_only"]
    options += ["--delayed"] * (delay is not None)
    with _neighbour(busy):
        for number in range(1, runs + 1):
            folder, start = output / f"{kind}-{number}", time.monotonic()
            command = [sys.executable, "-m", "bratune.studies", "coverage", "one", str(folder), *options]
            subprocess.run(command, env=env, check=True)
            click.echo(f"{folder}: {time.monotonic() - start:.0f} s", err=True)


@main.command("one", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--effort", default="quick")
@click.option("--passes", type=int)
@click.option("--stage", "stages", type=int, multiple=True)
@click.option("--res", type=int, default=224)
@click.option("--attention-only", is_flag=True)
@click.option("--smoke", is_flag=True)
@click.option("--delayed", is_flag=True)
def one_command(
    folder: Path,
    effort: str,
    passes: int | None,
    stages: tuple[int, ...],
    res: int,
    attention_only: bool,
    smoke: bool,
    delayed: bool,
) -> None:
    """One run, in this process and its workers."""
    machine = detect("auto")
    names: tuple[str, ...] = ("gather", "native", "gather-sdpa", "dense")
    if delayed:
        from bratune.studies.delayed import DELAYED

        names = (BASELINE, *DELAYED.values(), *DELAYED)
    request = make_request(machine, image=(res, res), backends=names)
    (scene,) = scenes(request)
    chosen = [stage for stage in scene.stages if stage.kind == "routed" or not delayed]
    chosen = [stage for stage in chosen if not stages or stage.index in stages]
    cells = [cell for stage in chosen for cell in scene.attention_cells(stage)]
    cells += [] if delayed or attention_only else scene.form_cells()
    settings = MeterSettings.for_effort(effort, **({"passes": passes} if passes else {}))
    if smoke:
        settings = settings.replace(min_time_s=0.0, warmup_s=0.0, max_noise_pct=100.0, min_samples=6)
    with IsolatedEngine(
        machine,
        settings.per_pass(),
        passes=settings.passes,
        store=Store(folder / "records.jsonl"),
        run_id=new_run_id(),
        preload=("bratune.studies.delayed",) if delayed else (),
    ) as engine:
        for row in engine.run(cells):
            if not row.ok:
                click.echo(
                    f"{row.stage or ''} {row.backend or row.form}: {row.outcome}: {row.reason}", err=True
                )


@main.command("show")
@click.option("-o", "--output", type=click.Path(path_type=Path, exists=True), required=True)
def show_command(output: Path) -> None:
    """What the runs that are there say; also written to coverage-study.json in the folder."""
    figures = study_of(output)
    (output / "coverage-study.json").write_text(json.dumps(figures, indent=1) + "\n")
    for path in _run_files(output):
        if _is_cut_short(list(store.read_records([path]))):
            click.echo(f"{path.parent.name} was cut short and is left out; the same run goes on", err=True)
    if busy := regret.disturbed(output):
        click.echo(busy, err=True)
    click.echo(table_of(figures))


@main.command("table")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def table_command(file: Path) -> None:
    """What a coverage-study.json says, as the table of docs/measuring.md."""
    click.echo(table_of(json.loads(file.read_text())))


def study_of(output: Path) -> dict[str, Any]:
    """Everything that the runs in a folder say, as numbers.

    Raises:
        StoreError: there are no runs.
    """
    kinds = sorted({path.parent.name.rpartition("-")[0] for path in _run_files(output)})
    sets = {kind: _sets(output, kind) for kind in kinds}
    sets = {kind: found for kind, found in sets.items() if found}
    plans = regret.stored_regrets(output)
    if not sets and not plans:
        raise StoreError(f"{output} holds no runs; `coverage run -o {output}` makes them")
    figures: dict[str, Any] = {"kinds": {}}
    if sets:
        row = next(iter(sets.values()))[0].records[0]
        names = ("gpu_name", "threads", "torch", "triton", "bratune", "git_sha", "model", "dtype")
        figures["machine"] = {name: getattr(row, name) for name in (*names, "image_height")}
    if plans:
        figures["tune"] = regret.summary(plans)
    for kind, runs in sets.items():
        figures["kinds"][kind] = _kind_figures(runs, kind)
    return figures


def _kind_figures(sets: Sequence[RecordSet], kind: str) -> dict[str, Any]:
    rows = [row for one in sets for row in one.records]
    waits = [row.cpu_wait_pct for row in rows if row.cpu_wait_pct is not None]
    figures: dict[str, Any] = {
        "runs": len(sets),
        "passes": max(row.passes or 1 for row in rows),
        "sampling": rows[0].sampling,
        "cpu_wait_pct": median(waits) if waits else None,
        "from_utc": min(row.timestamp_utc for row in rows),
        "to_utc": max(row.timestamp_utc for row in rows),
    }
    if kind.startswith("delay"):
        figures["in_turn"] = asdict(found_in_turn(sets))
        if len(sets) > 1:
            figures["compared"] = asdict(found(sets))
            figures["pairs"] = asdict(pairs(sets))
        return figures
    if len(sets) >= _FEWEST_RUNS:
        pooled = [store.pool(one.records) for one in sets]
        figures["times"] = asdict(coverage(pooled, _time))
        figures["ratios"] = asdict(coverage(pooled, _ratio))
        figures["pairs"] = asdict(pairs(sets))
    return figures


def table_of(figures: Mapping[str, Any]) -> str:
    """The figures of a study as Markdown."""
    lines = ["| what | runs x passes | found |", "| --- | --- | --- |"]
    for kind, one in figures["kinds"].items():
        runs = f"{one['runs']} x {one['passes']}"
        wait = "" if one["cpu_wait_pct"] is None else f", waiting {one['cpu_wait_pct']:.0f} %"
        for name in ("times", "ratios"):
            if name in one:
                seen = one[name]
                widths = f"half-width {seen['half_width_pct']:.1f} %, scatter {seen['scatter_pct']:.1f} %"
                held = f"{_share(seen['inside'], seen['n'])} hold the median of the other runs"
                lines.append(f"| intervals of {name}, {kind}{wait} | {runs} | {held}; {widths} |")
        if "pairs" in one:
            seen = one["pairs"]
            lines.append(
                f"| same code against itself, {kind} | {seen['n']} pairs | "
                f"{_share(seen['wrong'], seen['n'])} with a false claim; "
                f"{seen['claimed']} of {seen['cells']} cells |"
            )
        for name, where in (("in_turn", "in turn within a run"), ("compared", "two runs compared")):
            if name in one:
                seen = one[name]
                text = f"{_share(seen['slower'], seen['n'])} SLOWER"
                if name == "compared":
                    text += f"; {seen['wrong']} of {seen['comparisons']} comparisons with a false claim"
                if seen["left_out"]:
                    text += f"; {seen['left_out']} left out, clearly slower than others"
                lines.append(f"| a true +{kind.removeprefix('delay')} %, {where} | {runs} | {text} |")
    if "tune" in figures:
        lines += _tune_lines(figures["tune"])
    return "\n".join(lines)


def _tune_lines(found: Mapping[str, Any]) -> list[str]:
    plans = found["plans"]
    within = f"regret of {found['within']} of {found['n']} plans at most {100 * regret.LIMIT:g} %"
    slower = f"{found['slower']} slower than the default"
    lines = [f"| plans of tune | {found['n']} seeds | {within}, {slower}; best: {plans[0]['best']} |"]
    for row in plans:
        against = f"{row['speedup']:.3f}x the default {row['verdict']}".rstrip()
        text = f"regret {100 * row['regret']:.1f} %, {against}: {row['plan']}"
        lines.append(f"| plan of tune | seed {row['seed']} | {text} |")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f} %)" if whole else "none"
