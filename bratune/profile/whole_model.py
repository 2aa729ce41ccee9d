"""Whole models side by side: the published composition, a backend everywhere, and the runtime.

    $ python -m bratune.profile.whole_model --model biformer_tiny --res 224 -b 1

All contenders share weights and images, give equal outputs before anything is timed, and are timed in
turn, so that what happens to the machine happens to all of them. A ratio is the median over rounds of the
ratio within a round, with its distribution-free 95 % interval.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from bratune.errors import MeasureError
from bratune.measure.statistics import median, median_interval

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bratune.kernels.backbone import Backbone

__all__ = ["CLOCKS", "Contest", "Row", "contenders", "contest", "difference_limit"]

# ``cpu`` counts the time that this process computed, which other processes on a shared machine do not change
# much; it is the sum over threads, so that it is latency with one thread alone.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# On max|a - b| / max|b| of the outputs, by data type.
AGREE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender.

    Attributes:
        name: What ran.
        operations: Dispatched operations of a forward pass; None where they cannot be counted.
        megabytes: What they read and write at two bytes per number, weights included, in MB; None likewise.
        median_ms: Median time of a batch.
        ratio: How many times faster than the baseline, the median over rounds.
        ratio_interval: Its 95 % interval.
        difference: Largest difference of its output from the baseline's, over the largest number.
    """

    name: str
    operations: int | None
    megabytes: float | None
    median_ms: float
    ratio: float
    ratio_interval: tuple[float, float]
    difference: float


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All contenders in the same run; the first row is the baseline."""

    rows: tuple[Row, ...]
    rounds: int

    def table(self) -> str:
        """One line per contender."""
        lines = [f"{'contender':20}{'ops':>6}{'MB/batch':>10}{'median ms':>11}{'x baseline':>12}  95 %"]
        for row in self.rows:
            operations = "-" if row.operations is None else str(row.operations)
            moved = "-" if row.megabytes is None else f"{row.megabytes:.0f}"
            low, high = row.ratio_interval
            lines.append(
                f"{row.name:20}{operations:>6}{moved:>10}{row.median_ms:>11.2f}{row.ratio:>11.2f}x"
                f"  {low:.2f} to {high:.2f}"
            )
        return "\n".join(lines)


def contenders(model: Backbone, images: Tensor) -> dict[str, nn.Module]:
    """What there is to compare of a model, the baseline first.

    Args:
        model: In evaluation, with backend ``auto``; its weights are shared.
        images: A batch; on CUDA, graphs are captured for it.

    Returns:
        ``published`` (the official sequence of operations, for models that have one), ``gather`` (this
        package's layers with the published attention), ``auto`` (with the preferred backend), ``runtime``
        (`bratune.kernels.runtime`) and, on CUDA, ``runtime, graph``.
    """
    from bratune.kernels.biformer import BiFormer
    from bratune.kernels.published import as_published
    from bratune.kernels.runtime import optimize

    found: dict[str, nn.Module] = {}
    if isinstance(model, BiFormer) and not model.auto_pad:
        found["published"] = as_published(model)
    gather = copy.deepcopy(model)
    gather.set_backend("gather")
    found |= {"gather": gather, "auto": model, "runtime": optimize(model)}
    if images.is_cuda:
        found["runtime, graph"] = optimize(model, graph_input=images)
    return found


def contest(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    rounds: int = 30,
    clock: Callable[[], float] | None = None,
) -> Contest:
    """Check that contenders agree, count what they do, and time them in turn.

    Args:
        models: By name, the baseline first.
        images: A batch.
        rounds: Times that everyone runs.
        clock: Seconds; by default the wall clock.

    Raises:
        MeasureError: an output differs from the baseline's by more than the data type allows.
    """
    import torch

    clock = clock or CLOCKS["wall"]
    baseline = next(iter(models))
    with torch.no_grad():
        outputs = {name: _flat(model(images)) for name, model in models.items()}
        differences = {
            name: float((out - outputs[baseline]).abs().max() / outputs[baseline].abs().max())
            for name, out in outputs.items()
        }
        limit = AGREE[str(images.dtype).removeprefix("torch.")]
        for name, difference in differences.items():
            if not difference <= limit:
                raise MeasureError(
                    f"{name} differs from {baseline} by {difference:.1e} of the largest output; "
                    f"{limit:.0e} would pass"
                )
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, model in models.items():
                times[name].append(_timed(model, images, clock))
    rows = []
    for name, model in models.items():
        ratios = sorted(base / own for base, own in zip(times[baseline], times[name], strict=True))
        operations, megabytes = _counted(model, images)
        rows.append(
            Row(
                name=name,
                operations=operations,
                megabytes=megabytes,
                median_ms=median(times[name]) * 1e3,
                ratio=median(ratios),
                ratio_interval=median_interval(ratios),
                difference=differences[name],
            )
        )
    return Contest(rows=tuple(rows), rounds=rounds)


def difference_limit(
    found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]
) -> tuple[float, float]:
    """How far a model's outputs are from another's, over the largest, and how far its data type allows."""
    a, b = _flat(found), _flat(expected)
    first = expected[0] if isinstance(expected, tuple) else expected
    limit = AGREE[str(first.dtype).removeprefix("torch.")]
    return float((a - b).abs().max() / b.abs().max()), limit


def _timed(model: nn.Module, images: Tensor, clock: Callable[[], float]) -> float:
    import torch

    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    start = clock()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return clock() - start


def _counted(model: nn.Module, images: Tensor) -> tuple[int | None, float | None]:
    """Operations and MB; a captured graph dispatches nothing that could be counted."""
    from bratune.kernels.accounting import count
    from bratune.kernels.runtime import GraphRunner

    if isinstance(model, GraphRunner):
        return None, None
    account = count(lambda: model(images), weights=model)
    return account.operations, account.total_bytes / 1e6


def _flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    import torch

    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.flatten().double() for part in parts])


@click.command()
@click.option("--model", default="biformer_tiny", show_default=True, help="A published model.")
@click.option("--res", default="224", show_default=True, help="Image size, 512 or 800x1333.")
@click.option("-b", "--batch-size", default=1, show_default=True, help="Images.")
@click.option("--dtype", default="float32", type=click.Choice(list(AGREE)), show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--rounds", default=30, show_default=True, help="Times that every contender runs.")
@click.option("--threads", default=0, help="CPU threads; 0 leaves them as they are.")
@click.option("--clock", default="wall", type=click.Choice(list(CLOCKS)), show_default=True)
def main(
    model: str, res: str, batch_size: int, dtype: str, device: str, rounds: int, threads: int, clock: str
) -> None:
    """Time a whole model as published, by backend, and in the runtime, side by side."""
    import torch

    from bratune.kernels.biformer import build
    from bratune.machine import detect
    from bratune.variant import parse_resolution

    if threads:
        torch.set_num_threads(threads)
    machine = detect(device)
    torch.manual_seed(0)
    network = build(model).eval().to(machine.device, getattr(torch, dtype))
    images = torch.randn(
        batch_size, 3, *parse_resolution(res), device=machine.device, dtype=getattr(torch, dtype)
    )
    found = contest(contenders(network, images), images, rounds=rounds, clock=CLOCKS[clock])
    click.echo(str(machine))
    click.echo(f"{model} · {res} · batch {batch_size} · {dtype} · fwd · {clock} clock · {rounds} rounds")
    click.echo(found.table())


if __name__ == "__main__":
    main()
