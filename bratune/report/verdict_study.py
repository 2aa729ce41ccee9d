"""How often the verdict is wrong, on synthetic data with known truth.

``python -m bratune.report.verdict_study`` prints the table of ``docs/compare.md``. A side has an effect per
process (normal, 1 % by default) and samples with 2 % noise of which one in twenty is up to half slower,
as interrupts make them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bratune.report.verdict import Process, decide, process_of_samples

__all__ = ["StudyRow", "rows", "simulate_side", "study"]

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


def main() -> None:
    """Print the table as Markdown."""
    print("| process effect | processes per side | truly faster by | FASTER | SLOWER | SAME | UNDECIDED |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows():
        shares = " | ".join(f"{100 * share:.1f} %" for share in row[3:])
        print(f"| {100 * row.process_sd:g} % | {row.processes} | {100 * row.effect:g} % | {shares} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
