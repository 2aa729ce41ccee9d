"""``bratune predict``: estimate times on a GPU that is not here, or check the estimates."""

from __future__ import annotations

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
@click.option("--gpu", "keys", multiple=True, help="Short key of a GPU, e.g. a100; repeatable.")
@click.option("--gpu-spec", "specs", multiple=True, type=click.Path(path_type=Path), help="YAML of a board.")
@options.what_options
@options.work_options
@options.way_options
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=True,
    help="Compile the fused kernels for the GPU and cost their machine code.  [default: yes]",
)
@click.option("--host", default="", metavar="KIND", help="Host of that GPU: slow, typical, fast, or us.")
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
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also append the rows to this .jsonl.")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(
    keys: tuple[str, ...],
    specs: tuple[Path, ...],
    compiled: bool,
    host: str,
    peers: tuple[str, ...],
    paths: tuple[Path, ...],
    checked: tuple[Path, ...],
    output: Path | None,
    style: str,
    **asked: Any,
) -> None:
    """Estimate times on a GPU that is not here, with an interval and a bound beside every row.

    What the rows rest on stands below them: rates of published models on that board or carried over to it,
    records of this project, and how much of the time is in operations that nobody published the like of.

    bratune predict --gpu a100 --gpu rtx4090 --res 512 -b 1 -b 64

    bratune predict --validate results/
    """
    if checked:
        _validate(checked, style)
        return
    from bratune import gpus
    from bratune.predict import fit
    from bratune.predict.model import absent_machine, bound_cell, predict_cell
    from bratune.work.request import make_request

    coefficients = fit.stored_coefficients(*paths)
    if host:
        coefficients = coefficients.on_host(host)
    values = options.request_values(asked) | {"regimes": asked["regime"], "l2": asked["l2"]}
    values["batches"] = values["batches"] or BATCHES
    values["backends"] = values["backends"] or BACKENDS
    rows: list[Record] = []
    refused: list[str] = []
    for board in _boards(keys, specs):
        request = make_request(absent_machine(board), **values)
        if reason := gpus.why_not_dtype(board, request.dtype):
            refused.append(reason)
            continue
        for cell in _cells(request, [name for text in peers for name in text.split(",") if name]):
            rows += [predict_cell(cell, board, coefficients, compiled=compiled), bound_cell(cell, board)]
    if not rows:
        raise UsageError("; ".join(dict.fromkeys(refused)))
    for reason in dict.fromkeys(refused):
        click.echo(reason, err=True)
    if output:
        from bratune.store import Store

        target = Store(output)
        for row in rows:
            target.append(row)
    _show(rows, style)
    if output:
        click.echo(f"results: {output}", err=True)


def _boards(keys: Sequence[str], specs: Sequence[Path]) -> list[GPU]:
    from bratune import gpus

    if not keys and not specs:
        raise UsageError("predict needs a GPU: --gpu a100 (repeatable) or --gpu-spec FILE; see list gpus")
    for key in keys:
        click.echo(gpus.describe_choice(key), err=True)
    return [*map(gpus.resolve, keys), *map(gpus.load_spec, specs)]


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


def _show(rows: Sequence[Record], style: str) -> None:
    if style == "json":
        for row in rows:
            click.echo(row.to_json())
        return
    header = f"{'gpu':<14}{'batch':>6}  {'what':<10}{'backend':<13}{'ms':>10}   {'95 % interval':<19}" + (
        f"{'img/s':>9}  {'of bound':>8}  limited by"
    )
    click.echo(header)
    missing: dict[tuple[str, str, str], None] = {}
    for row in rows:
        if row.evidence == "bound":
            continue
        if not row.ok or row.median_ms is None:
            missing[row.gpu_key, row.backend or row.form, row.reason] = None
            continue
        peer = row.form == "timm"
        what = row.model[:22] if peer else f"stage {row.stage}" if row.stage else row.part
        start = f"{row.gpu_key:<14}{row.batch:>6}  "
        start += f"{what:<23}" if peer else f"{what:<10}{row.backend:<13}"
        interval = f"{row.ci_lo_ms:.3g} to {row.ci_hi_ms:.3g}"
        speed = f"{row.images_per_s:.0f}" if row.images_per_s else ""
        click.echo(
            f"{start}{row.median_ms:>10.3f}   {interval:<19}{speed:>9}"
            f"  {row.roofline_pct:>6.0f} %  {row.bound}"
        )
    for key, name, reason in missing:
        click.echo(f"{key:<14}{name}: not there: {reason}")
    _explain([row for row in rows if row.ok and row.evidence == "modelled"])


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

    checked = validate.check(store.read_records(paths))
    rows = validate.error_rows(checked)
    if style == "json":
        for row in rows:
            click.echo(json.dumps(row._asdict()))
        return
    click.echo(validate.verdict(checked))
    if not rows:
        return
    click.echo(
        f"\n{'machine':<38}{'backend or part':<18}{'records':>8}{'median error':>14}{'worst':>9}{'bias':>8}"
        f"{'in interval':>13}{'rank':>7}"
    )
    for r in rows:
        rank = "" if r.rank is None else f"{r.rank:.2f}"
        click.echo(
            f"{r.gpu_key:<38}{r.name or 'all':<18}{r.records:>8}{r.median_pct:>12.0f} %"
            f"{r.worst_factor:>8.1f}x{r.bias_factor:>7.2f}x{r.covered_pct:>11.0f} %{rank:>7}"
        )
