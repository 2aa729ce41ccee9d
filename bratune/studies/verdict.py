"""How often the verdict is wrong, on synthetic data with known truth.

``python -m bratune.studies verdict`` prints the table of ``docs/compare.md``: two runs of twenty cells, each
with a scatter between its passes of its own (0.5 to 2 times a typical one) and 1 % of noise within a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import click
import numpy as np

from bratune.measure.verdict import Passes, judge_runs

__all__ = ["StudyRow", "rows", "simulate_run", "study", "table"]

PASS_COUNTS = (1, 2, 3, 6)
EFFECTS = (0.0, 0.02, 0.05, 0.10)
CELLS = 20
# Half the 95 % interval of a pass, relative.
_NOISE = 0.01


class StudyRow(NamedTuple):
    """Shares over the repetitions of one setting, between 0 and 1.

    ``false_runs`` are comparisons with any false FASTER or SLOWER among the unchanged cells, ``found`` those
    in which the one cell that is truly faster is FASTER, ``same`` the unchanged cells that are SAME.
    """

    passes: int
    pass_sd: float
    effect: float
    false_runs: float
    found: float
    same: float


def simulate_run(
    rng: np.random.Generator, passes: int, effect: float, scatters: Sequence[float]
) -> list[Passes]:
    """A run whose first cell truly takes ``1 - effect`` milliseconds and all others 1."""
    cells = []
    for number, scatter in enumerate(scatters):
        level = 1 - effect if number == 0 else 1.0
        values = level * np.exp(rng.normal(0, scatter, passes))
        rows = [(float(t), float(t) * (1 - _NOISE / 2), float(t) * (1 + _NOISE / 2)) for t in values]
        cells.append(Passes.of(rows, kind="attention"))
    return cells


def study(passes: int, effect: float, *, pass_sd: float, repetitions: int = 200, seed: int = 0) -> StudyRow:
    """The shares when the first of twenty cells is truly faster by ``effect``."""
    rng = np.random.default_rng([seed, passes, round(effect * 1e4), round(pass_sd * 1e4)])
    wrong = found = same = 0
    for _ in range(repetitions):
        scatters = (pass_sd * 2 ** rng.uniform(-1, 1, CELLS)).tolist()
        a = simulate_run(rng, passes, 0.0, scatters)
        b = simulate_run(rng, passes, effect, scatters)
        first, *others = (v.verdict for v in judge_runs(list(zip(a, b, strict=True))).verdicts)
        found += first == "FASTER"
        wrong += any(verdict in ("FASTER", "SLOWER") for verdict in others)
        same += others.count("SAME")
    shares = wrong / repetitions, found / repetitions, same / repetitions / (CELLS - 1)
    return StudyRow(passes, pass_sd, effect, *shares)


def rows(
    counts: Sequence[int] = PASS_COUNTS,
    effects: Sequence[float] = EFFECTS,
    sds: Sequence[float] = (0.01, 0.03),
    repetitions: int = 200,
) -> list[StudyRow]:
    """The whole table."""
    return [study(n, e, pass_sd=sd, repetitions=repetitions) for sd in sds for n in counts for e in effects]


def table(found: Sequence[StudyRow]) -> str:
    """The rows as Markdown, one line per scatter and number of passes."""
    lines: dict[tuple[float, int], dict[float, StudyRow]] = {}
    for row in found:
        lines.setdefault((row.pass_sd, row.passes), {})[row.effect] = row
    effects = sorted({row.effect for row in found} - {0.0})
    header = ["scatter between passes", "passes per run", "runs with a false claim", "SAME, truly equal"]
    header += [f"FASTER, truly by {100 * effect:g} %" for effect in effects]
    text = [" | ".join(header), " | ".join("---" for _ in header)]
    for (sd, count), by_effect in lines.items():
        equal = by_effect[0.0]
        shares = [equal.false_runs, equal.same, *(by_effect[e].found for e in effects)]
        cells = [f"{100 * sd:g} %", str(count), *(f"{100 * share:.1f} %" for share in shares)]
        text.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in text)


@click.command("verdict")
def main() -> None:
    """Print the whole table; takes some minutes."""
    click.echo(table(rows()))
