"""Page: records as one HTML file that needs no network.

It opens with the answer and the chart that shows it. Plotly, the figures and the CSV files of their data are
packed into the file; tables can be read without a script. The same records always give the same bytes.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bratune.errors import MissingPackageError
from bratune.record import EVIDENCE, Record
from bratune.report import assets
from bratune.report.figures.facts import told_apart, with_bounds
from bratune.report.figures.panel import Key, Panel
from bratune.report.figures.section import Section
from bratune.report.opening import opening
from bratune.report.sections import sections
from bratune.report.style import EVIDENCE_WORDS
from bratune.tables import to_csv
from bratune.text import html_table

__all__ = ["Page", "page", "rows_to_csv"]

# Rows of a table, and of a cell the characters, that the page shows; the CSV has all of them.
SHOWN_ROWS = 200
SHOWN_CHARACTERS = 72


class Page(str):
    """A report: the text of an HTML file, which a notebook shows in a frame."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        frame = 'style="width:100%;height:900px;border:0" title="bratune report"'
        return f'<iframe srcdoc="{html.escape(self)}" {frame}></iframe>'


def page(
    records: Sequence[Record],
    *,
    passes: Sequence[Record] = (),
    title: str = "bratune report",
    plan: Mapping[str, Any] | None = None,
    gmacs: Mapping[str, float] | None = None,
) -> Page:
    """The whole report as HTML.

    Args:
        records: What to show, pooled over passes; failures are listed with their reasons.
        passes: Rows of single passes, which alone can show that anything is faster.
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
        _header(title, opening(records, told_apart(passes)), records),
        *(_section(s) for s in shown[:1]),
        _contents(shown[1:]),
        *(_section(s) for s in shown[1:]),
        _missing(missing),
        _failures(records),
        _machines(records),
    ]
    plots = "\n".join(_plot_call(s.name, i, p) for s in shown for i, p in enumerate(s.panels))
    files = {f"{name}.csv": rows_to_csv(rows) for s in shown for name, rows in _kinds(s)}
    script = f"{_plotly()}\nconst files = {_script_json(files)};\nfunction plots() {{\n{plots}\n}}\n"
    return Page(assets.document(title=html.escape(title), body="\n".join(body), script=script))


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingPackageError("plotly", "the report") from None
    return str(get_plotlyjs())


def _plot_call(name: str, index: int, panel: Panel) -> str:
    keys = [[key.name, key.colour] for key in panel.keys]
    parts = (f"{name}-{index}", panel.data, panel.layout, panel.title, keys)
    return f"draw({', '.join(map(_script_json, parts))});"


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element; a figure needs no more than six digits."""
    text = json.dumps(_rounded(value), separators=(",", ":"), sort_keys=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


# --- header -------------------------------------------------------------------------------------------


def _header(title: str, sentence: str, records: Sequence[Record]) -> str:
    models = sorted({r.model for r in records if r.model})
    dates = sorted({r.timestamp_utc[:10] for r in records if r.timestamp_utc and r.evidence == "measured"})
    period = f"measured {dates[0]}" + (f" to {dates[-1]}" if dates[0] != dates[-1] else "") if dates else ""
    if not any(r.evidence == "measured" and r.ok for r in records):
        period = "nothing in it was measured"
    facts = [f"{len(records)} records", ", ".join(models), period]
    shown = {r.evidence for r in with_bounds(records)}
    legend = "".join(
        f'<li><span class="swatch {name}"></span><b>{name}</b> {EVIDENCE_WORDS[name]}</li>'
        for name in EVIDENCE
        if name in shown
    )
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="answer">{html.escape(sentence)}</p>'
        f'<p class="facts">{html.escape(" · ".join(f for f in facts if f))}</p>'
        f'<ul class="evidence">{legend}</ul></header>'
    )


def _machines(records: Sequence[Record]) -> str:
    rows: list[tuple[str, ...]] = []
    for key in sorted({r.gpu_key for r in records if r.gpu_key}):
        own = [r for r in records if r.gpu_key == key]
        first = next((r for r in own if r.evidence == "measured"), own[0])
        counts = Counter(r.evidence if r.ok else "without a number" for r in own if r.outcome != "started")
        what = ", ".join(f"{counts[e]} {e}" for e in (*EVIDENCE, "without a number") if counts[e])
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
    return f'<section id="machines"><h2>Machines</h2>{_table(header, rows)}</section>'


def _contents(shown: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{s.name}">{html.escape(s.title)}</a>' for s in shown)
    return f'<nav aria-label="More questions">{links}</nav>' if links else ""


# --- sections -----------------------------------------------------------------------------------------


def _section(section: Section) -> str:
    panels = "".join(_panel(section.name, i, p) for i, p in enumerate(section.panels))
    return (
        f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2>'
        f"<p>{html.escape(section.lead)}</p>{panels}{_data(section)}</section>"
    )


def _panel(name: str, index: int, panel: Panel) -> str:
    keys = "".join(_key(key) for key in panel.keys)
    legend = f'<div class="keys" data-for="{name}-{index}">{keys}</div>' if keys else ""
    save = "".join(
        f'<button type="button" data-save="{kind}" data-for="{name}-{index}">{kind.upper()}</button>'
        for kind in ("png", "svg")
    )
    return (
        f"<figure><figcaption>{panel.title}</figcaption>{legend}"
        f'<div class="plot" id="{name}-{index}"></div>'
        f'<p class="save">copy for a talk: {save}</p></figure>'
    )


def _key(key: Key) -> str:
    return (
        f'<button type="button" aria-pressed="true" data-group="{html.escape(key.name)}">'
        f'<span class="{key.kind}" style="--c:{key.colour}"></span>{key.name}</button>'
    )


def _kinds(section: Section) -> list[tuple[str, list[Any]]]:
    """The rows of a section by kind, each with the name of its file."""
    found = []
    for kind in dict.fromkeys(type(row) for row in section.rows):
        name = section.name if kind is type(section.rows[0]) else f"{section.name}-{kind.__name__.lower()}"
        found.append((name, [row for row in section.rows if type(row) is kind]))
    return found


def _data(section: Section) -> str:
    """The data of a section as tables, one per kind of row, and as CSV files in the page."""
    parts = []
    for name, rows in _kinds(section):
        shown = [[_cell(value) for value in row] for row in rows[:SHOWN_ROWS]]
        rest = f"<p>{len(rows) - SHOWN_ROWS} more rows are in the CSV.</p>" if len(rows) > SHOWN_ROWS else ""
        parts.append(
            f"<details><summary>Data: {len(rows)} rows</summary>"
            f'<p><a download="{name}.csv">{name}.csv</a></p>'
            f"{_table(rows[0]._fields, shown)}{rest}</details>"
        )
    return "".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def rows_to_csv(rows: Sequence[Any]) -> str:
    """Named tuples of one kind as CSV with a header; empty text for None."""
    return to_csv(rows[0]._fields, rows) + "\n"


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    return f'<div class="scroll">{html_table(header, rows)}</div>'


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
