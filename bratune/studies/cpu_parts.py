"""Where the time of the runtime goes on a CPU, part by part, beside what the machine could do.

``python -m bratune.studies cpu-parts`` runs a model made ready for inference with and without the C kernels,
in turn, with a clock around every part of every block. The floor of a part is the larger of its multiply-adds
at the processor's peak and its bytes at the speed of a copy, both measured here first. Parts are timed one by
one, in the thread that calls them, so that their sum is the time of the blocks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch
from torch import Tensor, nn

from bratune.kernels.biformer import biformer_small, biformer_stl, biformer_tiny
from bratune.kernels.native import block
from bratune.kernels.runtime import FastBlock, FastModel
from bratune.tables import Table, to_text

__all__ = ["Clock", "command", "copy_gb_s", "peak_gflop_s", "table"]

MODELS = {"biformer_tiny": biformer_tiny, "biformer_small": biformer_small, "biformer_stl": biformer_stl}
ATTENTION = "attention, routing and views"


class Clock:
    """Seconds, multiply-adds and bytes per part of a runtime, of every pass since `reset`."""

    def __init__(self, model: FastModel) -> None:
        self.reset()
        for module in model.stages.modules():
            if isinstance(module, FastBlock):
                for part, owner, method in _parts(module):
                    setattr(owner, method, self._timed(part, getattr(owner, method)))

    def reset(self) -> None:
        """Forget what was seen."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.macs: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        self._inside: list[float] = []

    def _timed(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            out = run(*args, **kwargs)
            spent = time.perf_counter() - start
            within = self._inside.pop()
            self.seconds[part] += spent - within  # what its own parts took is theirs
            if self._inside:
                self._inside[-1] += spent
            self._count(part, run, args, out)
            return out

        return timed

    def _count(self, part: str, run: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
        made = out[0] if isinstance(out, tuple) else out
        read = sum(x.numel() * x.element_size() for x in args if isinstance(x, Tensor))
        self.bytes[part] += read + made.numel() * made.element_size()
        owner: Any = getattr(run, "__self__", None)
        if part == ATTENTION:
            batch, height, width, channels = args[0].shape
            routed = getattr(owner, "source", None)
            share = 1.0 if routed is None else routed.topk / routed.n_win**2  # of all tokens, a query's keys
            self.macs[part] += int(2 * batch * (height * width) ** 2 * share * channels)
        weight = getattr(owner, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            self.macs[part] += made.numel() // made.shape[-1] * weight.numel()


def _parts(block: FastBlock) -> Iterator[tuple[str, Any, str]]:
    """Name, owner and method of what a block calls."""
    attn: Any = block.attn
    yield "norms", block.norm1, "forward"
    yield "norms", block.norm2, "forward"
    yield "mlp", block.widen, "gelu"
    yield "mlp", block.narrow, "add"
    yield ATTENTION, attn, "forward"
    for name, part, methods in (
        ("position embedding", block.pos_embed, ("forward",)),
        ("qkv", getattr(attn, "qkv", None), ("forward",)),
        ("LePE", getattr(attn, "lepe", None), ("add",)),
        ("projection and residual", getattr(attn, "proj", None), ("add",)),
    ):
        for method in methods if part is not None else ():
            yield name, part, method


def peak_gflop_s(dtype: torch.dtype) -> float:
    """What a product of two 1024x1024 matrices reaches, in 10^9 operations per second; best of sixty."""
    a = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / _best(lambda: a @ a) / 1e9


def copy_gb_s() -> float:
    """What a copy of 16 MB reaches, read and written, in GB per second; best of sixty."""
    a = torch.randn(4 * 2**20)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / _best(lambda: b.copy_(a)) / 1e9


def _best(run: Callable[[], Any]) -> float:
    found = []
    for _ in range(60):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def table(model: nn.Module, x: Tensor, rounds: int, *, peak: float, copy: float) -> Table:
    """A row per part: milliseconds per pass without and with the C kernels, its floor, and how far it is.

    Args:
        model: In evaluation, on the CPU.
        x: A batch of images.
        rounds: Passes of each, in turn; a part's time is the least of them.
        peak: 10^9 operations per second.
        copy: GB per second.
    """
    runners = [FastModel(model, native=native) for native in (False, True)]  # type: ignore[arg-type]
    clocks = [Clock(runner) for runner in runners]
    best: list[dict[str, float]] = [{}, {}]
    with torch.inference_mode():
        for _ in range(rounds):
            for runner, clock, least in zip(runners, clocks, best, strict=True):
                clock.reset()
                runner(x)
                for part, seconds in clock.seconds.items():
                    least[part] = min(least.get(part, seconds), seconds)
    rows, sums = [], [0.0, 0.0, 0.0]
    for part in sorted(best[0], key=lambda name: -best[0][name]):
        floor = max(2 * clocks[0].macs[part] / peak / 1e9, clocks[0].bytes[part] / copy / 1e9)
        times = (best[0][part], best[1][part], floor)
        sums = [a + b for a, b in zip(sums, times, strict=True)]
        rows.append(_row(part, *times))
    rows.append(_row("all blocks", *sums))
    return Table(("<part", "plain ms", "native ms", "floor ms", "native / floor"), tuple(rows))


def _row(part: str, plain: float, native: float, floor: float) -> tuple[str, ...]:
    return part, f"{1e3 * plain:.2f}", f"{1e3 * native:.2f}", f"{1e3 * floor:.2f}", f"{native / floor:.1f}"


@click.command("cpu-parts")
@click.option("--model", type=click.Choice(sorted(MODELS)), default="biformer_tiny", show_default=True)
@click.option("--res", type=click.IntRange(min=32), default=224, show_default=True)
@click.option("-b", "--batch-size", "batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True)
def command(model: str, res: int, batch: int, dtype: str, threads: int, rounds: int) -> None:
    """Print the time of every part of a block on this CPU, beside its floor."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    made = MODELS[model]().eval().to(kind)
    if not block.can_run(next(made.parameters())):
        raise click.ClickException("the C kernels cannot run here; bratune doctor says why")
    x = torch.randn(batch, 3, res, res).to(kind)
    peak, copy = peak_gflop_s(kind), copy_gb_s()
    click.echo(f"{model} · {res} · batch {batch} · {dtype} · {threads} threads · least of {rounds} rounds")
    click.echo(f"peak {peak:.0f} GFLOP/s · copy {copy:.0f} GB/s")
    click.echo(to_text(table(made, x, rounds, peak=peak, copy=copy)))
