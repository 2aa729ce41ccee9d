"""Panel: one figure of a report, and which of many are worth drawing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from bratune.record import EVIDENCE
from bratune.report.style import as_text

__all__ = [
    "MOST_PANELS",
    "ROW_PX",
    "Key",
    "Panel",
    "by",
    "label_sides",
    "most_telling",
    "number",
    "safe",
    "trust",
    "without_shared_model",
]

# More panels than this are left to the table; a page is for reading.
MOST_PANELS = 4
# Height of one bar.
ROW_PX = 24


Row = TypeVar("Row", bound=Any)


class Key(NamedTuple):
    """One entry of a legend; its name is the `legendgroup` of the traces that it switches, in markup."""

    name: str
    colour: str
    kind: str = "box"


class Panel(NamedTuple):
    """A figure as Plotly takes it, with its title and legend; texts are markup (`bratune.report.style`)."""

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


def safe(rows: Iterable[Row]) -> list[Row]:
    """Rows for a figure: their texts, which are data, made to stand for themselves in markup."""
    return [row._make(as_text(v) if isinstance(v, str) else v for v in row) for row in rows]


def number(value: float) -> str:
    """Three significant digits, without exponents: ``12.0``, ``1 234``."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:#.3g}".rstrip(".")


def label_sides(points: Sequence[tuple[float, float]]) -> list[str]:
    """Where the names of points stand so that they stay in a plot that begins at 0.

    Away from the nearer edge, and of neighbours one above and one below.
    """
    middle = 0.55 * max((x for x, _ in points), default=0.0)
    ranks = {point: rank for rank, point in enumerate(sorted(set(points)))}
    return [
        f"{'top' if ranks[point] % 2 else 'bottom'} {'left' if point[0] > middle else 'right'}"
        for point in points
    ]


def without_shared_model(work: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A title and short names: the model moves into the title where all series share it."""
    models = {name.partition(" · ")[0] for name in names}
    if len(models) != 1 or len(names) == 1:
        return work, {name: name for name in names}
    return f"{models.pop()}, {work}", {name: name.partition(" · ")[2] or name for name in names}
