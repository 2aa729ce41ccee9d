"""Page: records as one HTML file that needs no network.

Plotly is written into the file once. Every figure has its data as a table and as a CSV link inside the
file; the same records always give the same bytes.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from bratune.errors import MissingPackageError
from bratune.record import EVIDENCE, Record
from bratune.report import assets
from bratune.report.figures.facts import told_apart
from bratune.report.figures.panel import Key, Panel
from bratune.report.figures.section import Section
from bratune.report.sections import sections
from bratune.report.style import EVIDENCE_WORDS
from bratune.report.tables import to_csv

__all__ = ["page", "rows_to_csv"]

# Rows of a table that the page shows; the CSV has all of them.
SHOWN_ROWS = 200


def page(
    records: Sequence[Record],
    *,
    title: str = "bratune report",
    plan: Mapping[str, Any] | None = None,
    gmacs: Mapping[str, float] | None = None,
) -> str:
    """The whole report as HTML.

    Args:
        records: What to show; failures are listed with their reasons.
        title: Of the page.
        plan: A plan file's contents, whose setting is marked.
        gmacs: See `bratune.report.sections.sections`.

    Raises:
        MissingPackageError: plotly is not installed.
    """
    records = told_apart(records)
    found = sections(records, plan, gmacs)
    shown = [s for s in found if s.panels]
    missing = [s for s in found if not s.panels]
    body = [
        _header(title, records),
        _contents(shown),
        *(_section(s, records) for s in shown),
        _missing(missing),
        _failures(records),
    ]
    script = "\n".join(_plot_call(s.name, i, p) for s in shown for i, p in enumerate(s.panels))
    return assets.document(title=html.escape(title), body="\n".join(body), plotly=_plotly(), plots=script)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingPackageError("plotly", "the report") from None
    return str(get_plotlyjs())


def _plot_call(name: str, index: int, panel: Panel) -> str:
    data, layout = (_script_json(part) for part in (panel.data, panel.layout))
    return f"draw({_script_json(f'{name}-{index}')}, {data}, {layout});"


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


# --- header -------------------------------------------------------------------------------------------


def _header(title: str, records: Sequence[Record]) -> str:
    models = sorted({r.model for r in records if r.model})
    dates = sorted({r.timestamp_utc[:10] for r in records if r.timestamp_utc and r.evidence == "measured"})
    period = f"measured {dates[0]}" + (f" to {dates[-1]}" if dates[0] != dates[-1] else "") if dates else ""
    if not any(r.evidence == "measured" and r.ok for r in records):
        period = "nothing in it was measured"
    facts = [f"{len(records)} records", ", ".join(models), period]
    legend = "".join(
        f'<li><span class="swatch {name}"></span><b>{name}</b> {EVIDENCE_WORDS[name]}</li>'
        for name in EVIDENCE
        if any(r.evidence == name for r in records) or name == "bound"
    )
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="facts">{html.escape(" · ".join(f for f in facts if f))}</p>'
        f'<ul class="evidence">{legend}</ul>{_machines(records)}</header>'
    )


def _machines(records: Sequence[Record]) -> str:
    rows: list[tuple[str, ...]] = []
    for key in sorted({r.gpu_key for r in records if r.gpu_key}):
        own = [r for r in records if r.gpu_key == key]
        first = next((r for r in own if r.evidence == "measured"), own[0])
        counts = Counter(r.evidence for r in own)
        what = ", ".join(f"{counts[e]} {e}" for e in EVIDENCE if counts[e])
        memory = f"{first.memory_gib:g} GiB" if first.memory_gib else ""
        versions = " · ".join(
            f"{name} {value}"
            for name, value in (("torch", first.torch), ("triton", first.triton), ("driver", first.driver))
            if value and first.evidence == "measured"
        )
        rows.append((key, first.gpu_name, str(first.sm_count or ""), memory, what, versions))
    header: tuple[str, ...] = ("machine", "name", "SMs or cores", "memory", "records", "versions")
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return _table(header, rows)


def _contents(shown: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{s.name}">{html.escape(s.title)}</a>' for s in shown)
    return f"<nav>{links}</nav>"


# --- sections -----------------------------------------------------------------------------------------


def _section(section: Section, records: Sequence[Record]) -> str:
    panels = "".join(_panel(section.name, i, p) for i, p in enumerate(section.panels))
    return (
        f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2>'
        f"<p>{html.escape(section.lead)}</p>{panels}{_data(section)}</section>"
    )


def _panel(name: str, index: int, panel: Panel) -> str:
    keys = "".join(_key(key) for key in panel.keys)
    legend = f'<div class="keys" data-for="{name}-{index}">{keys}</div>' if keys else ""
    return (
        f"<figure><figcaption>{html.escape(panel.title)}</figcaption>{legend}"
        f'<div class="plot" id="{name}-{index}"></div></figure>'
    )


def _key(key: Key) -> str:
    name = html.escape(key.name, quote=True)
    return (
        f'<button type="button" aria-pressed="true" data-group="{name}">'
        f'<span class="{key.kind}" style="--c:{key.colour}"></span>{name}</button>'
    )


def _data(section: Section) -> str:
    """The data of a section as tables, one per kind of row, and as CSV files in the page."""
    parts = []
    for kind in dict.fromkeys(type(row) for row in section.rows):
        rows = [row for row in section.rows if type(row) is kind]
        name = section.name if kind is type(section.rows[0]) else f"{section.name}-{kind.__name__.lower()}"
        link = f"data:text/csv;charset=utf-8,{quote(rows_to_csv(rows))}"
        shown = [[_cell(value) for value in row] for row in rows[:SHOWN_ROWS]]
        rest = f"<p>{len(rows) - SHOWN_ROWS} more rows are in the CSV.</p>" if len(rows) > SHOWN_ROWS else ""
        parts.append(
            f"<details><summary>Data: {len(rows)} rows</summary>"
            f'<p><a download="{name}.csv" href="{link}">{name}.csv</a></p>'
            f"{_table(kind._fields, shown)}{rest}</details>"
        )
    return "".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def rows_to_csv(rows: Sequence[Any]) -> str:
    """Named tuples of one kind as CSV with a header; empty text for None."""
    return to_csv(rows[0]._fields, rows) + "\n"


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


# --- what is not there --------------------------------------------------------------------------------


def _missing(missing: Sequence[Section]) -> str:
    if not missing:
        return ""
    items = "".join(f"<li><b>{html.escape(s.title)}</b> {html.escape(s.missing)}.</li>" for s in missing)
    return f'<section id="missing"><h2>Not shown</h2><ul>{items}</ul></section>'


def _failures(records: Sequence[Record]) -> str:
    failed = [r for r in records if not r.ok and r.outcome not in ("started",)]
    if not failed:
        return ""
    counted: Counter[tuple[str, str, str, str]] = Counter()
    for r in failed:
        what = " ".join(filter(None, (r.backend, r.part, f"stage {r.stage}" if r.stage else "")))
        counted[(r.gpu_key, what, r.outcome, r.reason)] += 1
    rows = [(*key, str(count)) for key, count in sorted(counted.items())]
    return (
        '<section id="failures"><h2>What did not run</h2>'
        "<p>Every failure is a record with its reason.</p>"
        f"{_table(('machine', 'what', 'outcome', 'reason', 'cells'), rows)}</section>"
    )
