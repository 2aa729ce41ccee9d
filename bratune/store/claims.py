"""Claims: which cell is whose, among runs that share a file of records.

The line "started" that is written before a cell is measured names the process that measures it. Whoever comes
to the same cell while that process lives goes on with another one, and finds the row later; the cell of a
process that died, or that has held it for too long, is taken over.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from bratune.record import Record
from bratune.store.index import Index
from bratune.store.lines import Store

__all__ = ["Claim", "Claims", "Holder"]


@dataclass(frozen=True)
class Holder:
    """A process: host, process id, and what tells it from a later one of that id."""

    host: str
    pid: int
    started: str
    boot: str

    @classmethod
    def current(cls) -> Holder:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _process_start(os.getpid()), _boot_id())

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """The inverse of `str`; None for anything else."""
        parts = text.rsplit(" ", 3)
        if len(parts) != 4 or not parts[1].isdigit() or len(parts[1]) > 10:
            return None
        return cls(parts[0], int(parts[1]), parts[2].strip("-"), parts[3].strip("-"))

    def is_alive(self) -> bool | None:
        """Whether it still runs; None when that cannot be seen from this host."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot_id():
            return False
        return bool(self.started) and _process_start(self.pid) == self.started

    def __str__(self) -> str:
        boot = self.boot.replace("-", "")
        return f"{self.host} {self.pid} {self.started or '-'} {boot or '-'}"


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    return ""


def _process_start(pid: int) -> str:
    """The start time of a process in clock ticks since boot; empty when it is not there or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Claim(Enum):
    """What became of an attempt to take a cell."""

    OURS = "ours"
    TAKEN = "taken"
    ANSWERED = "answered"


class Claims:
    """Takes cells of a store for this process.

    Args:
        store: The file.
        index: Of the same file.
        question: What a row answers, as text: rows of one cell that were asked for differently (on another
            board, sampled otherwise) do not stand in each other's way.
        now: The time, aware of its zone.
    """

    def __init__(
        self,
        store: Store,
        index: Index,
        question: Callable[[Record], str],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store, self._index, self._question, self._now = store, index, question, now
        self._own = Holder.current()

    def take(self, started: Record, *, answered: Callable[[], bool], lease_s: float) -> Claim:
        """Write the line "started" of a cell, unless another process has it or its row is there.

        Args:
            started: The line; it gets the name of this process.
            answered: Whether a row answers the cell; asked while nobody else can write.
            lease_s: Seconds after which whoever holds the cell is late and it is taken over.

        Raises:
            StoreError: the file cannot be read or written.
        """
        with self._store.exclusive() as write:
            if answered():
                return Claim.ANSWERED
            asked = self._question(started)
            for other in self._index.unfinished(started.cell_id):
                if self._stands(other, lease_s) and self._question(other) == asked:
                    return Claim.TAKEN
            write(started.replace(claimed_by=str(self._own)))
            return Claim.OURS

    def _stands(self, other: Record, lease_s: float) -> bool:
        """Whether a line "started" still keeps others off."""
        holder = Holder.parse(other.claimed_by)
        if holder is None or holder == self._own or holder.is_alive() is False:
            return False
        try:
            since = datetime.strptime(other.timestamp_utc, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        except ValueError:
            return False
        return abs((self._now() - since).total_seconds()) <= lease_s
