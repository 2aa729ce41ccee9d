"""Where the time of the runtime goes on a CPU, part by part, beside what the machine could do.

``python -m bratune.studies cpu-parts`` runs a model made ready for inference with and without the C kernels,
in turn. Without them a clock stands around every part of every block; with them a block is one call, which
says itself what its parts took. The floor of a part is the larger of its multiply-adds at the processor's
peak and the bytes that it must read and write, maps and weights, at the speed of a copy, both measured here
first: hidden channels, scores and gathered keys need not be written.
"""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click
import torch
from torch import Tensor, nn

from bratune.kernels.biformer import biformer_small, biformer_stl, biformer_tiny
from bratune.kernels.native import block
from bratune.kernels.native.whole import PARTS
from bratune.kernels.runtime import FastBlock, FastModel
from bratune.tables import Table, to_text

__all__ = ["Clock", "command", "copy_gb_s", "floors", "peak_gflop_s", "table"]

MODELS = {"biformer_tiny": biformer_tiny, "biformer_small": biformer_small, "biformer_stl": biformer_stl}
POSITION, QKV, ROUTING, ATTENTION, LEPE, PROJECTION, MLP = PARTS
FULL = "attention everywhere"
REST = "stem, downsampling, head, host"


class Clock:
    """Seconds per part of a runtime, of every pass since `reset`.

    A part of a block that is one call is what the call says of it; of other blocks, what its method takes.
    """

    def __init__(self, model: FastModel) -> None:
        self.blocks = [module for module in model.stages.modules() if isinstance(module, FastBlock)]
        self.shapes: dict[FastBlock, torch.Size] = {}
        self.reset()
        for inside in self.blocks:
            inside.register_forward_pre_hook(lambda of, args: self.shapes.update({of: args[0].shape}))
            for part, owner, method in _parts(inside):
                setattr(owner, method, self._timed(part, getattr(owner, method)))

    def reset(self) -> None:
        """Forget what was seen."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []
        for inside in self.blocks:
            inside.at_once.seconds = (ctypes.c_double * len(PARTS))()

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds per part."""
        found = dict(self._seconds)
        for inside in self.blocks:
            for part, spent in zip(PARTS, inside.at_once.seconds or (), strict=False):
                if spent:
                    name = FULL if part == ATTENTION and _routed(inside) is None else part
                    found[name] = found.get(name, 0.0) + spent
        return found

    def _timed(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            out = run(*args, **kwargs)
            spent = time.perf_counter() - start
            within = self._inside.pop()
            self._seconds[part] += spent - within  # what its own parts took is theirs
            if self._inside:
                self._inside[-1] += spent
            return out

        return timed


def _routed(inside: FastBlock) -> Any:
    """What says how a block routes; None where it attends everywhere."""
    return getattr(inside.attn, "source", None)


def _parts(inside: FastBlock) -> Iterator[tuple[str, Any, str]]:
    """Name, owner and method of what a block calls where it is no call itself."""
    attn: Any = inside.attn
    yield QKV, inside.norm1, "forward"
    yield MLP, inside.norm2, "forward"
    yield MLP, inside.widen, "gelu"
    yield MLP, inside.narrow, "add"
    yield (FULL if _routed(inside) is None else ATTENTION), attn, "forward"
    for name, part, method in (
        (POSITION, inside.pos_embed, "forward"),
        (QKV, getattr(attn, "qkv", None), "forward"),
        (LEPE, getattr(attn, "lepe", None), "add"),
        (PROJECTION, getattr(attn, "proj", None), "add"),
    ):
        if part is not None:
            yield name, part, method


def floors(inside: FastBlock, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Multiply-adds, and numbers read and written at least, of every part of a block.

    Args:
        inside: The block.
        shape: Of its map, ``[B, H, W, C]``.
    """
    batch, height, width, channels = shape
    tokens, attn, source = batch * height * width, inside.attn, _routed(inside)
    one = tokens * channels
    keys = height * width
    if source is not None:
        keys = keys * source.topk // source.n_win**2
    qkv, proj = attn.qkv.weight.numel(), attn.proj.weight.numel()  # type: ignore[union-attr, operator]
    mlp = inside.widen.weight.numel() + inside.narrow.weight.numel()
    found = {
        QKV: (tokens * qkv, 4 * one + qkv),
        FULL if source is None else ATTENTION: (2 * one * keys, 4 * one),
        PROJECTION: (tokens * proj, 3 * one + proj),
        MLP: (tokens * mlp, 2 * one + mlp),
    }
    if source is not None:
        found[ROUTING] = (0, 2 * one)
    if inside.pos_embed is not None:
        found[POSITION] = (one * inside.pos_embed.weight[0].numel(), 2 * one)
    if attn.lepe is not None:
        found[LEPE] = (one * attn.lepe.weight[0].numel(), 3 * one)  # type: ignore[union-attr, index]
    return found


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
                start = time.perf_counter()
                runner(x)
                whole = time.perf_counter() - start
                seconds = dict(clock.seconds)
                for part, spent in (seconds | {REST: whole - sum(seconds.values()), "": whole}).items():
                    least[part] = min(least.get(part, spent), spent)
    lowest: dict[str, float] = defaultdict(float)
    for inside, shape in clocks[0].shapes.items():
        for part, (macs, numbers) in floors(inside, shape).items():
            lowest[part] += max(2 * macs / peak / 1e9, numbers * x.element_size() / copy / 1e9)
    plain, native = best
    rows = [
        _row(part, plain.get(part), native.get(part), lowest[part])
        for part in sorted(lowest, key=lambda name: -native.get(name, plain.get(name, 0.0)))
    ]
    rows.append(_row(REST, plain[REST], native[REST], None))
    rows.append(_row("whole model", plain[""], native[""], None))
    return Table(("<part", "plain ms", "native ms", "floor ms", "native / floor"), tuple(rows))


def _row(part: str, plain: float | None, native: float | None, floor: float | None) -> tuple[str, ...]:
    times = tuple("-" if t is None else f"{1e3 * t:.2f}" for t in (plain, native, floor))
    return part, *times, f"{native / floor:.1f}" if native and floor else "-"


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
    click.echo("Without the C kernels, attention has the routing in it.")
