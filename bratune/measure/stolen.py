"""Stolen time: what the host of a virtual machine gave to others while this machine wanted to compute.

Linux counts it in ``/proc/stat``, in ticks of 10 ms for all processors together. On a machine of its own, or
where the host does not tell, it is always 0.

Source: proc_stat(5).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["STOLEN", "StolenTime"]

# The reason that a reading names.
STOLEN = "cpu_steal"
# Columns of the first line: user nice system idle iowait irq softirq steal. Guests are part of user.
_BUSY = (0, 1, 2, 5, 6)
_STEAL = 7


class StolenTime:
    """Counts from when it is made, and from one question to the next.

    Args:
        source: A file in the format of ``/proc/stat``.
    """

    def __init__(self, source: Path = Path("/proc/stat")) -> None:
        self._source = source
        self._last = self._ticks()

    def share(self) -> float:
        """Of the processor time wanted since the last question, the share that others got, 0 to 1."""
        busy, steal = self._ticks()
        was_busy, was_steal = self._last
        self._last = busy, steal
        stolen = steal - was_steal
        wanted = busy - was_busy + stolen
        return stolen / wanted if wanted > 0 else 0.0

    def _ticks(self) -> tuple[int, int]:
        """Ticks computed and ticks stolen since the machine was started; zeros where nothing is counted."""
        try:
            name, *columns = self._source.read_text().split(maxsplit=_STEAL + 2)
            ticks = [int(column) for column in columns[: _STEAL + 1]]
        except (OSError, ValueError):
            return 0, 0
        if name != "cpu" or len(ticks) <= _STEAL:
            return 0, 0
        return sum(ticks[i] for i in _BUSY), ticks[_STEAL]
