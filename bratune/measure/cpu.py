"""The CPU as a device: wall clock, and a cache made cold by streaming through a buffer of its size.

Its sensors are the time that threads of this process wait for a processor, sample by sample
(`bratune.measure.waiting`), and the time that the host of a virtual machine gives to others. Unlike heat, the
latter passes at no time that could be waited for: samples taken meanwhile are kept, and the row says so.
"""

from __future__ import annotations

from time import perf_counter, perf_counter_ns, sleep

import torch

from bratune.errors import MeasureError
from bratune.machine import Machine
from bratune.measure.compiling import compile_call
from bratune.measure.device import Call, Memory, Prepared, Sample
from bratune.measure.memory import cpu_memory
from bratune.measure.stolen import STOLEN, StolenTime
from bratune.measure.telemetry import Reading
from bratune.measure.waiting import Waiting

__all__ = ["CpuDevice"]

# Replacement is not strictly least-recently-used: one pass over the cache's own size leaves lines behind.
FLUSH_FACTOR = 2
# A window of 50 ms on two threads is ten ticks of stolen time: one of them is the least that can be seen.
_STOLEN_SHARE = 0.1


class CpuDevice:
    """This machine's CPU; see `bratune.measure.device.Device`.

    The number of threads is torch's own setting and is recorded with the machine.

    Args:
        machine: What it is.
        stolen: Counts the time that the host gives to others; by default that of this machine.
    """

    launch_floor_ms = None

    def __init__(self, machine: Machine, stolen: StolenTime | None = None) -> None:
        self.flush_bytes = FLUSH_FACTOR * machine.l2_bytes
        self._buffer = torch.empty(0, dtype=torch.int64)  # until a cache is flushed: it can be hundreds of MB
        self._stolen = stolen or StolenTime()
        self._waiting = Waiting()

    def now(self) -> float:
        """See `Device.now`."""
        return perf_counter()

    def sleep(self, seconds: float) -> None:
        """See `Device.sleep`."""
        sleep(seconds)

    def prepare(self, call: Call, regime: str) -> Prepared:
        """See `Device.prepare`; there are no CUDA graphs on a CPU."""
        if regime == "graph":
            raise MeasureError(
                "regime graph was asked for on a CPU, which has no CUDA graphs; eager would work"
            )
        if regime == "compile":
            run, seconds = compile_call(call)
            return Prepared(run, seconds, run)
        return Prepared(call, None, call)

    def flush(self) -> None:
        """Read and write every line of a buffer that is larger than the last-level cache."""
        if self._buffer.nbytes < self.flush_bytes:
            self._buffer = torch.zeros(-(-self.flush_bytes // 8), dtype=torch.int64)
        self._buffer.add_(1)

    def time(self, run: Call) -> Sample:
        """See `Device.time`: the wall time of the call."""
        self._waiting.lap_ms()
        start = perf_counter_ns()
        output = run()
        elapsed = (perf_counter_ns() - start) / 1e6
        return Sample(elapsed, waited_ms=self._waiting.lap_ms(), output=output)

    def memory(self, probe: Call) -> Memory:
        """See `Device.memory`; the flush buffer is not counted."""
        return cpu_memory(probe, ignore_bytes=self._buffer.nbytes)

    def read(self) -> Reading:
        """Whether the host gave a tenth or more of the time since the last reading to others."""
        self._waiting.refresh()
        return Reading(throttle_reasons=(STOLEN,) if self._stolen.share() >= _STOLEN_SHARE else ())

    def foreign_processes(self) -> int | None:
        """None: a CPU is always shared."""
        return None
