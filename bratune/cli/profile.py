"""``bratune profile``: measure every backend at every stage of a model, then the whole model."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from bratune import gpus
from bratune.cli import options
from bratune.errors import UsageError
from bratune.record import new_run_id
from bratune.store import Store

if TYPE_CHECKING:
    from bratune.cli.progress import Progress
    from bratune.cluster import Site
    from bratune.engine import Engine
    from bratune.machine import Machine
    from bratune.measure.settings import MeterSettings
    from bratune.record import Record
    from bratune.run.engine import CellEngine
    from bratune.run.replay import ReplayRunner
    from bratune.run.session import Planned
    from bratune.run.target import Target
    from bratune.work.request import Request
    from bratune.work.yours import YoursRequest

ONE_PROCESS = "all is measured in this one process, from which nothing is called faster or slower"
FAILED = ("incorrect", "oom", "timeout", "crashed", "error")


@click.command("profile", context_settings=options.CONTEXT)
@options.target_options
@options.swept_what_options
@options.work_options
@click.option("--stage", type=click.IntRange(1, 4), multiple=True, help="Only this stage; repeatable.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Weights of the model, so that recorded routes are its own.  [default: seeded random weights]",
)
@options.trust_option
@options.input_option
@click.option("--suite", metavar="NAME", help="A list of measurements, see `bratune list suites`.")
@click.option(
    "--whole-model/--no-whole-model",
    default=None,
    help="Time whole models too.  [default: yes, without --stage]",
)
@click.option("--stages/--no-stages", default=True, help="Time the parts of stages.  [default: yes]")
@click.option(
    "--forms",
    metavar="NAME,NAME",
    help="Forms of whole models: published, runtime, lean (in training), auto, a backend everywhere, "
    "onnxruntime, openvino, openvino-bf16.  "
    "[default: published,gather,auto,runtime; lean in training]",
)
@click.option(
    "--peers",
    metavar="NAME,NAME",
    help="Also time these models of timm in turn with ours: swin_tiny, convnext_tiny, pvt_v2_b2, "
    "maxvit_tiny, deit_small, resnet50, or any name that timm knows.",
)
@options.mixer_option
@options.measuring_options
@click.option(
    "--passes",
    type=click.IntRange(1),
    metavar="N",
    help="Fresh processes per measurement; more add to those that are there.  [default: 2, 8, 16 by effort]",
)
@options.engine_options
@options.cluster_option
@options.host_option
@options.output_options
@options.config_file
@click.pass_context
def command(ctx: click.Context, /, **asked: Any) -> int:
    """Measure every backend at every stage of a model, then the whole model.

    Every implementation is checked against the reference before it is timed. Without options,
    biformer_tiny at 224x224 is measured on the first GPU, or on the CPU where there is none.

    \b
    bratune profile --model biformer_small --res 224 -b 1
    bratune profile --task segmentation --res 512 --dtype fp16 -b 1 -b 8
    bratune profile --task segmentation --n-win 8,16 --topks 1,4,16,-2 --topks 4,8,16,-2
    bratune profile --gpu a100 --res 512
    bratune profile --model my.network:make --input 1x3x640x640
    """  # noqa: D301
    if asked["dump_config"]:
        click.echo(options.dump_config(ctx))
        return 0
    if asked["suite"]:
        asked = _with_suite(asked, ctx)
    settings = options.settings_of(asked)
    jobs_of = _cluster_jobs if asked["cluster"] else _local_jobs
    rounds = [jobs_of(setting) for setting in settings]
    if asked["dry_run"]:
        for job in itertools.chain(*rounds):
            _show_plan(job)
        return 0
    start = time.monotonic()
    found = []
    for jobs, setting in zip(rounds, settings, strict=True):
        if asked["budget"]:
            setting["budget"] = max(0.001, asked["budget"] - (time.monotonic() - start))
        found.append(_run(jobs, setting))
    for number, job in enumerate(rounds[0]):
        parts = [
            _Part(jobs[number].request, rows[number], passes[number])
            for jobs, (rows, passes) in zip(rounds, found, strict=True)
        ]
        if asked["budget"]:
            parts = [part._replace(rows=sorted(part.rows, key=lambda row: row.stage or 0)) for part in parts]
        _show(job.target, parts, asked)
        every = [row for part in parts for row in part.rows]
        _say_what_is_missing(every, job.passes(asked) if asked["budget"] else 1)
        click.echo(f"results: {job.path}   again: {options.command_line()}", err=True)
    failed = any(row.outcome in FAILED for rows, _ in found for row in itertools.chain(*rows))
    return 4 if asked["strict"] and failed else 0


@dataclass(frozen=True)
class _Job:
    """What is measured on one device, and where it goes."""

    target: Target
    replayed: ReplayRunner | None
    request: Request | YoursRequest
    settings: MeterSettings
    flags: Sequence[str]
    stages: tuple[int, ...]
    path: Path
    site: Site | None = None

    def passes(self, asked: dict[str, Any]) -> int:
        """Fresh processes per cell."""
        if self.replayed:
            return self.replayed.passes
        if not asked["isolate"]:
            return 1
        return asked["passes"] or self.settings.passes

    @property
    def planned(self) -> Sequence[Planned]:
        from bratune.run import session

        return session.plan(self.request, self.stages)


def _local_jobs(asked: dict[str, Any]) -> list[_Job]:
    """The options as jobs, one per device; with several devices, each has a folder of its own."""
    from bratune.run.target import Target, device_names, find_target

    names = device_names(asked["device"])
    jobs = []
    for name in names:
        replayed = _replayed(asked)
        target = Target(replayed.machine) if replayed else find_target(asked["gpu"], name, asked["gpu_spec"])
        if asked["measured"]:
            target.require_present()
        path = _records_path(asked["output"], target.machine, several=len(names) > 1)
        jobs.append(_job(asked, target, path, replayed))
    return jobs


def _cluster_jobs(asked: dict[str, Any]) -> list[_Job]:
    """The options as jobs, one per kind of accelerator of a cluster, each with a folder of its own."""
    from bratune import cluster
    from bratune.run.target import Target

    for flag, off in (("device", "auto"), ("gpu_spec", None), ("replay", None), ("isolate", True)):
        if asked[flag] != off:
            raise UsageError(f"--cluster and --{flag.replace('_', '-')} exclude each other; leave one out")
    cluster.connect(asked["cluster"])
    keys = () if asked["gpu"] == "auto" else [key.strip() for key in asked["gpu"].split(",")]
    jobs = []
    for site in cluster.find_sites(keys):
        machine = cluster.machine_of(site)
        folder = (asked["output"] or Path("runs")) / machine.gpu_key
        job = _job(asked, Target(machine), folder / "records.jsonl", None)
        jobs.append(dataclasses.replace(job, site=site))
    return jobs


def _job(asked: dict[str, Any], target: Target, path: Path, replayed: ReplayRunner | None) -> _Job:
    """The options as a job on one target."""
    from bratune.work.request import make_request

    if factory := options.factory_of(asked):
        return _job_of_yours(factory, asked, target, path, replayed)
    values = options.request_values(asked)
    whole = not asked["stage"] if asked["whole_model"] is None else asked["whole_model"]
    values |= {"regimes": asked["regime"], "l2": asked["l2"], "whole_model": whole}
    values["parts"] = asked["stages"]
    values["checkpoint"] = str(asked["checkpoint"] or "")
    values |= {name: options.names_of([asked[name] or ""]) for name in ("forms", "peers")}
    values["mixers"] = options.names_of(asked["mixer"])
    values["directions"] = asked.get("directions", ())
    request = make_request(target.machine, **values)
    if target.absent:
        gpus.check_dtype(target.absent, request.dtype)
    elif asked["host"]:
        raise UsageError(f"--host is about a GPU that is not here; {target.machine.gpu_name} is measured")
    settings, flags = _settings(asked, target.machine)
    return _Job(target, replayed, request, settings, flags, tuple(asked["stage"]), path)


def _job_of_yours(
    factory: str, asked: dict[str, Any], target: Target, path: Path, replayed: ReplayRunner | None
) -> _Job:
    """A model of somebody else as a job; its routed layers are found and proved first."""
    from bratune.run.yours import ask

    target.require_present()
    if asked["cluster"] or asked["amp"] or len(asked["regime"]) > 1 or asked["l2"] == "both":
        raise UsageError(f"{factory} is measured here, in one regime and cache state, and without --amp")
    request = ask(
        factory,
        asked["input"],
        target.machine,
        dtype=asked["dtype"],
        direction=asked["direction"],
        backends=asked["backend"],
        skip=asked["skip"],
        regime=(asked["regime"] or ("eager",))[0],
        l2=asked["l2"],
        seed=asked["seed"],
    )
    for number, site in enumerate(request.sites, 1):
        click.echo(f"layer {number}: {site.name} ({site.how})", err=True)
    for name, why in request.left.items():
        click.echo(f"left {name}: {why}", err=True)
    settings, flags = _settings(asked, target.machine)
    return _Job(target, replayed, request, settings, flags, (), path)


def _replayed(asked: dict[str, Any]) -> ReplayRunner | None:
    """The records that ``--replay`` answers from."""
    if asked["replay"] is None:
        return None
    if asked["measured"]:
        raise UsageError("--replay answers from records and --measured forbids that; leave one of them out")
    from bratune.run.replay import ReplayRunner

    gpu = "" if asked["gpu"] == "auto" else asked["gpu"]
    runner = ReplayRunner.of([asked["replay"]], gpu=gpu)
    click.echo(f"replayed from {asked['replay']}: nothing is measured", err=True)
    return runner


def _run(jobs: Sequence[_Job], asked: dict[str, Any]) -> tuple[list[list[Record]], list[list[Record]]]:
    """The rows of every job, and those of the passes behind them; several jobs run side by side."""
    from bratune.cli.progress import Progress
    from bratune.run import fleet, session
    from bratune.store.maintenance import append_new

    progress = Progress(sum(len(job.planned) for job in jobs), budget_s=asked["budget"])
    rows: list[list[Record]] = [[] for _ in jobs]
    passes: list[list[Record]] = [[] for _ in jobs]

    def measure(number: int, engine: Engine) -> Iterator[Record]:
        job = jobs[number]
        return session.run(job.request, engine, job.stages, answer_first=bool(asked["budget"]))

    try:
        with contextlib.ExitStack() as stack:
            if jobs[0].target.absent:
                model = _model_engine(jobs[0], asked)
                _say_what_is_padded(jobs[0], asked)
                rows[0] += measure(0, model)
                append_new(jobs[0].path, rows[0])
                return rows, passes
            _say_what_is_padded(jobs[0], asked)
            engines = [stack.enter_context(_engine(job, asked, progress)) for job in jobs]
            _say_what_disturbs(jobs[0])
            for number, record in fleet.run(engines, measure):
                rows[number].append(record)
                progress.finish(record)
            for number, (job, engine) in enumerate(zip(jobs, engines, strict=True)):
                _say_what_was_reused(job, engine)
                passes[number] = engine.pass_rows
                if engine.slots > 1:
                    rows[number] = _in_order(job, rows[number])
    except KeyboardInterrupt:
        progress.close()
        for job, found in zip(jobs, rows, strict=True):
            click.echo(f"{len(found)} rows are in {job.path}", err=True)
        raise
    finally:
        progress.close()
    return rows, passes


def _in_order(job: _Job, rows: Sequence[Record]) -> list[Record]:
    """Rows that came as they were finished, in the order in which one device would have measured them."""
    places = {step.cell.cell_id: place for place, step in enumerate(job.planned) if step.cell}
    return sorted(rows, key=lambda row: (places.get(row.cell_id, len(places)), row.stage or 9))


def _model_engine(job: _Job, asked: dict[str, Any]) -> Engine:
    from bratune.predict import fit
    from bratune.predict.model import ModelEngine

    assert job.target.absent is not None
    model = ModelEngine(job.target.absent, fit.stored_coefficients().on_host(asked["host"]))
    choice = f"; {gpus.describe_choice(asked['gpu'])}" if asked["gpu"] != "auto" else ""
    _say_once(f"{model.notice}{choice}")
    return model


def _say_once(text: str) -> None:
    """A message on stderr, the first time that the command has it to say: every S and top-k would say it."""
    said = click.get_current_context().meta.setdefault("bratune.said", set())
    if text not in said:
        said.add(text)
        click.echo(text, err=True)


def _engine(job: _Job, asked: dict[str, Any], progress: Progress) -> CellEngine:
    """Whoever turns cells into rows by measuring or from records."""
    from bratune.run.engine import CellEngine, LocalEngine
    from bratune.run.isolated import IsolatedEngine

    given: dict[str, Any] = {
        "store": Store(job.path),
        "fresh": asked["fresh"],
        "run_id": new_run_id(),
        "flags": job.flags,
        "budget_s": asked["budget"],
        "on_start": progress.start,
    }
    if job.replayed:
        return CellEngine(job.replayed, job.settings, passes=job.passes(asked), **given)
    passes = job.passes(asked)
    if job.site:
        from bratune.cluster import ClusterEngine

        return ClusterEngine(job.site, job.settings.per_pass(), passes=passes, **given)
    if not asked["isolate"]:
        click.echo(f"--no-isolate: {ONE_PROCESS}; passes are fresh processes, so there is one", err=True)
        return LocalEngine(job.target.machine, job.settings, **given)
    return IsolatedEngine(job.target.machine, job.settings.per_pass(), passes=passes, **given)


def _say_what_disturbs(job: _Job) -> None:
    """What `bratune doctor` would say of a machine that is measured now."""
    from bratune.measure.health import at_a_glance

    if not job.replayed and not job.site and (text := at_a_glance(job.target.machine)):
        click.echo(text, err=True)


def _say_what_is_padded(job: _Job, asked: dict[str, Any]) -> None:
    """Whoever did not choose S learns that it pads maps, and whose S would not."""
    if not asked["n_win"]:
        for note in job.request.padding_notes():
            _say_once(note)


def _say_what_was_reused(job: _Job, engine: CellEngine) -> None:
    if engine.reused:
        click.echo(
            f"{engine.reused} rows were in {job.path} already, with the same sources, versions and "
            "sampling; --fresh measures them again",
            err=True,
        )


def _say_what_is_missing(rows: Sequence[Record], passes: int) -> None:
    """An answer that the budget cut short is marked as such."""
    from bratune.run.reuse import NO_TURN

    missing = sum(row.reason.startswith(NO_TURN) for row in rows)
    short = sum(row.ok and row.evidence == "measured" and (row.passes or 1) < passes for row in rows)
    if missing or short:
        fewer = f" and {short} have fewer than {passes} passes" if short else ""
        click.echo(
            f"incomplete: the budget ended before {missing} of {len(rows)} cells{fewer}; "
            "the same command goes on",
            err=True,
        )


def _settings(asked: dict[str, Any], machine: Machine) -> tuple[MeterSettings, list[str]]:
    """How long to measure, and the flags that say so."""
    from bratune.defaults import defaults_for
    from bratune.measure.settings import MeterSettings

    effort = asked["effort"] or defaults_for(machine).effort
    changes = options.meter_changes(asked)
    flags = ["--effort", effort]
    for flag, name, unit in (
        ("--min-time", "min_time_s", "s"),
        ("--max-noise", "max_noise_pct", "%"),
        ("--timeout", "timeout_s", "s"),
    ):
        if name in changes:
            flags += [flag, f"{changes[name]:g}{unit}"]
    return MeterSettings.for_effort(effort, **changes), flags


def _with_suite(asked: dict[str, Any], ctx: click.Context) -> dict[str, Any]:
    """The options with those of a suite where the command line says nothing."""
    from bratune.suites import load

    suite = load.load(asked["suite"])
    values = {
        "model": suite.models,
        "task": suite.task,
        "res": suite.image,
        "n_win": ((suite.n_win,),),
        "topks": (suite.topks,) if suite.topks else (),
        "batch_size": suite.batch_sizes,
        "routes": suite.routes,
        "mixer": suite.mixers,
    }
    if ctx.get_parameter_source("direction") is ParameterSource.DEFAULT:
        asked["directions"] = suite.directions
    return asked | {name: value for name, value in values.items() if not asked[name]}


def _records_path(output: Path | None, machine: Machine, *, several: bool) -> Path:
    """Where rows go: by default one folder per kind of machine, so that a run goes on where one ended."""
    folder = output or Path("runs") / machine.gpu_key
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output takes a folder, {folder} is a file; {folder.parent} would work")
    if folder.suffix == ".jsonl":
        raise UsageError(
            f"--output takes a folder, {folder} has the name of a file; {folder.with_suffix('')} would work"
        )
    if several:
        folder /= machine.gpu_uuid or machine.device.replace(":", "-")
    return folder / "records.jsonl"


def _show_plan(job: _Job) -> None:
    settings = job.settings
    texts = [step.text for step in job.planned]
    for text in (str(job.target.machine), *texts):
        click.echo(text)
    least = len(texts) * (settings.warmup_s + settings.min_time_s)
    most = len(texts) * (settings.warmup_s + settings.timeout_s)
    click.echo(
        f"{len(texts)} cells; sampling takes {_minutes(least)} to {_minutes(most)}, "
        "making inputs and checking results come on top"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Part(NamedTuple):
    """What was measured of one S and top-k: rows, and the passes behind them."""

    request: Request | YoursRequest
    rows: Sequence[Record]
    passes: Sequence[Record]


def _show(target: Target, parts: Sequence[_Part], asked: dict[str, Any]) -> None:
    """The rows of a target, those of every S and top-k apart."""
    from bratune.report import profile_tables, timm_format
    from bratune.report.answer import answer
    from bratune.run.passes import disturbance
    from bratune.tables import to_csv

    style = asked["format"]
    rows = [row for part in parts for row in part.rows]
    busy = disturbance(rows)
    if busy:
        click.echo(busy, err=style in ("json", "csv", "timm"))
    if style == "json":
        click.echo(json.dumps([row.to_dict() for row in rows], indent=1))
    elif style == "csv":
        columns = [name for name in rows[0].to_dict() if name != "cell"] if rows else []
        click.echo(to_csv(columns, [[getattr(row, name) for name in columns] for row in rows]))
    elif style == "timm":
        click.echo(timm_format.timm_csv(rows))
    if style not in ("table", "md"):
        return
    markdown = style == "md"
    click.echo(f"{target.machine}\n" if markdown else target.machine)
    for part in parts:
        if len(parts) > 1:
            click.echo(f"\n{part.request.setting_text}")
        tables = profile_tables.profile_markdown if markdown else profile_tables.profile_text
        click.echo(tables(part.rows, part.passes))
        for line in answer(part.rows, part.passes):
            click.echo(line)
