"""How often the verdict is wrong, on synthetic data with known truth.

``python -m bratune.studies.verdict`` prints the table of ``docs/compare.md``. A side has an effect per
process (normal, 1 % by default) and samples with 2 % noise of which one in twenty is up to half slower,
as interrupts make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bratune.report.verdict import Process, decide, process_of_samples

__all__ = ["StudyRow", "rows", "simulate_side", "study", "table"]

PROCESS_COUNTS = (1, 2, 3, 5, 10)
EFFECTS = (0.0, 0.01, 0.02, 0.05, 0.10)
SAMPLES = 50


class StudyRow(NamedTuple):
    """Shares of the verdicts over the repetitions of one setting, between 0 and 1."""

    processes: int
    process_sd: float
    effect: float
    faster: float
    slower: float
    same: float
    undecided: float


def simulate_side(
    rng: np.random.Generator, processes: int, effect: float, process_sd: float, samples: int = SAMPLES
) -> list[Process]:
    """Processes whose true median is ``1 - effect`` milliseconds."""
    side = []
    for number in range(processes):
        level = (1 - effect) * np.exp(rng.normal(0, process_sd))
        values = level * np.exp(rng.normal(0, 0.02, samples))
        values *= np.where(rng.random(samples) < 0.05, rng.uniform(1, 1.5, samples), 1)
        side.append(process_of_samples(values.tolist(), seed=number))
    return side


def study(
    processes: int, effect: float, *, process_sd: float = 0.01, repetitions: int = 400, seed: int = 0
) -> StudyRow:
    """The shares of the verdicts when B is truly faster by ``effect``."""
    rng = np.random.default_rng([seed, processes, round(effect * 1e4), round(process_sd * 1e4)])
    found = {"FASTER": 0, "SLOWER": 0, "SAME": 0, "UNDECIDED": 0}
    for _ in range(repetitions):
        a = simulate_side(rng, processes, 0.0, process_sd)
        b = simulate_side(rng, processes, effect, process_sd)
        found[decide(a, b).verdict] += 1
    shares = [found[name] / repetitions for name in ("FASTER", "SLOWER", "SAME", "UNDECIDED")]
    return StudyRow(processes, process_sd, effect, *shares)


def rows(
    counts: Sequence[int] = PROCESS_COUNTS,
    effects: Sequence[float] = EFFECTS,
    sds: Sequence[float] = (0.01, 0.03),
    repetitions: int = 400,
) -> list[StudyRow]:
    """The whole table."""
    return [
        study(n, e, process_sd=sd, repetitions=repetitions) for sd in sds for n in counts for e in effects
    ]


def table(found: Sequence[StudyRow]) -> str:
    """The rows as Markdown, one line per process effect and number of processes."""
    lines: dict[tuple[float, int], dict[float, StudyRow]] = {}
    for row in found:
        lines.setdefault((row.process_sd, row.processes), {})[row.effect] = row
    effects = sorted({row.effect for row in found} - {0.0})
    header = ["process effect", "processes per side", "falsely FASTER or SLOWER", "SAME, truly equal"]
    header += [f"FASTER, truly by {100 * effect:g} %" for effect in effects]
    text = [" | ".join(header), " | ".join("---" for _ in header)]
    for (sd, count), by_effect in lines.items():
        equal = by_effect[0.0]
        shares = [equal.faster + equal.slower, equal.same, *(by_effect[e].faster for e in effects)]
        cells = [f"{100 * sd:g} %", str(count), *(f"{100 * share:.1f} %" for share in shares)]
        text.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in text)


def main() -> None:
    """Print the whole table; takes some minutes."""
    print(table(rows()))


if __name__ == "__main__":
    main()
