"""Translate: the arguments of commands of earlier versions as those of ``bratune profile``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import click

from bratune.cell import FORMS
from bratune.cli import run
from bratune.errors import UsageError

__all__ = ["main", "translated"]

# Flags that mean the same, by command; the others of a command are in `_RENAMED` and `_GONE`.
_SAME = ("--model", "--task", "--res", "--batch-size", "--dtype", "--device", "--direction", "--regime")
_SAME_TOO = ("--backend", "--stage", "--effort", "--output", "--budget")
_SHORT = {"-b": "--batch-size", "-o": "--output"}
_GONE = ("--rounds", "--clock", "--threads", "--baseline")
# What each command measured where nothing was said.
_ALWAYS: Mapping[str, tuple[str, ...]] = {
    "whole_model": ("--no-stages", "--l2", "warm"),
    "peers": ("--no-stages",),
    "stage_contest": ("--no-whole-model",),
}
_OWN = (*(form for form in FORMS if form not in ("timm", "yours", "plain")), "gather", "auto")


def translated(command: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of ``bratune profile`` for a command of an earlier version, and the flags left out.

    Args:
        command: ``whole_model``, ``peers`` or ``stage_contest``.
        arguments: What followed it.

    Raises:
        UsageError: a flag is none that the command had, or lacks its value.
    """
    words, gone, dtype = ["profile", *_ALWAYS[command]], [], command != "whole_model"
    rest = list(arguments)
    while rest:
        flag, _, value = rest.pop(0).partition("=")
        flag = _SHORT.get(flag, flag)
        if flag == "--compile":
            words += ["--regime", "eager", "--regime", "compile"]
            continue
        if not value:
            if not rest:
                raise UsageError(f"{flag} lacks its value")
            value = rest.pop(0)
        dtype = dtype or flag == "--dtype"
        if flag in _SAME or flag in _SAME_TOO:
            words += [flag, value]
        elif flag == "--only":
            words += ["--forms", value]
        elif flag == "--peers":
            names = [name.strip() for name in value.split(",")]
            for option, chosen in (("--forms", _OWN), ("--peers", ())):
                found = [n for n in names if (n in _OWN) == bool(chosen)]
                words += [option, ",".join(found)] if found else []
        elif flag in _GONE:
            gone.append(flag)
        else:
            raise UsageError(
                f"bratune.profile.{command} had no flag {flag}; `bratune profile --help` lists all"
            )
    return words + ([] if dtype else ["--dtype", "fp32"]), gone


def main(command: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command of an earlier version as ``bratune profile``; its exit code."""
    try:
        words, gone = translated(command, sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        click.echo(f"bratune: {error}", err=True)
        return error.exit_code
    click.echo(f"python -m bratune.profile.{command} is now: bratune {' '.join(words)}", err=True)
    if gone:
        click.echo(f"{', '.join(gone)} mean nothing any longer: passes say how long to measure", err=True)
    sys.argv = ["bratune", *words]
    return run(words)
