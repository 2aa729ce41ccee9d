"""Picture: the first chart of a report as a small SVG, light or dark, for a page that runs no script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from bratune.record import Record
from bratune.report.figures.facts import told_apart
from bratune.report.figures.throughput import COLOURS, Bar, chart, infos, lanes, value_text

__all__ = ["THEMES", "throughput_svg"]

WIDTH, MARGIN = 860, 16
# Room for a character of a name, and for a value with its evidence.
CHARACTER, VALUE = 7.7, 130
LANE, HEADING = 30, 34
# Ink, soft ink, grid. The paper is the page's.
THEMES = {"light": ("#25303a", "#5d6a76", "#d5dbe1"), "dark": ("#e4e8ec", "#9aa7b3", "#39444e")}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def throughput_svg(records: Sequence[Record], *, theme: str = "light") -> str:
    """Images per second by architecture, as the report's first chart shows them; empty without a whole model.

    Args:
        records: Pooled over their passes.
        theme: One of `THEMES`.
    """
    charts = chart(infos(told_apart(records)))
    return _svg(charts[0], theme) if charts else ""


def _svg(bars: Sequence[Bar], theme: str) -> str:
    ink, soft, grid = THEMES[theme]
    title, lines = lanes(bars)
    top = 74
    bottom = top + sum(LANE if lane.bar else HEADING for lane in lines)
    step = _step(max(b.hi for b in bars))
    reach = max(b.hi for b in bars) * 1.02
    left = round(MARGIN + CHARACTER * max(len(lane.name) for lane in lines if lane.bar) + VALUE)
    width = max(WIDTH, left + WIDTH // 2)
    wide = width - left - MARGIN
    body = [_text(MARGIN, 26, title, ink, size=16, weight=600), _legend(bars, soft)]
    for number in range(int(reach / step) + 1):
        x = left + wide * number * step / reach
        body.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="{grid}"/>')
        body.append(_text(x, bottom + 18, f"{number * step:g}", soft, anchor="middle", size=12))
    body.append(_text(left + wide / 2, bottom + 38, "images per second", soft, anchor="middle", size=12))
    y = top
    for lane in lines:
        if lane.bar is None:
            body.append(_text(MARGIN, y + 23, lane.name, ink, weight=600))
        else:
            body += _lane(lane.name, lane.bar, left, y, wide / reach, ink, soft)
        y += LANE if lane.bar else HEADING
    height = bottom + 50
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{html.escape(f"images per second: {title}")}" '
        f'font-family="{html.escape(FONT)}" font-size="13.5">\n{_patterns()}\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _lane(name: str, bar: Bar, left: int, y: float, scale: float, ink: str, soft: str) -> list[str]:
    colour = COLOURS[bar.meaning]
    fill = (
        colour
        if bar.evidence in ("measured", "replayed")
        else f"url(#hatch{list(COLOURS).index(bar.meaning)})"
    )
    middle = y + LANE / 2
    lo, value, hi = (left + scale * v for v in (bar.lo, bar.images_per_s, bar.hi))
    return [
        _text(MARGIN, middle + 5, name, ink),
        _text(left - 10, middle + 5, value_text(bar), soft, anchor="end", size=12.5),
        f'<rect x="{left}" y="{y + 5}" width="{value - left:.1f}" height="{LANE - 10}" fill="{fill}" '
        f'stroke="{colour}"/>',
        f'<path d="M{lo:.1f} {middle}H{hi:.1f}M{lo:.1f} {middle - 4}v8M{hi:.1f} {middle - 4}v8" '
        f'stroke="{ink}" fill="none"/>',
    ]


def _legend(bars: Sequence[Bar], soft: str) -> str:
    parts, x = [], float(MARGIN)
    for meaning, colour in COLOURS.items():
        if any(b.meaning == meaning for b in bars):
            parts.append(f'<rect x="{x}" y="42" width="12" height="12" fill="{colour}"/>')
            parts.append(_text(x + 18, 53, meaning, soft, size=13))
            x += 18 + 7.5 * len(meaning) + 22
    return "".join(parts)


def _patterns() -> str:
    """Hatching in every colour, for what was not measured."""
    return "".join(
        f'<pattern id="hatch{number}" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><path d="M0 0V6" stroke="{colour}" stroke-width="3"/></pattern>'
        for number, colour in enumerate(COLOURS.values())
    )


def _text(
    x: float,
    y: float,
    text: str,
    colour: str,
    *,
    anchor: str = "start",
    size: float = 13.5,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{html.escape(text)}</text>'
    )


def _step(reach: float) -> float:
    """A round distance between grid lines, four to eight of them."""
    power: float = 10 ** math.floor(math.log10(reach))
    return next(s * power for s in (0.2, 0.25, 0.5, 1.0, 2.0) if reach / (s * power) <= 8)
