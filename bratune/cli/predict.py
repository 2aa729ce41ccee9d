"""``bratune predict``: estimate times on a GPU that is not here, or check the estimates."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.cli import options
from bratune.errors import UsageError

if TYPE_CHECKING:
    from bratune.cell import Cell
    from bratune.gpus import GPU
    from bratune.record import Record
    from bratune.work.request import Request

BACKENDS = ("gather", "gather-sdpa", "dense", "triton")
BATCHES = (1, 64)


@click.command("predict", context_settings=options.CONTEXT)
@click.option("--gpu", "keys", multiple=True, metavar="KEY", help="GPU, e.g. a100 or a100,h100; repeatable.")
@click.option("--gpu-spec", "specs", multiple=True, type=click.Path(path_type=Path), help="YAML of a board.")
@options.swept_what_options
@options.work_options
@options.way_options
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=True,
    help="Compile the fused kernels for the GPU and cost their machine code.  [default: yes]",
)
@options.host_option
@click.option("--peers", multiple=True, metavar="NAMES", help="Also these models of timm, e.g. swin_tiny.")
@click.option("--calibrate", "paths", multiple=True, type=click.Path(path_type=Path), help="More records.")
@click.option(
    "--validate",
    "checked",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Print the model's error on the measured records at PATH instead.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Also append the rows to this .jsonl, new ones only.",
)
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(
    keys: tuple[str, ...],
    specs: tuple[Path, ...],
    compiled: bool,
    host: str | None,
    peers: tuple[str, ...],
    paths: tuple[Path, ...],
    checked: tuple[Path, ...],
    output: Path | None,
    style: str,
    **asked: Any,
) -> int:
    """Estimate times on a GPU that is not here, with an interval and a bound beside every row.

    What the rows rest on stands below them: rates of published models on that board or carried over to it,
    records of this project, and how much of the time is in operations that nobody published the like of.
    Exit code 1: no row has a time.

    \b
    bratune predict --gpu a100 --gpu rtx4090 --res 512 -b 1 -b 64
    bratune predict --gpu a100 --task segmentation --n-win 8,16 --topks 1,4,16,-2 --topks 4,8,16,-2
    bratune predict --validate results/
    """  # noqa: D301
    if checked:
        if keys or specs:
            raise UsageError(
                "--validate is about the machines of its records; leave --gpu and --gpu-spec out"
            )
        _validate(checked, style)
        return 0
    from bratune import gpus
    from bratune.predict import fit
    from bratune.predict.model import absent_machine, bound_cell, predict_cell
    from bratune.work.request import make_request

    coefficients = fit.stored_coefficients(*paths).on_host(host)
    rows: dict[tuple[str, Cell], tuple[Record, Record]] = {}
    refused: list[str] = []
    for board, setting in itertools.product(_boards(keys, specs), options.settings_of(asked)):
        values = options.request_values(setting) | {"regimes": asked["regime"], "l2": asked["l2"]}
        values["batches"] = values["batches"] or BATCHES
        values["backends"] = values["backends"] or BACKENDS
        request = make_request(absent_machine(board), **values)
        if reason := gpus.why_not_dtype(board, request.dtype):
            refused.append(reason)
            continue
        for cell in _cells(request, [name for text in peers for name in text.split(",") if name]):
            if (board.key, cell) not in rows:  # two settings may share a stage
                predicted = predict_cell(cell, board, coefficients, compiled=compiled)
                rows[board.key, cell] = predicted, bound_cell(cell, board)
    if not rows:
        raise UsageError("; ".join(dict.fromkeys(refused)))
    for reason in dict.fromkeys(refused):
        click.echo(reason, err=True)
    every = [*itertools.chain(*rows.values())]
    if output:
        from bratune.store.maintenance import append_new

        append_new(output, every)
    if style == "json":
        for row in every:
            click.echo(row.to_json())
    else:
        _show([row for row, _ in rows.values()])
    if output:
        click.echo(f"results: {output}", err=True)
    return 0 if any(row.ok for row, _ in rows.values()) else 1


def _boards(keys: Sequence[str], specs: Sequence[Path]) -> list[GPU]:
    from bratune import gpus

    if not keys and not specs:
        raise UsageError("predict needs a GPU: --gpu a100 (repeatable) or --gpu-spec FILE; see list gpus")
    names = [name.strip() for key in keys for name in key.split(",")]
    for name in names:
        click.echo(gpus.describe_choice(name), err=True)
    return [*map(gpus.resolve, names), *map(gpus.load_spec, specs)]


def _cells(request: Request, peers: Sequence[str]) -> list[Cell]:
    """Attention of every routed stage and the whole model, by every backend, and the peers."""
    from bratune.work.cells import scenes
    from bratune.work.peers import PEERS

    found: list[Cell] = []
    for scene in scenes(request):
        routed = [stage for stage in scene.stages if stage.kind == "routed"]
        for backend in request.backends:
            found += [scene.stage_cell("attention", stage, backend=backend) for stage in routed]
            found.append(scene.model_cell((backend,)))
        found += [scene.peer_cell(PEERS.get(name, name)) for name in peers]
    return found


# Columns that stand in the table only where rows differ in them.
_VARYING = ("model", "n_win", "topk", "regime", "l2")


def _show(rows: Sequence[Record]) -> None:
    """The rows as a table, what is not there, and what they rest on."""
    from bratune.tables import Row, Table, to_text

    timed = [row for row in rows if row.ok and row.median_ms is not None]
    own = [row for row in timed if row.form != "timm" and row.part == "model"]
    varying = [name for name in _VARYING if len({getattr(row, name) for row in own}) > 1]
    found: list[Row] = []
    for row in timed:
        peer = row.form == "timm"
        what = row.model if peer else f"stage {row.stage}" if row.stage else row.part
        found.append(
            (
                row.gpu_key,
                str(row.batch),
                *("" if peer else _shared(getattr(row, name)) for name in varying),
                what,
                row.backend,
                f"{row.median_ms:.3f}",
                f"{row.ci_lo_ms:.3g} to {row.ci_hi_ms:.3g}",
                f"{row.images_per_s:.0f}" if row.images_per_s else "",
                f"{row.roofline_pct:.0f} %",
                row.bound,
            )
        )
    names = {"n_win": "<S", "topk": "<top-k"}
    heads = ("<gpu", "batch", *(names.get(name, f"<{name}") for name in varying), "<what", "<backend")
    heads += ("ms", "<95 % interval", "img/s", "of bound", "<limited by")
    if found:
        click.echo(to_text(Table(heads, tuple(found))))
    missing = dict.fromkeys((row.gpu_key, row.backend or row.form, row.reason) for row in rows if not row.ok)
    for key, name, reason in missing:
        click.echo(f"{key} {name}: not there: {reason}")
    _explain([row for row in timed if row.evidence == "modelled"])


def _shared(text: str) -> str:
    """``8`` for ``8,8,8,0``: what routed stages have in common (a stage that routes nothing has S 0)."""
    values = {value for value in text.split(",") if value != "0"}
    return values.pop() if len(values) == 1 else text


def _explain(rows: Sequence[Record]) -> None:
    """What the rows rest on, once per statement and GPU."""
    statements: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        for said in row.reason.split("; "):
            share, _, rest = said.partition(" % of the device's time ")
            known = statements.setdefault((row.gpu_key, rest or said), [])
            known += [int(share)] if rest else []
    if statements:
        click.echo("\nmodelled, not measured")
    for (key, said), shares in statements.items():
        if shares:
            least, most = min(shares), max(shares)
            many = f"{most}" if least == most else f"{least} to {most}"
            said = f"{many} % of the device's time {said}"
        click.echo(f"  {key}: {said}")


def _validate(paths: Sequence[Path], style: str) -> None:
    from bratune import store
    from bratune.predict import validate
    from bratune.tables import Table, to_text

    checked = validate.check(store.read_records(paths))
    rows = validate.error_rows(checked)
    if style == "json":
        for row in rows:
            click.echo(json.dumps(row._asdict()))
        return
    click.echo(validate.verdict(checked))
    if not rows:
        return
    heads = (
        "<machine",
        "<backend or part",
        "records",
        "median error",
        "worst",
        "bias",
        "in interval",
        "rank",
    )
    cells = tuple(
        (
            r.gpu_key,
            r.name or "all",
            str(r.records),
            f"{r.median_pct:.0f} %",
            f"{r.worst_factor:.1f}x",
            f"{r.bias_factor:.2f}x",
            f"{r.covered_pct:.0f} %",
            "" if r.rank is None else f"{r.rank:.2f}",
        )
        for r in rows
    )
    click.echo("\n" + to_text(Table(heads, cells)))
