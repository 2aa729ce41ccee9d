"""Replay: cells answered from stored records, so that everything above measuring runs without the machine.

A cell that was measured in passes is answered by all of them together. What is replayed is labelled so in
every row (``evidence``), and a cell that was never measured is an error with that reason, never a guess.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence

from bratune.cell import Cell
from bratune.errors import TargetError
from bratune.record import Record
from bratune.run.measure_cell import Result
from bratune.run.runner import Turns
from bratune.store import Rows, pool_each, read_rows
from bratune.store.pooled import alike, in_turn_with, sizes_of

__all__ = ["ReplayRunner"]

# What says where a row belongs in a table.
_OF_THE_CELL = ("cell", "stage", "block_count", "n_win", "topk", "height", "width", "region")
# What a replayed row has from the cell that is asked for, or what only runs that measure look at.
_NOT_NEEDED = ("cell", "claimed_by")


class ReplayRunner:
    """Answers cells from records; see `bratune.run.runner.Runner`.

    Args:
        records: Rows of one or several machines.
        gpu: Key of the machine to replay; needed only where the records hold several.
        source: Where the records come from, for messages.

    Raises:
        TargetError: the records hold nothing of that machine, or several and none was chosen.
    """

    evidence = "replayed"

    def __init__(self, records: Iterable[Record], *, gpu: str = "", source: str = "the records") -> None:
        rows = Rows.of(records).where("evidence", lambda value: value == "measured")
        keys = sorted(rows.different("gpu_key"))
        if not keys:
            raise TargetError(f"{source} cannot be replayed: nothing in them was measured")
        if gpu and gpu not in keys:
            raise TargetError(f"{source} cannot be replayed as {gpu}: they hold {', '.join(keys)}")
        if not gpu and len(keys) > 1:
            raise TargetError(f"{source} hold {', '.join(keys)}; --gpu says which of them to replay")
        self._source = source
        chosen = gpu or keys[0]
        self._own = rows.where("gpu_key", lambda key: key == chosen)
        self._pooled = Rows.of(pool_each(self._own))
        self.machine = self._own[0].machine

    @functools.cached_property
    def passes(self) -> int:
        """The most passes that a cell has."""
        sizes = sizes_of(self._own)
        for place in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            row = self._pooled[place]
            answer = self._answer(row.cell_id)
            if answer is not None and alike(answer) == alike(row):
                return sizes[place]
        return 1

    @classmethod
    def of(cls, paths: Iterable[str | os.PathLike[str]], *, gpu: str = "") -> ReplayRunner:
        """A replay of record files and folders; see `bratune.store.read_records`."""
        several = list(paths)
        rows = read_rows(several, without=_NOT_NEEDED)
        return cls(rows, gpu=gpu, source=", ".join(map(str, several)))

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        """See `bratune.run.runner.Runner.run`; takes no time."""
        row = self._answer(cell.cell_id)
        return self._missing(cell) if row is None else self._replayed(cell, row)

    def _answer(self, cell_id: str) -> Record | None:
        """The pooled row that stands for a cell."""
        found: Record | None = None
        for row in self._pooled.named(cell_id):
            found = row if _better(row, found) else found
        return found

    def _passes(self, cell_id: str) -> list[Record]:
        """The rows behind it."""
        answer = self._answer(cell_id)
        rows = [] if answer is None else self._own.named(cell_id)
        return [row for row in rows if answer is not None and alike(row) == alike(answer)]

    def _missing(self, cell: Cell) -> Result:
        reason = f"not replayed: {self._source} holds no row of this cell on {self.machine.gpu_key}"
        return Result(Record.of(cell, self.machine, outcome="error", evidence="replayed", reason=reason))

    def _replayed(self, cell: Cell, row: Record) -> Result:
        asked = Record.of(cell, self.machine)  # the same cell, whatever the row made of its description
        own = {name: getattr(asked, name) for name in _OF_THE_CELL}
        return Result(row.replace(evidence="replayed", **own))

    def in_turn(self, cells: Sequence[Cell], base: Cell, about: str) -> dict[Cell, list[Record]]:
        """See `bratune.run.runner.ComparingRunner.in_turn`."""
        how = in_turn_with(base, about)
        return {
            cell: [
                self._replayed(cell, row).record
                for row in self._own.named(cell.cell_id)
                if row.sampling.endswith(how)
            ]
            for cell in cells
        }

    def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
        """See `bratune.run.runner.GroupRunner.run_group`: rows of pass ``seed``, of cells that have it."""
        for cell in turns.cells:
            rows = self._passes(cell.cell_id)
            if not rows:
                yield cell, self._missing(cell)
            elif len(rows) >= turns.seed:
                yield cell, self._replayed(cell, rows[turns.seed - 1])

    def fresh(self) -> None:
        """There is no process."""

    def interrupt(self) -> None:
        """A replayed cell takes no time."""

    def close(self) -> None:
        """Nothing to close."""


def _better(row: Record, other: Record | None) -> bool:
    """Whether a later row replaces an earlier one: not where it failed and the other has a time."""
    return other is None or row.ok or not other.ok
