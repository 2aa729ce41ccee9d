"""``bratune tune --gpu a100`` where no A100 is: rank settings by the model, and say what to measure first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.errors import StoreError, UsageError
from bratune.files import write_text

if TYPE_CHECKING:
    from bratune.gpus import GPU
    from bratune.machine import Machine
    from bratune.tune.modelled import Modelled
    from bratune.tune.request import TuneRequest

__all__ = ["absent_boards", "run"]

# Flags that ask for a device, beside those that the request itself refuses.
NEEDS_DEVICE = {"join": "--join", "replay": "--replay", "cluster": "--cluster", "storage": "--storage"}
_SHOWN = 12


def absent_boards(asked: Mapping[str, Any]) -> tuple[GPU, ...]:
    """The boards that are to be modelled: several of ``--gpu A,B``, or one that is not here.

    Empty where a machine that is here, a cluster or records answer. With ``--measured`` an absent board is an
    error.

    Raises:
        TargetError: ``--measured``, and a board is not here.
        UnknownNameError: the table has no such board.
        UsageError: several boards, and something that only one machine can answer.
    """
    from bratune import gpus
    from bratune.run.target import find_target

    keys = [key.strip() for key in asked["gpu"].split(",") if key.strip()]
    if any(asked[name] for name in NEEDS_DEVICE):
        if len(keys) > 1:
            flags = ", ".join(flag for name, flag in NEEDS_DEVICE.items() if asked[name])
            raise UsageError(f"{flags} is about one GPU and --gpu names {len(keys)}; one of them would do")
        return ()
    if len(keys) > 1 and asked["gpu_spec"]:
        raise UsageError(
            f"--gpu {asked['gpu']} and --gpu-spec {asked['gpu_spec']} both name GPUs; one would do"
        )
    if len(keys) > 1:
        if asked["measured"]:
            raise UsageError(f"--measured tunes on one GPU and --gpu names {len(keys)}; one of them would do")
        if asked["device"] != "auto":
            raise UsageError(
                f"--device {asked['device']} is a machine, --gpu names {len(keys)}; one would do"
            )
        return tuple(dict.fromkeys(gpus.resolve(key) for key in keys))
    target = find_target(asked["gpu"], asked["device"], asked["gpu_spec"])
    if target.absent is None:
        return ()
    if asked["measured"]:
        target.require_present()
    return (target.absent,)


def run(
    asked: Mapping[str, Any],
    boards: Sequence[GPU],
    request_for: Callable[[Machine], TuneRequest],
    command: str,
) -> int:
    """Model every board, show what came out and write the plans; returns the exit code.

    Args:
        asked: What the command line was given.
        boards: From `absent_boards`.
        request_for: Makes the request with the defaults of a machine.
        command: What does this again.
    """
    from bratune import gpus
    from bratune.predict import fit
    from bratune.predict.model import ModelEngine
    from bratune.tune.modelled import measuring_command, search

    coefficients = fit.stored_coefficients().on_host(asked["host"])
    found: list[Modelled] = []
    for board in boards:
        if asked["gpu_spec"] is None and board.key in {b.key for b in gpus.table()}:
            click.echo(gpus.describe_choice(board.key), err=True)
        engine = ModelEngine(board, coefficients, compiled=False)
        click.echo(engine.notice, err=True)
        request = request_for(engine.machine)
        gpus.check_dtype(board, request.dtype)
        found.append(search(request, board, coefficients))
    _show(found, asked["style"])
    commands = [measuring_command(one) for one in found]
    if asked["style"] in ("table", "md"):
        click.echo("\nmeasure first, when the GPU is here:")
        for text in commands:
            click.echo(f"  {text}")
    if asked["plan_run"]:
        try:
            write_text(asked["plan_run"], "#!/bin/sh\n" + "".join(f"{text}\n" for text in commands))
        except OSError as error:
            why = error.strerror or error
            raise StoreError(f"the command cannot be written to {asked['plan_run']}: {why}") from None
    if asked["dry_run"]:
        return 0
    folder = asked["output"] or Path("runs") / "tune" / f"{found[0].request.study_name}-modelled"
    names = [f"plan-{one.board.key}.json" if len(found) > 1 else "plan.json" for one in found]
    paths = [one.plan(command).save(folder / name) for one, name in zip(found, names, strict=True)]
    click.echo(f"results: {', '.join(map(str, paths))} (modelled)   again: {command}", err=True)
    return 0


def _show(found: Sequence[Modelled], style: str) -> None:
    from bratune.tables import to_csv

    rows = [row for one in found for row in one.rows()]
    if style == "json":
        click.echo(json.dumps(rows, indent=1))
        return
    if style == "csv":
        columns = list(rows[0])
        click.echo(to_csv(columns, [[_plain(row[name]) for name in columns] for row in rows]))
        return
    for one in found:
        click.echo(one.sentence())
    for one in found:
        click.echo("")
        click.echo(_table(one, markdown=style == "md"))
        reasons = dict.fromkeys(part for r in one.ranked[:1] for part in r.reason.split("; "))
        click.echo(f"modelled: {'; '.join(reasons)}")
        for name, why in one.refused:
            click.echo(f"{name}: not on {one.board.name}: {why}")


def _plain(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _table(one: Modelled, *, markdown: bool) -> str:
    from bratune.tables import Row, Table, to_markdown, to_text

    rows: list[Row] = []
    for place, r in enumerate(one.ranked, 1):
        if place > _SHOWN and not r.name:
            continue
        rows.append(
            (
                f"{place}{'=' if r.tied else ''}",
                str(r.setting),
                "/".join(map(str, r.keys)),
                f"{r.ms:.2f}",
                f"{r.interval[0]:.2f} to {r.interval[1]:.2f}",
                f"{r.speedup.value:.2f}x",
                f"{r.speedup.lo:.2f} to {r.speedup.hi:.2f}",
                r.name,
            )
        )
    title = f"{one.board.name}, modelled; = cannot be told from the fastest"
    heads = ("", "<setting", "keys/q", "ms", "95 %", "default /", "95 %", "<what it is")
    return (to_markdown if markdown else to_text)(Table(heads, tuple(rows), title=title))
