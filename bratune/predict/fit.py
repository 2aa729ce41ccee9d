"""Fit: coefficients of the model from stored measured records.

Per backend (and per part that no backend computes) one factor, measured over modelled device time; the
host's time per launch from records that the host limits. A factor is carried to another GPU by that board's
specifications. Records of a CPU fit a model of that CPU only and never say anything about a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bratune import gpus, store
from bratune.cell import Cell
from bratune.errors import BratuneError, StoreError
from bratune.gpus import GPU
from bratune.kernels.tuned import machine_key
from bratune.predict.coefficients import TRANSFER_SPREAD, UNCALIBRATED, UNCALIBRATED_SPREAD, Coefficients
from bratune.predict.estimate import Estimate, estimate
from bratune.record import Record

__all__ = ["CPU_PRIOR", "FitSample", "board_of", "calibrate", "combine", "samples_of", "stored_coefficients"]

# A factor is fitted from at least this many records; a name with fewer takes the factor of all.
FEWEST = 3
# How many records the uncalibrated spread counts for when a spread is fitted.
PRIOR_RECORDS = 2
# A CPU: every operation is run by the thread that launches it, in a few microseconds.
CPU_PRIOR = Coefficients(host_us=4.0, gap_us=0.0, kernel_us=1.0)
# Nominal numbers of a CPU that nobody looked up; the fitted factors absorb them.
CPU_GFLOPS_PER_CORE = 50.0
CPU_MEMORY_GBPS = 20.0


@dataclass(frozen=True, kw_only=True)
class FitSample:
    """A measured record beside what the uncalibrated model makes of it.

    Attributes:
        cell: What was measured.
        gpu_key: Where.
        measured_ms: Median.
        base: The estimate without factors.
        name: The factor that it informs: a backend, a part, ``block`` or ``model``.
        launch_bound: Whether the host was slower than the device; by the model where the record does not
            say.
        cpu: Whether it was measured on a CPU.
        machine: What is held out together: the key of a GPU, the model and the cores of a CPU.
    """

    cell: Cell
    gpu_key: str
    measured_ms: float
    base: Estimate
    name: str
    launch_bound: bool
    cpu: bool
    machine: str = ""


def board_of(record: Record) -> GPU | None:
    """The board of a record, from the table, with the SM count and memory that the device reported."""
    if record.gpu_key == "cpu":
        return _cpu_board(record)
    board = gpus.match(record.gpu_name, memory_gib=record.memory_gib or 0.0, sm_count=record.sm_count or 0)
    if board is None:
        board = {b.key: b for b in gpus.table()}.get(record.gpu_key)
    return board


def _cpu_board(record: Record) -> GPU:
    threads = record.threads or record.sm_count or 1
    peak = threads * CPU_GFLOPS_PER_CORE / 1e3
    return GPU(
        key="cpu",
        name=record.gpu_name,
        architecture="CPU",
        sm_count=threads,
        boost_mhz=3000.0,
        memory_gib=record.memory_gib,
        memory_gbps=CPU_MEMORY_GBPS,
        l2_mib=32.0,
        fp32_tflops=peak,
        fp16_tensor_tflops=peak,
        bf16_tensor_tflops=peak,
        fp64_tflops=peak / 2,
    )


def samples_of(records: Iterable[Record]) -> list[FitSample]:
    """The measured records that the model can be compared with; others are left out."""
    found = []
    for record in records:
        if record.evidence != "measured" or not record.ok or not record.cell or record.median_ms is None:
            continue
        board = board_of(record)
        if board is None:
            continue
        try:
            cell = record.to_cell()
            if cell.form == "mixer":  # counted as models of timm are, and no part of a model of ours
                continue
            cpu = board.architecture == "CPU"
            base = estimate(cell, board, CPU_PRIOR if cpu else UNCALIBRATED, compiled=not cpu)
        except BratuneError:  # a backend of another package, a rate that is not known
            continue
        found.append(
            FitSample(
                cell=cell,
                gpu_key=record.gpu_key,
                measured_ms=record.median_ms,
                base=base,
                name=cell.backend if cell.part == "attention" else cell.part,
                launch_bound=base.launch_bound if record.launch_bound is None else record.launch_bound,
                cpu=board.architecture == "CPU",
                machine=machine_key(record.machine).rsplit("-", 2)[0] if cpu else record.gpu_key,
            )
        )
    return found


def combine(sample: FitSample, c: Coefficients) -> float:
    """The modelled milliseconds of a sample under other coefficients."""
    device_ms = sum(ms * c.factor(name) for name, ms in sample.base.by_group)
    host_ms = sample.base.host_ms
    if sample.cell.regime == "eager":
        host_ms *= c.host_us / (CPU_PRIOR if sample.cpu else UNCALIBRATED).host_us
    return device_ms + host_ms if sample.cpu else max(device_ms, host_ms)


def calibrate(samples: Sequence[FitSample], *, cpu: bool = False) -> Coefficients:
    """Coefficients that fit the samples of GPUs, or of a CPU; the uncalibrated ones where there are none."""
    prior = CPU_PRIOR if cpu else UNCALIBRATED
    used = [s for s in samples if s.cpu == cpu]
    if not used:
        return prior
    c = dataclasses.replace(
        prior,
        sources=tuple(sorted({s.gpu_key for s in used})),
        records=len(used),
    )
    if not cpu:
        c = _with_host(c, used)
    c = dataclasses.replace(c, factors=_factors(used))
    c = dataclasses.replace(c, spreads=_spreads(c, used))
    return dataclasses.replace(c, transfer=_transfer(used, cpu=cpu) or TRANSFER_SPREAD)


def _with_host(c: Coefficients, used: Sequence[FitSample]) -> Coefficients:
    limited = [
        s.measured_ms * 1e3 / s.base.launches
        for s in used
        if s.launch_bound and s.cell.regime == "eager" and s.base.launches
    ]
    if len(limited) < FEWEST:
        return c
    return dataclasses.replace(c, host_us=statistics.median(limited), host_fitted=True)


def _factors(used: Sequence[FitSample]) -> Mapping[str, float]:
    """Median measured over modelled device time by name, and over everything under the empty name."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for s in used:
        device_ms = s.base.device_ms
        host_ms = s.base.host_ms if s.cpu else 0.0
        if (s.launch_bound and not s.cpu) or s.cell.part in ("block", "model") or device_ms <= 0:
            continue
        ratio = max(s.measured_ms - host_ms, 0.1 * s.measured_ms) / device_ms
        ratios[s.name].append(ratio)
        ratios[""].append(ratio)
    return {
        name: _geometric_median(values) for name, values in sorted(ratios.items()) if len(values) >= FEWEST
    }


def _geometric_median(values: Sequence[float]) -> float:
    return math.exp(statistics.median(math.log(v) for v in values))


def _spreads(c: Coefficients, used: Sequence[FitSample]) -> Mapping[str, float]:
    residuals: dict[str, list[float]] = defaultdict(list)
    for s in used:
        residuals[s.name].append(math.log(s.measured_ms / combine(s, c)))
    prior = PRIOR_RECORDS * UNCALIBRATED_SPREAD**2
    return {
        name: math.sqrt((prior + sum(r * r for r in values)) / (PRIOR_RECORDS + len(values)))
        for name, values in sorted(residuals.items())
        if len(values) >= FEWEST
    }


def _transfer(used: Sequence[FitSample], *, cpu: bool) -> float | None:
    """What carrying over cost when each board was predicted from the others, as a spread in log."""
    keys = sorted({s.gpu_key for s in used})
    if cpu or len(keys) < 2:
        return None
    offsets = []
    for key in keys:
        others = [s for s in used if s.gpu_key != key]
        c = dataclasses.replace(UNCALIBRATED, factors=_factors(others))
        c = _with_host(c, others)
        own = [math.log(s.measured_ms / combine(s, c)) for s in used if s.gpu_key == key]
        offsets.append(statistics.median(own))
    prior = PRIOR_RECORDS * TRANSFER_SPREAD**2
    return math.sqrt((prior + sum(o * o for o in offsets)) / (PRIOR_RECORDS + len(offsets)))


@functools.cache
def stored_coefficients(*paths: str | os.PathLike[str]) -> Coefficients:
    """Coefficients from the records that ship with the package and those at ``paths``.

    Uncalibrated, and saying so, as long as none of them was measured on a GPU.
    """
    records: list[Record] = []
    for path in (*_shipped(), *map(Path, paths)):
        try:
            records += store.read_records([path])
        except StoreError:
            if path in map(Path, paths):
                raise
    return calibrate(samples_of(records))


def _shipped() -> tuple[Path, ...]:
    try:
        folder = Path(str(importlib.resources.files("bratune").joinpath("results")))
    except (ModuleNotFoundError, FileNotFoundError):
        return ()
    return (folder,) if folder.is_dir() else ()
