"""``bratune explain``: what a model asks of each backend, and which backends accept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.cli import options

if TYPE_CHECKING:
    from bratune.work.explain import StageFacts
    from bratune.work.request import Request


@click.command("explain", context_settings=options.CONTEXT)
@options.target_options
@options.what_options
@options.work_options
@click.option(
    "--fit", metavar="MEMORY", help="Also the largest batch that so much memory holds, e.g. 24GB or 80GiB."
)
@click.option(
    "--records",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="PATH",
    help="Where to look for the fastest S; repeatable.  [default: runs, and what comes with bratune]",
)
@click.option(
    "--format",
    type=options.Name("format", lambda: ("table", "json", "md")),
    default="table",
    show_default=True,
    help="What goes to stdout: table, json or md.",
)
@options.config_file
@click.pass_context
def command(
    ctx: click.Context,
    /,
    gpu: str,
    device: str,
    measured: bool,
    fit: str | None,
    records: tuple[Path, ...],
    format: str,
    **asked: Any,
) -> None:
    """Say what each stage asks of a backend, and which backends accept, without running anything.

    One row per stage: tokens that padding adds, keys per query, query-key pairs, bytes that gather-then-dense
    copies, multiply-adds. Then the S with the fewest multiply-adds, with its keys per query, and the fastest
    that was measured on this machine, and every backend, accepted or with all its reasons. With --fit, the
    largest batch per backend.
    """
    if asked.pop("dump_config"):
        click.echo(options.dump_config(ctx))
        return
    from bratune.run.target import find_target
    from bratune.work.capacity import parse_memory
    from bratune.work.explain import explain_fit, explain_stages
    from bratune.work.measured_n_win import stored_blocks
    from bratune.work.request import make_request

    target = find_target(gpu, device, asked.pop("gpu_spec"))
    if measured:
        target.require_present()
    request = make_request(target.machine, **options.request_values(asked))
    fits = explain_fit(request, target.machine, parse_memory(fit)) if fit else ()
    facts = explain_stages(request, target.machine, stored_blocks(target.machine, records))
    if format == "json":
        data: Any = [_as_json(fact) for fact in facts]
        if fit:
            data = {"stages": data, "fit": [dataclasses.asdict(found) for found in fits]}
        click.echo(json.dumps(data, indent=2))
        return
    _show(request, facts, str(target.machine), markdown=format == "md")
    if fit:
        from bratune.report.explain_tables import fit_table
        from bratune.report.tables import to_markdown, to_text

        click.echo("")
        click.echo((to_markdown if format == "md" else to_text)(fit_table(fits, fit)))


def _as_json(fact: StageFacts) -> dict[str, Any]:
    data = dataclasses.asdict(fact)
    stage = fact.stage
    data["stage"] = {
        "index": stage.index,
        "blocks": stage.blocks,
        "dim": stage.dim,
        "height": stage.height,
        "width": stage.width,
        "kind": stage.kind,
        "n_win": stage.n_win,
        "topk": stage.topk,
        "problem": stage.problem.to_dict() if stage.problem else None,
    }
    data["accepted_by"] = [name for name, reasons in fact.reasons.items() if not reasons]
    return data


def _show(request: Request, facts: Sequence[StageFacts], machine: str, *, markdown: bool) -> None:
    from bratune.report.explain_tables import backends_table, n_win_table, stages_table
    from bratune.report.tables import to_markdown, to_text

    render = to_markdown if markdown else to_text
    height, width = request.image
    padded = request.task.padded(height, width)
    image = f"{height}x{width}" + (
        f" (padded to {padded[0]}x{padded[1]})" if padded != (height, width) else ""
    )
    click.echo(machine)
    words = [request.models[0], request.task.name, image, f"batch {request.batches[0]}", request.dtype]
    click.echo(" · ".join([*words, request.direction]))
    for table in (
        stages_table(facts),
        n_win_table(facts, lambda fact: _measure(request, fact)),
        backends_table(facts),
    ):
        click.echo("")
        click.echo(render(table))


def _measure(request: Request, fact: StageFacts) -> str:
    """The command that measures a stage with the S in use, or after that with one near the formula's."""
    from bratune.tune.space import Space

    model, (height, width) = request.models[0], request.image
    words = ["bratune profile", f"--model {model}", f"--task {request.task.name}", f"--res {height}x{width}"]
    if request.batches[0] != 1:
        words.append(f"-b {request.batches[0]}")
    if request.direction != "fwd":
        words.append(f"--direction {request.direction}")
    tried = fact.measured_n_win.tried if fact.measured_n_win else ()
    n_win = fact.stage.n_win
    if n_win in tried:
        space = Space(model=model, height=height, width=width, default_n_win=n_win)
        others = [w.n_win for w in space.shared_windows() if w.n_win not in tried]
        wanted = fact.optimal_n_win or n_win
        n_win = min(others, key=lambda s: abs(s - wanted), default=n_win)
    return " ".join([*words, f"--n-win {n_win}", f"--stage {fact.stage.index}"])
