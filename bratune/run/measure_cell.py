"""From a cell to a record: refuse, check, then time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bratune import gpus
from bratune.cell import Cell
from bratune.errors import BratuneError, UnsupportedError
from bratune.kernels import registry
from bratune.machine import Machine
from bratune.measure import gate
from bratune.measure.compiling import forget_compiled
from bratune.measure.energy import energy_fields
from bratune.measure.memory import release
from bratune.measure.meter import Measurement, Meter
from bratune.measure.settings import MeterSettings
from bratune.predict.model import bound_cell
from bratune.record import Record
from bratune.variant import Stage, get_variant
from bratune.work import call as work
from bratune.work import mixers
from bratune.work.cells import model_stages
from bratune.work.count import part_macs

__all__ = ["CheckedCell", "Result", "check", "failure", "finish", "prepare", "refusals", "run_cell"]

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


@dataclass(frozen=True)
class Result:
    """What is known of a cell after its turn: the row, and the raw samples if it was timed."""

    record: Record
    samples_ms: tuple[float, ...] = ()


def run_cell(cell: Cell, machine: Machine, meter: Meter, settings: MeterSettings) -> Result:
    """Measure a cell, or say why not: a failure is a row with its reason.

    The gate comes first: the same call on the same data must give the result of the reference, or the row
    is ``incorrect`` and has no time.
    """
    if cell.regime == "compile":
        forget_compiled()
    made = prepare(cell, machine)
    if isinstance(made, Record):
        return Result(made)
    try:
        own = settings.replace(l2=cell.l2, regime=cell.regime)
        return finish(made, machine, meter.measure(made.work.call, own, before=made.work.before))
    except Exception as error:  # a backend or a driver may raise anything; the row says what
        return Result(Record.of(cell, machine, **failure(error)))
    finally:
        if machine.is_cuda:
            release()  # so that one cell does not take room from the next


@dataclass(frozen=True)
class CheckedCell:
    """A cell whose work is built and agrees with the reference: it may be timed.

    Attributes:
        cell: What is measured.
        work: What is timed.
        fields: What the check found, as a record keeps it.
        result: What an attention call returned before it was timed (`gate.plain`); empty for other parts.
    """

    cell: Cell
    work: work.TimedWork
    fields: dict[str, Any]
    result: list[Any]


def prepare(cell: Cell, machine: Machine) -> CheckedCell | Record:
    """Build the work of a cell and check it; the row that says why not, where it may not be timed."""
    try:
        reasons = refusals(cell, machine)
        if reasons:
            return Record.of(cell, machine, outcome="unsupported", reason="; ".join(reasons))
        made = work.build(cell, machine)
        checked = check(made)
    except Exception as error:  # a backend or a driver may raise anything; the row says what
        return Record.of(cell, machine, **failure(error))
    if "reason" in checked:
        return Record.of(cell, machine, outcome="incorrect", **checked)
    try:
        result = gate.plain(made.call()) if _is_compared(cell) else []
    except Exception as error:
        return Record.of(cell, machine, **failure(error))
    return CheckedCell(cell, made, checked, result)


def _is_compared(cell: Cell) -> bool:
    """Whether the last timed result is compared: attention, on routes that rounding cannot change."""
    return cell.part == "attention"


def finish(made: CheckedCell, machine: Machine, measured: Measurement) -> Result:
    """The row of a cell that was timed, with what follows from its time."""
    cell = made.cell
    if made.result:
        wrong = gate.agrees(measured.output, made.result, cell.problem.dtype)
        if wrong:
            return Result(Record.of(cell, machine, outcome="incorrect", reason=wrong, **made.fields))
    values = {**made.fields, **measured.to_record_fields()}
    macs = made.work.macs() if made.work.macs else cell_macs(cell)
    values |= derived(cell, measured.median_ms, made.work.images, macs)
    values |= _floor(cell, machine, measured.median_ms)
    if cell.part == "model":
        values |= energy_fields(measured.run or made.work.call, machine, made.work.images)
    return Result(Record.of(cell, machine, outcome="measured", **values), measured.samples_ms)


def failure(error: Exception) -> dict[str, str]:
    """Outcome and reason, one sentence, of the row of what raised an error."""
    if isinstance(error, UnsupportedError):
        return {"outcome": "unsupported", "reason": "; ".join(error.reasons)}
    if isinstance(error, BratuneError):
        return {"outcome": "error", "reason": str(error)}
    return {"outcome": _outcome_of(error), "reason": _sentence(error)}


def refusals(cell: Cell, machine: Machine) -> tuple[str, ...]:
    """Every reason of the cell's backends against it; empty: they accept."""
    if cell.regime == "graph" and not machine.is_cuda:
        return ("a CUDA graph needs a CUDA device, this is a CPU",)
    if cell.form == "mixer":
        return mixers.obstacles(cell, machine)
    if cell.form == "yours" and cell.part == "model":  # its layers are known once it is built
        return ()
    if not cell.backend or (cell.part != "model" and _is_full(cell)):
        return ()
    if cell.part != "model":
        return registry.get(cell.backend).why_not(cell.problem, machine)
    found: list[str] = []
    parts = model_stages(cell)
    names = cell.backend.split(",")
    for stage, name in zip(parts, names * len(parts) if len(names) == 1 else names, strict=False):
        if stage.kind == "routed" and stage.problem and name != "auto":
            reasons = registry.get(name).why_not(stage.problem, machine)
            found += [f"stage {stage.index}: {reason}" for reason in reasons]
    return tuple(found)


def _is_full(cell: Cell) -> bool:
    """Full attention is computed by the module itself: a backend only says whether scores are written."""
    return bool(cell.topk) and int(cell.topk) < 0


def check(made: work.TimedWork) -> dict[str, Any]:
    """Errors against the reference, the worst of all attention calls; a reason where one is too large."""
    worst: dict[str, Any] = {}
    for call in made.attentions():
        found = gate.check(
            call.backend, call.problem, call.q, call.k, call.v, call.routes, config=call.config
        )
        worst["tolerance"] = found.tolerance
        for name in ("max_rel_err", "grad_rel_err"):
            values = [v for v in (worst.get(name), getattr(found, name)) if v is not None]
            worst[name] = max(values, default=None)
        if not found.ok:
            return worst | {"reason": found.reason}
    return worst | _agreement(made)


def _agreement(made: work.TimedWork) -> dict[str, Any]:
    """How far a form is from the plain model, or mixers from their definitions; a reason where too far."""
    found = made.agreement()
    if found is None:
        return {}
    difference, limit = found
    values: dict[str, Any] = {"max_rel_err": difference, "tolerance": limit}
    if not difference <= limit:
        values["reason"] = (
            f"differs from {made.against} by {difference:.1e} of the largest number; {limit:.0e} would pass"
        )
    return values


def derived(cell: Cell, median_ms: float, images: int, macs: int) -> dict[str, Any]:
    """Rates that follow from a time: images, useful multiply-adds and least bytes per second."""
    seconds = median_ms / 1e3
    values: dict[str, Any] = {"images_per_s": images / seconds}
    if macs and not cell.problem.backward:
        values["tflops_s"] = 2 * macs / seconds / 1e12
    if cell.part == "attention" and not cell.problem.backward:
        values["gb_s"] = cell.problem.io_bytes / seconds / 1e9
    return values


def _floor(cell: Cell, machine: Machine, median_ms: float) -> dict[str, Any]:
    """How near a time is to what the board's published peaks allow; nothing where they are unknown."""
    board = gpus.from_machine(machine)
    if board is None or cell.form in ("timm", "mixer", "yours"):
        return {}
    try:
        least = bound_cell(cell, board)
    except BratuneError:  # a peak of this dtype is not published
        return {}
    if least.median_ms is None:
        return {}
    return {"roofline_pct": 100 * least.median_ms / median_ms, "bound": least.bound}


def cell_macs(cell: Cell) -> int:
    """Multiply-adds of the forward pass of a cell below a model; 0 where none are counted."""
    if cell.part == "attention":
        return cell.problem.attention_macs
    if not cell.model or cell.form == "yours":
        return 0
    variant, batch = get_variant(cell.model), cell.problem.batch
    counts = part_macs(variant, _stage_of(cell), batch)
    return sum(counts.values()) if cell.part == "block" else counts.get(cell.part, 0)


def _stage_of(cell: Cell) -> Stage:
    variant = get_variant(cell.model)
    height, width = variant.maps(*cell.image)[cell.stage - 1]
    topk = int(cell.topk)
    return Stage(
        index=cell.stage,
        blocks=cell.block_count,
        dim=variant.dims[cell.stage - 1],
        height=height,
        width=width,
        kind="routed" if topk > 0 else "full" if topk < 0 else "conv",
        n_win=int(cell.n_win or 0),
        topk=topk,
        problem=cell.problem,
    )


def _outcome_of(error: Exception) -> str:
    text = str(error).lower()
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return "oom" if memory or any(phrase in text for phrase in OUT_OF_MEMORY) else "error"


def _sentence(error: Exception) -> str:
    """The first line of an error, with its type."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:500] if first else type(error).__name__
