"""Proof of the fused kernels: ``python -m bratune.studies kernels -o runs/gpu/kernels``.

Four parts, each on stdout; every attention call is also a row of ``records.jsonl`` in the output folder.

1. Side by side in one run: the ``triton`` backend against the composed ones and against full attention over
   all tokens, which is what a user would take instead, at the published sizes; forward, and forward with
   backward. The floor of a call is its fewest bytes over the rate at which this machine copies, measured
   first.
2. The choices that counting instructions could not settle: which family, how many warps, how many rows of a
   tile, what a hub costs.
3. The rank correlation of the offline cost model with the times of the fused kernels.
4. Which implementation of full attention is the one to beat; LayerNorm of several tokens per program and
   depthwise convolution in strips against PyTorch's. These are no cells and only printed, last, in what the
   budget leaves and at least a quarter of it.

Our own kernels are timed first, then these questions, then everybody else. ``--compile`` compiles all of them
beforehand, on every core, so that no measurement waits for a compiler. Without a GPU, ``--execute`` runs the
compiled kernels on the CPU instead (`bratune.studies.execute_kernels`).

What is wanted most comes first and every row is on disk as soon as it is known, so that ``--budget 480``
makes the most of ten minutes. Everything runs in worker processes: a kernel that loses the device costs its
row. Rows that the folder holds are not measured again: the same command goes on.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bratune import gpus
from bratune import machine as machines
from bratune.cell import Cell
from bratune.errors import BratuneError, MeasureError, TargetError, UsageError
from bratune.machine import Machine
from bratune.measure.meter import meter_for
from bratune.measure.settings import EFFORTS, MeterSettings
from bratune.measure.worker import JobOutcome, Worker
from bratune.predict.validate import rank_correlation
from bratune.problem import Problem
from bratune.record import Record, new_run_id
from bratune.run.isolated import IsolatedEngine
from bratune.store import Store
from bratune.variant import get_variant, stages

__all__ = [
    "AIMS",
    "Trial",
    "beside",
    "copy_gb_s",
    "copy_rates",
    "floor_ms",
    "main",
    "questions",
    "shown_aims",
    "side_by_side",
    "single_images",
    "trials",
]

# Height, width, images and regions per side.
SCENES = ((224, 224, 128, 7), (512, 512, 16, 8), (800, 1333, 2, 16))
BACKENDS = ("gather", "triton", "gather-sdpa", "flex", "dense")
FULL = "full SDPA"

# Shares of the floor that a kernel should reach, and that a very good one would: their times on an H200 (at
# 4.3 TB/s) over what the bytes take there. Forward, then forward and backward together.
AIMS: Mapping[str, tuple[float, float]] = {
    "224x224 s1 b128 fwd": (0.75, 0.88),
    "224x224 s2 b128 fwd": (0.53, 0.80),
    "224x224 s3 b128 fwd": (0.25, 0.33),
    "512x512 s1 b16 fwd": (0.36, 0.48),
    "512x512 s2 b16 fwd": (0.36, 0.48),
    "512x512 s3 b16 fwd": (0.16, 0.24),
    "224x224 s1 b128 fwd-bwd": (0.72, 0.80),
    "224x224 s2 b128 fwd-bwd": (0.44, 0.55),
    "224x224 s3 b128 fwd-bwd": (0.32, 0.40),
}

_COPY_BYTES = 2**30
# A cell that takes longer than this, compilation included, is killed and its row says so.
_CELL_LIMIT_S = 60.0
# What the questions that cells do not express may take: of the budget, or where there is none.
_BESIDE_SHARE, _BESIDE_S = 0.25, 300.0


@dataclass(frozen=True)
class Trial:
    """A cell, what it is compared within, and what it is called there."""

    group: str
    name: str
    cell: Cell


def _stage_problems(height: int, width: int, batch: int, n_win: int) -> Iterator[tuple[str, Problem]]:
    small = get_variant("biformer_small")
    for stage in stages(small, height, width, batch=batch, n_win=n_win, dtype="bfloat16"):
        if stage.kind == "routed" and stage.problem:
            yield f"{height}x{width} s{stage.index} b{batch}", stage.problem


def _trial(group: str, name: str, problem: Problem, backend: str, **more: Any) -> Trial:
    config = json.dumps(more.pop("config", {}))
    how: dict[str, Any] = {"route_distribution": "random", "regime": "graph"} | more
    cell = Cell(part="attention", problem=problem, backend=backend, config=config, **how)
    return Trial(group, name, cell)


def _everyone(group: str, problem: Problem, regime: str) -> Iterator[Trial]:
    for backend in BACKENDS:
        yield _trial(group, backend, problem, backend, regime=regime)
    # One region is the whole map: what runs is PyTorch's fused attention over all tokens.
    whole = problem.replace(
        region=(problem.height, problem.width), kv_region=(problem.height, problem.width), topk=1
    )
    yield _trial(group, FULL, whole, "gather-sdpa", regime=regime)


def side_by_side(scenes: Sequence[tuple[int, int, int, int]] = SCENES) -> Iterator[Trial]:
    """Every backend at every published size and a large batch, as CUDA graphs, in both directions."""
    for height, width, batch, n_win in scenes:
        for name, problem in _stage_problems(height, width, batch, n_win):
            for direction in ("fwd", "fwd-bwd"):
                yield from _everyone(f"{name} {direction}", problem.replace(direction=direction), "graph")


def single_images() -> Iterator[Trial]:
    """Every backend at every published size for one image, eagerly."""
    for height, width, _, n_win in SCENES:
        for name, problem in _stage_problems(height, width, 1, n_win):
            yield from _everyone(f"{name} fwd, eager", problem, "eager")


def trials() -> tuple[Trial, ...]:
    """All of them, what is wanted most first: a budget may end before they do."""
    first = tuple(side_by_side(SCENES[:2]))
    ours = [trial for trial in first if trial.name == "triton"]
    others = [trial for trial in first if trial.name != "triton"]
    return (*ours, *questions(), *others, *side_by_side(SCENES[2:]), *single_images())


def questions() -> Iterator[Trial]:
    """Pairs of settings of the fused kernels between which only a measurement decides."""
    first, second, third = (p for _, p in _stage_problems(*SCENES[0]))
    last = [p for _, p in _stage_problems(*SCENES[1])][2]
    for where, problem in (("224 s2", second), ("512 s3", last)):
        for family in ("stationary", "gather"):
            name = f"family {family}"
            yield _trial(f"keys kept in L1, {where}", name, problem, "triton", config={"forward": family})
    for warps in (4, 2):
        config = {"forward": "gather", "fwd_block_m": 64, "fwd_block_n": 64, "fwd_num_warps": warps}
        yield _trial("warps of a 64x64 tile, 224 s1", f"{warps} warps", first, "triton", config=config)
    for rows in (16, 4):
        config = {"forward": "stationary", "fwd_block_m": rows}
        yield _trial("rows of a product, 224 s3", f"{rows} rows", third, "triton", config=config)
    for family in ("image", "stationary", "gather"):
        yield _trial("family, 224 s3", f"family {family}", third, "triton", config={"forward": family})
    train = third.replace(direction="fwd-bwd")
    group = "backward in one kernel, 224 s3"
    for keys in (32, 64):
        choice = {"backward": "image", "dkv_block_n": keys}
        yield _trial(group, f"image, {keys} keys", train, "triton", config=choice)
    yield _trial(group, "gather", train, "triton", config={"backward": "gather"})
    large = next(p for _, p in _stage_problems(*SCENES[1])).replace(direction="fwd-bwd")
    train = first.replace(direction="fwd-bwd")
    for routes in ("random", "same"):
        for where, problem, family in (
            ("224 s1", train, "key"),
            ("224 s1", train, "gather"),
            ("512 s1", large, "gather"),
        ):
            for chunk in (0, 8):
                yield _trial(
                    f"backward with {routes} routes, {where}",
                    f"{family}, " + (f"hubs cut at {chunk}" if chunk else "hubs whole"),
                    problem,
                    "triton",
                    config={"backward": family, "dkv_chunk": chunk},
                    route_distribution=routes,
                )


def copy_gb_s(machine: Machine, settings: MeterSettings, size: int = _COPY_BYTES) -> float:
    """The rate at which this machine copies, in 10^9 bytes per second, read and written bytes counted."""
    import torch

    source = torch.ones(size // 2, dtype=torch.bfloat16, device=machine.device)
    target = torch.empty_like(source)
    measured = meter_for(machine).measure(lambda: target.copy_(source), settings)
    return 2 * size / measured.median_ms / 1e6


def floor_ms(problem: Problem, gb_s: float) -> float:
    """The least time of a call at a copy rate.

    Forward reads q, k and v and writes the output; backward reads these and the gradient of the output and
    writes three gradients, twice as much.
    """
    return problem.io_bytes * (3 if problem.backward else 1) / gb_s / 1e6


def _lines(trials: Sequence[Trial], rows: Iterable[Record], gb_s: float) -> Iterator[str]:
    """The table: a heading when a group begins, a line per row as soon as it is known.

    A row is compared with the first of its group that was measured, however long ago.
    """
    group = ""
    baselines: dict[str, tuple[str, float]] = {}
    for trial, row in zip(trials, rows, strict=False):
        if trial.group != group:
            group = trial.group
            yield f"\n{group}: floor {1e3 * floor_ms(trial.cell.problem, gb_s):.1f} us{shown_aims(group)}"
        if row.median_ms is None:
            yield f"  {trial.name:20} {row.outcome}: {row.reason}"
            continue
        baseline = baselines.setdefault(group, (trial.name, row.median_ms))
        interval = (
            "" if row.ci_lo_ms is None else f"[{1e3 * row.ci_lo_ms:.1f}, {1e3 * (row.ci_hi_ms or 0):.1f}]"
        )
        share = 100 * floor_ms(trial.cell.problem, gb_s) / row.median_ms
        memory = "" if row.workspace_mb is None else f"{row.workspace_mb:9.1f} MB with its results"
        yield (
            f"  {trial.name:20} {1e3 * row.median_ms:9.1f} us {interval:20} "
            f"{baseline[1] / row.median_ms:6.2f}x {baseline[0]:12} {share:5.1f} % of floor {memory}"
        )


def shown_aims(group: str) -> str:
    """What a kernel of a group should reach of the floor at this card's own rate; may be empty."""
    if group not in AIMS:
        return ""
    must, better = AIMS[group]
    return f", {100 * must:.0f} % of it wanted, {100 * better:.0f} % would be very good"


def _modelled_ms(problem: Problem, config: dict[str, Any], machine: Machine) -> float | None:
    """The offline estimate of the forward kernel; None where the board or its target is unknown."""
    from bratune.predict.cost import cost_of
    from bratune.predict.offline import attention_launches
    from bratune.predict.targets import target_of

    board, target = gpus.from_machine(machine), target_of(machine)
    if board is None or target is None:
        return None
    try:
        for kind, launch in attention_launches(problem, target, config).items():
            if kind.endswith("_fwd"):
                return cost_of(launch, kind, problem, board).us / 1e3
    except BratuneError:  # a peak of the board is not published
        pass
    return None


def _correlation(trials: Iterable[Trial], rows: Iterable[Record], machine: Machine) -> str:
    pairs = []
    for trial, row in zip(trials, rows, strict=True):
        cell = trial.cell
        if cell.backend != "triton" or cell.problem.backward or cell.regime != "graph" or not row.median_ms:
            continue
        modelled = _modelled_ms(cell.problem, cell.settings, machine)
        if modelled:
            pairs.append((row.median_ms, modelled))
    rank = rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
    found = "unknown" if rank is None else f"{rank:.2f}"
    return f"rank correlation of the cost model with {len(pairs)} measured forward passes: {found}"


@click.command("kernels")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for records.jsonl.")
@click.option(
    "--execute",
    "executes",
    is_flag=True,
    help="No GPU: execute the compiled kernels at the published sizes on the CPU and check them.",
)
@click.option(
    "--effort",
    type=click.Choice(EFFORTS),
    default="quick",
    show_default=True,
    help="How long each row is sampled.",
)
@click.option("--only", default="", help="Regular expression: groups that match it, e.g. '224.*s1'.")
@click.option("--budget", type=float, default=None, help="Seconds after which no row is started.")
@click.option(
    "--compile", "compiles", is_flag=True, help="Only compile what would be measured, on all cores."
)
@click.option(
    "--target",
    default="",
    help="With --compile or --execute: for which architecture; by default the GPU's, or sm80.",
)
@click.option("--dry-run", is_flag=True, help="Only list what would be measured, and what cannot be.")
def main(
    output: Path | None,
    executes: bool,
    effort: str,
    only: str,
    budget: float | None,
    compiles: bool,
    target: str,
    dry_run: bool,
) -> None:
    """Measure the fused kernels beside their rivals on a GPU, question by question; print and store.

    Raises:
        MeasureError: an executed kernel is wrong.
        TargetError: the machine has no GPU, or it cannot copy.
        UsageError: there is no folder to measure into.
    """
    if executes:
        from bratune.studies.execute_kernels import execute

        if not execute(output, only, budget, target or "sm80"):
            raise MeasureError("a compiled kernel is wrong: see the lines that say so")
        return
    wanted = [t for t in trials() if re.search(only, t.group)]
    if not wanted:
        raise UsageError(f"no group matches {only!r}; these are groups: {', '.join(_groups()[:4])} ...")
    if compiles:
        _compile(wanted, target)
        return
    if output is None:
        raise UsageError("measuring needs a folder for its records: -o FOLDER")
    machine = machines.detect("cuda")
    if dry_run:
        _list(wanted, machine)
        return
    started = time.monotonic()
    settings = MeterSettings.for_effort(effort)
    rates = _apart("copy_rates", machine, settings)
    if not rates.ok:
        raise TargetError(f"this device cannot copy: {rates.reason}")
    gb_s, cached = rates.value
    print(
        f"{machine}\ncopies {gb_s:.0f} GB/s from memory, {cached:.0f} GB/s of 8 MiB in the cache", flush=True
    )
    share = 0.0 if only else _BESIDE_SHARE
    left = None if budget is None else (1 - share) * budget - (time.monotonic() - started)
    rows: list[Record] = []
    with IsolatedEngine(
        machine,
        settings,
        store=Store(output / "records.jsonl"),
        run_id=new_run_id(),
        budget_s=left,
        cell_limit_s=_CELL_LIMIT_S,
    ) as engine:
        for line in _lines(wanted, _kept(engine.run(t.cell for t in wanted), rows), gb_s):
            print(line, flush=True)
    if not only:
        spare = _BESIDE_S if budget is None else budget - (time.monotonic() - started)
        found = _apart("beside", machine, settings, max(0.0, min(spare, _BESIDE_S)))
        print("\n".join(found.value) if found.ok else f"not measured: {found.reason}", flush=True)
    print(f"\n{_correlation(wanted, rows, machine)}\nrecords: {output / 'records.jsonl'}")


def _groups() -> list[str]:
    return list(dict.fromkeys(trial.group for trial in trials()))


def _compile(wanted: Sequence[Trial], target: str) -> None:
    """Compile what is wanted of the fused kernels."""
    from bratune.predict.targets import get_target, target_of
    from bratune.studies.compile_kernels import compile_all, jobs_of

    goal = get_target(target) if target else target_of(machines.detect("cuda"))
    if goal is None:
        raise TargetError(
            "kernels are not compiled beforehand for this GPU; --target names one that is known"
        )
    ours = [trial.cell for trial in wanted if trial.cell.backend == "triton"]
    compile_all(jobs_of((cell.problem, cell.settings) for cell in ours), goal.name)


def _list(wanted: Sequence[Trial], machine: Machine) -> None:
    """What would be measured, in order, and why some of it cannot be."""
    from bratune.kernels import registry

    for trial in wanted:
        reasons = registry.get(trial.cell.backend).why_not(trial.cell.problem, machine)
        print(f"{trial.group}: {trial.name}" + (f", not: {'; '.join(reasons)}" if reasons else ""))
    print(f"{len(wanted)} rows")


def _apart(job: str, machine: Machine, settings: MeterSettings, seconds: float = 0.0) -> JobOutcome:
    """A function of this module in a process of its own: this one never touches the device."""
    payload = {"machine": machine.to_dict(), "settings": settings.to_dict(), "seconds": seconds}
    with Worker(preload=("bratune.run.measure_cell",)) as worker:
        return worker.run(f"bratune.studies.kernels:{job}", payload, limit_s=seconds + _CELL_LIMIT_S)


def copy_rates(payload: Mapping[str, Any]) -> tuple[float, float]:
    """See `copy_gb_s`: from memory, and of 8 MiB in the cache."""
    machine = Machine.from_dict(payload["machine"])
    settings = MeterSettings.from_dict(payload["settings"])
    return copy_gb_s(machine, settings), copy_gb_s(machine, settings.replace(l2="warm"), 2**23)


def beside(payload: Mapping[str, Any]) -> list[str]:
    """The questions that cells do not express, as many as fit into ``seconds`` of the payload."""
    end = time.monotonic() + payload["seconds"]
    lines = []
    for line in _beside(Machine.from_dict(payload["machine"]), MeterSettings.from_dict(payload["settings"])):
        lines.append(line)
        if time.monotonic() >= end:
            return [*lines, "the rest was not started: its time was spent"]
    return lines


def _beside(machine: Machine, settings: MeterSettings) -> Iterator[str]:
    import torch

    from bratune.studies.rivals import depthwise_lines, norm_lines, sdpa_lines

    problems = [p for _, p in _stage_problems(*SCENES[0])]
    maps = [(p.batch, p.height, p.width, p.channels) for p in problems]
    yield from sdpa_lines(machine, settings, problems)
    yield from norm_lines(machine, settings, maps, SCENES[0][-1], torch.bfloat16)
    yield from depthwise_lines(machine, settings, maps, torch.bfloat16)


def _kept(rows: Iterable[Record], into: list[Record]) -> Iterator[Record]:
    for row in rows:
        into.append(row)
        yield row
