"""Model: the time of a cell on a GPU that need not be here.

A cell is a list of kernels (`bratune.predict.parts`), each with a working time on the board
(`bratune.predict.roofline`). Eager, the host launches them one by one and the device follows: the cell takes
the longer of the two, so that a small batch costs what its launches cost, whatever its size. In a CUDA
graph only the device counts. Every row has a 95 % interval and says what its coefficients rest on; a `bound`
row beside it holds what no implementation can beat.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import bratune
from bratune import gpus
from bratune import variant as variants
from bratune.cell import Cell
from bratune.errors import UnsupportedError
from bratune.gpus import GPU
from bratune.machine import Machine
from bratune.predict import parts, work
from bratune.predict.coefficients import UNCALIBRATED, Coefficients
from bratune.predict.roofline import Rates, op_time, rates
from bratune.predict.work import Op
from bratune.record import Record

__all__ = ["Estimate", "ModelEngine", "absent_machine", "bound_cell", "estimate", "predict_cell"]

# Host time of starting a captured graph, and of entering a compiled function.
GRAPH_LAUNCH_US = 8.0
COMPILED_ENTRY_US = 40.0
Z95 = 1.96
# What speedups are relative to: what the paper describes and the official code does.
BASELINE = "gather"


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
    """

    ms: float
    device_ms: float
    host_ms: float
    launches: int
    bound: str
    memory_bytes: float
    by_group: tuple[tuple[str, float], ...]

    @property
    def launch_bound(self) -> bool:
        """Whether the host is slower than the device."""
        return self.host_ms > self.device_ms


def estimate(cell: Cell, board: GPU, c: Coefficients = UNCALIBRATED) -> Estimate:
    """The modelled time of a cell on a board.

    Raises:
        UnsupportedError: the work of its backend is not counted.
        UsageError: a rate that the model needs is not published.
    """
    peak = rates(board, cell.problem.dtype)
    shares: dict[str, float] = {}
    by_group: list[tuple[str, float]] = []
    device_us = memory_bytes = 0.0
    launches = 0
    for group in parts.groups(cell):
        ops = _as_run(group.ops, cell)
        us, moved = _device_time(ops, cell, peak, c, shares, group.times * c.factor(group.name))
        device_us += us
        memory_bytes += moved * group.times
        launches += group.times * sum(op.launches for op in ops)
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
    )


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


# --- records ------------------------------------------------------------------------------------------


def absent_machine(board: GPU) -> Machine:
    """A machine with this board, as far as the table knows it; versions are those installed here."""
    return Machine(
        kind="cuda",
        device="absent",
        gpu_key=board.key,
        gpu_name=board.name,
        compute_capability=board.compute_capability if board.capability != (0, 0) else "",
        sm_count=board.sm_count or 0,
        memory_gib=board.memory_gib or 0.0,
        l2_bytes=int((board.l2_mib or 0.0) * 2**20),
        smem_per_block_kib=int(board.smem_per_block_optin_kib or 0),
        torch=_version("torch"),
        triton=_version("triton"),
        bratune=bratune.__version__,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def predict_cell(cell: Cell, gpu: GPU, coefficients: Coefficients | None = None) -> Record:
    """The modelled row of a cell on a board: a time, its 95 % interval and what limits it.

    Args:
        cell: Any cell, a whole model included.
        gpu: The board, e.g. from `bratune.gpus.resolve`.
        coefficients: From `bratune.predict.fit`; by default uncalibrated, with wide intervals.

    Returns:
        A record with evidence ``modelled``. ``reason`` says what the coefficients rest on. A dtype that the
        board cannot compute in, a backend that refuses the problem there and a backend whose work is not
        counted give an ``unsupported`` row with the reason.
    """
    c = coefficients or UNCALIBRATED
    machine = absent_machine(gpu)
    reasons = _why_not(cell, gpu, machine)
    try:
        found = None if reasons else estimate(cell, gpu, c)
    except UnsupportedError as error:
        found, reasons = None, error.reasons
    if found is None:
        return Record.of(cell, machine, evidence="modelled", outcome="unsupported", reason="; ".join(reasons))
    floor_ms = _floor_ms(cell, gpu)
    name = _calibration_name(cell)
    spread = c.spread(name, gpu.key)
    return Record.of(
        cell,
        machine,
        evidence="modelled",
        outcome="modelled",
        reason=c.describe(name, gpu.key),
        median_ms=found.ms,
        ci_lo_ms=max(floor_ms, found.ms * math.exp(-Z95 * spread)),
        ci_hi_ms=found.ms * math.exp(Z95 * spread),
        noise_pct=50 * (math.exp(Z95 * spread) - max(floor_ms / found.ms, math.exp(-Z95 * spread))),
        host_ms=found.host_ms,
        launch_bound=found.launch_bound,
        bound=found.bound,
        roofline_pct=100 * floor_ms / found.ms,
        gb_s=found.memory_bytes / found.ms / 1e6,
        **_derived(cell, found.ms),
        **_memory(cell),
        **_speedup(cell, gpu, c, found.ms),
    )


def bound_cell(cell: Cell, gpu: GPU) -> Record:
    """What no implementation of a cell can beat on a board: its least bytes or its least arithmetic.

    Returns:
        A record with evidence ``bound``, whose interval is the point itself; ``bound`` says which of
        ``memory`` and ``compute`` it is. An ``unsupported`` row where the board cannot compute in the dtype.
    """
    machine = absent_machine(gpu)
    if reason := gpus.why_not_dtype(gpu, cell.problem.dtype):
        return Record.of(cell, machine, evidence="bound", outcome="unsupported", reason=reason)
    memory_ms, compute_ms = _floor_terms(cell, gpu)
    ms = max(memory_ms, compute_ms)
    return Record.of(
        cell,
        machine,
        evidence="bound",
        outcome="modelled",
        reason="published peaks, least bytes and least arithmetic",
        median_ms=ms,
        ci_lo_ms=ms,
        ci_hi_ms=ms,
        bound="memory" if memory_ms >= compute_ms else "compute",
        roofline_pct=100.0,
        **_derived(cell, ms),
    )


def _floor_ms(cell: Cell, gpu: GPU) -> float:
    return max(_floor_terms(cell, gpu))


def _floor_terms(cell: Cell, gpu: GPU) -> tuple[float, float]:
    """Milliseconds that the least bytes and the least arithmetic of a cell take at the published peaks."""
    peak = rates(gpu, cell.problem.dtype)
    read, written, macs = _least(cell)
    cache = (gpu.l2_mib or 0.0) * 2**20
    # What is written may stay in the cache as far as it fits; so may what is read, when it is warm.
    moved = max(0.0, read + written - cache) if cell.l2 == "warm" else read + max(0.0, written - cache)
    return moved / peak.memory * 1e3, 2 * macs / peak.matrix * 1e3


def _least(cell: Cell) -> tuple[float, float, float]:
    """Bytes read, bytes written and multiply-adds that any implementation of a cell needs."""
    p = cell.problem
    passes = 3 if p.backward else 1
    if cell.part == "attention":
        out = p.batch * p.tokens * p.v_channels * p.item_bytes
        inputs = p.io_bytes - out
        # Backward reads the inputs and two output-sized tensors, and writes a gradient per input.
        read, written = (inputs + 2 * out, out + inputs) if p.backward else (inputs, out)
        return read, written, p.attention_macs * passes
    if cell.part == "model":
        return _least_of_model(cell, passes)
    every = parts.groups(cell)
    # One kernel would read the first input and write the last output, and keep the rest on chip.
    first, last = every[0].ops[0], every[-1].ops[-1]
    macs = sum(op.macs * group.times for group in every for op in group.ops if op.kind == "matmul")
    return first.cold or first.read, last.written, macs * passes


def _least_of_model(cell: Cell, passes: int) -> tuple[float, float, float]:
    variant, found = parts.model_stages(cell)
    p = cell.problem
    image = p.batch * 3 * cell.image[0] * cell.image[1]
    linear = sum(
        s.blocks * p.batch * s.height * s.width * s.dim**2 * (4 + 2 * variant.mlp_ratio) for s in found
    )
    attention = sum(s.blocks * s.problem.attention_macs for s in found if s.problem is not None)
    weights = variant.parameters * p.item_bytes
    return image * p.item_bytes + weights, weights if p.backward else 0.0, float(linear + attention) * passes


def _derived(cell: Cell, ms: float) -> dict[str, Any]:
    p = cell.problem
    values: dict[str, Any] = {}
    if cell.part == "model":
        values["images_per_s"] = p.batch / ms * 1e3
    if cell.part == "attention":
        values["tflops_s"] = 2 * work.useful_macs(p) / ms / 1e9
    return values


def _calibration_name(cell: Cell) -> str:
    """Whose spread a cell's interval takes."""
    if cell.part == "attention":
        return cell.backend
    return cell.part


def _stage_backends(cell: Cell) -> list[tuple[Any, str]]:
    """The problems of a cell with the backend of each; full attention is not a backend's business."""
    if cell.part == "attention" and cell.backend:
        return [(cell.problem, cell.backend)]
    if cell.part == "model":
        return [(b.problem, b.backend) for b, _ in parts.model_blocks(cell) if b.kind == "routed"]
    return []


def _why_not(cell: Cell, gpu: GPU, machine: Machine) -> tuple[str, ...]:
    """Every obstacle on that board: the dtype, memory, and what the backends themselves say."""
    from bratune.kernels import registry

    if reason := gpus.why_not_dtype(gpu, cell.problem.dtype):
        return (reason,)
    reasons: list[str] = []
    for problem, name in _stage_backends(cell):
        if name in registry.names():
            reasons += registry.get(name).why_not(problem, machine)
        needed = problem.io_bytes + _backend_workspace(problem, name)
        if machine.memory_bytes and needed > machine.memory_bytes:
            reasons.append(
                f"{name} needs {needed / 2**30:.1f} GiB for one call; {gpu.name} has {gpu.memory_gib:g}"
            )
    return tuple(dict.fromkeys(reasons))


def _backend_workspace(problem: Any, name: str) -> int:
    from bratune.kernels import registry

    return registry.get(name).workspace_bytes(problem) if name in registry.names() else 0


def _memory(cell: Cell) -> dict[str, Any]:
    """Workspace of the backends, and the peak with inputs and weights, by counting what lives at once."""
    calls = _stage_backends(cell)
    if not calls:
        return {}
    workspace = max(_backend_workspace(problem, name) for problem, name in calls)
    if cell.part == "attention":
        return {"workspace_mb": workspace / 1e6, "peak_alloc_mb": (cell.problem.io_bytes + workspace) / 1e6}
    weights = variants.get_variant(cell.model).parameters * cell.problem.item_bytes
    every = parts.groups(cell)
    if cell.problem.backward:  # weights, gradients, and every output is kept for the backward pass
        live = weights + sum(op.written * group.times for group in every for op in group.ops)
    else:
        largest = max(op.read + op.written for group in every for op in group.ops)
        live = max(largest, max(problem.io_bytes for problem, _ in calls) + workspace)
    return {"workspace_mb": workspace / 1e6, "peak_alloc_mb": (weights + live) / 1e6}


def _speedup(cell: Cell, gpu: GPU, c: Coefficients, ms: float) -> dict[str, Any]:
    """Against gather-then-dense on the same board, by the same model."""
    if not cell.backend:
        return {}
    base = estimate(cell.replace(backend=BASELINE, config="{}"), gpu, c)
    return {"speedup": base.ms / ms, "baseline": BASELINE}


class ModelEngine:
    """An engine (`bratune.engine.Engine`) that answers with modelled rows for a board that is not here.

    Profiling runs on it unchanged::

        engine = ModelEngine(gpus.resolve("a100"), fit.stored_coefficients())
        for record in engine.run(cells): ...     # evidence "modelled", outcome "modelled" or "unsupported"

    Args:
        gpu: The board.
        coefficients: From `bratune.predict.fit`; by default uncalibrated.

    Raises:
        UsageError: a rate that the model needs is not published for this board.
    """

    def __init__(self, gpu: GPU, coefficients: Coefficients | None = None) -> None:
        rates(gpu, "float32")
        self.gpu = gpu
        self.coefficients = coefficients or UNCALIBRATED
        self._machine = absent_machine(gpu)

    @property
    def machine(self) -> Machine:
        """The absent machine, described from the table."""
        return self._machine

    @property
    def notice(self) -> str:
        """One sentence for the first line on stderr: the GPU is not here, and what the rows are."""
        c = self.coefficients
        basis = c.describe("", self.gpu.key) if c.records else "uncalibrated"
        return f"{self.gpu.name} is not here: rows are modelled, not measured ({basis})"

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """One modelled row per cell, in the order of the cells."""
        for cell in cells:
            yield predict_cell(cell, self.gpu, self.coefficients)
