"""``bratune cache``: look at, merge and prune stored records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bratune.errors import StoreError, UsageError
from bratune.text import one_line

if TYPE_CHECKING:
    from bratune.record import Record

DEFAULT = (Path("runs"),)

several = click.argument("paths", nargs=-1, type=click.Path(path_type=Path))


@click.group("cache", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look at, merge, mend and prune stored records.

    A path is a records file or a folder of them; without one, ./runs is meant.
    """


@command.command("ls")
@several
def ls(paths: tuple[Path, ...]) -> None:
    """List files with their rows, outcomes and machines."""
    from bratune.store import read_fields, record_files

    for path in record_files(paths or DEFAULT):
        outcomes: Counter[str] = Counter()
        machines: set[str] = set()
        try:
            for row in read_fields([path]):
                outcomes[str(row.get("outcome", "measured"))] += 1
                machines.add(str(row.get("gpu_key") or "(no machine)"))
        except StoreError as error:
            click.echo(one_line(f"{path}  no records: {error}"))
            continue
        counts = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common()) or "no rows"
        click.echo(f"{path}  {path.stat().st_size / 1e6:.2f} MB  {', '.join(sorted(machines))}  {counts}")


@command.command("show")
@click.argument("cell")
@several
def show(cell: str, paths: tuple[Path, ...]) -> None:
    """Show every row of a cell, field by field; CELL is its id or the beginning of it."""
    for row in _rows_of(cell, paths):
        for name, value in row.to_dict().items():
            if value not in (None, "") and name != "cell":
                click.echo(f"{name:20} {value}")
        click.echo("")


@command.command("why")
@click.argument("cell")
@several
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N.")
@click.option("--effort", default=None, metavar="NAME", help="quick, standard or full.  [default: as stored]")
def why(cell: str, paths: tuple[Path, ...], device: str, effort: str | None) -> None:
    """Say whether a cell would be measured again here and now, and which fields decide that.

    CELL is the id of a stored cell, or the beginning of one.
    """
    from bratune.machine import detect
    from bratune.measure.settings import EFFORTS, MeterSettings
    from bratune.run.reuse import Cache

    rows = _rows_of(cell, paths)
    efforts = [MeterSettings.for_effort(name) for name in ([effort] if effort else EFFORTS)]
    settings = next((s for s in efforts if s.sampling == rows[-1].sampling), efforts[0])
    cache = Cache(detect(device), settings, rows)
    asked = rows[-1].to_cell()
    click.echo(f"{rows[-1].cell_id}  {asked}")
    click.echo(str(cache.why(asked)))


@command.command("merge")
@click.argument("into", type=click.Path(path_type=Path))
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
def merge(into: Path, paths: tuple[Path, ...]) -> None:
    """Append the rows of PATHS that the file INTO does not hold yet."""
    from bratune.store.maintenance import merge as merged

    click.echo(f"{merged(into, paths)} rows added to {into}", err=True)


@command.command("import")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=DEFAULT[0],
    show_default=True,
    help="Folder; rows go into one subfolder per GPU key.",
)
def import_(paths: tuple[Path, ...], into: Path) -> None:
    """Take in records of other machines, each kind of machine in a folder of its own."""
    from bratune.store.maintenance import import_records

    for path, number in import_records(into, paths).items():
        click.echo(f"{number} rows added to {path}", err=True)


@command.command("prune")
@several
@click.option("--keep", type=click.IntRange(1), default=1, show_default=True, help="Rows to keep per cell.")
@click.option("--yes", is_flag=True, help="Rewrite the files; without it, only say what would go.")
def prune(paths: tuple[Path, ...], keep: int, yes: bool) -> None:
    """Drop "started" lines that have an outcome, and rows that a later one of the same key replaces."""
    from bratune.run.reuse import key_of
    from bratune.store import record_files
    from bratune.store.maintenance import prune as pruned

    verb, refused = "dropped from" if yes else "would be dropped from", list[str]()
    for path in record_files(paths or DEFAULT):
        try:
            gone, kept = pruned(path, key_of=key_of, keep=keep, rewrite=yes)
        except StoreError as error:  # what is no store does not keep the others from it
            refused.append(str(error))
            continue
        click.echo(f"{gone} rows {verb} {path}, {kept} stay", err=True)
    if refused:
        raise StoreError("; ".join(refused))


@command.command("repair")
@several
@click.option("--yes", is_flag=True, help="Rewrite the files; without it, only say what is wrong.")
def repair(paths: tuple[Path, ...], yes: bool) -> None:
    """Set lines aside that are no records: cut short, not JSON, a number that is none.

    They go to FILE.bad-lines beside their file, as they are.
    """
    from bratune.store import record_files
    from bratune.store.maintenance import BAD_SUFFIX
    from bratune.store.maintenance import repair as repaired

    verb = f"set aside in FILE{BAD_SUFFIX}" if yes else "would be set aside"
    refused = list[str]()
    for path in record_files(paths or DEFAULT):
        try:
            found = repaired(path, rewrite=yes)
        except StoreError as error:
            refused.append(str(error))
            continue
        for number, why in found:
            click.echo(one_line(f"{path}, line {number}: {why}"))
        click.echo(f"{path}: {len(found)} lines {verb}", err=True)
    if refused:
        raise StoreError("; ".join(refused))


@command.command("compact")
@several
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A .parquet file."
)
def compact(paths: tuple[Path, ...], output: Path) -> None:
    """Write records as one Parquet file, which pandas reads many times faster; needs pyarrow."""
    from bratune.store.maintenance import compact as compacted

    if output.suffix != ".parquet":
        raise UsageError(f"--output must be a .parquet file, not {output}")
    number = compacted(paths or DEFAULT, output)
    click.echo(f"{number} rows in {output}, {output.stat().st_size / 1e6:.2f} MB", err=True)


def _rows_of(cell: str, paths: tuple[Path, ...]) -> list[Record]:
    """Rows of the one cell whose id begins so."""
    from bratune.store import read_records

    rows = [row for row in read_records(paths or DEFAULT) if row.cell_id.startswith(cell) and row.cell]
    ids = sorted({row.cell_id for row in rows})
    where = ", ".join(map(str, paths or DEFAULT))
    if not ids:
        raise StoreError(f"no cell of {where} has an id that begins with {cell!r}; cache ls shows the files")
    if len(ids) > 1:
        raise UsageError(f"{len(ids)} cells of {where} begin with {cell!r}: {', '.join(ids[:5])}")
    return rows
