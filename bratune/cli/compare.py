"""``bratune compare``: say which of several sets of records is faster, and how sure that is."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bratune.report.compare import Comparison


@click.command("compare")
@click.argument("sets", nargs=-1, required=True, metavar="A B [C...]")
@click.option("--threshold", default="2%", show_default=True, help="Differences within it do not matter.")
@click.option("--confidence", default=0.95, show_default=True, type=click.FloatRange(0.5, 0.999))
@click.option("--across", is_flag=True, help="Also compare cells that were run differently.")
@click.option(
    "--fail-on-regression", "limit", metavar="PERCENT", help="Exit with 3 when a cell is surely slower."
)
@click.option(
    "--format", "style", type=click.Choice(["table", "json", "md"]), default="table", show_default=True
)
def command(
    sets: tuple[str, ...],
    threshold: str,
    confidence: float,
    across: bool,
    limit: str | None,
    style: str,
) -> int:
    """Compare every set of records with the first, cell by cell.

    A set is a file, a folder, PATH@gpu (one machine of several), or a GPU key (the records that ship). Ratios
    are of B over A: below 1 is faster. What is compared are passes, each a fresh process; with one on a side
    nothing is called faster or slower. What all cells moved by together is named and divided out, and what
    the machine did to the baseline that took turns with a cell is taken out of that cell.

    Exit code 3 with --fail-on-regression when a cell is SLOWER by at least that share.
    """
    from bratune.measure.settings import parse_percent
    from bratune.report import compare as comparing

    share = None if limit is None else parse_percent(limit) / 100
    found = [comparing.load_set(argument) for argument in sets]
    result = comparing.compare(
        found,
        margin=parse_percent(threshold) / 100,
        confidence=confidence,
        across=across,
    )
    _show(result, style)
    if share is None:
        return 0
    slower = comparing.regressions(result, share)
    for row in slower:
        click.echo(f"regression: {row.what}: {row.verdict}", err=True)
    return 3 if slower else 0


def _show(result: Comparison, style: str) -> None:
    from bratune.tables import Table, to_markdown, to_text

    if style == "json":
        for row in result.rows:
            verdict = row.verdict
            data = row._asdict() | {
                "verdict": verdict.verdict,
                "ratio": verdict.ratio,
                "lo": verdict.lo or None,
                "hi": None if verdict.hi == float("inf") else verdict.hi,
                "passes": verdict.passes,
                "settles": verdict.settles,
            }
            click.echo(json.dumps(data))
        for sentence in result.drifts:
            click.echo(sentence, err=True)
        return
    cells = [
        (
            row.what,
            row.other,
            f"{row.base_ms:.4g}",
            f"{row.other_ms:.4g}",
            f"{row.verdict.ratio:.3f}",
            f"{row.verdict.lo:.3f} to {row.verdict.hi:.3f}" if row.verdict.lo else "one process",
            row.verdict.verdict,
            "" if row.evidence == "measured" else row.evidence,
        )
        for row in result.rows
    ]
    header = ("<cell", "<B", "A ms", "B ms", "B / A", "<interval", "<verdict", "<evidence")
    table = Table(header, tuple(cells))
    click.echo(to_markdown(table) if style == "md" else to_text(table))
    _explain(result)


def _explain(result: Comparison) -> None:
    """What the table leaves open, on stderr, each sentence once."""
    for sentence in result.drifts:
        click.echo(sentence, err=True)
    if result.beside:
        click.echo(
            f"{_cells(result.beside)} compared beside the baseline that took turns with "
            f"{'it' if result.beside == 1 else 'them'} and is the same code in both: what the machine did "
            "to it is taken out",
            err=True,
        )
    if result.other_baselines:
        click.echo(
            f"{_cells(result.other_baselines)} compared by times alone: the baseline beside "
            f"{'it' if result.other_baselines == 1 else 'them'} is other code, or ran on another machine",
            err=True,
        )
    advice = Counter(row.verdict.settles for row in result.rows if row.verdict.settles)
    for sentence, count in advice.most_common():
        click.echo(f"{_cells(count)} undecided: {sentence}", err=True)
    if result.refused:
        click.echo(
            f"{result.refused} cells were run differently and left out; --across compares them", err=True
        )
    if result.only_in_one:
        click.echo(f"{result.only_in_one} cells are in one set only", err=True)


def _cells(count: int) -> str:
    return f"{count} {'cell is' if count == 1 else 'cells are'}"
