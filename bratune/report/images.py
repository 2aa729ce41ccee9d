"""Images: every figure of a report as PNG or SVG, where kaleido and a browser are installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bratune.errors import BratuneError, MissingPackageError
from bratune.record import Record
from bratune.report.figures.facts import told_apart
from bratune.report.sections import sections

__all__ = ["write_images"]

WIDTH = 900


def write_images(
    records: Sequence[Record],
    folder: Path,
    kind: str,
    *,
    plan: Mapping[str, Any] | None = None,
    gmacs: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write one image per figure as ``<section>-<number>.<kind>`` and return the paths.

    Raises:
        MissingPackageError: kaleido is not installed.
        BratuneError: kaleido finds no browser.
    """
    try:
        import kaleido  # noqa: F401
    except ImportError:
        raise MissingPackageError("kaleido", "writing images", extra="images") from None
    import plotly.graph_objects as go
    import plotly.io as pio

    drawings: dict[Path, Any] = {}
    for section in sections(told_apart(records), plan, gmacs):
        for number, panel in enumerate(section.panels):
            layout = panel.layout | {
                "paper_bgcolor": "white",
                "title": {"text": panel.title, "font": {"size": 14}},
                "margin": {**panel.layout["margin"], "t": 52},
                "showlegend": bool(panel.keys),
                "width": WIDTH,
                "height": panel.layout["height"] + 60,
            }
            path = folder / f"{section.name}-{number}.{kind}"
            drawings[path] = go.Figure({"data": panel.data, "layout": layout})
    try:
        pio.write_images(list(drawings.values()), list(drawings))  # one browser for all of them
    except Exception as error:  # kaleido has no error of its own for a missing browser
        raise BratuneError(
            f"images cannot be written: kaleido needs Chrome or Chromium ({error}); "
            "the HTML report needs neither"
        ) from None
    return list(drawings)
