"""``bratune contribute``: check a measured run and make of it a file of ``results/``."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import click

from bratune.cli import options
from bratune.errors import StoreError, UsageError

# Names that say nothing about anybody.
COMMON = {"root", "user", "home", "admin", "ubuntu", "runner", "localhost"}


@click.command("contribute", context_settings=options.CONTEXT)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUNS...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    metavar="DIR",
    help="Folder that the file goes to; the table of a README.md there gets its line.",
)
@click.option("--name", metavar="NAME", help="Of the file, without .jsonl.  [default: GPU, model and size]")
@click.option("--who", default="a contributor", show_default=True, help="Who measured, as the table says it.")
@click.option("--dry-run", is_flag=True, help="Check, and print the line of the table; write nothing.")
def command(runs: tuple[Path, ...], output: Path, name: str | None, who: str, dry_run: bool) -> None:
    """Check a measured run, strip what identifies people and hosts, and write the file for results/.

    Fit is what was measured on one machine with one set of versions and committed sources, in two passes or
    more, on a quiet machine, every time after its proof. Lines of cells that were only started go, with the
    host and process in them, and so do the identity of the board and paths; cells with pictures or weights
    of your own are left out. The line for the table of results/README.md goes to stdout.

    \b
    bratune profile --model biformer_small --res 224 -b 1 -b 64 -o runs/mine
    bratune contribute runs/mine --who "your name"
    """  # noqa: D301
    from bratune.files import write_text
    from bratune.store.contribution import prepare, read_strictly

    made = prepare(read_strictly(runs), names=_names_here())
    file = output / f"{_file_name(name or made.name)}.jsonl"
    if file.exists():
        raise UsageError(
            f"{file} is there already, and results are not edited; --name {file.stem}-r2 would do"
        )
    line = made.table_row(file.name, who)
    if not dry_run:
        readme = output / "README.md"
        try:
            write_text(file, "".join(f"{row.to_json()}\n" for row in made.rows))
            text = readme.read_text("utf-8") if readme.is_file() else ""
            if added := _with_line(text, line):
                write_text(readme, added)
        except OSError as error:
            raise StoreError(f"{file} cannot be written: {error.strerror or error}") from None
    click.echo(line)
    left = f", {made.left_out} rows with pictures or weights of your own left out" if made.left_out else ""
    where = "would be in" if dry_run else "in"
    click.echo(f"{len(made.rows)} rows {where} {file}{left}", err=True)


def _file_name(name: str) -> str:
    from bratune.text import is_name

    stem = name.removesuffix(".jsonl")
    if not is_name(stem):
        raise UsageError(f"--name {name!r} is no name of a file; h100-biformer-small-224 would be")
    return stem


def _with_line(readme: str, line: str) -> str:
    """A README with a line at the end of its table of files; empty where it has no such table."""
    from bratune.store.contribution import TABLE_HEAD

    lines = readme.splitlines()
    if TABLE_HEAD not in lines:
        return ""
    end = lines.index(TABLE_HEAD)
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:end], line, *lines[end:]]) + "\n"


def _names_here() -> list[str]:
    """The user and the host, where their names say who they are."""
    found = [os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")]
    found += [socket.gethostname(), socket.gethostname().partition(".")[0], Path.home().name]
    return [name for name in dict.fromkeys(found) if len(name) > 2 and name.lower() not in COMMON]
