"""Waiting: how long this process had work and no processor to do it on.

Linux counts, per thread, the time that it was runnable and stood in a run queue. A parallel call waits for
the thread that waited longest. Where a kernel does not count it, an involuntary switch is taken for
a wait of one time slice.

Source: Documentation/scheduler/sched-stats.rst, getrusage(2).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["Waiting"]

# What a thread that was pushed aside waits at least, on a kernel that does not count.
_SLICE_MS = 3.0


class Waiting:
    """Counts from one lap to the next.

    Args:
        tasks: Folder of the threads of a process, with a ``schedstat`` each.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")) -> None:
        self._tasks = tasks
        self._files: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._switches = _switches()
        self.refresh()
        self.lap_ms()

    def refresh(self) -> None:
        """Find the threads that began or ended since."""
        try:
            names = set(os.listdir(self._tasks))
        except OSError:
            names = set()
        for name in self._files.keys() - names:
            os.close(self._files.pop(name))
            self._last.pop(name, None)
        for name in names - self._files.keys():
            with contextlib.suppress(OSError):
                self._files[name] = os.open(self._tasks / name / "schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def lap_ms(self) -> float:
        """Milliseconds that the thread which waited longest has waited since the last lap."""
        longest = 0
        for name, file in self._files.items():
            try:
                waited = int(os.pread(file, 128, 0).split()[1])
            except (OSError, ValueError, IndexError):  # it ended, or the kernel does not count
                continue
            longest = max(longest, waited - self._last.get(name, waited))
            self._last[name] = waited
        switches = _switches()
        pushed, self._switches = switches - self._switches, switches
        return longest / 1e6 if self._last else pushed * _SLICE_MS

    def close(self) -> None:
        """Release the files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def _switches() -> int:
    try:
        import resource
    except ImportError:  # Windows says nothing of this
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
