"""Whole models side by side: the published composition, a backend everywhere, and the runtime.

    $ python -m bratune.profile.whole_model --model biformer_tiny --res 224 -b 1
    $ python -m bratune.profile.whole_model -b 4 --direction fwd-bwd
    $ python -m bratune.profile.whole_model --compile --peers swin_tiny,convnext_tiny

All contenders share weights and images, give equal outputs before anything is timed, and are timed in
turn, so that what happens to the machine happens to all of them. A ratio is the median over rounds of the
ratio within a round, with its distribution-free 95 % interval. Models of timm (``--peers``) take
their turns too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from bratune.errors import MeasureError
from bratune.measure.statistics import median, paired_ratio

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bratune.kernels.backbone import Backbone

__all__ = ["CLOCKS", "Contest", "Row", "contenders", "contest", "difference_limit", "with_compiled"]

# ``cpu`` counts the time that this process computed, which other processes on a shared machine do not change
# much; it is the sum over threads, so that it is latency with one thread alone.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# What the twin of a contender is called that `torch.compile` has made.
COMPILED = ", compiled"
# On max|a - b| / max|b| of the outputs, by data type.
AGREE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender.

    Attributes:
        name: What ran.
        operations: Dispatched operations of a forward pass; None where they cannot be counted, as in what
            a compiler or a graph has made.
        megabytes: What they read and write at two bytes per number, weights included, in MB; None likewise.
        median_ms: Median time of a batch.
        ratio: How many times faster than the baseline, the median over rounds.
        ratio_interval: Its 95 % interval.
        difference: Largest difference of its output from the baseline's, over the largest number; None of
            another model.
    """

    name: str
    operations: int | None
    megabytes: float | None
    median_ms: float
    ratio: float
    ratio_interval: tuple[float, float]
    difference: float | None


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All contenders in the same run; the first row is the baseline."""

    rows: tuple[Row, ...]
    rounds: int

    def table(self) -> str:
        """One line per contender."""
        lines = [f"{'contender':24}{'ops':>6}{'MB/batch':>10}{'median ms':>11}{'x baseline':>12}  95 %"]
        for row in self.rows:
            operations = "-" if row.operations is None else str(row.operations)
            moved = "-" if row.megabytes is None else f"{row.megabytes:.0f}"
            low, high = row.ratio_interval
            lines.append(
                f"{row.name:24}{operations:>6}{moved:>10}{row.median_ms:>11.2f}{row.ratio:>11.2f}x"
                f"  {low:.2f} to {high:.2f}"
            )
        return "\n".join(lines)


def contenders(model: Backbone, images: Tensor, *, direction: str = "fwd") -> dict[str, nn.Module]:
    """What there is to compare of a model, the baseline first.

    Args:
        model: In evaluation, with backend ``auto``; its weights are shared.
        images: A batch; on CUDA, graphs are captured for it.
        direction: ``fwd``, or ``fwd-bwd`` for a training step without the optimizer's.

    Returns:
        ``published`` (the official sequence of operations, for models that have one), ``gather`` (this
        package's layers with the published attention), ``auto`` (with the preferred backend). Then for
        ``fwd``, ``runtime`` (`bratune.kernels.runtime`) and, on CUDA, ``runtime, graph``; for ``fwd-bwd``,
        ``lean`` (`Backbone.set_lean`).
    """
    from bratune.kernels.biformer import BiFormer
    from bratune.kernels.published import as_published
    from bratune.kernels.runtime import optimize

    found: dict[str, nn.Module] = {}
    if isinstance(model, BiFormer) and not model.auto_pad:
        found["published"] = as_published(model)
    gather = copy.deepcopy(model)
    gather.set_backend("gather")
    found |= {"gather": gather, "auto": model}
    if direction == "fwd-bwd":
        lean = copy.deepcopy(model)
        lean.set_lean()
        return {name: form.train() for name, form in {**found, "lean": lean}.items()}
    found["runtime"] = optimize(model)
    if images.is_cuda:
        found["runtime, graph"] = optimize(model, graph_input=images)
    return found


def with_compiled(models: Mapping[str, nn.Module], model: Backbone | None = None) -> dict[str, nn.Module]:
    """Every contender, each followed by what `torch.compile` makes of it for one shape.

    Args:
        models: By name. A captured graph has no twin: what it replays can be compiled before.
        model: The model whose ``runtime`` is among them: that one is compiled unpacked, as the runtime
            itself does it.
    """
    import torch

    from bratune.kernels.runtime import GraphRunner, optimize

    found: dict[str, nn.Module] = {}
    for name, form in models.items():
        found[name] = form
        if name == "runtime" and model is not None:
            found[name + COMPILED] = optimize(model, compile=True)
        elif not isinstance(form, GraphRunner):
            twin: Any = torch.compile(form, dynamic=False)
            found[name + COMPILED] = twin
    return found


def contest(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    rounds: int = 30,
    clock: Callable[[], float] | None = None,
    direction: str = "fwd",
    rivals: Mapping[str, nn.Module] | None = None,
) -> Contest:
    """Check that contenders agree, count what they do, and time them in turn.

    Args:
        models: By name, the baseline first.
        images: A batch.
        rounds: Times that everyone runs.
        clock: Seconds; by default the wall clock.
        direction: ``fwd``, or ``fwd-bwd``: then what must agree are the gradients of the images.
        rivals: Other models, timed in the same rounds; their outputs are their own.

    Raises:
        MeasureError: an output differs from the baseline's by more than the data type allows.
    """
    import torch

    clock = clock or CLOCKS["wall"]
    baseline = next(iter(models))
    step = _trained if direction == "fwd-bwd" else _inferred
    with torch.set_grad_enabled(direction == "fwd-bwd"):
        outputs = {name: _flat(step(model, images)) for name, model in models.items()}
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
        everyone = {**models, **(rivals or {})}
        for rival in (rivals or {}).values():
            step(rival, images)
        times: dict[str, list[float]] = {name: [] for name in everyone}
        for _ in range(rounds):
            for name, model in everyone.items():
                times[name].append(_timed(step, model, images, clock))
    rows = []
    for name, model in everyone.items():
        ratio, interval = paired_ratio(times[baseline], times[name])
        uncounted = name.endswith(COMPILED)
        operations, megabytes = (None, None) if uncounted else _counted(step, model, images, direction)
        rows.append(
            Row(
                name=name,
                operations=operations,
                megabytes=megabytes,
                median_ms=median(times[name]) * 1e3,
                ratio=ratio,
                ratio_interval=interval,
                difference=differences.get(name),
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


def _inferred(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def _trained(model: nn.Module, images: Tensor) -> Any:
    """The gradient of the images, after one of every parameter has been written."""
    import torch

    for parameter in model.parameters():
        parameter.grad = None
    images = images.detach().requires_grad_()
    scores = model(images)
    parts = scores if isinstance(scores, tuple) else (scores,)
    torch.autograd.backward([part.float().square().mean() for part in parts])
    return images.grad


def _timed(
    step: Callable[[nn.Module, Tensor], Any], model: nn.Module, images: Tensor, clock: Callable[[], float]
) -> float:
    import torch

    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    start = clock()
    step(model, images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return clock() - start


def _counted(
    step: Callable[[nn.Module, Tensor], Any], model: nn.Module, images: Tensor, direction: str
) -> tuple[int | None, float | None]:
    """Operations and MB; a captured graph dispatches nothing that could be counted."""
    from bratune.kernels.accounting import count
    from bratune.kernels.runtime import GraphRunner

    if isinstance(model, GraphRunner):
        return None, None
    account = count(lambda: step(model, images), weights=model, gradients=direction == "fwd-bwd")
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
@click.option("--direction", default="fwd", type=click.Choice(["fwd", "fwd-bwd"]), show_default=True)
@click.option("--peers", default="", help="Models of timm in the same rounds, e.g. swin_tiny,deit_small.")
@click.option(
    "--compile", "compile_", is_flag=True, help="Time every contender compiled, too; takes minutes."
)
@click.option("--threads", default=0, help="CPU threads; 0 leaves them as they are.")
@click.option("--clock", default="wall", type=click.Choice(list(CLOCKS)), show_default=True)
def main(
    model: str,
    res: str,
    batch_size: int,
    dtype: str,
    device: str,
    rounds: int,
    direction: str,
    peers: str,
    compile_: bool,
    threads: int,
    clock: str,
) -> None:
    """Time a whole model as published, by backend, and in the runtime (or lean), side by side."""
    import torch

    from bratune.kernels.biformer import build
    from bratune.machine import detect
    from bratune.profile.peers import timm_model
    from bratune.variant import parse_resolution

    if threads:
        torch.set_num_threads(threads)
    machine = detect(device)
    torch.manual_seed(0)
    network = build(model).eval().to(machine.device, getattr(torch, dtype))
    images = torch.randn(
        batch_size, 3, *parse_resolution(res), device=machine.device, dtype=getattr(torch, dtype)
    )
    forms = contenders(network, images, direction=direction)
    rivals: dict[str, nn.Module] = {}
    for name in filter(None, peers.split(",")):
        rival: Any = timm_model(name, parse_resolution(res))
        rivals[name] = rival.to(machine.device, getattr(torch, dtype)).train(direction == "fwd-bwd")
    if compile_:
        forms, rivals = with_compiled(forms, network), with_compiled(rivals)
    found = contest(forms, images, rounds=rounds, clock=CLOCKS[clock], direction=direction, rivals=rivals)
    click.echo(str(machine))
    click.echo(
        f"{model} · {res} · batch {batch_size} · {dtype} · {direction} · {clock} clock · {rounds} rounds"
    )
    click.echo(found.table())


if __name__ == "__main__":
    main()
