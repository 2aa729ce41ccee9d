"""Isolated: cells measured in a worker process that is allowed to die.

The parent never touches the device: it hands out cells, waits, and writes rows down. A cell that hangs,
crashes or exhausts memory costs that cell only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from bratune.cell import Cell
from bratune.machine import Machine
from bratune.measure.settings import MeterSettings
from bratune.measure.worker import Worker
from bratune.record import Record
from bratune.run.engine import CellEngine
from bratune.run.measure_cell import Result, run_cell

__all__ = ["IsolatedEngine", "IsolatedRunner", "job"]

# On a CPU, cells together with the rest of the system must fit into real memory: there is no swap to wait
# for, and the kernel would end whatever process is largest.
_MEMORY_SHARE = 0.8


class IsolatedRunner:
    """Measures cells in a worker process, one after the other; see `bratune.run.engine.Runner`.

    Args:
        machine: Where. Of several GPUs, one that is known by its UUID is the only one that the worker sees.
        settings: How long to measure; regime and cache state come from each cell.
        memory_limit_bytes: Most memory of the worker; by default 80 % of a CPU's, none on a GPU.
    """

    evidence = "measured"

    def __init__(
        self, machine: Machine, settings: MeterSettings, *, memory_limit_bytes: int | None = None
    ) -> None:
        self.machine = machine
        self.settings = settings
        env: dict[str, str] = {}
        self._inside = machine
        # A part of a GPU (MIG), which CUDA shows alone, has other names for CUDA than for NVML.
        if machine.is_cuda and machine.gpu_uuid and torch.cuda.device_count() > 1:
            env["CUDA_VISIBLE_DEVICES"] = _visible_name(machine.gpu_uuid)
            self._inside = dataclasses.replace(machine, device="cuda:0")
        if memory_limit_bytes is None and not machine.is_cuda:
            memory_limit_bytes = int(_MEMORY_SHARE * machine.memory_bytes) or None
        self._worker = Worker(
            env=env, preload=("bratune.run.measure_cell",), memory_limit_bytes=memory_limit_bytes
        )

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        """See `bratune.run.engine.Runner.run`."""
        settings = self.settings.replace(give_up_ms=give_up_ms)
        payload = {
            "cell": cell.to_dict(),
            "machine": self._inside.to_dict(),
            "settings": settings.to_dict(),
        }
        outcome = self._worker.run("bratune.run.isolated:job", payload, limit_s=limit_s)
        if outcome.ok:
            record = Record.from_dict(outcome.value["record"])
            return Result(record, tuple(outcome.value["samples_ms"]))
        reason = outcome.reason + ("; the same in a clean process" if outcome.retried else "")
        return Result(Record.of(cell, self.machine, outcome=outcome.status, reason=reason))

    def interrupt(self) -> None:
        """Kill the worker in the middle of a cell."""
        self._worker.interrupt()

    def close(self) -> None:
        """End the worker and everything that it started."""
        self._worker.close()


class IsolatedEngine(CellEngine):
    """A `bratune.run.engine.CellEngine` that measures in a worker process; close it after use.

    Args:
        machine: Where.
        settings: How cells are sampled.
        memory_limit_bytes: See `IsolatedRunner`.
        options: Those of `bratune.run.engine.CellEngine`.
    """

    def __init__(
        self,
        machine: Machine,
        settings: MeterSettings,
        *,
        memory_limit_bytes: int | None = None,
        **options: Any,
    ) -> None:
        runner = IsolatedRunner(machine, settings, memory_limit_bytes=memory_limit_bytes)
        super().__init__(runner, settings, **options)


def job(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one cell; runs in the worker.

    Raises:
        MemoryError: memory ran out, so that the worker is replaced and the cell tried once more.
    """
    machine = Machine.from_dict(payload["machine"])
    settings = MeterSettings.from_dict(payload["settings"])
    result = run_cell(Cell.from_dict(payload["cell"]), machine, _meter(machine), settings)
    if result.record.outcome == "oom":
        raise MemoryError(result.record.reason)
    return {"record": result.record.to_dict(), "samples_ms": list(result.samples_ms)}


@functools.lru_cache(maxsize=1)
def _meter(machine: Machine) -> Any:
    from bratune.measure.meter import meter_for

    if not machine.is_cuda and machine.threads:
        torch.set_num_threads(machine.threads)
    return meter_for(machine)


def _visible_name(uuid: str) -> str:
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
