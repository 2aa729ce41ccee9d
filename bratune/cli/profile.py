"""``bratune profile``: measure every backend at every stage of a model, then the whole model."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune import gpus
from bratune.cli import options
from bratune.errors import UsageError

if TYPE_CHECKING:
    from bratune.engine import Engine
    from bratune.measure.settings import MeterSettings
    from bratune.profile.engine import CellEngine
    from bratune.profile.replay import ReplayRunner
    from bratune.profile.request import Request
    from bratune.profile.target import Target
    from bratune.record import Record
    from bratune.store import Store

FAILED = ("incorrect", "oom", "timeout", "crashed", "error")


@click.command("profile", context_settings=options.CONTEXT)
@options.target_options
@options.what_options
@options.work_options
@click.option("--stage", type=click.IntRange(1, 4), multiple=True, help="Only this stage; repeatable.")
@click.option("--suite", metavar="NAME", help="A list of measurements, see `bratune list suites`.")
@click.option(
    "--whole-model/--no-whole-model",
    default=None,
    help="Time whole models too.  [default: yes, without --stage]",
)
@options.measuring_options
@options.engine_options
@options.output_options
@options.config_file
@click.pass_context
def command(ctx: click.Context, /, **asked: Any) -> int:
    r"""Measure every backend at every stage of a model, then the whole model.

    Every implementation is checked against the reference before it is timed. Without options,
    biformer_tiny at 224x224 is measured on the first GPU, or on the CPU where there is none.

    \b
    bratune profile --model biformer_small --res 224 -b 1
    bratune profile --task segmentation --res 512 --dtype fp16 -b 1 -b 8
    bratune profile --gpu a100 --res 512
    """
    if asked["dump_config"]:
        click.echo(options.dump_config(ctx))
        return 0
    from bratune.profile import session
    from bratune.profile.request import make_request
    from bratune.profile.target import Target, find_target

    if asked["suite"]:
        asked = _with_suite(asked)
    replayed = _replayed(asked)
    target = (
        Target(replayed.machine)
        if replayed
        else find_target(asked["gpu"], asked["device"], asked["gpu_spec"])
    )
    if asked["measured"]:
        target.require_present()
    values = options.request_values(asked)
    whole = not asked["stage"] if asked["whole_model"] is None else asked["whole_model"]
    values |= {"regimes": asked["regime"], "l2": asked["l2"], "whole_model": whole}
    request = make_request(target.machine, **values)
    if target.absent:
        gpus.check_dtype(target.absent, request.dtype)
    settings, flags = _settings(asked, on_gpu=target.machine.is_cuda)
    stages = tuple(asked["stage"])
    planned = session.plan(request, stages)
    if asked["dry_run"]:
        _show_plan(target, planned, settings)
        return 0
    path = _records_path(asked["output"], target.machine.gpu_key)
    rows = _run(target, replayed, request, settings, path, asked, stages, flags, len(planned))
    _show(target, rows, asked["format"])
    click.echo(f"results: {path}   again: {_again(ctx)}", err=True)
    failed = any(row.outcome in FAILED for row in rows)
    return 4 if asked["strict"] and failed else 0


def _replayed(asked: dict[str, Any]) -> ReplayRunner | None:
    """The records that ``--replay`` answers from."""
    if asked["replay"] is None:
        return None
    if asked["measured"]:
        raise UsageError("--replay answers from records and --measured forbids that; leave one of them out")
    from bratune.profile.replay import ReplayRunner

    gpu = "" if asked["gpu"] == "auto" else asked["gpu"]
    runner = ReplayRunner.of([asked["replay"]], gpu=gpu)
    click.echo(f"replayed from {asked['replay']}: nothing is measured", err=True)
    return runner


def _run(
    target: Target,
    replayed: ReplayRunner | None,
    request: Request,
    settings: MeterSettings,
    path: Path,
    asked: dict[str, Any],
    stages: tuple[int, ...],
    flags: Sequence[str],
    total: int,
) -> list[Record]:
    from bratune.cli.progress import Progress
    from bratune.profile import session
    from bratune.store import Store

    store = Store(path)
    progress = Progress(total)
    rows: list[Record] = []
    try:
        with _engine(target, replayed, settings, store, asked, progress, flags) as engine:
            for record in session.run(request, engine, stages):
                rows.append(record)
                if target.absent:
                    store.append(record)
                else:
                    progress.finish(record)
    except KeyboardInterrupt:
        progress.close()
        click.echo(f"{len(rows)} rows are in {path}", err=True)
        raise
    finally:
        progress.close()
    return rows


@contextlib.contextmanager
def _engine(
    target: Target,
    replayed: ReplayRunner | None,
    settings: MeterSettings,
    store: Store,
    asked: dict[str, Any],
    progress: Any,
    flags: Sequence[str],
) -> Iterator[Engine]:
    """Whoever turns cells into rows, for the length of the run."""
    if target.absent:
        from bratune.predict import fit
        from bratune.predict.model import ModelEngine

        model = ModelEngine(target.absent, fit.stored_coefficients())
        choice = f"; {gpus.describe_choice(asked['gpu'])}" if asked["gpu"] != "auto" else ""
        click.echo(f"{model.notice}{choice}", err=True)
        yield model
        return
    with _measuring_engine(
        target,
        replayed,
        settings,
        asked,
        store=store,
        fresh=asked["fresh"],
        run_id=time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
        flags=flags,
        budget_s=asked["budget"],
        on_start=progress.start,
    ) as engine:
        yield engine
        if engine.reused:
            click.echo(
                f"{engine.reused} rows were in {store.path} already, with the same sources, versions and "
                "sampling; --fresh measures them again",
                err=True,
            )


def _measuring_engine(
    target: Target,
    replayed: ReplayRunner | None,
    settings: MeterSettings,
    asked: dict[str, Any],
    **given: Any,
) -> CellEngine:
    from bratune.profile.engine import CellEngine, LocalEngine
    from bratune.profile.isolated import IsolatedEngine

    if replayed:
        return CellEngine(replayed, settings, **given)
    if asked["isolate"]:
        return IsolatedEngine(target.machine, settings, **given)
    return LocalEngine(target.machine, settings, **given)


def _settings(asked: dict[str, Any], *, on_gpu: bool) -> tuple[MeterSettings, list[str]]:
    """How long to measure, and the flags that say so."""
    from bratune.measure.settings import MeterSettings

    effort = asked["effort"] or ("standard" if on_gpu else "quick")
    changes = {
        "min_time_s": asked["min_time"],
        "max_noise_pct": asked["max_noise"],
        "timeout_s": asked["timeout"],
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    flags = ["--effort", effort]
    for flag, name, unit in (
        ("--min-time", "min_time_s", "s"),
        ("--max-noise", "max_noise_pct", "%"),
        ("--timeout", "timeout_s", "s"),
    ):
        if name in changes:
            flags += [flag, f"{changes[name]:g}{unit}"]
    return MeterSettings.for_effort(effort, **changes), flags


def _with_suite(asked: dict[str, Any]) -> dict[str, Any]:
    """The options with those of a suite where the command line says nothing."""
    from bratune.suites import load

    suite = load.load(asked["suite"])
    values = {
        "model": suite.models,
        "task": suite.task,
        "res": suite.image,
        "n_win": (suite.n_win,),
        "topks": suite.topks,
        "batch_size": suite.batch_sizes,
        "routes": suite.routes,
    }
    return asked | {name: value for name, value in values.items() if not asked[name]}


def _records_path(output: Path | None, gpu_key: str) -> Path:
    """Where rows go: by default one folder per kind of machine, so that a run goes on where one ended."""
    folder = output or Path("runs") / gpu_key
    if folder.is_file() or folder.suffix == ".jsonl":
        raise UsageError(f"--output takes a folder, {folder} is a file; {folder.parent} would work")
    return folder / "records.jsonl"


def _again(ctx: click.Context) -> str:
    """The command line that was given, ready to be pasted."""
    return shlex.join(["bratune", *sys.argv[1:]]) if Path(sys.argv[0]).name != "pytest" else ctx.command_path


def _show_plan(target: Target, planned: Sequence[Any], settings: MeterSettings) -> None:
    click.echo(str(target.machine))
    for step in planned:
        click.echo(step.text)
    least = len(planned) * (settings.warmup_s + settings.min_time_s)
    most = len(planned) * (settings.warmup_s + settings.timeout_s)
    click.echo(
        f"{len(planned)} cells; sampling takes {_minutes(least)} to {_minutes(most)}, "
        "making inputs and checking results come on top"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _show(target: Target, rows: Sequence[Record], style: str) -> None:
    from bratune.report import profile_tables, timm_format
    from bratune.report.tables import to_csv

    if style == "json":
        click.echo(json.dumps([row.to_dict() for row in rows], indent=1))
    elif style == "csv":
        columns = [name for name in rows[0].to_dict() if name != "cell"] if rows else []
        click.echo(to_csv(columns, [[getattr(row, name) for name in columns] for row in rows]))
    elif style == "timm":
        click.echo(timm_format.timm_csv(rows))
    elif style == "md":
        click.echo(f"{target.machine}\n\n{profile_tables.profile_markdown(rows)}")
    else:
        click.echo(f"{target.machine}\n{profile_tables.profile_text(rows)}")
