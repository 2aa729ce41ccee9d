"""Engine: whoever turns cells into records.

Profiling and tuning ask an engine and do not know whether it measures in this process, in a worker that
is allowed to die, on a cluster, or answers from stored records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.record import Record

__all__ = ["Engine"]


@runtime_checkable
class Engine(Protocol):
    """Turns cells into records."""

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
