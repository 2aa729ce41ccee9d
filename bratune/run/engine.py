"""Engines: cells in, rows out, and everything that a long run needs around the measurement of one cell.

Who measures is a `bratune.run.runner.Runner`. What surrounds it is the same for all: rows that are there
already are not measured again, a line "started" is on disk before a cell is launched and its outcome right
after, the budget is kept, speedups are filled in.

A precise answer takes *passes*. A pass is a fresh process that measures every *group* of cells in turn; a
group is the cells that answer one question (`bratune.run.groups`). Passes are spread over the run: pass 1 of
every group, then pass 2 of every group. Every pass is a row; what `CellEngine.run` gives is the cell pooled
over its passes (`bratune.store.pooled`).
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.measure.meter import Meter
from bratune.measure.settings import MeterSettings
from bratune.measure.verdict import BUSY_PCT
from bratune.record import Record
from bratune.run.groups import Baselines, groups_of, is_baseline
from bratune.run.measure_cell import Result
from bratune.run.repro import command_for
from bratune.run.reuse import NOT_FINISHED, NOT_STARTED, Cache, key_of, source_hash
from bratune.run.runner import ComparingRunner, GroupRunner, LocalRunner, Runner, Turns
from bratune.store import Store, pool
from bratune.store.claims import Claim, Claims
from bratune.store.pooled import in_turn_with
from bratune.work.contents import contents_of

__all__ = ["LEASES", "OVERHEAD_S", "CellEngine", "LocalEngine", "lacks"]

# Making inputs and checking them against the reference come on top of sampling; compiling can take minutes.
OVERHEAD_S, _COMPILE_S = 180.0, 600.0
# After how many of its limits a cell of another run is taken over.
LEASES = 2.0


def _question(row: Record) -> str:
    """What a row answers: two runs that ask the same share the work."""
    return f"{key_of(row)} {row.pass_number} {row.evidence}"


class CellEngine:
    """An `bratune.engine.Engine` around a runner; use it in a ``with`` block, so that the runner is closed.

    Args:
        runner: Measures one cell.
        settings: How cells are sampled; part of what a stored row must match to be reused.
        store: Where rows go; None keeps them in memory only. Rows that it holds already may answer a cell.
        fresh: Measure again what the store holds.
        run_id: Name of this run in its rows.
        flags: Flags that the ``repro`` command of a row shall repeat.
        budget_s: Seconds after which cells are no longer started, and a running one is stopped.
        cell_limit_s: Most wall time of a cell; by default, sampling time and a margin.
        on_start: Told of every cell before its turn.
        passes: Fresh processes per cell; ``settings`` are those of one of them (`MeterSettings.per_pass`). 1
            measures cell after cell in whatever process there is, and its rows are one process.
        turns: With one pass, let the cells of a group take turns nevertheless, in the process that there is.
        clock: Seconds that only grow.

    Attributes:
        reused: Cells that were answered by stored rows so far.
        slots: Cells that are measured at a time.
        look_s: Seconds between looks at a cell that another run is measuring.
        passes: Fresh processes per cell.
        turns: Cells that `run` is given together take turns, those of a group.
    """

    slots = 1
    look_s = 1.0

    def __init__(
        self,
        runner: Runner,
        settings: MeterSettings,
        *,
        store: Store | None = None,
        fresh: bool = False,
        run_id: str = "",
        flags: Sequence[str] = (),
        budget_s: float | None = None,
        cell_limit_s: float | None = None,
        on_start: Callable[[Cell], None] | None = None,
        passes: int = 1,
        turns: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._store = store
        index = store.index() if store and not fresh else None
        self._cache = Cache(runner.machine, settings, index=index, evidence=runner.evidence)
        self._claims = Claims(store, index, _question) if store and index is not None else None
        self._run_id = run_id
        self._flags = tuple(flags)
        self._cell_limit_s = cell_limit_s
        self._on_start = on_start
        self.passes = passes if isinstance(runner, GroupRunner) else 1
        self.turns = self.passes > 1 or (turns and isinstance(runner, GroupRunner))
        self._clock = clock
        self._budget_s = budget_s
        self._deadline = None if budget_s is None else clock() + budget_s
        self._baselines = Baselines()
        self._cancelled = threading.Event()
        self._behind: dict[Cell, list[Record]] = {}
        self.reused = 0

    @property
    def machine(self) -> Machine:
        """The machine that the records speak of."""
        return self._runner.machine

    @property
    def pass_rows(self) -> list[Record]:
        """Rows of single passes behind what `run` gave so far; what verdicts rest on."""
        return [row for rows in self._behind.values() for row in rows]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close()

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """One finished record per cell, in the order of the cells; see `bratune.engine.Engine`.

        A cell that another run of the same store is measuring comes last, when that run is done with it.
        """
        if self.turns:
            yield from self._run_passes(list(dict.fromkeys(cells)))
            return
        taken: list[Cell] = []
        for cell in cells:
            if self._cancelled.is_set():
                return
            if self._on_start:
                self._on_start(cell)
            record = self._answer(cell)
            if record is not None:
                yield record
            elif not self._cancelled.is_set():
                taken.append(cell)
        while taken and not self._cancelled.wait(self.look_s):
            for cell in tuple(taken):
                record = self._answer(cell)
                if record is not None:
                    taken.remove(cell)
                    yield record

    def _answer(self, cell: Cell) -> Record | None:
        """The row of a cell, stored or measured; None where another run has it, or this one was cancelled."""
        stored = self._cache.find_all(cell)
        result = None if stored else self._turn(cell)
        if result is None:
            stored = stored or self._cache.find_all(cell)
            if not stored:
                return None
            self.reused += 1
            return self._baselines.compared(cell, _one_of(stored))
        if self._cancelled.is_set():
            return None
        return self._write(cell, self._baselines.compared(cell, result.record), result.samples_ms)

    def _run_passes(self, cells: Sequence[Cell]) -> Iterator[Record]:
        """Every cell pooled over its passes, once all of them are there."""
        groups = groups_of(cells)
        rows = {cell: self._cache.find_all(cell) for cell in cells}
        self.reused += sum(
            _is_complete(found, self.passes) for cell, found in rows.items() if cell not in self._behind
        )
        while self._all_passes(groups, rows) and not self._cancelled.wait(self.look_s):
            rows |= {cell: self._cache.find_all(cell) for cell in cells}
        if self._cancelled.is_set():
            return
        for cell in cells:
            if not rows[cell]:
                rows[cell].append(self._out_of_budget(cell, NOT_STARTED).record)
                self._write(cell, rows[cell][-1])
        self._behind |= rows
        pooled = {record.cell_id: record for record in pool(row for cell in cells for row in rows[cell])}
        for cell in cells:
            yield self._baselines.compared(cell, pooled[cell.cell_id])

    def _all_passes(self, groups: list[list[Cell]], rows: dict[Cell, list[Record]]) -> bool:
        """Measure what passes are missing; whether another run of the same store has some of them in hand."""
        taken, took_s = False, [0.0] * len(groups)
        for number in range(1, self.passes + 1):
            begun = False
            for place, group in enumerate(groups):
                missing = [cell for cell in group if lacks(rows[cell], number)]
                if self._left_s() <= 0:
                    return False
                if self._left_s() < took_s[place]:  # half a pass of a group would be lost
                    continue
                ours = [cell for cell in missing if self._claim(cell, self._which(number), len(group))]
                taken = taken or len(ours) < len(missing)
                if not ours:
                    continue
                if not begun and self.passes > 1:
                    self._runner_of_passes.fresh()
                    begun = True
                start = self._clock()
                for cell, record in self._pass(group, ours, number):
                    rows[cell].append(record)
                took_s[place] = self._clock() - start
                if self._cancelled.is_set():
                    return False
        return taken

    def in_turn(
        self,
        cells: Sequence[Cell],
        base: Cell,
        passes: int,
        *,
        enough: Callable[[int], bool] = lambda made: False,
        about: str = "",
    ) -> dict[Cell, list[Record]]:
        """The rows of cells that take turns with one of them; see `bratune.engine.ComparingEngine`.

        Where the runner starts no process per pass, a ratio is that of two times, one after the other; of
        cells that are measured in this process there is one pass.
        """
        if isinstance(self._runner, ComparingRunner):
            return self._runner.in_turn(cells, base, about)
        how = f"{self._settings.sampling}{in_turn_with(base, about)}"
        rows: dict[Cell, list[Record]] = {cell: [] for cell in cells}
        passes = 1 if isinstance(self._runner, LocalRunner) else passes
        while True:
            # Rows of this run or of another; what was disturbed counts for nobody else.
            for cell, found in rows.items():
                others = filter(_is_quiet, self._cache.find_all(cell, sampling=how))
                found += [row for row in others if lacks(found, row.pass_number or 1)]
                found.sort(key=lambda row: row.pass_number or 1)
            taken = self._compare(rows, base, passes, enough, how)
            if not taken or self._cancelled.wait(self.look_s):
                return rows

    def _compare(
        self, rows: dict[Cell, list[Record]], base: Cell, passes: int, enough: Callable[[int], bool], how: str
    ) -> bool:
        """Make the passes of a comparison that are missing; whether another run has some of them in hand."""
        taken = False
        for number in range(1, passes + 1):
            missing = [cell for cell, found in rows.items() if lacks(found, number)]
            if not missing:
                continue
            if self._cancelled.is_set() or enough(number - 1):
                return False
            which = {"pass_number": number, "passes": passes, "baseline": base.cell_id}
            ours = [cell for cell in missing if self._claim(cell, which, len(rows) + 1, how)]
            taken = taken or len(ours) < len(missing)
            for cell, result in self._turns(ours, base, number) if ours else ():
                record = result.record
                if cell == base and record.ok:
                    record = record.replace(ratio=1.0, ratio_lo=1.0, ratio_hi=1.0)
                record = record.replace(speedup=record.ratio, **which)
                rows[cell].append(self._write(cell, record, result.samples_ms, how))
        return taken

    def _turns(self, missing: Sequence[Cell], base: Cell, number: int) -> Iterator[tuple[Cell, Result]]:
        """What one pass of a comparison gives of the cells that lack it; the base runs beside them anyway."""
        turns = [*missing] if base in missing else [base, *missing]
        limit = max(self._limit_of(cell) for cell in turns)
        if isinstance(self._runner, GroupRunner):
            self._runner.fresh()
            one_pass = Turns(cells=turns, limit_s=limit, left_s=self._left_s(), base=base, seed=number)
            for cell, result in self._runner.run_group(one_pass):
                if cell in missing and not self._cancelled.is_set():
                    yield cell, result
            return
        found = {cell: self._runner.run(cell, limit_s=limit) for cell in turns}
        for cell in missing:
            record, base_ms = found[cell].record, found[base].record.median_ms
            if cell != base and base_ms and record.median_ms:
                record = record.replace(ratio=base_ms / record.median_ms)
            yield cell, dataclasses.replace(found[cell], record=record)

    def _which(self, number: int) -> dict[str, Any]:
        """What a row says of the pass that it is."""
        return {"pass_number": number, "passes": self.passes}

    def _claim(
        self, cell: Cell, which: Mapping[str, Any] | None = None, together: int = 1, how: str = ""
    ) -> bool:
        """Write that a cell, or a pass of it, begins; False where another run has it or it is answered.

        Args:
            cell: The cell.
            which: What the row says of the pass that it is.
            together: Cells that take turns, and so take as many times as long.
            how: How it is sampled, of a comparison of its own.
        """
        if self._store is None:
            return True
        started = Record.of(cell, self.machine, outcome="started", evidence=self._runner.evidence)
        started = self._signed(cell, started, how).replace(**(which or {}))
        if self._claims is None:
            self._store.append(started)
            return True

        def answered() -> bool:
            if started.pass_number is None:
                return self._cache.find(cell) is not None
            rows = self._cache.find_all(cell, sampling=how)
            return not lacks([*filter(_is_quiet, rows)] if how else rows, started.pass_number)

        lease = LEASES * self._limit_of(cell) * together
        return self._claims.take(started, answered=answered, lease_s=lease) is Claim.OURS

    def _pass(
        self, group: Sequence[Cell], missing: Sequence[Cell], number: int
    ) -> Iterator[tuple[Cell, Record]]:
        """One pass of a group, each row on disk as soon as it is known."""
        rivals = len({cell.part for cell in group}) == 1  # a block is no rival of its parts
        base = next((cell for cell in group if is_baseline(cell)), None) if rivals else None
        # One that lost the others' pass is measured beside the baseline again, whose row is there already.
        turns = [*missing] if base is None or base in missing else [base, *missing]
        for cell in missing:
            if self._on_start:
                self._on_start(cell)
        limit = max(self._limit_of(cell) for cell in missing)
        one_pass = Turns(cells=turns, limit_s=limit, left_s=self._left_s(), base=base, seed=number)
        for cell, result in self._runner_of_passes.run_group(one_pass):
            if self._cancelled.is_set():
                return
            if cell not in missing:
                continue
            if self._left_s() <= 0 and result.record.outcome in ("timeout", "crashed"):
                result = self._out_of_budget(cell, NOT_FINISHED)
            record = result.record.replace(pass_number=number, passes=self.passes)
            yield cell, self._write(cell, record, result.samples_ms)

    def _write(
        self, cell: Cell, record: Record, samples_ms: Sequence[float] = (), sampling: str = ""
    ) -> Record:
        signed = self._signed(cell, record, sampling)
        self._cache.add(signed)
        if self._store:
            self._store.append(signed, samples_ms)
        return signed

    @property
    def _runner_of_passes(self) -> GroupRunner:
        assert isinstance(self._runner, GroupRunner)
        return self._runner

    def _left_s(self) -> float:
        return math.inf if self._deadline is None else self._deadline - self._clock()

    def cancel(self) -> None:
        """End `run` in another thread: the cell in flight is killed and leaves no outcome."""
        self._cancelled.set()
        self._runner.interrupt()

    def _turn(self, cell: Cell) -> Result | None:
        """What measuring a cell gave; None where another run has it, or has just measured it."""
        left = self._left_s()
        if left <= 0:
            return self._out_of_budget(cell, NOT_STARTED)
        limit = self._limit_of(cell)
        if not self._claim(cell):
            return None
        result = self._runner.run(
            cell,
            limit_s=min(limit, left),
            give_up_ms=self._baselines.give_up_ms(cell),
        )
        cut_short = result.record.outcome == "timeout" and left < limit
        interrupted = result.record.outcome == "crashed" and self._left_s() <= 0
        if cut_short or interrupted:
            return self._out_of_budget(cell, NOT_FINISHED)
        return result

    def _out_of_budget(self, cell: Cell, what: str) -> Result:
        reason = f"{what}the budget of {self._budget_s:g} s was spent"
        return Result(Record.of(cell, self.machine, outcome="timeout", reason=reason))

    def _limit_of(self, cell: Cell) -> float:
        if self._cell_limit_s is not None:
            return self._cell_limit_s
        limit = self._settings.warmup_s + self._settings.timeout_s + OVERHEAD_S
        return limit + (_COMPILE_S if cell.regime == "compile" else 0)

    def _signed(self, cell: Cell, record: Record, sampling: str = "") -> Record:
        return record.replace(
            run_id=self._run_id,
            repro=command_for(cell, extra=self._flags),
            source_hash=source_hash(cell),
            **contents_of(cell),
            sampling=sampling or self._settings.sampling,
        )


def lacks(rows: Sequence[Record], number: int) -> bool:
    """Whether a cell needs a pass: not where it is there, nor where an earlier one failed.

    A row that was no part of a series of passes, and is sampled like one, is the first.
    """
    return not any((row.pass_number or 1) == number or not row.ok for row in rows)


def _is_quiet(row: Record) -> bool:
    """Whether a pass of a comparison may decide something; one that may not is made again."""
    return (row.cpu_wait_pct or 0.0) <= BUSY_PCT


def _one_of(rows: Sequence[Record]) -> Record:
    """What the rows of a cell say: all passes together, of rows that are none the last one."""
    return pool(rows)[0] if any(row.pass_number for row in rows) else rows[-1]


def _is_complete(rows: Sequence[Record], passes: int) -> bool:
    return bool(rows) and not any(lacks(rows, number) for number in range(1, passes + 1))


class LocalEngine(CellEngine):
    """A `CellEngine` that measures in this process.

    Args:
        machine: Where.
        settings: How cells are sampled.
        meter: Takes the times; by default the machine's.
        options: Those of `CellEngine`.
    """

    def __init__(
        self, machine: Machine, settings: MeterSettings, *, meter: Meter | None = None, **options: Any
    ) -> None:
        super().__init__(LocalRunner(machine, settings, meter), settings, **options)
