"""How often the verdict is wrong, on synthetic data with known truth.

``python -m bratune.studies verdict`` prints the table of ``docs/compare.md``: two runs of twenty cells, each
with a scatter between its passes of its own (0.5 to 2 times a typical one) and 1 % of noise within a pass.
On a shared machine every pass of a group finds the processor at another speed: the baseline's time changes by
that, and the time of a cell by a power of it between 0 and 1 that is the cell's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import click
import numpy as np

from bratune.measure.verdict import Passes, judge_runs

__all__ = ["StudyRow", "rows", "simulate_run", "study", "table"]

PASS_COUNTS = (1, 2, 3, 6, 8)
EFFECTS = (0.0, 0.02, 0.05, 0.10)
CELLS = 20
# Half the 95 % interval of a pass, relative.
_NOISE = 0.01
# How much the speed of a shared machine changes from pass to pass: the standard deviation of the logarithm of
# `gather`'s time on two cores of a virtual machine with neighbours, in eight runs of two passes.
SHARED = 0.2
# Cells that took turns with one baseline.
_GROUP = 4


class StudyRow(NamedTuple):
    """Shares over the repetitions of one setting, between 0 and 1.

    ``false_runs`` are comparisons with any false FASTER or SLOWER among the unchanged cells, ``found`` those
    in which the one cell that is truly faster is FASTER, ``same`` the unchanged cells that are SAME.
    """

    passes: int
    pass_sd: float
    machine_sd: float
    effect: float
    false_runs: float
    found: float
    same: float


def simulate_run(
    rng: np.random.Generator,
    passes: int,
    effect: float,
    scatters: Sequence[float],
    slopes: Sequence[float] = (),
    machine_sd: float = 0.0,
) -> list[Passes]:
    """A run whose first cell truly takes ``1 - effect`` milliseconds and all others 1.

    Args:
        rng: Draws.
        passes: How many.
        effect: By how much the first cell is faster.
        scatters: Between passes, of every cell.
        slopes: What a cell makes of the machine's changes; none: there is no baseline beside the cells.
        machine_sd: Of the machine's changes.
    """
    cells: list[Passes] = []
    speed = np.zeros(passes)
    for number, scatter in enumerate(scatters):
        level = 1 - effect if number == 0 else 1.0
        if number % _GROUP == 0:
            speed = rng.normal(0, machine_sd, passes)
        moved = slopes[number] * speed if slopes else np.zeros(passes)
        values = level * np.exp(moved + rng.normal(0, scatter, passes))
        rows = [(float(t), float(t) * (1 - _NOISE / 2), float(t) * (1 + _NOISE / 2)) for t in values]
        cell = Passes.of(rows, kind="attention")
        if slopes:
            beside = tuple(map(float, np.exp(speed)))
            cell = dataclasses.replace(cell, beside=beside, beside_noise=cell.noise)
        cells.append(cell)
    return cells


def study(
    passes: int,
    effect: float,
    *,
    pass_sd: float,
    machine_sd: float = 0.0,
    repetitions: int = 200,
    seed: int = 0,
) -> StudyRow:
    """The shares when the first of twenty cells is truly faster by ``effect``.

    Args:
        passes: Of either run.
        effect: By how much.
        pass_sd: Typical scatter between passes of a cell.
        machine_sd: Of a shared machine; 0: there is no baseline beside the cells.
        repetitions: Pairs of runs.
        seed: Of the draws.
    """
    rng = np.random.default_rng([seed, passes, round(effect * 1e4), round(pass_sd * 1e4)])
    wrong = found = same = 0
    for _ in range(repetitions):
        scatters = (pass_sd * 2 ** rng.uniform(-1, 1, CELLS)).tolist()
        slopes = rng.uniform(0, 1, CELLS).tolist() if machine_sd else []
        a = simulate_run(rng, passes, 0.0, scatters, slopes, machine_sd)
        b = simulate_run(rng, passes, effect, scatters, slopes, machine_sd)
        first, *others = (v.verdict for v in judge_runs(list(zip(a, b, strict=True))).verdicts)
        found += first == "FASTER"
        wrong += any(verdict in ("FASTER", "SLOWER") for verdict in others)
        same += others.count("SAME")
    shares = wrong / repetitions, found / repetitions, same / repetitions / (CELLS - 1)
    return StudyRow(passes, pass_sd, machine_sd, effect, *shares)


def rows(
    counts: Sequence[int] = PASS_COUNTS,
    effects: Sequence[float] = EFFECTS,
    sds: Sequence[tuple[float, float]] = ((0.01, 0.0), (0.03, 0.0), (0.01, SHARED), (0.03, SHARED)),
    repetitions: int = 200,
) -> list[StudyRow]:
    """The whole table."""
    return [
        study(n, e, pass_sd=sd, machine_sd=machine, repetitions=repetitions)
        for sd, machine in sds
        for n in counts
        for e in effects
    ]


def table(found: Sequence[StudyRow]) -> str:
    """The rows as Markdown, one line per scatter and number of passes."""
    lines: dict[tuple[float, float, int], dict[float, StudyRow]] = {}
    for row in found:
        lines.setdefault((row.machine_sd, row.pass_sd, row.passes), {})[row.effect] = row
    effects = sorted({row.effect for row in found} - {0.0})
    header = ["scatter between passes", "passes per run", "runs with a false claim", "SAME, truly equal"]
    header += [f"FASTER, truly by {100 * effect:g} %" for effect in effects]
    text = [" | ".join(header), " | ".join("---" for _ in header)]
    for (machine, sd, count), by_effect in lines.items():
        equal = by_effect[0.0]
        shares = [equal.false_runs, equal.same, *(by_effect[e].found for e in effects)]
        scatter = f"{100 * sd:g} %" + (f", machine {100 * machine:g} %" if machine else "")
        cells = [scatter, str(count), *(f"{100 * share:.1f} %" for share in shares)]
        text.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in text)


@click.command("verdict")
def main() -> None:
    """Print the whole table; takes some minutes."""
    click.echo(table(rows()))
