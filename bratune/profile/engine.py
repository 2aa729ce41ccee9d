"""LocalEngine: cells measured one after the other in this process, each written down at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.measure.meter import Meter, meter_for
from bratune.measure.settings import MeterSettings
from bratune.profile.cells import BASELINE
from bratune.profile.repro import command_for
from bratune.profile.run_cell import Result, run_cell
from bratune.record import Record
from bratune.store import Store

__all__ = ["Baselines", "LocalEngine"]


class Baselines:
    """Remembers the rows of the baseline and sets the speedup of the rows that are like one of them."""

    def __init__(self) -> None:
        self._medians: dict[str, float] = {}

    def compared(self, cell: Cell, record: Record) -> Record:
        """The record with its speedup, where the baseline of its cell is known."""
        if record.median_ms is None or not cell.backend:
            return record
        key = cell.replace(backend="", config="{}").cell_id
        if set(cell.backend.split(",")) == {BASELINE} and cell.config == "{}":
            self._medians[key] = record.median_ms
        if key not in self._medians:
            return record
        return record.replace(speedup=self._medians[key] / record.median_ms, baseline=BASELINE)


class LocalEngine:
    """An `bratune.engine.Engine` that measures in this process.

    A backend that kills its process kills the run; the store then ends with the name of the cell ("started").

    Args:
        machine: The machine to measure on.
        settings: How long to measure; regime and L2 state come from each cell.
        store: Where rows go; None keeps them in memory only.
        run_id: Name of this run in its rows.
        flags: Flags that the ``repro`` command of a row shall repeat.
        budget_s: Seconds after which no further cell is started.
        on_start: Told of every cell before its turn.
        meter: Takes the times; by default the machine's.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        machine: Machine,
        settings: MeterSettings,
        *,
        store: Store | None = None,
        run_id: str = "",
        flags: Sequence[str] = (),
        budget_s: float | None = None,
        on_start: Callable[[Cell], None] | None = None,
        meter: Meter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._settings = settings
        self._store = store
        self._run_id = run_id
        self._flags = tuple(flags)
        self._on_start = on_start
        self._meter = meter
        self._clock = clock
        self._budget_s = budget_s
        self._deadline = None if budget_s is None else clock() + budget_s
        self._baselines = Baselines()

    @property
    def machine(self) -> Machine:
        """The machine that the records speak of."""
        return self._machine

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """One finished record per cell, in the order of the cells; see `bratune.engine.Engine`."""
        for cell in cells:
            if self._on_start:
                self._on_start(cell)
            result = self._turn(cell)
            record = self._baselines.compared(cell, self._signed(cell, result.record))
            if self._store:
                self._store.append(record, result.samples_ms)
            yield record

    def _turn(self, cell: Cell) -> Result:
        if self._deadline is not None and self._clock() >= self._deadline:
            reason = f"not started: the budget of {self._budget_s:g} s was spent"
            return Result(Record.of(cell, self._machine, outcome="timeout", reason=reason))
        if self._store:
            self._store.append(self._signed(cell, Record.of(cell, self._machine, outcome="started")))
        if self._meter is None:
            self._meter = meter_for(self._machine)
        return run_cell(cell, self._machine, self._meter, self._settings)

    def _signed(self, cell: Cell, record: Record) -> Record:
        return record.replace(run_id=self._run_id, repro=command_for(cell, extra=self._flags))
