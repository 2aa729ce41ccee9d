"""Attention of a stage, backends in turn: the ratio between them on a machine whose speed changes.

    $ python -m bratune.profile.stage_contest --model biformer_tiny --res 224 -b 1

`bratune profile` measures one backend after the other, seconds apart; what happens to the machine in between
is in their ratio. Here every round runs every backend once, on the same data and with the rest of the block
before it (`bratune.work.call.Work`), and a ratio is the median over rounds of the ratio within a round.
Each is first compared with the reference, as everywhere.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from bratune.errors import UsageError
from bratune.measure.statistics import median, paired_ratio

if TYPE_CHECKING:
    from bratune.cell import Cell
    from bratune.machine import Machine
    from bratune.measure.device import Device
    from bratune.work.call import Work
    from bratune.work.request import Request

__all__ = ["StageRow", "contest", "stage_rows", "table"]

# Untimed rounds: caches, allocators and thread pools find their state.
_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One backend at one stage.

    Attributes:
        stage: From 1.
        backend: Its name.
        median_ms: Median time of one block's attention; None where it did not run.
        ratio: How many times faster than the baseline, the median over rounds.
        ratio_interval: Its 95 % interval.
        reason: Why it did not run.
    """

    stage: int
    backend: str
    median_ms: float | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    reason: str = ""


def stage_rows(
    request: Request,
    machine: Machine,
    device: Device,
    *,
    baseline: str = "gather",
    stages: Sequence[int] = (),
    rounds: int = 200,
) -> list[StageRow]:
    """Every backend of a request at every stage with routed attention.

    Args:
        request: One model, batch and route distribution.
        machine: Where.
        device: Takes the times.
        baseline: The backend that the others are compared with.
        stages: Which, from 1; by default all.
        rounds: Times that every backend runs.

    Raises:
        UsageError: the baseline is not among the backends or cannot run.
    """
    from bratune.run.measure_cell import check, refusals
    from bratune.run.session import plan
    from bratune.work.call import build

    found: list[StageRow] = []
    cells = [p.cell for p in plan(request, tuple(stages)) if p.cell is not None]
    cells = [cell for cell in cells if cell.part == "attention" and not cell.topk.startswith("-")]
    for stage in sorted({cell.stage or 0 for cell in cells}):
        works: dict[str, tuple[Cell, Work]] = {}
        refused: list[StageRow] = []
        for cell in (cell for cell in cells if cell.stage == stage):
            reasons = refusals(cell, machine)
            if not reasons:
                made = build(cell, machine)
                checked = check(made)
                reasons = (f"WRONG RESULT, not timed: {checked['reason']}",) if "reason" in checked else ()
                works |= {} if reasons else {cell.backend: (cell, made)}
            if reasons:
                refused.append(StageRow(stage=stage, backend=cell.backend, reason="; ".join(reasons)))
        if baseline not in works:
            why = next((row.reason for row in refused if row.backend == baseline), "it is not asked for")
            raise UsageError(f"the baseline {baseline} does not run at stage {stage}: {why}")
        calls = {
            name: (made.call, device.flush if cell.l2 == "cold" else made.before)
            for name, (cell, made) in works.items()
        }
        times = contest(calls, device, rounds=rounds)
        found += [_row(stage, name, times[name], times[baseline]) for name in times] + refused
        del works, calls
        gc.collect()
    return found


def contest(
    calls: Mapping[str, tuple[Callable[[], Any], Callable[[], Any] | None]],
    device: Device,
    *,
    rounds: int,
) -> dict[str, list[float]]:
    """Times of every call in milliseconds, round by round.

    Args:
        calls: By name, what is timed and what runs before it untimed.
        device: Takes the times.
        rounds: How many.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(_WARM_UP + rounds):
        for name, (call, before) in calls.items():
            if before is not None:
                before()
            sample = device.time(call)
            if number >= _WARM_UP:
                times[name].append(sample.device_ms)
    return times


def _row(stage: int, name: str, own: Sequence[float], base: Sequence[float]) -> StageRow:
    ratio, interval = paired_ratio(base, own)
    return StageRow(stage=stage, backend=name, median_ms=median(own), ratio=ratio, ratio_interval=interval)


def table(rows: Sequence[StageRow], baseline: str) -> str:
    """One line per row; the fastest of every stage is marked."""
    lines = [f"{'stage':6}{'backend':16}{'median ms':>10}{'x ' + baseline:>11}  95 %"]
    for row in rows:
        if row.median_ms is None or row.ratio is None or row.ratio_interval is None:
            lines.append(f"{row.stage:<6}{row.backend:16}not here: {row.reason}")
            continue
        best = max(other.ratio or 0.0 for other in rows if other.stage == row.stage)
        name = f"{row.backend} *" if row.ratio == best else row.backend
        low, high = row.ratio_interval
        lines.append(
            f"{row.stage:<6}{name:16}{row.median_ms:>10.3f}{row.ratio:>10.2f}x  {low:.2f} to {high:.2f}"
        )
    return "\n".join(lines)


@click.command()
@click.option("--model", default="biformer_tiny", show_default=True, help="A published model.")
@click.option("--task", default="classification", show_default=True, help="Sets S; see bratune list tasks.")
@click.option("--res", default="224", show_default=True, help="Image size, 512 or 800x1333.")
@click.option("-b", "--batch-size", default=1, show_default=True, help="Images.")
@click.option("--dtype", default=None, help="As profile, by default.")
@click.option("--direction", default="fwd", type=click.Choice(["fwd", "fwd-bwd"]), show_default=True)
@click.option("--backend", "backends", multiple=True, help="Only this backend; repeatable.")
@click.option("--baseline", default="gather", show_default=True, help="Whom the others are compared with.")
@click.option("--stage", "stages", type=int, multiple=True, help="Only this stage; repeatable.")
@click.option("--rounds", default=200, show_default=True, help="Times that every backend runs.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def main(
    model: str,
    task: str,
    res: str,
    batch_size: int,
    dtype: str | None,
    direction: str,
    backends: tuple[str, ...],
    baseline: str,
    stages: tuple[int, ...],
    rounds: int,
    device: str,
) -> None:
    """Time the backends of every stage in turn; ratios within rounds."""
    from bratune.machine import detect
    from bratune.measure.meter import device_for
    from bratune.variant import parse_resolution
    from bratune.work.request import make_request

    machine = detect(device)
    request = make_request(
        machine,
        models=(model,),
        task=task,
        image=parse_resolution(res),
        batches=(batch_size,),
        dtype=dtype,
        direction=direction,
        backends=tuple(dict.fromkeys((baseline, *backends))) if backends else (),
        whole_model=False,
    )
    rows = stage_rows(request, machine, device_for(machine), baseline=baseline, stages=stages, rounds=rounds)
    click.echo(str(machine))
    click.echo(
        f"{model} · {task} · {res} · batch {batch_size} · {request.dtype} · {direction} · {rounds} rounds"
    )
    click.echo(table(rows, baseline))


if __name__ == "__main__":
    main()
