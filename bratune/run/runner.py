"""Runners: whoever takes measurements, and what an engine asks of one.

This process is one (`LocalRunner`); others are a worker that may die (`bratune.run.isolated.IsolatedRunner`),
the nodes of a cluster (`bratune.cluster.ClusterRunner`) and stored records
(`bratune.run.replay.ReplayRunner`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.measure.meter import Meter, meter_for
from bratune.measure.settings import MeterSettings
from bratune.record import Record
from bratune.run.measure_cell import Result, run_cell

__all__ = ["ComparingRunner", "GroupRunner", "LocalRunner", "Runner", "Turns"]


class Runner(Protocol):
    """Whoever takes the measurement of one cell."""

    @property
    def evidence(self) -> str:
        """What its rows are: ``measured`` or ``replayed``."""
        ...

    @property
    def machine(self) -> Machine:
        """The machine that rows speak of."""
        ...

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        """The row of a cell and its raw samples; a failure is a row too.

        Args:
            cell: What is measured.
            limit_s: Most wall time in seconds, where it can be enforced.
            give_up_ms: Time above which it is not worth measuring well.
        """
        ...

    def interrupt(self) -> None:
        """End the cell that another thread is running here, where that is possible."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Cells that take turns in one pass, and within which limits.

    Attributes:
        cells: What takes turns.
        limit_s: Most wall time in seconds per cell.
        left_s: Most wall time in seconds of all together.
        base: Whom the others are compared with, within rounds; one of them.
        seed: Of the order of turns; that of a pass is its number.
    """

    cells: Sequence[Cell]
    limit_s: float
    left_s: float = math.inf
    base: Cell | None = None
    seed: int = 0


@runtime_checkable
class GroupRunner(Runner, Protocol):
    """A runner that can measure cells in turn, in processes that it starts anew."""

    def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
        """One pass of a group: a result per cell, as each is known."""
        ...

    def fresh(self) -> None:
        """Let the next cell find a new process."""
        ...


@runtime_checkable
class ComparingRunner(Protocol):
    """A runner that holds comparisons that were made before."""

    def in_turn(self, cells: Sequence[Cell], base: Cell, about: str) -> dict[Cell, list[Record]]:
        """The rows of cells that took turns with one of them; none of cells that did not."""
        ...


class LocalRunner:
    """Measures in this process: for debugging, because a cell that crashes ends the run.

    Args:
        machine: Where.
        settings: How long to measure; regime and cache state come from each cell.
        meter: Takes the times; by default the machine's.
    """

    evidence = "measured"

    def __init__(self, machine: Machine, settings: MeterSettings, meter: Meter | None = None) -> None:
        self.machine, self.settings = machine, settings
        self._meter = meter

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        """See `Runner.run`; no limit can be enforced from inside."""
        if self._meter is None:
            self._meter = meter_for(self.machine)
        return run_cell(cell, self.machine, self._meter, self.settings.replace(give_up_ms=give_up_ms))

    def interrupt(self) -> None:
        """A cell in this process ends when it ends."""

    def close(self) -> None:
        """Nothing to close."""
