"""``bratune doctor``: check whether this machine can measure soundly."""

from __future__ import annotations

import dataclasses
import json

import click

MARKS = {"ok": "ok  ", "note": "note", "problem": "BAD "}


@click.command("doctor")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N.")
@click.option("--noise/--no-noise", default=True, help="Measure the meter's noise floor.  [default: yes]")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(device: str, noise: bool, style: str) -> int:
    """Check versions, the GPU, clocks, other processes, torch's switches, the noise floor and the disk.

    Exit code 0: what is measured now can be trusted. 1: it cannot; each line says what to do.
    """
    from bratune.machine import detect
    from bratune.measure.health import examine, is_sound

    findings = examine(detect(device), measure=noise)
    if style == "json":
        click.echo(json.dumps([dataclasses.asdict(f) for f in findings], indent=1))
    else:
        width = max(len(f.what) for f in findings)
        for f in findings:
            click.echo(f"{MARKS[f.state]}  {f.what.ljust(width)}  {f.found}")
            if f.advice:
                click.echo(f"{' ' * (width + 6)}  -> {f.advice}")
    sound = is_sound(findings)
    click.echo("measuring here is sound" if sound else "measuring here is not sound now", err=True)
    return 0 if sound else 1
