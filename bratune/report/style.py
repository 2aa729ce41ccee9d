"""Style: one look for every figure, and one way to draw each level of evidence.

Measured is solid. What was not measured looks it: modelled bars are hatched and hollow, modelled points and
published ones are open, bounds are lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "EVIDENCE_WORDS",
    "as_text",
    "bar_marker",
    "colours",
    "error_bars",
    "layout",
    "line",
    "point_marker",
]

# Neutral grey for the published baseline, so that what differs from it carries the colour.
BACKEND_COLOURS = {
    "gather": "#8b98a8",
    "gather-sdpa": "#4677b8",
    "dense": "#d99a2b",
    "flex": "#a06cb0",
    "sparse": "#c8603c",
    "triton": "#16877a",
    "native": "#2f6f4f",
    "reference": "#b9b2a8",
}
PART_COLOURS = {
    "pos_embed": "#c3ccd6",
    "norm": "#a7b4c2",
    "qkv": "#7f93a8",
    "routing": "#e0a83a",
    "attention": "#16877a",
    "lepe": "#c9a7b8",
    "proj": "#63788f",
    "mlp": "#465a70",
}
OTHER_COLOURS = ("#16877a", "#4677b8", "#d99a2b", "#a06cb0", "#c8603c", "#5b6b7c", "#7a9a3c", "#b2577b")
EVIDENCE_WORDS = {
    "measured": "measured on that machine",
    "replayed": "answered from stored measurements",
    "interpolated": "between stored measurements",
    "modelled": "modelled, never run there",
    "bound": "what no implementation can beat",
    "published": "somebody else's published number",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
GRID = "rgba(128,138,150,0.20)"
INK = "#3b4652"


ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;", "%": "&#37;"})


def as_text(text: str) -> str:
    """A text that stands for itself in a figure, where ``<b>`` and ``%{x}`` would be markup, and in HTML."""
    return text.translate(ENTITIES)


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour per series: backends and parts always the same, others in order."""
    fixed = BACKEND_COLOURS | PART_COLOURS
    free = itertools.cycle(OTHER_COLOURS)
    found: dict[str, str] = {}
    names = list(dict.fromkeys(names))
    tails = [name.rpartition(" · ")[2].removesuffix(" everywhere") for name in names]
    for name, tail in zip(names, tails, strict=True):
        # Where only one model is shown, its backends keep their colours.
        alone = tails.count(tail) == 1
        found[name] = fixed[tail] if alone and tail in fixed else next(free)
    return found


def error_bars(values: Sequence[float], lo: Sequence[float], hi: Sequence[float]) -> dict[str, Any]:
    """From the lower to the upper bound of each value."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [top - value for value, top in zip(values, hi, strict=True)],
        "arrayminus": [value - bottom for value, bottom in zip(values, lo, strict=True)],
        "thickness": 1.2,
        "width": 3,
        "color": "rgba(70,80,92,0.85)",
    }


def bar_marker(colour: str, evidence: str) -> dict[str, Any]:
    """How a bar looks: solid when measured, hatched and hollow when not."""
    outline = {"color": colour, "width": 1.2}
    if evidence in ("measured", "replayed"):
        return {"color": colour, "line": outline}
    shape = {"interpolated": "-", "modelled": "/", "published": "."}.get(evidence, "x")
    pattern = {"shape": shape, "fgcolor": colour, "bgcolor": "rgba(0,0,0,0)", "size": 6, "solidity": 0.28}
    return {"color": colour, "line": outline, "pattern": pattern | {"fillmode": "replace"}}


def point_marker(colour: str, evidence: str, size: float = 9) -> dict[str, Any]:
    """How a point looks: filled when measured, open when not."""
    symbol = {"measured": "circle", "replayed": "circle", "published": "diamond-open"}.get(
        evidence, "circle-open"
    )
    return {"color": colour, "symbol": symbol, "size": size, "line": {"width": 1.8, "color": colour}}


def line(colour: str, evidence: str) -> dict[str, Any]:
    """How a line looks: solid when measured, dashed when modelled, dotted for a bound."""
    dash = {"measured": "solid", "replayed": "solid", "bound": "dot"}.get(evidence, "dash")
    return {"color": colour, "width": 2, "dash": dash}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title that carries its unit."""
    return {
        "title": {"text": title, "font": {"size": 12}, "standoff": 10},
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": GRID,
        "automargin": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "rgba(0,0,0,0)",
    } | more


def layout(height: int, x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The layout that all figures share; the page draws the legend."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 20, "t": 12, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12.5, "color": INK},
        "showlegend": False,
        "hoverlabel": {"font": {"family": FONT, "size": 12.5}, "align": "left"},
        "xaxis": dict(x),
        "yaxis": dict(y),
    } | more
