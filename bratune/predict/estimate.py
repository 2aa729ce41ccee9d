"""Estimate: the time of a cell on a board, as the sum of its kernels or as the time to launch them.

A cell is a list of kernels (`bratune.predict.parts`), each with a working time on the board
(`bratune.predict.roofline`). Eager, the host launches them one by one and the device follows: the cell takes
the longer of the two, so that a small batch costs what its launches cost, whatever its size. In a CUDA
graph only the device counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from bratune.cell import Cell
from bratune.gpus import GPU
from bratune.predict import parts, work
from bratune.predict.coefficients import UNCALIBRATED, Coefficients
from bratune.predict.compiled import BACKEND as COMPILED_BACKEND
from bratune.predict.compiled import CompiledTime, compiled_time
from bratune.predict.parts import Group
from bratune.predict.roofline import Rates, op_time, rates
from bratune.predict.work import Op

__all__ = ["Estimate", "estimate"]

# Host time of starting a captured graph, and of entering a compiled function.
GRAPH_LAUNCH_US = 8.0
COMPILED_ENTRY_US = 40.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A modelled time and what it consists of.

    Attributes:
        ms: Time of one call.
        device_ms: Time that the device is busy, gaps between kernels included.
        host_ms: Time that the host needs to launch everything.
        launches: Kernels launched.
        bound: What takes the largest share: ``memory``, ``cache``, ``compute``, ``cores`` or ``launches``.
        memory_bytes: Bytes from and to memory.
        by_group: Device milliseconds by part or backend, for the attribution of a measured time.
        detail: What is known of compiled kernels, in words.
    """

    ms: float
    device_ms: float
    host_ms: float
    launches: int
    bound: str
    memory_bytes: float
    by_group: tuple[tuple[str, float], ...]
    detail: str = ""

    @property
    def launch_bound(self) -> bool:
        """Whether the host is slower than the device."""
        return self.host_ms > self.device_ms


def estimate(cell: Cell, board: GPU, c: Coefficients = UNCALIBRATED, *, compiled: bool = False) -> Estimate:
    """The modelled time of a cell on a board.

    Args:
        cell: What is run.
        board: Where.
        c: Reached fractions and launch costs.
        compiled: Compile the kernels of the fused backend for the board and cost their machine code
            (seconds per new problem), instead of counting what they move and multiply.

    Raises:
        UnsupportedError: the work of its backend is not counted.
        UsageError: a rate that the model needs is not published.
    """
    peak = rates(board, cell.problem.dtype)
    shares: dict[str, float] = {}
    by_group: list[tuple[str, float]] = []
    device_us = memory_bytes = 0.0
    launches = 0
    details: list[str] = []
    for group in parts.groups(cell):
        ops = _as_run(group.ops, cell)
        count = sum(op.launches for op in ops)
        factor = group.times * c.factor(group.name)
        found = _compiled(group, board) if compiled else None
        if found is None:
            us, moved = _device_time(ops, cell, peak, c, shares, factor)
        else:
            us, moved, count = (
                _compiled_time(found, cell, c, shares, factor),
                found.memory_bytes,
                len(found.us),
            )
            details.append(found.detail)
        device_us += us
        memory_bytes += moved * group.times
        launches += group.times * count
        by_group.append((group.name, us / 1e3))
    host_us = _host_time(launches, cell, c)
    # A CPU runs what it launches: nothing overlaps.
    total_us = device_us + host_us if board.architecture == "CPU" else max(device_us, host_us)
    bound = max(shares, key=lambda name: shares[name]) if shares else "launches"
    if host_us > device_us:
        bound = "launches"
    return Estimate(
        ms=total_us / 1e3,
        device_ms=device_us / 1e3,
        host_ms=host_us / 1e3,
        launches=launches,
        bound=bound,
        memory_bytes=memory_bytes,
        by_group=tuple(by_group),
        detail="; ".join(dict.fromkeys(details)),
    )


def _compiled(group: Group, board: GPU) -> CompiledTime | None:
    if group.name != COMPILED_BACKEND or group.problem is None:
        return None
    return compiled_time(group.problem, board)


def _compiled_time(
    found: CompiledTime, cell: Cell, c: Coefficients, shares: dict[str, float], factor: float
) -> float:
    """Microseconds of compiled kernels on the device; adds to the shares of each bound."""
    gap = c.graph_gap_us if cell.regime == "graph" else c.gap_us
    total = 0.0
    for us in found.us:
        worked = max(us or 0.0, c.kernel_us)
        bound = found.bound if us and us > c.kernel_us else "launches"
        shares[bound] = shares.get(bound, 0.0) + (worked + gap) * factor
        total += (worked + gap) * factor
    return total


def _as_run(ops: tuple[Op, ...], cell: Cell) -> tuple[Op, ...]:
    if cell.problem.backward:
        ops = (*ops, *work.backward_ops(ops))
    return work.fuse(ops) if cell.regime == "compile" else ops


def _device_time(
    ops: tuple[Op, ...], cell: Cell, peak: Rates, c: Coefficients, shares: dict[str, float], factor: float
) -> tuple[float, float]:
    """Microseconds on the device and bytes moved; adds to the shares of each bound."""
    gap = c.graph_gap_us if cell.regime == "graph" else c.gap_us
    total = moved = 0.0
    for op in ops:
        one = op_time(op, peak, c, warm=cell.l2 == "warm")
        floor = (c.kernel_us + gap) * op.launches
        worked = one.us + gap * op.launches
        bound = one.bound if worked > floor else "launches"
        us = max(worked, floor) * factor
        shares[bound] = shares.get(bound, 0.0) + us
        total += us
        moved += one.memory_bytes
    return total, moved


def _host_time(launches: int, cell: Cell, c: Coefficients) -> float:
    if cell.regime == "graph":
        return GRAPH_LAUNCH_US
    if cell.regime == "compile":
        return COMPILED_ENTRY_US + launches * c.compiled_host_us
    # Autocast adds a cast of every weight.
    return launches * c.host_us * (1.3 if cell.amp else 1.0)
