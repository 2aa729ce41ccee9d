"""Record: one line of results, a cell with its outcome and everything needed to trust it.

Long format: one row per cell or whole-model measurement. Units are in the field names. An absent number
is None (empty), never 0; a failure is a row with a reason, never a missing row.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from bratune.cell import Cell, form_fields
from bratune.errors import BratuneError, StoreError
from bratune.machine import Machine
from bratune.text import html_table, is_whole_numbers, printable

__all__ = [
    "EVIDENCE",
    "LONGEST",
    "OUTCOMES",
    "SCHEMA",
    "TOO_LONG",
    "Record",
    "check_fields",
    "completed",
    "field_types",
    "new_run_id",
    "parse_fields",
    "parse_line",
    "require_known",
    "utc_now",
]

SCHEMA = 1
# In order of trust. `published` is somebody else's number, read from their files.
EVIDENCE = ("measured", "replayed", "interpolated", "modelled", "bound", "published")
OUTCOMES = (
    "measured",
    "modelled",
    "unsupported",
    "incorrect",
    "oom",
    "timeout",
    "crashed",
    "error",
    "started",
)


def utc_now() -> str:
    """The time, to the second, in UTC: ``2026-01-31T12:00:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_run_id() -> str:
    """A name for a run that begins now, also beside others: ``20260131T120000Z-1f0c93ab``."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.urandom(4).hex()}"


# With slots, and each different text once: reports hold a row per line of files of millions.
@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row. Field order is column order."""

    # identity
    schema: int = SCHEMA
    run_id: str = ""
    cell_id: str = ""
    timestamp_utc: str = ""
    claimed_by: str = ""  # of a line "started": the process that measures, see `bratune.store.claims`
    evidence: str = "measured"
    outcome: str = "measured"
    reason: str = ""
    # machine
    gpu_key: str = ""
    gpu_name: str = ""
    gpu_uuid: str = ""
    compute_capability: str = ""
    sm_count: int | None = None
    memory_gib: float | None = None
    threads: int | None = None
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    bratune: str = ""
    git_sha: str = ""
    git_dirty: bool | None = None
    # what
    task: str = ""
    model: str = ""
    part: str = ""
    form: str = ""
    stage: int | None = None
    block_count: int | None = None
    backend: str = ""
    config: str = ""
    n_win: str = ""
    topk: str = ""
    # how
    batch: int | None = None
    image_height: int | None = None
    image_width: int | None = None
    height: int | None = None
    width: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    region: str = ""
    padding: str = ""
    dtype: str = ""
    amp: bool | None = None
    layout: str = ""
    direction: str = ""
    regime: str = ""
    l2: str = ""
    deterministic: bool | None = None
    route_distribution: str = ""
    seed: int | None = None
    # sources that compute the cell, files that it reads, how it was sampled: with the versions, what a row is
    # reused by
    source_hash: str = ""
    backend_package: str = ""
    checkpoint_hash: str = ""
    images_hash: str = ""
    sampling: str = ""
    # time
    n_samples: int | None = None
    n_discarded: int | None = None
    n_processes: int | None = None
    # which pass of how many: what one worker process measured in turn with the other cells of its group. Rows
    # of earlier versions have neither and are one process.
    pass_number: int | None = None
    passes: int | None = None
    median_ms: float | None = None
    ci_lo_ms: float | None = None
    ci_hi_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    min_ms: float | None = None
    noise_pct: float | None = None
    stop_reason: str = ""
    compile_s: float | None = None
    host_ms: float | None = None
    launch_bound: bool | None = None
    # derived
    images_per_s: float | None = None
    tflops_s: float | None = None
    gb_s: float | None = None
    roofline_pct: float | None = None
    bound: str = ""
    speedup: float | None = None
    baseline: str = ""
    # how many times faster than the baseline within the rounds of this pass, and its 95 % interval
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    # memory
    peak_alloc_mb: float | None = None
    peak_reserved_mb: float | None = None
    workspace_mb: float | None = None
    # energy
    joules_per_image: float | None = None
    power_w: float | None = None
    energy_method: str = ""
    # state
    sm_clock_mhz: float | None = None
    temp_c: float | None = None
    throttle_reasons: str = ""
    # of the time that a call wanted a processor, the share that it waited for one
    cpu_wait_pct: float | None = None
    flush_mb: float | None = None
    foreign_processes: int | None = None
    # fidelity
    max_rel_err: float | None = None
    grad_rel_err: float | None = None
    tolerance: float | None = None
    # again
    repro: str = ""
    # the cell itself, as canonical JSON, so that it can be run again without guessing
    cell: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise StoreError(f"outcome {self.outcome!r} is not known; these are: {', '.join(OUTCOMES)}")
        if self.evidence not in EVIDENCE:
            raise StoreError(f"evidence {self.evidence!r} is not known; these are: {', '.join(EVIDENCE)}")
        _require_reason(self.outcome, self.reason)

    @property
    def ok(self) -> bool:
        """Whether the row holds a time."""
        return self.median_ms is not None and self.outcome in ("measured", "modelled")

    @property
    def machine(self) -> Machine:
        """The machine that a row speaks of, as far as rows describe it."""
        return Machine(
            kind="cuda" if self.compute_capability else "cpu",
            device="cuda:0" if self.compute_capability else "cpu",
            gpu_key=self.gpu_key,
            gpu_name=self.gpu_name,
            gpu_uuid=self.gpu_uuid,
            compute_capability=self.compute_capability,
            sm_count=self.sm_count or 0,
            memory_gib=self.memory_gib or 0.0,
            threads=self.threads or 0,
            driver=self.driver,
            cuda=self.cuda,
            torch=self.torch,
            triton=self.triton,
            python=self.python,
            bratune=self.bratune,
            git_sha=self.git_sha,
            git_dirty=self.git_dirty,
        )

    def to_cell(self) -> Cell:
        """The cell that the row answers.

        Raises:
            StoreError: the row describes none.
        """
        try:
            return Cell.from_dict(json.loads(self.cell))
        except (ValueError, TypeError, RecursionError, BratuneError) as error:
            raise StoreError(f"row {self.cell_id} describes no cell: {error}") from None

    @classmethod
    def of(cls, cell: Cell, machine: Machine, **values: Any) -> Record:
        """The row of a cell on a machine; ``values`` are the outcome and the numbers."""
        p = cell.problem
        base: dict[str, Any] = {
            "cell_id": cell.cell_id,
            "timestamp_utc": utc_now(),
            "gpu_key": machine.gpu_key,
            "gpu_name": machine.gpu_name,
            "gpu_uuid": machine.gpu_uuid,
            "compute_capability": machine.compute_capability,
            "sm_count": machine.sm_count,
            "memory_gib": machine.memory_gib,
            "threads": machine.threads or None,
            "driver": machine.driver,
            "cuda": machine.cuda,
            "torch": machine.torch,
            "triton": machine.triton,
            "python": machine.python,
            "bratune": machine.bratune,
            "git_sha": machine.git_sha,
            "git_dirty": machine.git_dirty,
            "task": cell.task,
            "model": cell.model,
            "part": cell.part,
            "form": cell.form,
            "stage": cell.stage or None,
            "block_count": cell.block_count,
            "backend": cell.backend,
            "config": cell.config,
            "n_win": cell.n_win,
            "topk": cell.topk,
            "batch": p.batch,
            "image_height": cell.image[0] or None,
            "image_width": cell.image[1] or None,
            "height": p.height,
            "width": p.width,
            "heads": p.heads,
            "head_dim": p.head_dim,
            "region": f"{p.region[0]}x{p.region[1]}",
            "padding": p.padding,
            "dtype": p.dtype,
            "amp": cell.amp,
            "layout": cell.layout,
            "direction": p.direction,
            "regime": cell.regime,
            "l2": cell.l2,
            "deterministic": cell.deterministic,
            "route_distribution": cell.route_distribution,
            "seed": cell.seed,
            "cell": json.dumps(cell.to_dict(), sort_keys=True, separators=(",", ":")),
        }
        return cls(**(base | values))

    def replace(self, **changes: Any) -> Record:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, in column order."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def _repr_html_(self) -> str:
        """What a notebook shows: the fields that hold something."""
        filled = [(name, str(value)) for name, value in self.to_dict().items() if value not in (None, "")]
        return html_table(("field", "value"), filled)

    def to_json(self) -> str:
        """One line; fields that are empty are left out."""
        data = {k: v for k, v in self.to_dict().items() if v is not None and v != ""}
        return json.dumps(data, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """A row from its fields; fields that a newer version added are ignored.

        Raises:
            StoreError: the schema is newer than this version can read, or a field holds what it cannot.
        """
        return cls._of_checked(check_fields(data))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of `to_json`.

        Raises:
            StoreError: the line is not a record.
        """
        return cls._of_checked(parse_fields(line))

    @classmethod
    def _of_checked(cls, fields: Mapping[str, Any]) -> Record:
        return cls(**completed(fields))


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a line, checked already, as those of a `Record`: what another version added is left out.

    Raises:
        StoreError: a row that failed has no reason.
    """
    intern = sys.intern
    known: dict[str, Any] = {
        name: intern(value) if type(value) is str else value
        for name, value in fields.items()
        if name in _KINDS
    }
    if known.get("part") == "model" and "form" not in known:
        known |= form_fields(str(known.get("backend", "")))
    _require_reason(known.get("outcome", "measured"), known.get("reason", ""))
    return known


def _require_reason(outcome: str, reason: str) -> None:
    if outcome not in ("measured", "modelled", "started") and not reason:
        raise StoreError(f"a row with outcome {outcome!r} needs a reason")


def field_types() -> dict[str, type]:
    """What every field of a record holds where it is not empty: str, bool, int or float."""
    hints = typing.get_type_hints(Record)
    found: dict[str, type] = {}
    for name in (f.name for f in dataclasses.fields(Record)):
        kinds = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        found[name] = next(kind for kind in kinds if kind is not types.NoneType)
    return found


# A whole number may stand where a number is expected, and the other way round: JSON does not tell them apart.
_KINDS: dict[str, type | tuple[type, ...]] = {
    name: (int, float) if kind in (int, float) else kind for name, kind in field_types().items()
}


# Never 0 where they are known: a time or a size of 0 is the mark of a broken row, not a measurement.
_POSITIVE = frozenset(
    {"median_ms", "ci_lo_ms", "ci_hi_ms", "p10_ms", "p90_ms", "min_ms", "images_per_s", "speedup"}
    | {"pass_number", "passes", "ratio", "ratio_lo", "ratio_hi"}
    | {"batch", "height", "width", "heads", "head_dim", "stage", "image_height", "image_width"}
)
_ANY_SIGN = frozenset({"temp_c", "seed"})
_WHOLE = frozenset(name for name, kind in field_types().items() if kind is int)
# Texts that are numbers, and what says so.
_NUMBERS: dict[str, Callable[[str], object]] = {
    "n_win": is_whole_numbers,
    "topk": is_whole_numbers,
    "region": re.compile(r"[0-9]{1,9}x[0-9]{1,9}").fullmatch,
}
# One of these is in every record.
_MARKS = frozenset({"schema", "cell_id", "outcome"})
# Beyond this a number is nothing that was measured, and does not fit a column.
_LARGEST = float(2**63)


# Bytes of a line beyond which it is no record.
LONGEST = 1 << 24
# Stands for a line that is longer and was not held in memory.
TOO_LONG = b"(longer than a record can be)\n"

T = TypeVar("T")


def parse_line(raw: bytes, parse: Callable[[str], T]) -> T:
    """What ``parse``, `Record.from_json` or `parse_fields`, makes of the bytes of a line.

    Raises:
        StoreError: it is no record; the message says why.
    """
    if raw is TOO_LONG or len(raw) > LONGEST:
        raise StoreError(f"is longer than {LONGEST >> 20} MiB")
    try:
        return parse(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise StoreError("is not text") from None
    except TypeError as error:
        raise StoreError(str(error)) from None


def parse_fields(line: str) -> dict[str, Any]:
    """The fields of a line that `Record.to_json` wrote, those that are empty left out.

    Raises:
        StoreError: the line is not a record, its schema is newer than this version can read, or a field holds
            what it cannot.
    """
    try:
        data = json.loads(line.removeprefix("\ufeff"))  # some editors put this mark at the beginning
    except ValueError as error:
        raise StoreError(f"is not JSON ({error})") from None
    except RecursionError:
        raise StoreError("is not a record: it nests too deep") from None
    if not isinstance(data, dict):
        raise StoreError("is not a JSON object, as a record is")
    require_known(data)
    return check_fields(data)


def require_known(data: Mapping[str, Any]) -> None:
    """Raise `StoreError` for the fields of something else than a record."""
    if _MARKS.isdisjoint(data):
        raise StoreError(f"is not a record: it has none of {', '.join(sorted(_MARKS))}")


def check_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a record may hold them: of the right kind, in range, nothing in a text that a terminal obeys.

    Raises:
        StoreError: a field holds what it cannot, or the schema is newer than this version can read.
    """
    schema = data.get("schema", SCHEMA)
    if type(schema) is not int or schema > SCHEMA:
        raise StoreError(
            f"the records have schema {_short(schema)} and this version reads up to {SCHEMA}; "
            "a newer bratune would read them"
        )
    checked = dict(data)
    for name, value in data.items():
        kind = _KINDS.get(name)
        if kind is None or value is None:
            continue
        if kind is str:
            if not isinstance(value, str):
                raise StoreError(f"{name} should be a text and is {_short(value)}")
            if not value.isprintable():
                checked[name] = _clean(name, value)
            if value and name in _NUMBERS and not _NUMBERS[name](value):
                raise StoreError(f"{name} should be whole numbers and is {_short(value)}")
        elif kind is bool:
            if not isinstance(value, bool):
                raise StoreError(f"{name} should be yes or no and is {_short(value)}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise StoreError(f"{name} should be a number and is {_short(value)}")
        elif not -_LARGEST < value < _LARGEST:
            raise StoreError(f"{name} should be a finite number and is {_short(value)}")
        elif value <= 0 and name not in _ANY_SIGN and (value < 0 or name in _POSITIVE):
            raise StoreError(f"{name} should be above 0 and is {value}")
        elif name in _WHOLE and value != int(value):
            raise StoreError(f"{name} should be a whole number and is {value}")
    for name, words in (("outcome", OUTCOMES), ("evidence", EVIDENCE)):
        if data.get(name, words[0]) not in words:
            raise StoreError(f"{name} {_short(data[name])} is not known; these are: {', '.join(words)}")
    return checked


def _clean(name: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise StoreError(f"{name} holds half a character: {_short(text)}") from None
    return printable(text)


def _short(value: Any, most: int = 60) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}..."
