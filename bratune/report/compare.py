"""Compare: sets of records, cell by cell.

Two records are compared when they describe the same work: part, model, stage, backend, S, top-k, sizes, dtype
and direction. How they were run (regime, cache state, autocast, layout, determinism) must be the same too,
unless the caller says otherwise. Several records of one cell in a set are passes, each a fresh process.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bratune import gpus, store
from bratune.errors import StoreError, UnknownNameError, UsageError
from bratune.measure.verdict import CONFIDENCE, MARGIN, Passes, Verdict, judge_runs
from bratune.record import Record
from bratune.run.summary import is_base
from bratune.store.pooled import IN_TURN_WITH, passes_of

__all__ = [
    "Compared",
    "Comparison",
    "RecordSet",
    "compare",
    "describe",
    "load_set",
    "regressions",
]

WHAT = (
    "model",
    "part",
    "form",
    "stage",
    "backend",
    "config",
    "n_win",
    "topk",
    "batch",
    "image_height",
    "image_width",
    "height",
    "width",
    "heads",
    "head_dim",
    "region",
    "padding",
    "dtype",
    "direction",
    "route_distribution",
)
HOW = ("regime", "l2", "amp", "layout", "deterministic")
# What cells that took turns differ in.
_RIVALS = ("form", "backend", "config")
# What can change the time of a cell that is the same work.
_CODE = (*HOW, "gpu_key", "gpu_name", "driver", "torch", "triton", "threads", "source_hash")
_NOT_NEEDED = ("cell_id", "cell", "repro", "claimed_by", "timestamp_utc", "run_id")


@dataclass(frozen=True)
class RecordSet:
    """Records under one label, all of one machine.

    Attributes:
        label: What the user called it.
        records: Finished rows with a time.
    """

    label: str
    records: Sequence[Record]

    @property
    def gpu_key(self) -> str:
        """The machine that the set speaks of."""
        return self.records[0].gpu_key


class _Cell(NamedTuple):
    """One cell of a set: what is compared of its rows, which are not held.

    The contest is what it has in common with those that it took turns with; the code is that of its rows, by
    everything that can change their time, and ``is_base`` says whether the others' ratios are to it.
    """

    what: str
    passes: Passes
    evidence: tuple[str, ...]
    contest: tuple[object, ...]
    code: frozenset[tuple[object, ...]]
    is_base: bool


class Compared(NamedTuple):
    """One cell of one set against the same cell of the first.

    Attributes:
        what: The cell in words.
        base: Label of the first set.
        other: Label of the set compared with it.
        base_ms: Median of the first set.
        other_ms: Median of the other.
        verdict: Of the other against the first.
        evidence: Evidence of both, ``measured`` or e.g. ``measured/modelled``.
    """

    what: str
    base: str
    other: str
    base_ms: float
    other_ms: float
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Comparison:
    """Every cell that could be compared, and how many could not.

    Attributes:
        rows: In the order of the first set.
        only_in_one: Cells that only one of the two sets holds, over all pairs.
        refused: Cells left out because they were run differently.
        drifts: What all cells of a set moved by together, in words.
        beside: Cells from which what the machine did to the baseline beside them is taken out, over all
            pairs.
        other_baselines: Cells where it is not, because the baseline's code or the machine is another one.
    """

    rows: tuple[Compared, ...]
    only_in_one: int
    refused: int
    drifts: tuple[str, ...] = ()
    beside: int = 0
    other_baselines: int = 0


def load_set(argument: str) -> RecordSet:
    """The records behind a file, a folder, ``PATH@gpu`` or a GPU key (of the records that ship).

    Raises:
        StoreError: nothing is there, or the records are of several machines and none was named.
        UsageError: the named machine is not among them.
    """
    path, key = argument, ""
    if "@" in argument and not Path(argument).exists():
        path, _, key = argument.rpartition("@")
    if Path(path).exists():
        return _of_machine(argument, Path(path), key)
    try:
        board = gpus.resolve(path)
    except UnknownNameError:
        raise StoreError(
            f"{argument!r} is neither a file, a folder nor a GPU key; 'bratune list gpus' lists the keys"
        ) from None
    shipped = Path(str(importlib.resources.files("bratune").joinpath("results")))
    try:
        return _of_machine(argument, shipped, board.key)
    except (StoreError, UsageError):
        raise StoreError(
            f"no record of {board.key} ships with this package; a file or folder of records would work"
        ) from None


def _of_machine(label: str, path: Path, key: str) -> RecordSet:
    rows = store.read_rows([path], without=_NOT_NEEDED).timed().where("evidence", lambda e: e != "bound")
    rows = rows.where("sampling", lambda how: IN_TURN_WITH not in how)  # a comparison of its own, not passes
    found = sorted(rows.different("gpu_key"))
    if key and key not in found:
        raise UsageError(f"{path} has no timed record of {key!r}; it has: {', '.join(found) or 'none'}")
    if not key and len(found) > 1:
        raise UsageError(f"{path} holds records of {', '.join(found)}; name one, e.g. {path}@{found[0]}")
    rows = rows.where("gpu_key", lambda other: not key or other == key)
    if not rows:
        raise StoreError(f"{path} holds no record with a time")
    return RecordSet(label, rows)


def compare(
    sets: Sequence[RecordSet],
    *,
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    across: bool = False,
) -> Comparison:
    """Every set against the first, cell by cell.

    Args:
        sets: Two or more.
        margin: See `bratune.measure.verdict.judge_runs`.
        confidence: Of the intervals.
        across: Compare cells that were run differently, too.

    Raises:
        UsageError: fewer than two sets, no cell in common, or the only common cells were run differently.
    """
    if len(sets) < 2:
        raise UsageError("a comparison needs two or more sets of records")
    base, alone, refused = sets[0], 0, 0
    rows: list[Compared] = []
    drifts: list[str] = []
    beside = other_baselines = 0
    mismatch = ""
    base_groups = _groups(base, across)
    for other in sets[1:]:
        other_groups = _groups(other, across)
        other_work = {key[: len(WHAT)] for key in other_groups}
        common: list[tuple[_Cell, _Cell]] = []
        for key, mine in base_groups.items():
            theirs = other_groups.get(key)
            if theirs is not None:
                common.append((mine, theirs))
            elif key[: len(WHAT)] in other_work:
                refused += 1
                mismatch = mismatch or _mismatch(base, key, other, other_groups)
            else:
                alone += 1
        same = _same_baselines(base_groups.values(), other_groups.values())
        pairs = [_to_judge(mine, theirs, same) for mine, theirs in common]
        judged = judge_runs(pairs, margin=margin, confidence=confidence)
        could = sum(bool(mine.passes.beside and theirs.passes.beside) for mine, theirs in common)
        beside += (had := sum(bool(a.beside and b.beside) for a, b in pairs))
        other_baselines += could - had
        if judged.sentence:
            drifts.append(f"{other.label}: {judged.sentence}")
        for (mine, theirs), verdict in zip(common, judged.verdicts, strict=True):
            rows.append(_compared(base, mine, other, theirs, verdict))
        base_work = {key[: len(WHAT)] for key in base_groups}
        alone += sum(key[: len(WHAT)] not in base_work for key in other_groups)
    if not rows and refused:
        raise UsageError(
            f"all {refused} common cells were run differently ({mismatch}); --across compares them anyway"
        )
    if not rows:
        labels = ", ".join(s.label for s in sets)
        raise UsageError(f"no cell is in the first set and another one: {labels}")
    return Comparison(tuple(rows), alone, refused, tuple(drifts), beside, other_baselines)


def _same_baselines(*sets: Iterable[_Cell]) -> set[tuple[object, ...]]:
    """The contests whose baseline is one and the same code, on one kind of machine, in all sets."""
    codes: dict[tuple[object, ...], list[frozenset[tuple[object, ...]]]] = {}
    for cells in sets:
        for cell in cells:
            if cell.is_base:
                codes.setdefault(cell.contest, []).append(cell.code)
    return {
        contest
        for contest, found in codes.items()
        if len(found) == len(sets) and len(frozenset.union(*found)) == 1
    }


def _to_judge(mine: _Cell, theirs: _Cell, same: set[tuple[object, ...]]) -> tuple[Passes, Passes]:
    """The passes of a cell in both sets, with the baseline beside them where it is the same in both."""
    if mine.contest in same:
        return mine.passes, theirs.passes
    return mine.passes.alone, theirs.passes.alone


def _groups(found: RecordSet, across: bool) -> dict[tuple[object, ...], _Cell]:
    names = WHAT if across else WHAT + HOW
    groups: dict[tuple[object, ...], _Cell] = {}
    for rows in store.Rows.of(found.records).groups(names):
        first = rows[0]
        evidence = tuple(sorted({row.evidence for row in rows}))
        groups[tuple(_value(first, name) for name in names)] = _Cell(
            what=describe(first),
            passes=passes_of(rows),
            evidence=evidence,
            contest=tuple(_value(first, name) for name in names if name not in _RIVALS),
            code=frozenset(tuple(getattr(row, name) for name in _CODE) for row in rows),
            is_base=is_base(first),
        )
    return groups


def _value(record: Record, name: str) -> object:
    """A field as cells are told apart by it; rows of earlier versions name no form."""
    value: object = getattr(record, name)
    return value or "plain" if name == "form" else value


def _mismatch(
    base: RecordSet, key: tuple[object, ...], other: RecordSet, others: Iterable[tuple[object, ...]]
) -> str:
    theirs = next(k for k in others if k[: len(WHAT)] == key[: len(WHAT)])
    return "; ".join(
        f"{name}: {mine} in {base.label}, {its} in {other.label}"
        for name, mine, its in zip(HOW, key[len(WHAT) :], theirs[len(WHAT) :], strict=True)
        if mine != its
    )


def _compared(base: RecordSet, mine: _Cell, other: RecordSet, theirs: _Cell, verdict: Verdict) -> Compared:
    return Compared(
        what=mine.what,
        base=base.label,
        other=other.label,
        base_ms=median(mine.passes.values),
        other_ms=median(theirs.passes.values),
        verdict=verdict,
        evidence="/".join(dict.fromkeys(mine.evidence + theirs.evidence)),
    )


def describe(record: Record) -> str:
    """A cell in a few words: model, stage, part, form, backend, S and top-k, image, batch, dtype."""
    where = f"stage {record.stage}" if record.stage else ""
    size = f"{record.image_height}x{record.image_width}" if record.image_height else ""
    form = record.form if record.form not in ("", "plain") else ""
    words = [record.model, where, record.part, form, record.backend, _grid(record), size]
    words += [f"b{record.batch}", record.dtype]
    words += [record.direction] if record.direction != "fwd" else []
    words += [record.regime] if record.regime != "eager" else []
    words += (
        [f"{record.route_distribution} routes"] if record.route_distribution not in ("", "recorded") else []
    )
    words += [record.config] if record.config not in ("", "{}") else []
    return " ".join(word for word in words if word)


def _grid(record: Record) -> str:
    """S and top-k, of a whole model stage by stage; nothing for a model that has none."""
    if not record.topk or record.form == "timm":
        return ""
    return f"S={record.n_win.replace(',', '/')} k={record.topk.replace(',', '/')}"


def regressions(comparison: Comparison, limit: float) -> list[Compared]:
    """The cells that are surely slower and by at least ``limit``, beyond what everything moved by."""
    return [
        row for row in comparison.rows if row.verdict.verdict == "SLOWER" and row.verdict.ratio >= 1 + limit
    ]
