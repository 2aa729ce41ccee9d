"""Claims: which cell is whose, among runs that share a file of records.

The line "started" that is written before a cell is measured names the process that measures it. Whoever comes
to the same cell while that process lives goes on with another one, and finds the row later; the cell of a
process that died, or that has held it for too long, is taken over.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from bratune.errors import StoreError
from bratune.record import Record
from bratune.store.index import Index
from bratune.store.lines import Store

__all__ = ["Claim", "Claims", "Holder"]


@dataclass(frozen=True)
class Holder:
    """A process: host, process id, and what tells it from a later one of that id.

    Attributes:
        host: Name of the machine; containers that share its network share the name.
        pid: Its number there, or in its container.
        started: When it began, in clock ticks since the machine did.
        boot: A name for the machine's last start.
        container: Where its number counts; empty of what earlier versions wrote, and where Linux is not.
    """

    host: str
    pid: int
    started: str
    boot: str
    container: str = ""

    @classmethod
    def current(cls) -> Holder:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _process_start(pid), _boot_id(), _container())

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """The inverse of `str`; None for anything else."""
        found = _HOLDER.fullmatch(text)
        if found is None:
            return None
        host, pid, started, boot, container = found.groups(default="")
        return cls(host, int(pid), started.strip("-"), boot.strip("-"), container)

    def is_alive(self) -> bool | None:
        """Whether it still runs; None when that cannot be seen from here: another host, another container."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot_id():
            return False
        if self.container and self.container != _container():
            return None
        return bool(self.started) and _process_start(self.pid) == self.started

    def __str__(self) -> str:
        boot = self.boot.replace("-", "")
        where = f" in {self.container}" if self.container else ""
        return f"{self.host} {self.pid} {self.started or '-'} {boot or '-'}{where}"


_TIME = "%Y-%m-%dT%H:%M:%SZ"
_HOLDER = re.compile(r"(.*) ([0-9]{1,10}) (\S+) (\S+?)(?: in ([0-9]+))?", re.DOTALL)


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    return ""


def _container() -> str:
    """A name for what numbers the processes that this one can see; containers have numbers of their own."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
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
        self._taken: dict[tuple[object, ...], Record] = {}

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
                if self._stands(other, lease_s) and self._asks(other) == asked:
                    return Claim.TAKEN
            started = started.replace(claimed_by=str(self._own))
            write(started)
            self._taken[_name(started)] = started
            return Claim.OURS

    def renew(self, after_s: float) -> None:
        """Write the lines "started" again that this process took so long ago and that have no outcome yet.

        For cells that wait for a device after they were taken: nobody knows how long.

        Raises:
            StoreError: the file cannot be read or written.
        """
        with self._store.exclusive() as write:
            for key, line in [*self._taken.items()]:
                if key not in map(_name, self._index.unfinished(line.cell_id)):
                    self._taken.pop(key, None)
                elif (self._age_s(line) or 0.0) >= after_s:
                    again = line.replace(timestamp_utc=self._now().strftime(_TIME))
                    write(again)
                    self._taken[key] = again

    def _asks(self, other: Record) -> str:
        """What a line "started" asks; nothing where it does not describe its cell."""
        try:
            return self._question(other)
        except StoreError:
            return ""

    def _stands(self, other: Record, lease_s: float) -> bool:
        """Whether a line "started" still keeps others off."""
        holder = Holder.parse(other.claimed_by)
        if holder is None or holder == self._own or holder.is_alive() is False:
            return False
        age_s = self._age_s(other)
        return age_s is not None and age_s <= lease_s

    def _age_s(self, line: Record) -> float | None:
        """Seconds since a line was written; None where it does not say when."""
        try:
            since = datetime.strptime(line.timestamp_utc, _TIME).replace(tzinfo=UTC)
        except ValueError:
            return None
        return abs((self._now() - since).total_seconds())


def _name(line: Record) -> tuple[object, ...]:
    """What tells a line "started" from the others."""
    return line.claimed_by, line.cell_id, line.pass_number, line.sampling
