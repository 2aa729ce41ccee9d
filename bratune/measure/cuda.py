"""A CUDA GPU as a device: events, L2 flush, graph capture, sensors.

A sample starts on an idle device. Its device time is therefore what a caller waits for who has nothing else
enqueued: where launching takes longer than computing it contains the launches, and the measurement says
``launch_bound``. The graph regime shows the same work without them.
"""

from __future__ import annotations

from time import perf_counter, perf_counter_ns, sleep

import torch

from bratune import gpus
from bratune.errors import MeasureError
from bratune.machine import Machine
from bratune.measure.compiling import compile_call
from bratune.measure.device import Call, Memory, Prepared, Sample
from bratune.measure.memory import cuda_memory
from bratune.measure.statistics import median
from bratune.measure.telemetry import Reading, connect

__all__ = ["CudaDevice", "flush_bytes_for"]

# Hashed and sectored caches keep lines of the last write of their own size; twice the size leaves none.
FLUSH_FACTOR = 2
# Libraries choose algorithms and allocate workspaces in their first calls, which a graph must not record.
_CALLS_BEFORE_CAPTURE = 3
_FLOOR_SAMPLES = 25


def flush_bytes_for(machine: Machine) -> int:
    """Bytes that one flush writes: twice the larger of the reported L2 and the table's; 0 when unknown.

    Some boards report an inner cache while a larger one stands behind it, so both are asked.
    """
    board = gpus.match(machine.gpu_name, memory_gib=machine.memory_gib, sm_count=machine.sm_count)
    known = int((board.l2_mib or 0) * 2**20) if board else 0
    return FLUSH_FACTOR * max(machine.l2_bytes, known)


class CudaDevice:
    """One GPU; see `bratune.measure.device.Device`.

    Raises:
        MeasureError: the device cannot be used in this process.
    """

    def __init__(self, machine: Machine) -> None:
        self.flush_bytes = flush_bytes_for(machine)
        self._device = torch.device(machine.device)
        self._sensors = connect(machine)
        try:
            torch.cuda.set_device(self._device)
            self._buffer = torch.zeros(self.flush_bytes // 8, dtype=torch.int64, device=self._device)
            self.launch_floor_ms: float | None = self._launch_floor_ms()
        except (RuntimeError, AssertionError) as error:
            raise MeasureError(f"{machine.device} cannot be used: {error}") from error

    def _launch_floor_ms(self) -> float:
        one = torch.zeros(1, device=self._device)
        samples = [self.time(lambda: one.add_(1)).device_ms for _ in range(_FLOOR_SAMPLES)]
        return median(samples)

    def now(self) -> float:
        """See `Device.now`."""
        return perf_counter()

    def sleep(self, seconds: float) -> None:
        """See `Device.sleep`."""
        sleep(seconds)

    def prepare(self, call: Call, regime: str) -> Prepared:
        """See `Device.prepare`."""
        if regime == "graph":
            return self._capture(call)
        if regime == "compile":
            run, seconds = compile_call(call)
            return Prepared(run, seconds, run)
        return Prepared(call, None, call)

    def _capture(self, call: Call) -> Prepared:
        """Record the call's kernels once; each replay launches all of them together."""
        start = perf_counter()
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(side):
                for _ in range(_CALLS_BEFORE_CAPTURE):
                    call()
            torch.cuda.current_stream(self._device).wait_stream(side)
            torch.cuda.synchronize(self._device)
            with torch.cuda.graph(graph):
                kept = call()
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            first = str(error).strip().splitlines()[0]
            raise MeasureError(f"this call cannot be captured in a CUDA graph: {first}") from error

        def replay() -> object:
            graph.replay()
            return kept  # the graph writes its result here at every replay

        return Prepared(replay, perf_counter() - start, call)

    def flush(self) -> None:
        """Write a buffer larger than the last-level cache; `time` waits for it."""
        self._buffer.zero_()

    def time(self, run: Call) -> Sample:
        """See `Device.time`: events around the call on an idle device, the host's clock beside them."""
        torch.cuda.synchronize(self._device)
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        start = perf_counter_ns()
        output = run()
        host_ms = (perf_counter_ns() - start) / 1e6
        end.record()
        end.synchronize()
        return Sample(begin.elapsed_time(end), host_ms, output=output)

    def memory(self, probe: Call) -> Memory:
        """See `Device.memory`; the flush buffer is not counted."""
        return cuda_memory(probe, self._device, ignore_bytes=self._buffer.nbytes)

    def read(self) -> Reading:
        """See `Device.read`."""
        return self._sensors.read()

    def foreign_processes(self) -> int | None:
        """See `Device.foreign_processes`."""
        return self._sensors.foreign_processes(holds_context=True)
