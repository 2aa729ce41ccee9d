"""Groups: which cells answer one question, take turns, and are compared with which."""

from __future__ import annotations

from collections.abc import Iterable

from bratune.cell import Cell
from bratune.record import Record
from bratune.work.cells import BASELINE, MIXER_BASELINE

__all__ = ["CLEARLY_WORSE", "Baselines", "baseline_of", "group_of", "groups_of", "is_baseline"]

# A backend that is this many times slower than the fastest one so far is not worth a precise time.
CLEARLY_WORSE = 3.0


class Baselines:
    """Remembers the times of cells that differ in their backend only, to compare each with the others."""

    def __init__(self) -> None:
        self._medians: dict[str, float] = {}
        self._fastest: dict[str, float] = {}

    def compared(self, cell: Cell, record: Record) -> Record:
        """The record with its speedup, where the baseline of its cell is known."""
        if record.median_ms is None or not _is_compared(cell):
            return record
        if record.ratio is not None:  # measured in turn, which says more than two medians
            return record.replace(speedup=record.ratio, baseline=baseline_of(cell))
        key = _contest(cell)
        self._fastest[key] = min(record.median_ms, self._fastest.get(key, record.median_ms))
        if is_baseline(cell):
            self._medians[key] = record.median_ms
        if key not in self._medians:
            return record
        return record.replace(speedup=self._medians[key] / record.median_ms, baseline=baseline_of(cell))

    def give_up_ms(self, cell: Cell) -> float | None:
        """Time above which a cell is clearly worse than what is known; None for the baseline itself."""
        fastest = self._fastest.get(_contest(cell))
        return None if fastest is None or is_baseline(cell) else CLEARLY_WORSE * fastest


def _contest(cell: Cell) -> str:
    return group_of(cell) if _is_compared(cell) else ""


def _is_compared(cell: Cell) -> bool:
    """Whether others do the same in another way; a peer is only compared within rounds."""
    return bool(cell.backend) or cell.form in ("published", "yours")


def group_of(cell: Cell) -> str:
    """A name for the question that a cell answers, with others that differ in backend, settings or form."""
    return cell.replace(backend="", config="{}", form="plain").cell_id


def groups_of(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that take turns: what answers one question, a block with its parts, a model with its peers.

    Peers join the first model of ours that runs on the same images in the same way.
    """
    groups: dict[str, list[Cell]] = {}
    peers: list[Cell] = []
    for cell in cells:
        if cell.form == "timm":
            peers.append(cell)
        else:
            groups.setdefault(_turns_of(cell), []).append(cell)
    for peer in peers:
        own = next((g for g in groups.values() if g[0].part == "model" and _way(g[0]) == _way(peer)), None)
        if own is None:
            own = groups.setdefault(f"peers {_way(peer)}", [])
        own.append(peer)
    return list(groups.values())


def _turns_of(cell: Cell) -> str:
    """The group of a cell; the parts of a block add up to it only where the machine is the same for all."""
    alone = cell.part in ("attention", "model") or cell.form == "mixer"  # rivals, not parts of one block
    return group_of(cell if alone else cell.replace(part="block"))


def _way(cell: Cell) -> tuple[object, ...]:
    p = cell.problem
    how = (cell.regime, cell.l2, cell.layout, cell.amp, cell.seed)
    return (cell.task, cell.image, p.batch, p.dtype, p.direction, *how)


def is_baseline(cell: Cell) -> bool:
    """Whether others are compared with this cell: gather-then-dense, or window attention among mixers.

    Of a model of somebody else, the model as it is.
    """
    if cell.form not in ("plain", "mixer", "yours"):
        return False
    return set(cell.backend.split(",")) == {baseline_of(cell)} and cell.config == "{}"


def baseline_of(cell: Cell) -> str:
    """The backend, or the mixer, that what answers the cell's question is compared with.

    Of a whole model of somebody else it has no name: it is the model as it is.
    """
    if cell.form == "yours" and cell.part == "model":
        return ""
    return MIXER_BASELINE if cell.form == "mixer" else BASELINE
