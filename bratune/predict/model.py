"""Model: rows about a GPU that need not be here.

Every modelled row has a 95 % interval and says what its coefficients rest on; a `bound` row beside it holds
what no implementation can beat.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable, Iterator
from typing import Any

import bratune
from bratune import gpus
from bratune import variant as variants
from bratune.cell import Cell
from bratune.errors import UnsupportedError
from bratune.gpus import GPU
from bratune.machine import Machine
from bratune.predict import parts, work
from bratune.predict.coefficients import HOSTS, UNCALIBRATED, UNCALIBRATED_SPREAD, Coefficients
from bratune.predict.estimate import Estimate, as_counted, estimate, is_peer, peer_loads_of
from bratune.predict.public import public_rates
from bratune.predict.roofline import rates
from bratune.record import Record

__all__ = ["ModelEngine", "absent_machine", "basis", "bound_cell", "interval_ms", "predict_cell"]

Z95 = 1.96
# What a part, or attention alone, may be off by beyond what whole models are, in log at 95 %.
PART_REACH = math.log(2)
# What a host's time per operation differs by between models, at 95 %.
HOST_FACTOR = 1.3
# What speedups are relative to: what the paper describes and the official code does.
BASELINE = "gather"


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


def predict_cell(
    cell: Cell, gpu: GPU, coefficients: Coefficients | None = None, *, compiled: bool = False
) -> Record:
    """The modelled row of a cell on a board: a time, its 95 % interval and what limits it.

    Args:
        cell: Any cell, a whole model included.
        gpu: The board, e.g. from `bratune.gpus.resolve`.
        coefficients: From `bratune.predict.fit`; by default uncalibrated, with wide intervals.
        compiled: See `estimate`.

    Returns:
        A record with evidence ``modelled``. ``reason`` says what the coefficients rest on. A dtype that the
        board cannot compute in, a backend that refuses the problem there and a backend whose work is not
        counted give an ``unsupported`` row with the reason.
    """
    c = coefficients or UNCALIBRATED
    machine = absent_machine(gpu)
    asked = cell
    reasons: tuple[str, ...] = ()
    found: Estimate | None = None
    try:
        cell = as_counted(cell)
        reasons = _why_not(cell, gpu, machine)
        found = None if reasons else estimate(cell, gpu, c, compiled=compiled)
    except UnsupportedError as error:
        reasons = error.reasons
    if found is None:
        why = "; ".join(reasons)
        return Record.of(asked, machine, evidence="modelled", outcome="unsupported", reason=why)
    floor_ms = _floor_ms(cell, gpu)
    ms = max(found.ms, floor_ms)
    lo_ms, hi_ms = interval_ms(cell, gpu, c, found)
    lo_ms = max(floor_ms, lo_ms)
    return Record.of(
        asked,
        machine,
        evidence="modelled",
        outcome="modelled",
        reason="; ".join(filter(None, (basis(cell, gpu, c, found), found.detail))),
        median_ms=ms,
        ci_lo_ms=min(lo_ms, ms),
        ci_hi_ms=max(hi_ms, ms),
        noise_pct=50 * (hi_ms - lo_ms) / ms,
        host_ms=found.host_ms,
        launch_bound=found.launch_bound,
        bound=found.bound,
        roofline_pct=100 * floor_ms / ms,
        gb_s=found.memory_bytes / ms / 1e6,
        **_derived(cell, ms),
        **_memory(cell),
        **_speedup(cell, gpu, c, ms),
    )


def interval_ms(cell: Cell, gpu: GPU, c: Coefficients, found: Estimate) -> tuple[float, float]:
    """The 95 % interval of an estimate, in milliseconds.

    Where records of its backend or part were fitted, it follows from their residuals. Else the part of the
    device's time that public rates speak of is as uncertain as they were on held-out models, the rest is
    uncalibrated, and a host that nobody described may be any of `bratune.predict.coefficients.HOSTS`.
    """
    name = _calibration_name(cell)
    if found.public is None or name in c.spreads:
        reach = Z95 * c.spread(name, gpu.key)
        return found.ms * math.exp(-reach), found.ms * math.exp(reach)
    p, own = found.public, found.own_ms
    shared = found.device_ms - own
    # A rate of a single kind is known less well than the sum of many.
    part = 0.0 if cell.part == "model" else PART_REACH
    lo = found.device_ms - math.hypot(
        shared * (1 - math.exp(-math.hypot(p.lo, part))), own * (1 - math.exp(-Z95 * UNCALIBRATED_SPREAD))
    )
    hi = found.device_ms + math.hypot(
        shared * (math.exp(math.hypot(p.hi, part)) - 1), own * (math.exp(Z95 * UNCALIBRATED_SPREAD) - 1)
    )
    if cell.regime != "eager":
        return max(lo, found.host_ms / HOST_FACTOR), max(hi, found.host_ms * HOST_FACTOR)
    known = c.host_fitted
    low = found.host_ms * (1 / HOST_FACTOR if known else HOSTS["fast"] / c.host_us)
    high = found.host_ms * (HOST_FACTOR if known else HOSTS["slow"] / c.host_us)
    return max(lo, low), max(hi, high)


def basis(cell: Cell, gpu: GPU, c: Coefficients, found: Estimate) -> str:
    """What an estimate rests on, in words."""
    name = _calibration_name(cell)
    if found.public is None or name in c.spreads:
        return c.describe(name, gpu.key)
    said = [found.public.basis]
    own = 100 * found.own_ms / found.device_ms if found.device_ms else 0.0
    if own >= 0.5:
        said.append(
            f"{own:.0f} % of the device's time is in operations that nobody published the like of "
            "(gathering along routes, routing, attention over routed keys): counted, uncalibrated"
        )
    if cell.regime == "eager" and found.launch_bound:
        usual = "" if c.host_fitted else f" (a typical host, others {HOSTS['fast']:g} to {HOSTS['slow']:g})"
        said.append(f"the host limits it, at {c.host_us:g} us per operation{usual}")
    return "; ".join(said)


def bound_cell(cell: Cell, gpu: GPU) -> Record:
    """What no implementation of a cell can beat on a board: its least bytes or its least arithmetic.

    Returns:
        A record with evidence ``bound``, whose interval is the point itself; ``bound`` says which of
        ``memory`` and ``compute`` it is. An ``unsupported`` row where the board cannot compute in the dtype.
    """
    machine = absent_machine(gpu)
    if reason := gpus.why_not_dtype(gpu, cell.problem.dtype):
        return Record.of(cell, machine, evidence="bound", outcome="unsupported", reason=reason)
    memory_ms, compute_ms = _floor_terms(as_counted(cell) if cell.form == "published" else cell, gpu)
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
    read, written, macs = _least_of_peer(cell) if is_peer(cell) else _least(cell)
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


def _least_of_peer(cell: Cell) -> tuple[float, float, float]:
    macs = sum(load.macs for load in peer_loads_of(cell).values())
    p = cell.problem
    return float(p.batch * 3 * cell.image[0] * cell.image[1] * p.item_bytes), 0.0, macs


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
        return [(cell.problem, cell.backend)] if parts.block_of(cell).kind == "routed" else []
    if cell.part == "model" and not is_peer(cell):
        return [(b.problem, b.backend) for b, _ in parts.model_blocks(cell) if b.kind == "routed"]
    return []


def _why_not(cell: Cell, gpu: GPU, machine: Machine) -> tuple[str, ...]:
    """Every obstacle on that board: the dtype, memory, and what the backends themselves say."""
    from bratune.kernels import registry

    if reason := gpus.why_not_dtype(gpu, cell.problem.dtype):
        return (reason,)
    reasons: list[str] = []
    for problem, name in _stage_backends(cell):
        if name in registry.known_names():
            reasons += registry.get(name).why_not(problem, machine)
        needed = problem.io_bytes + _backend_workspace(problem, name)
        if machine.memory_bytes and needed > machine.memory_bytes:
            reasons.append(
                f"{name} needs {needed / 2**30:.1f} GiB for one call; {gpu.name} has {gpu.memory_gib:g}"
            )
    return tuple(dict.fromkeys(reasons))


def _backend_workspace(problem: Any, name: str) -> int:
    from bratune.kernels import registry

    return registry.get(name).workspace_bytes(problem) if name in registry.known_names() else 0


def _memory(cell: Cell) -> dict[str, Any]:
    """Workspace of the backends, and the peak with inputs and weights, by counting what lives at once."""
    calls = _stage_backends(cell)
    if cell.part == "attention" and not calls:
        written = sum(op.written for group in parts.groups(cell) for op in group.ops)
        return {"peak_alloc_mb": (cell.problem.io_bytes + written) / 1e6}
    if not calls or is_peer(cell):
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
    if not cell.backend or is_peer(cell):
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
        compiled: Compile the fused kernels for the board (see `estimate`); seconds per new problem.

    Raises:
        UsageError: a rate that the model needs is not published for this board.
    """

    slots = passes = 1
    turns = False

    def __init__(self, gpu: GPU, coefficients: Coefficients | None = None, *, compiled: bool = True) -> None:
        rates(gpu, "float32")
        self.compiled = compiled
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
        public = public_rates(self.gpu, rates(self.gpu, "float32"), dtype="float16")
        said = public.basis if public else "uncalibrated"
        if c.records:
            said = c.describe("", self.gpu.key)
        return f"{self.gpu.name} is not here: rows are modelled, not measured ({said})"

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        """One modelled row per cell, in the order of the cells."""
        for cell in cells:
            yield predict_cell(cell, self.gpu, self.coefficients, compiled=self.compiled)
