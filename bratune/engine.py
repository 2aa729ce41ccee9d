"""Engine: whoever turns cells into records.

Profiling and tuning ask an engine and do not know whether it measures in this process, in a worker that
is allowed to die, on a cluster, or answers from stored records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.record import Record

__all__ = ["ComparingEngine", "Engine"]


@runtime_checkable
class Engine(Protocol):
    """Turns cells into records.

    Attributes:
        slots: Cells that it measures at a time.
        passes: Fresh processes per cell; 1 of an engine that knows of none.
        turns: Whether cells that answer one question take turns where `run` is given them together.
    """

    slots: int
    passes: int
    turns: bool

    @property
    def machine(self) -> Machine:
        """The machine that the records speak of."""
        ...

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """One finished record per cell, as each is known; order may differ from that of the cells.

        A cell that cannot be measured gives a record with its outcome and reason; `run` raises only when
        no further cell can be measured either (the store cannot be written, the device is gone).
        """
        ...


@runtime_checkable
class ComparingEngine(Engine, Protocol):
    """An engine that can also compare cells, each with one of them."""

    def in_turn(
        self,
        cells: Sequence[Cell],
        base: Cell,
        passes: int,
        *,
        enough: Callable[[int], bool] = lambda made: False,
        about: str = "",
    ) -> dict[Cell, list[Record]]:
        """The rows of cells that take turns, pass after pass, each pass in a fresh process.

        It is a comparison of its own: what was measured before does not answer it, nor do its rows answer
        anything else. The same comparison again goes on where it ended; passes that were disturbed are
        made again.

        Args:
            cells: Who takes turns.
            base: Whom the others are compared with; one of them.
            passes: Fresh processes.
            enough: Asked before every pass that is to be made, with the number of those that are there:
                whether to stop.
            about: What it is for, where the same cells are compared for something else, too: a search must
                not answer whether what it chose is faster.

        Returns:
            For each cell its rows, each a pass; ``ratio`` is how many times faster it was than the base
            within rounds, 1 of the base itself. Fewer than asked where something failed, or `enough` said so.
        """
        ...
