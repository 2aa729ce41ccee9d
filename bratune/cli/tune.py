"""``bratune tune``: search S, top-k and backend per stage; write the best plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.cli import options, tune_modelled, tune_yours, values
from bratune.errors import UsageError
from bratune.record import new_run_id

if TYPE_CHECKING:
    from bratune.cluster import Site
    from bratune.machine import Machine
    from bratune.run.engine import CellEngine
    from bratune.run.replay import ReplayRunner
    from bratune.tune.fidelity_source import FidelitySource
    from bratune.tune.request import TuneRequest
    from bratune.tune.session import TuneResult

FORMATS = ("table", "json", "csv", "md")


@click.command("tune", context_settings=options.CONTEXT)
@options.target_options
@options.what_options
@click.option("-b", "--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images.")
@click.option("--dtype", type=values.Dtype(), help=values.DTYPE_HELP)
@click.option("--amp", is_flag=True, help="Autocast to --dtype and keep float32 weights.")
@click.option(
    "--channels-last/--no-channels-last", default=None, help="Memory order of images.  [default: no]"
)
@click.option(
    "--direction",
    type=click.Choice(["fwd", "fwd-bwd"]),
    default="fwd",
    show_default=True,
    help="fwd, or fwd-bwd to add the gradients.",
)
@click.option(
    "--backend",
    type=values.Name("backend", values.backend_names),
    multiple=True,
    help="Only this backend; repeatable.",
)
@click.option(
    "--seed", type=values.Seed(), default=0, show_default=True, help="Of weights, images and proposals."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Trained weights: tune for them.")
@options.trust_option
@options.input_option
@click.option("--trained-res", type=values.Resolution(), help="Image size they were trained at.")
@click.option(
    "--images", type=click.Path(path_type=Path), metavar="DIR", help="Pictures to judge fidelity on."
)
@click.option("--labels", is_flag=True, help="The subfolders of --images are classes.")
@click.option("--shared-run", is_flag=True, help="Without weights: judge by one weight-shared training run.")
@click.option(
    "--train-trials",
    type=click.IntRange(1),
    metavar="N",
    help="Without weights: judge by short trainings of N settings, each a trial.",
)
@click.option(
    "--train-steps",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="Steps of a training (--shared-run, --train-trials).",
)
@click.option(
    "--train-seeds",
    type=click.IntRange(2),
    default=2,
    show_default=True,
    help="Trainings that differ in the seed only; two are the fewest with a standard error.",
)
@click.option(
    "--train-most-seeds",
    type=click.IntRange(2),
    default=6,
    show_default=True,
    help="With --train-trials: add paired seeds up to so many where fewer do not decide.",
)
@click.option(
    "--calibration-images",
    type=click.IntRange(8),
    default=1000,
    show_default=True,
    help="Pictures of --images to use, at most.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 0.999),
    default=0.95,
    show_default=True,
    help="Of what is said about lost accuracy.",
)
@click.option("--allow-model-changes", is_flag=True, help="With weights: S and top-k may change.")
@click.option(
    "--allow-more-k", is_flag=True, help="With weights: more keys than in training too; can cost accuracy."
)
@click.option("--per-stage-s/--shared-s", default=None, help="S may differ between stages.")
@click.option(
    "--omega", type=click.FloatRange(0, 1), default=1.0, help="Without data: share of keys to keep."
)
@click.option(
    "--objective",
    type=click.Choice(["auto", "fidelity", "memory"]),
    default="auto",
    show_default=True,
    help="Beside latency; auto is fidelity where it is measured.",
)
@click.option("--constraint", multiple=True, metavar="EXPR", help="E.g. 'peak_alloc_mb<=20000'; repeatable.")
@click.option(
    "--pick", default="balanced", show_default=True, help="knee, fastest, lightest, safe, trial:N ..."
)
@click.option("--trials", type=click.IntRange(1), help="Settings measured end to end, at most.")
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "nsga2", "gp", "random", "brute"]),
    default="tpe",
    show_default=True,
    help="Who proposes where the table does not.",
)
@click.option("--no-lut", is_flag=True, help="Whole models only: let the sampler search.")
@click.option(
    "--storage",
    default="",
    metavar="URL",
    envvar="BRATUNE_STORAGE",
    help="sqlite:///F, journal:///F or postgresql://...; BRATUNE_STORAGE holds it out of sight, "
    "as PGPASSWORD does a password.",
)
@click.option("--study", default="", metavar="NAME", help="Name of the study.")
@click.option("--join", default="", metavar="URL", help="Help the run that has this storage (and --study).")
@click.option("--replay", type=click.Path(path_type=Path), metavar="DIR", help="Answer from records.")
@click.option("--no-isolate", is_flag=True, help="Measure in this process.")
@options.cluster_option
@click.option("--no-install", is_flag=True, help='Do not put the plan where backend="auto" finds it.')
@options.measuring_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the results."
)
@click.option(
    "--format",
    "style",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="What goes to stdout.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be searched.")
@options.host_option
@click.option(
    "--plan-run",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For a GPU that is not here: write the command that measures.",
)
@options.config_file
@click.pass_context
def command(ctx: click.Context, /, **asked: Any) -> int:
    """Search S, top-k and backend per stage; write the best plan.

    The same command again goes on where it stopped. Without weights and without data nothing is said about
    accuracy: every stage keeps at least the authors' keys per query. With --checkpoint only the cost
    changes, unless --allow-model-changes. For a GPU that is not here (or for several: --gpu a100,h100) the
    settings are modelled: they are ranked, and which cannot be told apart is said; nothing is installed.

    \b
    bratune tune --model biformer_small --res 512 --task segmentation
    bratune tune --model biformer_small --res 512 --task segmentation --gpu a100,h100,rtx4090
    bratune tune --model biformer_tiny --checkpoint best.pth --images photos --allow-model-changes
    bratune tune --join postgresql://me@host/studies --study NAME --device cuda:3
    bratune tune --model my.network:make --input 1x3x640x640
    """  # noqa: D301
    if asked["dump_config"]:
        click.echo(options.dump_config(ctx))
        return 0
    if factory := options.factory_of(asked):
        return tune_yours.run(factory, asked)
    from bratune.tune import session

    if boards := tune_modelled.absent_boards(asked):
        return tune_modelled.run(
            asked, boards, lambda machine: _request(asked, machine), options.command_line()
        )
    replayed = _replayed(asked)
    machine = replayed.machine if replayed else _machine(asked)
    if asked["join"]:
        return _join(asked)
    request = _request(asked, machine)
    if asked["host"] or asked["plan_run"]:
        raise UsageError("--host and --plan-run are about a GPU that is not here; what is here is measured")
    if asked["dry_run"]:
        _show_space(request, machine)
        return 0
    folder = asked["output"] or Path("runs") / "tune" / request.study_name
    _say_what_disturbs(asked, machine)
    try:
        with _engine(asked, request, folder) as engine:
            result = session.run(
                engine,
                request,
                folder,
                url=asked["storage"],
                study=asked["study"],
                fidelity=_fidelity(request, machine),
                say=lambda text: click.echo(text, err=True),
                command=options.command_line(),
                put_in_cache=not asked["no_install"] and not replayed,
            )
    except KeyboardInterrupt:
        click.echo(
            f"what was measured is in {folder}; the same command goes on: {options.command_line()}", err=True
        )
        raise
    _show(result, asked["style"])
    where = f" and {result.installed}" if result.installed else ""
    click.echo(f"results: {result.path}{where}   again: {options.command_line()}", err=True)
    return 0


def _request(asked: dict[str, Any], machine: Machine) -> TuneRequest:
    from bratune import defaults
    from bratune.tune.request import TuneRequest
    from bratune.variant import get_task

    usual = defaults.defaults_for(machine)
    models = asked["model"] or (defaults.MODEL,)
    if len(models) > 1:
        raise UsageError(f"tune takes one model, not {len(models)}: {', '.join(models)}")
    task = get_task(asked["task"] or defaults.TASK)
    height, width = task.padded(*(asked["res"] or (task.height, task.width)))
    if asked["checkpoint"] and not asked["checkpoint"].is_file():
        raise UsageError(f"--checkpoint {asked['checkpoint']}: there is no such file")
    if asked["checkpoint"]:
        from bratune.work.modules import check_checkpoint

        check_checkpoint(models[0], task.name, str(asked["checkpoint"]))
    if asked["l2"] == "both":
        raise UsageError("a plan is made for one cache state and --l2 both is two; cold or warm would do")
    n_win = asked["n_win"] or ()
    return TuneRequest(
        model=models[0],
        task=task.name,
        height=height,
        width=width,
        batch=asked["batch_size"],
        dtype=asked["dtype"] or usual.dtype,
        amp=asked["amp"],
        direction=asked["direction"],
        layout={None: usual.layout, True: "nhwc", False: "nchw"}[asked["channels_last"]],
        regimes=tuple(asked["regime"]) or ("eager",),
        l2=asked["l2"] or usual.l2,
        backends=tuple(asked["backend"]),
        per_stage_s=asked["per_stage_s"],
        checkpoint=str(asked["checkpoint"] or ""),
        trained_n_win=n_win * 4 if len(n_win) == 1 else n_win,
        trained_topks=asked["topks"] or (),
        trained_res=asked["trained_res"] or (0, 0),
        images=str(asked["images"] or ""),
        labels=asked["labels"],
        shared_run=asked["shared_run"],
        train_trials=asked["train_trials"] or 0,
        train_steps=asked["train_steps"],
        train_seeds=asked["train_seeds"],
        train_most_seeds=asked["train_most_seeds"],
        calibration_images=asked["calibration_images"],
        confidence=asked["confidence"],
        allow_model_changes=asked["allow_model_changes"],
        allow_more_k=asked["allow_more_k"],
        objective=asked["objective"],
        constraints=tuple(asked["constraint"]),
        pick=asked["pick"],
        omega=asked["omega"],
        trials=asked["trials"] or 0,
        sampler=asked["sampler"],
        table=not asked["no_lut"],
        effort=asked["effort"] or usual.effort,
        budget_s=asked["budget"] or 0.0,
        seed=asked["seed"],
    )


def _say_what_disturbs(asked: dict[str, Any], machine: Machine) -> None:
    """What `bratune doctor` would say of a machine that is measured now."""
    from bratune.measure.health import at_a_glance

    if asked["replay"]:
        click.echo(f"replayed from {asked['replay']}: nothing is measured", err=True)
    elif not asked["cluster"] and (text := at_a_glance(machine)):
        click.echo(text, err=True)


def _engine(asked: dict[str, Any], request: TuneRequest, folder: Path) -> CellEngine:
    """Who measures, as `bratune profile` would in each of its passes, so that each finds the other's rows."""
    from bratune.measure.settings import MeterSettings
    from bratune.run.engine import CellEngine, LocalEngine
    from bratune.run.isolated import IsolatedEngine
    from bratune.store import Store

    settings = MeterSettings.for_effort(request.effort, **options.meter_changes(asked)).per_pass()
    given: dict[str, Any] = {"store": Store(folder / "records.jsonl"), "run_id": new_run_id()}
    if (runner := _replayed(asked)) is not None:
        return CellEngine(runner, settings, **given)
    if (site := _site(asked)) is not None:
        from bratune.cluster import ClusterEngine

        return ClusterEngine(site, settings, **given)
    kind = LocalEngine if asked["no_isolate"] else IsolatedEngine
    return kind(_machine(asked), settings, turns=True, **given)


def _replayed(asked: dict[str, Any]) -> ReplayRunner | None:
    """The records that ``--replay`` answers from."""
    if asked["replay"] is None:
        return None
    from bratune.run.replay import ReplayRunner

    return ReplayRunner.of([asked["replay"]], gpu="" if asked["gpu"] == "auto" else asked["gpu"])


def _site(asked: dict[str, Any]) -> Site | None:
    """The nodes to measure on, of the cluster that ``--cluster`` names.

    Raises:
        UsageError: the cluster has several kinds of GPU and none was chosen: a plan is made for one.
    """
    if not asked["cluster"]:
        return None
    from bratune import cluster

    cluster.connect(asked["cluster"])
    sites = cluster.find_sites(() if asked["gpu"] == "auto" else [asked["gpu"]])
    if len(sites) > 1:
        kinds = ", ".join(site.accelerator for site in sites)
        raise UsageError(f"a plan is made for one GPU and the cluster has {kinds}; --gpu would choose one")
    return sites[0]


def _machine(asked: dict[str, Any]) -> Machine:
    """The machine to measure on.

    Raises:
        TargetError: the board that was asked for is not here: a plan needs measurements.
    """
    from bratune.run.target import find_target

    site = _site(asked)
    if site is not None:
        from bratune.cluster import machine_of

        return machine_of(site)
    target = find_target(asked["gpu"], asked["device"])
    target.require_present()
    return target.machine


def _fidelity(request: TuneRequest, machine: Machine) -> FidelitySource | None:
    from bratune.tune.fidelity_source import open_fidelity

    return open_fidelity(request, machine, say=lambda text: click.echo(text, err=True))


def _join(asked: dict[str, Any]) -> int:
    from bratune.tune.request import TuneRequest
    from bratune.tune.storage import open_storage, serves_several
    from bratune.tune.tuner import Tuner

    if not serves_several(asked["join"]):
        raise UsageError(
            "SQLite serves one process only; start the run with --storage journal:///FILE (one host) "
            "or postgresql://... (several) and join that"
        )
    import optuna

    kind, _, place = asked["join"].partition(":///")
    if kind == "journal" and not Path(place).exists():
        raise UsageError(f"there is no study to join at {place}: no such file")
    storage = open_storage(asked["join"])
    known = {s.study_name: s.user_attrs for s in optuna.get_all_study_summaries(storage)}
    open_ones = [name for name, attrs in known.items() if "request" in attrs]
    name = asked["study"] or (open_ones[0] if len(open_ones) == 1 else "")
    if name not in open_ones:
        raise UsageError(f"--study must name one of: {', '.join(open_ones) or 'none is there yet'}")
    request = TuneRequest.from_dict(known[name]["request"])
    folder = asked["output"] or Path("runs") / "tune" / f"{name}-joined"
    with _engine(asked, request, folder) as engine:
        tuner = Tuner(
            engine,
            request,
            asked["join"],
            study=name,
            fidelity=_fidelity(request, engine.machine),
            say=lambda text: click.echo(text, err=True),
        )
        click.echo(f"{tuner.help()} trials done for {name}", err=True)
    return 0


def _show_space(request: TuneRequest, machine: Machine) -> None:
    from bratune.tune.bench import registry_offers
    from bratune.tune.evidence import FROM_SCRATCH

    space, offers = request.space, registry_offers(machine, request.backends)
    for i in space.routed:
        choices = list(space.model_choices(i))
        height, width = space.variant.maps(space.height, space.width)[i]
        click.echo(f"stage {i + 1}, {height}x{width} tokens: {len(choices)} choices of S and top-k")
        for s in space.windows(i):
            waste = space.stage(i, s, 1).padding_waste
            click.echo(f"  S={s} (padding {waste:.0%}): k in {', '.join(map(str, space.topks(i, s)))}")
        problem = space.stage(i, request.reference.n_win[i], request.reference.topks[i]).problem
        names = [name for name, _ in offers(problem)] if problem else []
        click.echo(f"  backends: {', '.join(names) or 'none accepts; bratune explain says why'}")
    for name, setting in request.first_settings().items():
        click.echo(f"tried first: {name}: {setting}")
    if space.bounds.floor_only:
        click.echo(
            f"k is the smallest that keeps {request.omega:.0%} of the authors' keys per query, S at least as "
            "fine: nothing is known about accuracy"
        )
        click.echo(FROM_SCRATCH)
    if space.bounds.topks is not None:
        click.echo("S and top-k are those of the weights; --allow-model-changes with --images tunes them too")


def _show(result: TuneResult, style: str) -> None:
    if style == "json":
        click.echo(json.dumps({"plan": result.plan.to_dict(), "front": result.rows}, indent=1))
        return
    from bratune.tables import to_csv
    from bratune.tune.show import front_table, plan_text

    if style == "csv":
        columns = list(result.rows[0])
        click.echo(to_csv(columns, [[row[name] for name in columns] for row in result.rows]))
        return
    click.echo(front_table(result.rows, markdown=style == "md"))
    click.echo(plan_text(result.plan))
