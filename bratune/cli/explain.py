"""``bratune explain``: what a model asks of each backend, and which backends accept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.cli import options, values
from bratune.errors import UsageError

if TYPE_CHECKING:
    from bratune.machine import Machine
    from bratune.work.cells import Scene
    from bratune.work.explain import StageFacts


@click.command("explain", context_settings=options.CONTEXT)
@options.target_options
@options.swept_what_options
@options.work_options
@options.mixer_option
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
    type=values.Name("format", lambda: ("table", "json", "md")),
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
    mixer: tuple[str, ...],
    **asked: Any,
) -> None:
    """Say what each stage asks of a backend, and which backends accept, without running anything.

    One row per stage: tokens that padding adds, keys per query, query-key pairs, bytes that gather-then-dense
    copies, multiply-adds. Then the S with the fewest multiply-adds, with its keys per query, and the fastest
    that was measured on this machine, and every backend, accepted or with all its reasons. With --fit, the
    largest batch per backend. With --mixer, the multiply-adds and bytes of attentions in one layout, and how
    they grow with the resolution.
    """
    if asked.pop("dump_config"):
        click.echo(options.dump_config(ctx))
        return
    from bratune.run.target import find_target
    from bratune.work.capacity import parse_memory
    from bratune.work.cells import scenes
    from bratune.work.explain import explain_fit, explain_stages
    from bratune.work.measured_n_win import stored_blocks
    from bratune.work.request import make_request

    target = find_target(gpu, device, asked.pop("gpu_spec"))
    if measured:
        target.require_present()
    names = options.names_of(mixer)
    if names and fit:
        raise UsageError("--mixer and --fit exclude each other; leave one of them out")
    requests = [
        make_request(target.machine, **options.request_values(setting), mixers=names)
        for setting in options.settings_of(asked)
    ]
    found = [scene for request in requests for scene in scenes(request)]
    if names:
        _show_mixers(target.machine, found, format)
        return
    memory = parse_memory(fit) if fit else 0
    blocks = stored_blocks(target.machine, records)
    facts = [(scene, explain_stages(scene, target.machine, blocks)) for scene in found]
    # The largest batch of a model does not depend on how many images were asked about.
    firsts = [scene for scene in found if fit and scene.batch == scene.request.batches[0]]
    fits = {scene: explain_fit(scene, target.machine, memory) for scene in firsts}
    if format == "json":
        stages = [_as_json(scene, fact) for scene, of_scene in facts for fact in of_scene]
        data: Any = stages
        if fit:
            rows = [_about(scene) | dataclasses.asdict(row) for scene, own in fits.items() for row in own]
            data = {"stages": stages, "fit": rows}
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(target.machine)
    several = len(requests) > 1
    for number, (scene, of_scene) in enumerate(facts):
        if number:
            click.echo("")
        _show(scene, of_scene, markdown=format == "md", setting=several)
        if scene in fits:
            from bratune.report.explain_tables import fit_table
            from bratune.tables import to_markdown, to_text

            click.echo("")
            click.echo((to_markdown if format == "md" else to_text)(fit_table(fits[scene], str(fit))))


def _show_mixers(machine: Machine, scenes: Sequence[Scene], format: str) -> None:
    """What attentions of one layout cost, and how that grows."""
    from bratune.report.explain_tables import mixers_table
    from bratune.tables import to_markdown, to_text
    from bratune.work.explain import explain_mixers

    facts = [(scene, explain_mixers(scene, machine)) for scene in scenes]
    if format == "json":
        rows = [_about(scene) | dataclasses.asdict(fact) for scene, own in facts for fact in own]
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(machine)
    for number, (scene, own) in enumerate(facts):
        click.echo("\n" * bool(number) + _title(scene))
        click.echo("")
        click.echo((to_markdown if format == "md" else to_text)(mixers_table(own)))


def _about(scene: Scene) -> dict[str, Any]:
    return {"model": scene.model, "batch": scene.batch, "setting": scene.request.setting_text}


def _as_json(scene: Scene, fact: StageFacts) -> dict[str, Any]:
    data = _about(scene) | dataclasses.asdict(fact)
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


def _show(scene: Scene, facts: Sequence[StageFacts], *, markdown: bool, setting: bool) -> None:
    from bratune.report.explain_tables import backends_table, n_win_table, stages_table
    from bratune.tables import to_markdown, to_text

    render = to_markdown if markdown else to_text
    click.echo(_title(scene, setting=setting))
    for table in (
        stages_table(facts),
        n_win_table(facts, lambda fact: _measure(scene, fact)),
        backends_table(facts),
    ):
        click.echo("")
        click.echo(render(table))


def _title(scene: Scene, *, setting: bool = False) -> str:
    """What is explained, in one line."""
    request = scene.request
    height, width = request.image
    padded = request.task.padded(height, width)
    image = f"{height}x{width}" + (
        f" (padded to {padded[0]}x{padded[1]})" if padded != (height, width) else ""
    )
    words = [scene.model, request.task.name, image, f"batch {scene.batch}", request.dtype]
    words += [request.direction, *([request.setting_text] if setting else [])]
    return " · ".join(words)


def _measure(scene: Scene, fact: StageFacts) -> str:
    """The command that measures a stage with the S in use, or after that with one near the formula's."""
    from bratune.tune.space import Space

    request, model, (height, width) = scene.request, scene.model, scene.request.image
    words = ["bratune profile", f"--model {model}", f"--task {request.task.name}", f"--res {height}x{width}"]
    if scene.batch != 1:
        words.append(f"-b {scene.batch}")
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
