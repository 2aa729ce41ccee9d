"""Estimate: the time of a cell on a board, as the sum of its kernels or as the time to launch them.

A cell is a list of kernels (`bratune.predict.parts`), each with a working time on the board
(`bratune.predict.roofline`). Eager, the host launches them one by one and the device follows: the cell takes
the longer of the two, so that a small batch costs what its launches cost, whatever its size. In a CUDA
graph only the device counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bratune.cell import Cell
from bratune.errors import ProblemError, UnsupportedError
from bratune.gpus import GPU
from bratune.kernels.mixers.registry import ROUTED
from bratune.predict import parts, work
from bratune.predict.coefficients import UNCALIBRATED, Coefficients
from bratune.predict.compiled import BACKEND as COMPILED_BACKEND
from bratune.predict.compiled import CompiledTime, compiled_time
from bratune.predict.counted import Load, mixer_loads, peer_loads
from bratune.predict.parts import Group
from bratune.predict.public import PublicRates, public_rates
from bratune.predict.roofline import Rates, op_time, public_time, rates
from bratune.predict.work import Op
from bratune.variant import VARIANTS

__all__ = ["Estimate", "as_counted", "estimate", "is_peer", "peer_loads_of"]

# Host time of starting a captured graph, and of entering a compiled function.
GRAPH_LAUNCH_US = 8.0
COMPILED_ENTRY_US = 40.0
# What the published composition of a model attends with.
PUBLISHED_BACKEND = "gather"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A modelled time and what it consists of.

    Attributes:
        ms: Time of one call.
        device_ms: Time that the device is busy, gaps between kernels included.
        host_ms: Time that the host needs to launch everything.
        launches: Kernels launched.
        bound: What takes the largest share: ``memory``, ``cache``, ``compute``, ``cores``, ``latency`` or
            ``launches``.
        memory_bytes: Bytes from and to memory.
        by_group: Device milliseconds by part or backend, for the attribution of a measured time.
        detail: What is known of compiled kernels, in words.
        by_kind: Device microseconds by kind of operation; those that nobody published the like of by the
            name of their part or backend.
        own_ms: Device milliseconds of the latter.
        public: The public rates that the rest was timed with; None where there are none.
    """

    ms: float
    device_ms: float
    host_ms: float
    launches: int
    bound: str
    memory_bytes: float
    by_group: tuple[tuple[str, float], ...]
    detail: str = ""
    by_kind: Mapping[str, float] = field(default_factory=dict)
    own_ms: float = 0.0
    public: PublicRates | None = None

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
        UnsupportedError: the work of its backend is not counted, or nothing public speaks of a peer's.
        BratuneError: see `bratune.predict.counted.count_peer`.
        UsageError: a rate that the model needs is not published.
    """
    cell = as_counted(cell)
    peak = rates(board, cell.problem.dtype)
    public = public_rates(
        board,
        peak,
        regime=cell.regime,
        layout=cell.layout,
        amp=cell.amp,
        dtype=cell.problem.dtype,
        backward=cell.problem.backward,
    )
    if is_peer(cell):
        return _peer(cell, board, peak, c, public)
    clock = _Clock(cell=cell, peak=peak, c=c, public=public)
    by_group: list[tuple[str, float]] = []
    launches = 0
    details: list[str] = []
    for group in parts.groups(cell):
        ops = group.ops if not cell.problem.backward else (*group.ops, *work.backward_ops(group.ops))
        fused = work.fuse(ops) if cell.regime == "compile" else ops
        count = sum(op.launches for op in fused)
        factor = group.times * c.factor(group.name)
        found = _compiled(group, board) if compiled else None
        if found is None:
            # Public rates of compiled models are per operation before anything is fused.
            us = clock.add(group, fused if public is None else ops, factor)
        else:
            us, count = clock.add_compiled(group, found, factor), len(found.us)
            details.append(found.detail)
        launches += group.times * count
        by_group.append((group.name, us / 1e3))
    return _total(clock, board, launches, tuple(by_group), "; ".join(dict.fromkeys(details)))


def is_peer(cell: Cell) -> bool:
    """Whether a cell is a whole model of timm, or mixers: what is counted by running it on meta tensors."""
    return cell.form == "mixer" or (
        cell.part == "model" and (cell.form == "timm" or cell.model not in VARIANTS)
    )


def as_counted(cell: Cell) -> Cell:
    """The cell whose kernels are listed for a form of a whole model.

    Raises:
        UnsupportedError: nobody listed what that form runs.
    """
    if cell.form == "mixer":
        return _routed_as_counted(cell)
    if cell.part != "model" or cell.form in ("plain", "timm"):
        return cell
    if cell.form == "published":
        return cell.replace(form="plain", backend=PUBLISHED_BACKEND)
    why = f"the operations that the form {cell.form!r} merges are not listed; plain and published are"
    raise UnsupportedError(cell.backend or cell.form, [why])


def _routed_as_counted(cell: Cell) -> Cell:
    """The network of bi-level routing by a backend as the model that it is; any other mixer as it is."""
    base, _, backend = cell.backend.partition(":")
    if base != ROUTED:
        return cell
    if cell.part != "model" or backend in ("", "auto"):
        why = "its operations are listed for a whole model by a named backend, e.g. bi-level-routing:gather"
        raise UnsupportedError(cell.backend, [why])
    found = cell.replace(form="plain", backend=backend)
    try:
        parts.model_blocks(found)
    except ProblemError as error:
        raise UnsupportedError(cell.backend, [str(error)]) from None
    return found


@dataclass(kw_only=True)
class _Clock:
    """Adds up kernels: their time by what limits it and by kind, and their bytes from memory."""

    cell: Cell
    peak: Rates
    c: Coefficients
    public: PublicRates | None
    shares: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    own_us: float = 0.0
    memory_bytes: float = 0.0

    @property
    def gap_us(self) -> float:
        return self.c.graph_gap_us if self.cell.regime == "graph" else self.c.gap_us

    def add(self, group: Group, ops: tuple[Op, ...], factor: float) -> float:
        """Microseconds of kernels on the device."""
        total = 0.0
        warm = self.cell.l2 == "warm"
        for op in ops:
            # Where everybody attends to everybody, a fused attention is what others have measured.
            kind = "attention" if op.kind == "fused" and group.problem is None else op.rate_kind
            if self.public is None or not kind:
                one = op_time(op, self.peak, self.c, warm=warm)
            else:
                one = public_time(op, kind, self.peak, self.public, warm=warm)
            floor = (self.c.kernel_us + self.gap_us) * op.launches
            if self.cell.regime == "compile" and self.public is not None:
                floor = 0.0  # most of these are not kernels of their own
            worked = one.us + self.gap_us * op.launches * bool(floor)
            unknown = not kind or op.kind == "gather"
            us = max(worked, floor) * factor
            self._note(one.bound if worked > floor else "launches", group.name if unknown else kind, us)
            self.own_us += us * unknown
            self.memory_bytes += one.memory_bytes * group.times
            total += us
        return total

    def add_compiled(self, group: Group, found: CompiledTime, factor: float) -> float:
        """Microseconds of compiled kernels on the device."""
        total = 0.0
        for us in found.us:
            worked = (max(us or 0.0, self.c.kernel_us) + self.gap_us) * factor
            self._note(found.bound if us and us > self.c.kernel_us else "launches", group.name, worked)
            total += worked
        self.own_us += total
        self.memory_bytes += found.memory_bytes * group.times
        return total

    def _note(self, bound: str, kind: str, us: float) -> None:
        self.shares[bound] = self.shares.get(bound, 0.0) + us
        self.kinds[kind] = self.kinds.get(kind, 0.0) + us


def _total(
    clock: _Clock, board: GPU, launches: int, by_group: tuple[tuple[str, float], ...], detail: str = ""
) -> Estimate:
    cell, shares = clock.cell, clock.shares
    device_us = sum(shares.values())
    if cell.regime == "compile" and clock.public is not None:
        device_us = max(device_us, launches * (clock.c.kernel_us + clock.gap_us))
    host_us = _host_time(launches, cell, clock.c)
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
        memory_bytes=clock.memory_bytes,
        by_group=by_group,
        detail=detail,
        by_kind=clock.kinds,
        own_ms=clock.own_us / 1e3,
        public=clock.public,
    )


def peer_loads_of(cell: Cell) -> Mapping[str, Load]:
    """What the model of a peer's cell does, by kind; see `peer_loads` and `mixer_loads`."""
    p = cell.problem
    if cell.form == "mixer":
        if p.backward:
            why = (
                "a training step is not modelled: the backward pass of fused attention is not counted as one"
            )
            raise UnsupportedError(cell.backend, [why])
        n_win = int(cell.n_win.split(",")[0])
        where = (cell.part, cell.stage, cell.image, n_win)
        return mixer_loads(cell.backend, *where, p.batch, p.item_bytes)
    return peer_loads(cell.model, cell.image, p.batch, p.item_bytes, p.backward)


def _peer(cell: Cell, board: GPU, peak: Rates, c: Coefficients, public: PublicRates | None) -> Estimate:
    """A model of timm, or mixers, by its counted operations."""
    if public is None:
        raise UnsupportedError(
            cell.backend or cell.model,
            [f"nothing public says how fast its operations are on {board.name} in this dtype"],
        )
    clock = _Clock(cell=cell, peak=peak, c=c, public=public)
    launches = 0
    for kind, load in peer_loads_of(cell).items():
        count = round(load.launches)
        launches += count
        compute, moving = public.macs_us(kind, load.macs), public.moved_us(kind, load.moved)
        floor = 0.0 if cell.regime == "compile" else (c.kernel_us + clock.gap_us) * count
        us = max(compute + moving, floor)
        bound = "launches" if us == floor else "compute" if compute > moving else "memory"
        clock._note(bound, kind, us)
        clock.memory_bytes += load.moved
    device = sum(clock.shares.values())
    return _total(clock, board, launches, ((cell.part, device / 1e3),))


def _compiled(group: Group, board: GPU) -> CompiledTime | None:
    if group.name != COMPILED_BACKEND or group.problem is None:
        return None
    return compiled_time(group.problem, board)


def _host_time(launches: int, cell: Cell, c: Coefficients) -> float:
    if cell.regime == "graph":
        return GRAPH_LAUNCH_US
    if cell.regime == "compile":
        return COMPILED_ENTRY_US + launches * c.compiled_host_us
    # Autocast adds a cast of every weight.
    return launches * c.host_us * (1.3 if cell.amp else 1.0)
