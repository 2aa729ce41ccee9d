"""``bratune report``: draw records as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.cli import options
from bratune.errors import BratuneError, UsageError

if TYPE_CHECKING:
    from bratune.record import Record


@click.command("report")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", default="report.html", show_default=True, type=click.Path(path_type=Path))
@click.option("--title", default="bratune report", show_default=True)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="A plan.json, to be marked among the settings that tuning verified (front.json beside it).",
)
@click.option(
    "--published",
    "tables",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Benchmark CSV of timm, drawn as somebody else's numbers; repeatable.",
)
@click.option("--gpu", "keys", multiple=True, help="Add modelled rows for this GPU; repeatable.")
@options.host_option
@click.option("--demo", is_flag=True, help="The records that ship, beside modelled rows for three GPUs.")
@click.option("--images", type=click.Choice(["png", "svg"]), help="Also write every figure as an image.")
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="Also the first chart as SVG, light and dark, into this folder.",
)
def command(
    paths: tuple[Path, ...],
    output: Path,
    title: str,
    plan: Path | None,
    tables: tuple[Path, ...],
    keys: tuple[str, ...],
    host: str | None,
    demo: bool,
    images: str | None,
    pictures: Path | None,
) -> None:
    """Draw records (files or folders) as one HTML page that works offline.

    bratune report runs/latest -o report.html
    """
    from bratune import gpus, store
    from bratune.report import demo as demonstration
    from bratune.report.page import page
    from bratune.report.published import read_timm

    if not paths and not demo and not keys:
        raise UsageError("report needs records: a file, a folder, --gpu KEY for modelled rows, or --demo")
    records = demonstration.demo_records() if demo else []
    stored = store.read_rows(paths, without=("repro", "claimed_by")) if paths else store.Rows.of(())
    records += store.pool(stored)
    passes = list(stored.where("part", lambda part: part == "model"))
    if keys:
        records += demonstration.modelled_records([gpus.resolve(key) for key in keys], host=host)
    elif host:
        raise UsageError("--host is about the modelled rows of --gpu KEY; one of them is missing")
    gmacs: dict[str, float] = {}
    for table in tables:
        rows, work = read_timm(table)
        records += rows
        gmacs |= work
    contents = _plan(plan) if plan else None
    text = page(records, passes=passes, title=title, plan=contents, gmacs=gmacs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, "utf-8")
    except OSError as error:
        raise BratuneError(f"the report cannot be written to {output}: {error.strerror}") from None
    if images:
        from bratune.report.images import write_images

        for path in write_images(records, output.parent, images, plan=contents, gmacs=gmacs):
            click.echo(f"image: {path}", err=True)
    if pictures:
        _write_pictures(records, pictures)
    click.echo(f"report: {output} ({len(records)} records, {len(text) / 1e6:.1f} MB)", err=True)


def _write_pictures(records: list[Record], folder: Path) -> None:
    from bratune.report.picture import THEMES, throughput_svg

    drawn = {theme: throughput_svg(records, theme=theme) for theme in THEMES}
    if not all(drawn.values()):
        raise UsageError("--pictures draws whole models, and no record here is of one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for theme, text in drawn.items():
            target = folder / f"throughput-{theme}.svg"
            target.write_text(text, "utf-8")
            click.echo(f"picture: {target}", err=True)
    except OSError as error:
        raise BratuneError(f"the pictures cannot be written to {folder}: {error.strerror}") from None


def _plan(path: Path) -> dict[str, Any]:
    """A plan's contents, with the settings that tuning verified under ``front`` where they lie beside it."""
    import json

    from bratune.tune.plan import load_plan
    from bratune.tune.plan_schema import FRONT_SCHEMA, hidden_texts, violations

    contents = load_plan(path).to_dict()
    beside = path.with_name("front.json")
    if not beside.exists():
        return contents
    try:
        front = json.loads(beside.read_text("utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise BratuneError(f"the settings beside the plan, {beside}, cannot be read: {error}") from None
    if wrong := [*violations(front, FRONT_SCHEMA), *hidden_texts(front)]:
        raise BratuneError(f"the settings beside the plan, {beside}, cannot be read: {'; '.join(wrong[:3])}")
    return contents | {"front": front}
