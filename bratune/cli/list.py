"""``bratune list``: the names that other verbs take."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from bratune.cli import options, values

Rows = list[dict[str, Any]]
# Of a table where no terminal says how wide it is.
WIDTH = 100


@click.command("list", context_settings=options.CONTEXT)
@click.argument("what", type=values.Name("list", lambda: LISTS), metavar="WHAT")
@click.option("--device", default="auto", metavar="NAME", help="For backends: auto, cpu, cuda or cuda:N.")
@click.option(
    "--format",
    type=values.Name("format", lambda: ("table", "json", "csv", "md")),
    default="table",
    show_default=True,
    help="table, json, csv or md.",
)
def command(what: str, device: str, format: str) -> None:
    """List backends, models, mixers, tasks, suites or gpus."""
    rows = LISTS[what](device)
    if format == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    from bratune.tables import Table, to_csv, to_markdown, to_text

    if what == "suites" and format in ("table", "md"):
        rows = [{name: value for name, value in row.items() if name != "about"} for row in rows]
    columns = list(rows[0]) if rows else []
    if format == "csv":
        click.echo(to_csv(columns, [list(row.values()) for row in rows]))
        return
    numbers = [all(isinstance(row[c], int | float | None) for row in rows) for c in columns]
    names = [_SHORT.get(c, c) for c in columns]
    heads = tuple(c if n else f"<{c}" for c, n in zip(names, numbers, strict=True))
    cells = [tuple(_cell(value) for value in row.values()) for row in rows]
    if format == "md":
        click.echo(to_markdown(Table(heads, tuple(cells))))
        return
    width = _width()
    click.echo(to_text(Table(heads, tuple(_fitted(heads, cells, width))), width=width))


# What columns are called where space is dear.
_SHORT = {
    "compute_capability": "cc",
    "memory_gib": "GiB",
    "memory_gbps": "GB/s",
    "bf16_tflops": "bf16 TFLOP/s",
    "padded_to_multiple_of": "padded to",
}
_LEAST = 12  # characters of a column that gives way


def _fitted(heads: Sequence[str], rows: Sequence[tuple[str, ...]], width: int) -> Iterator[tuple[str, ...]]:
    """Rows whose columns of text, the widest first, go on in the next line so that all fit the width."""
    sizes = [
        max(map(len, column)) for column in zip([head.lstrip("<") for head in heads], *rows, strict=True)
    ]
    excess = sum(sizes) + len(sizes) - 1 - width
    texts = [at for at, head in enumerate(heads) if head.startswith("<")]
    for at in sorted(texts[1:], key=lambda at: -sizes[at]):
        narrower = max(_LEAST, len(heads[at]) - 1, sizes[at] - max(0, excess))
        excess -= max(0, sizes[at] - narrower)
        sizes[at] = min(sizes[at], narrower)
    for row in rows:
        pieces = [_wrapped(cell, size) for cell, size in zip(row, sizes, strict=True)]
        yield from itertools.zip_longest(*pieces, fillvalue="")


def _wrapped(text: str, size: int) -> list[str]:
    """A text in lines of so many characters, broken after commas and spaces."""
    lines = [""]
    for word in re.findall(r"[^, ]+[, ]*|[, ]+", text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > size:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _width() -> int:
    """Columns of the terminal; of a page where there is none."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _backends(device: str) -> Rows:
    """Backends with their answer to the first stage of the default model on this machine."""
    from bratune.kernels import registry
    from bratune.machine import detect
    from bratune.work.request import make_request

    machine = detect(device)
    request = make_request(machine)
    problem = request.stages(request.models[0], 1)[0].problem
    assert problem is not None
    found: Rows = []
    for name in registry.names():
        reasons = registry.get(name).why_not(problem, machine)
        found.append({"backend": name, "here": "; ".join(reasons) or "accepts biformer_tiny stage 1 at 224"})
    for name in registry.known_names():
        if name not in registry.names():
            package = registry.package_of(name)
            text = f"of {package}, not loaded: --backend {name} or {registry.ALLOW_VARIABLE}={name} does"
            found.append({"backend": name, "here": text})
    return found


def _models(device: str) -> Rows:
    from bratune.variant import VARIANTS

    return [
        {
            "model": v.name,
            "layout": v.layout,
            "depths": list(v.depths),
            "channels": list(v.dims),
            "topks": list(v.topks),
            "parameters": v.parameters,
            "gmacs_224": v.gmacs_224,
        }
        for v in VARIANTS.values()
    ]


def _mixers(device: str) -> Rows:
    from bratune.kernels.mixers import registry

    kinds = [registry.get(name) for name in registry.names()]
    return [{"mixer": kind.name, "work grows as": kind.order, "paper": kind.paper} for kind in kinds]


def _tasks(device: str) -> Rows:
    from bratune.variant import TASKS

    return [
        {
            "task": t.name,
            "res": f"{t.height}x{t.width}",
            "n_win": t.n_win,
            "padded_to_multiple_of": t.pad_to,
            "output": "maps of the four stages" if t.features_only else "class scores",
        }
        for t in TASKS.values()
    ]


def _suites(device: str) -> Rows:
    from bratune.suites import load

    found = [load.load(name) for name in load.names()]
    return [
        {
            "suite": s.name,
            "task": s.task,
            "res": f"{s.image[0]}x{s.image[1]}",
            "n_win": s.n_win,
            "models": list(s.models),
            "batch_size": list(s.batch_sizes),
            "about": s.about,
        }
        for s in found
    ]


def _gpus(device: str) -> Rows:
    from bratune import gpus

    return [
        {
            "gpu": b.key,
            "name": b.name,
            "architecture": b.architecture,
            "compute_capability": b.compute_capability,
            "sms": b.sm_count,
            "memory_gib": b.memory_gib,
            "memory_gbps": b.memory_gbps,
            "bf16_tflops": b.bf16_tensor_tflops,
        }
        for b in gpus.table()
    ]


LISTS: dict[str, Callable[[str], Rows]] = {
    "backends": _backends,
    "models": _models,
    "mixers": _mixers,
    "tasks": _tasks,
    "suites": _suites,
    "gpus": _gpus,
}
