"""Panel: one figure of a report, and which of many are worth drawing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from bratune.record import EVIDENCE

__all__ = [
    "MOST_PANELS",
    "ROW_PX",
    "Key",
    "Panel",
    "by",
    "most_telling",
    "number",
    "trust",
    "without_shared_model",
]

# More panels than this are left to the table; a page is for reading.
MOST_PANELS = 4
# Height of one bar.
ROW_PX = 24


class Key(NamedTuple):
    """One entry of a legend; its name is the `legendgroup` of the traces that it switches."""

    name: str
    colour: str
    kind: str = "box"


class Panel(NamedTuple):
    """A figure as Plotly takes it, with its title and legend."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    keys: tuple[Key, ...] = ()


def most_telling(groups: dict[str, list[Any]]) -> list[tuple[str, list[Any]]]:
    """The groups that say most: best evidence first, then the most rows."""
    ranked = sorted(groups.items(), key=lambda g: (trust(g[1]), -len(g[1]), g[0]))
    return ranked[:MOST_PANELS]


def trust(rows: Sequence[Any]) -> int:
    """The place of the best evidence among rows; lower is more trusted."""
    return min(EVIDENCE.index(row.evidence) for row in rows)


def by(rows: Sequence[Any], *fields: str) -> dict[str, list[Any]]:
    """Rows grouped by the text of some fields."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        groups[" · ".join(str(getattr(row, f)) for f in fields)].append(row)
    return dict(groups)


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def without_shared_model(work: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A title and short names: the model moves into the title where all series share it."""
    models = {name.partition(" · ")[0] for name in names}
    if len(models) != 1 or len(names) == 1:
        return work, {name: name for name in names}
    return f"{models.pop()}, {work}", {name: name.partition(" · ")[2] or name for name in names}
