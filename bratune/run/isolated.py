"""Isolated: cells measured in a worker process that is allowed to die.

The parent never touches the device: it hands out cells, waits, and writes rows down. A cell that hangs,
crashes or exhausts memory costs that cell only; of a group that is measured in turn it costs the others one
new start. What a cell of this package leaves behind in torch is undone before the next one; a backend of
somebody else, who may leave anything behind, has a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bratune.cell import Cell
from bratune.kernels import registry
from bratune.kernels.mixers import registry as mixers
from bratune.machine import Machine
from bratune.measure.compiling import forget_compiled
from bratune.measure.memory import live_mb, release
from bratune.measure.meter import DeviceMeter, Ready, device_for
from bratune.measure.settings import MeterSettings
from bratune.measure.state import TorchState
from bratune.measure.worker import JobOutcome, Worker
from bratune.record import Record
from bratune.run.engine import CellEngine
from bratune.run.groups import CLEARLY_WORSE
from bratune.run.measure_cell import CheckedCell, Result, failure, finish, prepare, run_cell
from bratune.run.runner import Turns
from bratune.work.modules import scenery_for

__all__ = ["IsolatedEngine", "IsolatedRunner", "job"]

# On a CPU, cells together with the rest of the system must fit into real memory: there is no swap to wait
# for, and the kernel would end whatever process is largest.
_MEMORY_SHARE = 0.8


class IsolatedRunner:
    """Measures cells in a worker process, one after the other; see `bratune.run.runner.Runner`.

    Args:
        machine: Where. Of several GPUs, one that is known by its UUID is the only one that the worker sees.
        settings: How long to measure; regime and cache state come from each cell.
        memory_limit_bytes: Most memory of the worker; by default 80 % of a CPU's, none on a GPU.
        preload: Modules that the worker imports before its first cell.
    """

    evidence = "measured"

    def __init__(
        self,
        machine: Machine,
        settings: MeterSettings,
        *,
        memory_limit_bytes: int | None = None,
        preload: Sequence[str] = (),
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
        self._new_worker = functools.partial(
            Worker,
            env=env,
            preload=("bratune.run.measure_cell", *preload),
            memory_limit_bytes=memory_limit_bytes,
        )
        self._worker = self._new_worker()
        self._foreign: Worker | None = None

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        """See `bratune.run.runner.Runner.run`."""
        payload = self._payload(cell, give_up_ms=give_up_ms)
        with self._worker_for(cell) as worker:
            outcome = worker.run("bratune.run.isolated:job", payload, limit_s=limit_s)
        return self._result(cell, outcome)

    def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
        """See `bratune.run.runner.GroupRunner.run_group`."""
        base, limit = turns.base, _Limit(turns.limit_s, time.monotonic() + turns.left_s)
        ours = [cell for cell in turns.cells if not _is_foreign(cell)]
        if ours:
            yield from self._in_turn(self._worker, ours, limit, base, turns.seed)
        for cell in (cell for cell in turns.cells if _is_foreign(cell)):
            beside = [] if base is None or base == cell or _is_foreign(base) else [base]
            with self._worker_for(cell) as worker:
                for found, result in self._in_turn(worker, [*beside, cell], limit, base, turns.seed):
                    if found == cell:  # the other one only ran beside it, for the ratio
                        yield found, result

    def _in_turn(
        self, worker: Worker, cells: Sequence[Cell], limit: _Limit, base: Cell | None, seed: int
    ) -> Iterator[tuple[Cell, Result]]:
        """Cells in one worker: each prepared and checked, then all timed in turn."""
        waiting, ready, starts = list(cells), list[Cell](), 0
        while waiting:
            cell, pid = waiting.pop(0), worker.pid
            first = {"first": not ready}
            outcome = worker.run(
                "bratune.run.isolated:ready_job", self._payload(cell) | first, limit_s=limit.of(1)
            )
            if worker.pid != pid and ready:  # what was ready died with the worker
                waiting, ready, starts = [*ready, *waiting], [], starts + 1
                if starts > len(cells):  # each fits alone, but not beside the others
                    for one in (cell, *waiting):
                        yield one, self._result(one, self._alone(worker, one, limit.of(1)))
                    return
            if outcome.ok and outcome.value is None:
                ready.append(cell)
            else:
                yield cell, self._result(cell, outcome)
        if ready:
            yield from self._rounds(worker, ready, limit, base, seed)

    def _alone(self, worker: Worker, cell: Cell, limit_s: float) -> JobOutcome:
        return worker.run("bratune.run.isolated:job", self._payload(cell), limit_s=limit_s)

    def _rounds(
        self, worker: Worker, cells: Sequence[Cell], limit: _Limit, base: Cell | None, seed: int
    ) -> Iterator[tuple[Cell, Result]]:
        with tempfile.NamedTemporaryFile(prefix="bratune-turn-") as turn:
            payload = self._payload(cells[0]) | {
                "cells": [cell.cell_id for cell in cells],
                "base": base.cell_id if base is not None else "",
                "seed": seed,
                "turn": turn.name,
            }
            outcome = worker.run(
                "bratune.run.isolated:rounds_job", payload, limit_s=limit.of(len(cells)), retry=False
            )
            if outcome.ok:
                for cell, value in zip(cells, outcome.value, strict=True):
                    yield cell, self._result(cell, dataclasses.replace(outcome, value=value))
                return
            number = int(turn.read() or b"0")
        culprit = cells[min(number, len(cells) - 1)]
        yield culprit, self._result(culprit, outcome)
        worker.close()
        yield from self._in_turn(worker, [c for c in cells if c != culprit], limit, base, seed)

    def fresh(self) -> None:
        """End the worker; the next cell finds a new one."""
        self._worker.close()

    def _payload(self, cell: Cell, *, give_up_ms: float | None = None) -> dict[str, Any]:
        return {
            "cell": cell.to_dict(),
            "machine": self._inside.to_dict(),
            "settings": self.settings.replace(give_up_ms=give_up_ms).to_dict(),
        }

    def _result(self, cell: Cell, outcome: JobOutcome) -> Result:
        if outcome.ok:
            record = Record.from_dict(outcome.value["record"])
            return Result(record, tuple(outcome.value["samples_ms"]))
        reason = outcome.reason + ("; the same in a clean process" if outcome.retried else "")
        return Result(Record.of(cell, self.machine, outcome=outcome.status, reason=reason))

    @contextlib.contextmanager
    def _worker_for(self, cell: Cell) -> Iterator[Worker]:
        """The worker of this package's cells; of a backend of somebody else, one that ends with the cell."""
        if not _is_foreign(cell):
            yield self._worker
            return
        with self._new_worker() as self._foreign:
            try:
                yield self._foreign
            finally:
                self._foreign = None

    def interrupt(self) -> None:
        """Kill the worker in the middle of a cell."""
        for worker in (self._worker, self._foreign):
            if worker is not None:
                worker.interrupt()

    def close(self) -> None:
        """End the worker and everything that it started."""
        self._worker.close()


@dataclass(frozen=True)
class _Limit:
    """Most wall time of a cell in seconds, and when all time is up."""

    cell_s: float
    end: float

    def of(self, cells: int) -> float:
        """Most that so many cells may take now."""
        return max(0.1, min(cells * self.cell_s, self.end - time.monotonic()))


class IsolatedEngine(CellEngine):
    """A `bratune.run.engine.CellEngine` that measures in a worker process; close it after use.

    Args:
        machine: Where.
        settings: How cells are sampled.
        memory_limit_bytes: See `IsolatedRunner`.
        preload: See `IsolatedRunner`.
        options: Those of `bratune.run.engine.CellEngine`.
    """

    def __init__(
        self,
        machine: Machine,
        settings: MeterSettings,
        *,
        memory_limit_bytes: int | None = None,
        preload: Sequence[str] = (),
        **options: Any,
    ) -> None:
        runner = IsolatedRunner(machine, settings, memory_limit_bytes=memory_limit_bytes, preload=preload)
        super().__init__(runner, settings, **options)


def job(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one cell; runs in the worker.

    Raises:
        MemoryError: memory ran out, so that the worker is replaced and the cell tried once more.
    """
    machine, meter, settings = _begin(payload)
    _READY.clear()
    return _told(run_cell(Cell.from_dict(payload["cell"]), machine, meter, settings))


# The cells of a group that are ready to take turns in this worker, by their names.
_READY: dict[str, tuple[CheckedCell, Ready]] = {}
# What tensors held before the first of them was built, in MB.
_ALONE_MB = [0.0]


def ready_job(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make one cell of a group ready; runs in the worker. The row of one that may not be timed, else nothing.

    Raises:
        MemoryError: see `job`.
    """
    machine, meter, settings = _begin(payload)
    cell = Cell.from_dict(payload["cell"])
    if payload["first"]:
        _READY.clear()
        if cell.regime == "compile":
            forget_compiled()
        release()
        if cell.model and cell.part != "model" and cell.form != "yours":
            scenery_for(cell, machine.device)  # the maps that all cells of the group share
        _ALONE_MB[0] = live_mb(machine.device)
    others_mb = live_mb(machine.device) - _ALONE_MB[0]
    made = prepare(cell, machine)
    if isinstance(made, Record):
        return _told(Result(made))
    try:
        own = settings.replace(l2=cell.l2, regime=cell.regime)
        ready = meter.ready(made.work.call, own, before=made.work.before)
    except Exception as error:  # a backend or a driver may raise anything; the row says what
        return _told(Result(Record.of(cell, machine, **failure(error))))
    _READY[cell.cell_id] = made, _without(ready, others_mb)
    return None


def _without(ready: Ready, others_mb: float) -> Ready:
    """A call with the memory that it would have alone, without the cells that are ready beside it."""
    peak = ready.memory.peak_alloc_mb
    if peak is None:
        return ready
    memory = dataclasses.replace(ready.memory, peak_alloc_mb=peak - others_mb)
    return dataclasses.replace(ready, memory=memory)


def rounds_job(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Time the cells that are ready in turn; runs in the worker. A row for each, in order."""
    machine, meter, settings = _begin(payload)
    names = list(payload["cells"])
    players = [_READY[name] for name in names]
    base = names.index(payload["base"]) if payload["base"] in names else None
    turn = os.open(payload["turn"], os.O_WRONLY)

    def note(number: int) -> None:
        os.pwrite(turn, b"%4d" % number, 0)

    try:
        measured = meter.in_turn(
            [ready for _, ready in players],
            settings,
            seed=payload["seed"],
            keep=() if base is None else (base,),
            # The parts of a block are no rivals: none is hopeless because another one is faster.
            worse=CLEARLY_WORSE if len({checked.cell.part for checked, _ in players}) == 1 else None,
            on_turn=note,
        )
        rows = []
        for number, ((checked, _), found) in enumerate(zip(players, measured, strict=True)):
            note(number)
            result = finish(checked, machine, found)
            ratio = None if base in (None, number) else found.speedup_over(measured[base or 0])
            if ratio is not None:
                fields = dict(zip(("ratio", "ratio_lo", "ratio_hi"), ratio, strict=True))
                result = dataclasses.replace(result, record=result.record.replace(**fields))
            rows.append(_told(result))
    finally:
        os.close(turn)
        _READY.clear()
    return rows


def _told(result: Result) -> dict[str, Any]:
    """A row as the parent takes it."""
    if result.record.outcome == "oom":
        raise MemoryError(result.record.reason)
    return {"record": result.record.to_dict(), "samples_ms": list(result.samples_ms)}


def _begin(payload: Mapping[str, Any]) -> tuple[Machine, DeviceMeter, MeterSettings]:
    """The same process as before the first job, whatever jobs since have left in torch."""
    machine = Machine.from_dict(payload["machine"])
    meter = _meter(machine)
    _as_found().restore()
    return machine, meter, MeterSettings.from_dict(payload["settings"])


@functools.cache
def _as_found() -> TorchState:
    return TorchState.now()


@functools.lru_cache(maxsize=1)
def _meter(machine: Machine) -> DeviceMeter:
    if not machine.is_cuda and machine.threads:
        torch.set_num_threads(machine.threads)
    return DeviceMeter(device_for(machine))


def _is_foreign(cell: Cell) -> bool:
    """Whether a backend of the cell, or its mixer, is none of this package's."""
    if cell.form == "mixer":
        base, _, backend = cell.backend.partition(":")
        return base not in mixers.MIXERS or backend not in (*registry.BACKENDS, "auto", "")
    return any(name not in (*registry.BACKENDS, "auto", "") for name in cell.backend.split(","))


def _visible_name(uuid: str) -> str:
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
