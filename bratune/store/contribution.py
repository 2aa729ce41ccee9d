"""Contribution: what a measured run must be to stand in ``results/``, and what of it goes there.

A file of ``results/`` is one machine and one set of versions, measured in several passes on a quiet machine,
every time after its proof. Files from before passes are one process per cell; they are held to the rest.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bratune.errors import StoreError
from bratune.measure.verdict import BUSY_PCT
from bratune.record import Record, parse_line
from bratune.store.lines import record_files

__all__ = ["TABLE_HEAD", "Contribution", "prepare", "read_strictly", "row_files", "why_not"]

# The head of the table of files in ``results/README.md``.
TABLE_HEAD = "| file | machine | who, when | command |"
# What rows of one file share: one machine, one set of versions.
_SHARED = ("gpu_key", "gpu_name", "memory_gib", "threads", "driver", "torch", "triton", "python", "bratune")
# What a row must say about how it came about.
_PROVENANCE = ("timestamp_utc", "torch", "python", "bratune", "sampling", "repro", "cell")
# Fields that hold sentences; the rest is names and numbers.
_SENTENCES = ("reason", "stop_reason", "throttle_reasons", "energy_method")
# Of the rows of a GPU, the share beside which other processes may have computed.
_FOREIGN_SHARE = 0.1
_LEAST_PASSES = 2

_PATH = re.compile(r"(?<![\w./:])(?:~|[A-Za-z]:)?(?:[\\/][\w.@+-]+){2,}[\\/]?")
_UUID = re.compile(r"(?:GPU-|MIG-)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.I)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """A run that may stand in ``results/``.

    Attributes:
        rows: Without anything that names a person, a host or a board.
        left_out: Rows that others could not measure again: with pictures or weights of the contributor.
    """

    rows: tuple[Record, ...]
    left_out: int

    @property
    def name(self) -> str:
        """A name for the file: the GPU or CPU, the model and the size of its images."""
        first = self.rows[0]
        words = first.gpu_name.lower().replace("(r)", " ").split()
        cpu = next((word for word in ("epyc", "xeon", "ryzen", "core", "apple") if word in words), "other")
        models = sorted({row.model.replace("_", "-") for row in self.rows if row.form != "timm"})
        sizes = sorted({f"{row.image_height}x{row.image_width}" for row in self.rows})
        size = sizes[0].split("x")[0] if len(set(sizes[0].split("x"))) == 1 else sizes[0]
        key = f"cpu-{cpu}" if first.gpu_key == "cpu" else first.gpu_key
        parts = (key, models[0] if len(models) == 1 else "models", size if len(sizes) == 1 else "sizes")
        return "-".join(parts)

    def table_row(self, file: str, who: str) -> str:
        """The line of the table in ``results/README.md``."""
        first = self.rows[0]
        passes = min(_passes(self.rows).values())
        what = f"{first.sm_count} cores of {first.gpu_name}" if first.gpu_key == "cpu" else first.gpu_name
        driver = f", driver {first.driver}" if first.driver else ""
        slowed = sorted({r for row in self.rows for r in row.throttle_reasons.split(",") if r})
        held = f"; held back by {', '.join(slowed)}" if slowed else ""
        machine = f"{what}{driver}, torch {first.torch}; {passes} passes{held}"
        days = sorted({row.timestamp_utc[:10] for row in self.rows})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        commands = dict.fromkeys(_general(row.repro) for row in self.rows)
        most = max(commands, key=lambda text: sum(_general(row.repro) == text for row in self.rows))
        command = f"`{most}`" + ("" if len(commands) == 1 else f" and {len(commands) - 1} more, in `repro`")
        cells = (f"`{file}`", machine, f"{who}, {when}", command)
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def row_files(readme: str) -> dict[str, str]:
    """The lines of the table of files, by the names of their files.

    Args:
        readme: The text of ``results/README.md``.
    """
    found = {}
    for line in readme.splitlines():
        for name in re.findall(r"`([\w.+-]+\.jsonl)`", line.split("|")[1] if line.startswith("|") else ""):
            found[name] = line
    return found


def read_strictly(paths: Iterable[str | os.PathLike[str]]) -> list[Record]:
    """Every row of some files and folders.

    Raises:
        StoreError: a line is no record, or there is none.
    """
    rows = []
    for path in record_files(paths):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                rows.append(parse_line(line, Record.from_json))
            except StoreError as error:
                raise StoreError(
                    f"{path}, line {number}: {error}; bratune cache repair sets it aside"
                ) from None
    return rows


def why_not(rows: Sequence[Record], *, single_process: bool = False) -> tuple[str, ...]:
    """Every obstacle to a run as a file of ``results/``; empty where there is none.

    Args:
        rows: All of them.
        single_process: A file from before passes: one process per cell, whole models without a proof.
    """
    said = [row for row in rows if row.outcome != "started"]
    timed = [row for row in said if row.ok]
    if not timed:
        return ("nothing in it was measured",)
    found = [
        *_of_provenance(said),
        *_of_disturbance(timed),
        *_of_the_gate(timed, single_process),
        *_of_names(said if single_process else rows),
    ]
    if not single_process:
        passes = _passes(timed)
        few = [cell for cell, number in passes.items() if number < _LEAST_PASSES]
        if few:
            found.append(
                f"{len(few)} of {len(passes)} cells were measured in one process; --passes 2 or more would do"
            )
    return tuple(found)


def _of_provenance(rows: Sequence[Record]) -> list[str]:
    found = []
    for row in rows:
        if row.evidence != "measured":
            found.append(f"some rows are {row.evidence}; results hold what was measured only")
        if row.git_dirty:
            found.append(
                f"it was measured with sources that nobody else has: changes on top of {row.git_sha}"
            )
        missing = [name for name in _PROVENANCE if not getattr(row, name)]
        if missing:
            found.append(f"rows do not say their {', '.join(missing)}")
        elif (
            row.to_cell().cell_id != row.cell_id and row.part != "model"
        ):  # those changed once, see the README
            found.append(f"row {row.cell_id} is not of the cell that it describes")
    for name in _SHARED:
        values = sorted({str(getattr(row, name)) for row in rows})
        if len(values) > 1:
            found.append(
                f"rows are of several {name}: {', '.join(values)}; one file is one machine and version"
            )
    return [*dict.fromkeys(found)]


def _of_disturbance(timed: Sequence[Record]) -> list[str]:
    found = []
    waits = [row.cpu_wait_pct for row in timed if row.cpu_wait_pct is not None]
    if waits and statistics.median(waits) > BUSY_PCT:
        found.append(
            f"the machine was busy: processes waited for a processor {statistics.median(waits):.0f} % of the "
            f"time, and {BUSY_PCT:g} % is the most"
        )
    beside = sum(bool(row.foreign_processes) for row in timed)
    if beside > _FOREIGN_SHARE * len(timed):
        found.append(f"other processes used the GPU during {beside} of {len(timed)} measurements")
    return found


def _of_the_gate(timed: Sequence[Record], single_process: bool) -> list[str]:
    proofless = [
        row
        for row in timed
        if row.tolerance is None
        and (row.part in ("attention", "block", "mixer") or (row.part == "model" and row.form not in _JUDGES))
        and not (single_process and row.part == "model")
    ]
    failed = [row for row in timed if row.tolerance is not None and not _proved(row)]
    found = [f"{len(proofless)} times stand without a proof"] if proofless else []
    return found + ([f"{len(failed)} times stand although their proof failed"] if failed else [])


# Forms that nothing is compared with: the published one judges, models of timm are others' code.
_JUDGES = ("published", "timm")


def _proved(row: Record) -> bool:
    errors = [error for error in (row.max_rel_err, row.grad_rel_err) if error is not None]
    return row.tolerance is not None and bool(errors) and max(errors) <= row.tolerance


def _of_names(rows: Sequence[Record]) -> list[str]:
    """Fields that may name a person, a host or a board."""
    names = sorted({name for row in rows for name in _naming(row)})
    return [f"rows may name people or hosts in {', '.join(names)}"] if names else []


def _naming(row: Record) -> list[str]:
    found = [name for name in ("claimed_by", "gpu_uuid") if getattr(row, name)]
    for name, value in row.to_dict().items():
        if isinstance(value, str) and name not in found and (_PATH.search(value) or _UUID.search(value)):
            found.append(name)
    return found


def _passes(rows: Iterable[Record]) -> dict[str, int]:
    """How many passes measured each cell."""
    found: dict[str, set[int]] = {}
    for row in rows:
        if row.ok:
            found.setdefault(row.cell_id, set()).add(row.pass_number or 0)
    return {cell: len(numbers) for cell, numbers in found.items()}


def prepare(rows: Sequence[Record], *, names: Sequence[str] = ()) -> Contribution:
    """The rows of a run without what identifies people and hosts.

    Lines "started" go, with the host and process that they name; so do the identity of the board, paths in
    sentences down to their last part, and ``names``. Rows with pictures or weights of the contributor's own
    are left out: their paths are part of what was measured, and nobody else could measure them again.

    Args:
        rows: All of them.
        names: Of users and hosts, to be taken out of sentences.

    Raises:
        StoreError: the run is not fit for ``results/``; the message has every reason.
    """
    said = [row for row in rows if row.outcome != "started"]
    kept = [row for row in said if not any(json.loads(row.to_cell().extra).values())]
    clean = tuple(_without_names(row, names) for row in kept)
    if reasons := why_not(clean):
        raise StoreError(f"this run is not fit for results/: {'; '.join(reasons)}")
    return Contribution(rows=clean, left_out=len(said) - len(kept))


def _without_names(row: Record, names: Sequence[str]) -> Record:
    texts = {}
    for field in _SENTENCES:
        text = _PATH.sub(
            lambda found: "…/" + re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], getattr(row, field)
        )
        text = _UUID.sub("(uuid)", text)
        for name in names:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(name)", text)
        texts[field] = text
    return row.replace(claimed_by="", gpu_uuid="", **texts)


def _general(repro: str) -> str:
    """The command of a row without what is of one cell."""
    return re.sub(r" --(?:stage|backend|n-win|topks|forms|peers|config-of)[ =]\S+| --no-stages", "", repro)
