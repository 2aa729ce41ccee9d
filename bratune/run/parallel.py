"""Parallel: an engine whose runner measures several cells at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from bratune.cell import Cell
from bratune.measure.settings import MeterSettings
from bratune.record import Record
from bratune.run.engine import LEASES, OVERHEAD_S, CellEngine, lacks
from bratune.run.groups import baseline_of
from bratune.run.runner import Runner

__all__ = ["ParallelEngine"]

T = TypeVar("T")

# What cells on other machines may take to notice that the budget is spent, before they are stopped.
_GRACE_S = 15.0


class ParallelEngine(CellEngine):
    """A `CellEngine` whose runner measures several cells at a time, each on a device of its own.

    Args:
        runner: Measures a cell in the thread that asks; several threads do.
        settings: How cells are sampled.
        slots: Cells at a time.
        options: Those of `CellEngine`.
    """

    def __init__(self, runner: Runner, settings: MeterSettings, *, slots: int, **options: Any) -> None:
        super().__init__(runner, settings, **options)
        self.slots = slots

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """One finished record per cell, as each is known, baselines first; see `bratune.engine.Engine`.

        In passes, pooled over them and in the order of the cells: a pass of a group is what one device does.
        """
        if self.passes > 1:
            yield from self._run_passes(list(dict.fromkeys(cells)))
            return
        waves: tuple[list[Cell], list[Cell]] = [], []
        for cell in cells:
            waves[0 if set(cell.backend.split(",")) == {baseline_of(cell)} else 1].append(cell)
        for wave in waves:
            first, left = True, wave
            while left and not self._cancelled.is_set():
                taken = []
                jobs = (functools.partial(self._one, cell, first) for cell in left)
                for cell, record in self._side_by_side(jobs):
                    if record is None:  # another run has it, and the next cell does not wait for that
                        taken.append(cell)
                    else:
                        yield record
                first, left = False, taken
                if left:
                    self._cancelled.wait(self.look_s)

    def _all_passes(self, groups: list[list[Cell]], rows: dict[Cell, list[Record]]) -> bool:
        """See `CellEngine._all_passes`: passes of groups side by side, the first of every group first."""

        def one(number: int, group: list[Cell]) -> bool:
            missing = [cell for cell in group if lacks(rows[cell], number)]
            if self._left_s() <= 0 or self._cancelled.is_set():
                return False
            ours = [cell for cell in missing if self._claim(cell, self._which(number), len(group))]
            for cell, record in self._pass(group, ours, number) if ours else ():
                rows[cell].append(record)
            return len(ours) < len(missing)

        turns = [(number, group) for number in range(1, self.passes + 1) for group in groups]
        taken = list(self._side_by_side(functools.partial(one, *turn) for turn in turns))
        return any(taken) and self._left_s() > 0

    def _side_by_side(self, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
        """What jobs return that run side by side, each writing down its rows where they are known.

        No more are under way than can run, so that what a sweep of a hundred thousand cells holds in memory
        does not grow with it.
        """
        waiting, running = iter(jobs), set[Future[T]]()
        renewed = self._clock()
        with ThreadPoolExecutor(self.slots) as pool:
            try:
                running = {pool.submit(job) for job in itertools.islice(waiting, self.slots)}
                while running:
                    patience = min(self._patience_s(), self._renew_s)
                    done, running = wait(running, patience, return_when=FIRST_COMPLETED)
                    if not done and self._left_s() + _GRACE_S <= 0:  # and cells still wait for a device
                        self._runner.interrupt()
                    if self._claims and self._clock() - renewed >= self._renew_s:
                        self._claims.renew(self._renew_s)
                        renewed = self._clock()
                    for job in itertools.islice(waiting, len(done)):
                        running.add(pool.submit(job))
                    for turn in done:
                        yield turn.result()
            finally:
                if running:
                    self.cancel()

    def _patience_s(self) -> float:
        """How long to wait for the next cell: none may be under way shortly after the budget is spent."""
        return max(1.0, self._left_s() + _GRACE_S)

    @property
    def _renew_s(self) -> float:
        """How often cells are claimed again that are not back: well before others may take them over."""
        return LEASES * (self._cell_limit_s or OVERHEAD_S) / 3

    def _one(self, cell: Cell, first: bool) -> tuple[Cell, Record | None]:
        if self._cancelled.is_set():
            return cell, None
        if first and self._on_start:
            self._on_start(cell)
        return cell, self._answer(cell)
