"""Repro: the command that measures a row again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from bratune.cell import Cell
from bratune.kernels.checkpoint import is_trusted
from bratune.variant import TASKS, get_variant

__all__ = ["command_for"]

SHORT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def command_for(cell: Cell, *, extra: Sequence[str] = ()) -> str:
    """``bratune profile ...`` with the flags that give a cell; empty for a bare attention call.

    Args:
        cell: A cell of a model.
        extra: Flags that say how long to measure, appended as they are.
    """
    if not cell.model:
        return ""
    p = cell.problem
    if cell.form == "yours":
        return "" if cell.model.startswith("live:") else _of_yours(cell, extra)
    words = ["bratune", "profile"]
    if cell.form == "mixer":
        words += ["--mixer", cell.backend]
    else:
        words += ["--no-stages", "--peers", cell.model] if cell.form == "timm" else ["--model", cell.model]
    words += ["--task", cell.task] if cell.task else []
    words += ["--res", f"{cell.image[0]}x{cell.image[1]}", "-b", str(p.batch)]
    words += ["--dtype", SHORT_DTYPES[p.dtype], "--regime", cell.regime, "--l2", cell.l2]
    words += ["--direction", p.direction] if p.backward else []
    words += ["--amp"] if cell.amp else []
    words += ["--channels-last"] if cell.layout == "nhwc" else []
    words += ["--seed", str(cell.seed)] if cell.seed else []
    if cell.form == "mixer":
        words += ["--n-win", cell.n_win.split(",")[0]]
        words += ["--stage", str(cell.stage)] if cell.stage else ["--no-stages"]
        words += ["--images", folder] if (folder := json.loads(cell.extra).get("images")) else []
        return shlex.join([*words, *extra])
    # One backend everywhere is a form to ask for; one per stage is what the stages' own measurements give.
    form = cell.form if cell.form != "plain" else "" if "," in cell.backend else cell.backend
    if cell.part == "model" and cell.form != "timm":
        words += [f"--n-win={cell.n_win}", f"--topks={cell.topk}"]
        words += ["--no-stages", "--forms", form] if form else []
    elif cell.part != "model":
        words += ["--stage", str(cell.stage), *_grid_flags(cell)]
        words += ["--routes", cell.route_distribution] if cell.route_distribution != "recorded" else []
    for name, path in json.loads(cell.extra).items():
        words += [f"--{name}", path]
        words += ["--trust-checkpoint"] if name == "checkpoint" and is_trusted() else []
    named = [] if cell.part == "model" and form else cell.backend.split(",")
    for name in dict.fromkeys(named):
        words += ["--backend", name] if name else []
    return shlex.join([*words, *extra])


def _of_yours(cell: Cell, extra: Sequence[str]) -> str:
    p = cell.problem
    words = ["bratune", "profile", "--model", cell.model, "--input", json.loads(cell.extra)["input"]]
    words += ["--dtype", SHORT_DTYPES[p.dtype], "--regime", cell.regime, "--l2", cell.l2]
    words += ["--direction", p.direction] if p.backward else []
    words += ["--seed", str(cell.seed)] if cell.seed else []
    for name in dict.fromkeys(cell.backend.split(",")):
        words += ["--backend", name] if name not in ("", "auto") else []
    return shlex.join([*words, *extra])


def _grid_flags(cell: Cell) -> list[str]:
    """S and top-k of a stage where they are not the published ones; other stages are given full attention."""
    variant, index = get_variant(cell.model), cell.stage - 1
    flags = []
    if cell.n_win != "0" and (cell.task not in TASKS or int(cell.n_win) != TASKS[cell.task].n_win):
        flags.append(f"--n-win={cell.n_win}")
    if int(cell.topk) != variant.topks[index]:
        full = -1 if variant.layout == "stl_nchw" else -2
        topks = [full] * len(variant.topks)
        topks[index] = int(cell.topk)
        flags.append(f"--topks={','.join(map(str, topks))}")
    return flags
