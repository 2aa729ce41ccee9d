"""Mixers: the modules and the check of a cell whose form is ``mixer``.

Mixers of one layout are measured in its places. As some take turns between two forms from block to block,
what is measured of a stage are its first two blocks: their attentions alone (the part ``mixer``), or both
blocks one after the other (``block``); and the network of one mixer throughout (``model``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.cell import Cell
from bratune.kernels import registry as backends
from bratune.kernels.mixers import registry
from bratune.kernels.mixers.mixer import Place
from bratune.kernels.mixers.network import MixerBlock, MixerNetwork, places
from bratune.kernels.mixers.whole import problem_at
from bratune.machine import Machine
from bratune.measure.gate import TOLERANCES
from bratune.problem import ITEM_BYTES
from bratune.variant import get_task, get_variant
from bratune.work.forms import AGREE

__all__ = [
    "PAIR",
    "difference",
    "mixer_macs",
    "mixer_modules",
    "network_for",
    "normalised",
    "obstacles",
    "pair_for",
    "places_of",
    "reaching",
]

# Blocks that are measured together: mixers that take turns have two forms.
PAIR = 2
# Tokens of a map at which a module is compared with its definition, and images of a batch.
CHECKED_TOKENS, CHECKED_IMAGES = 48, 2
# Gradients below this share of the largest are compared with that: some are zero but for rounding.
SMALL_GRADIENT = 1e-3


def places_of(cell: Cell) -> tuple[Place, ...]:
    """Where mixers stand in a cell: every block of a model, or the first two of the cell's stage."""
    found = places(
        *cell.image,
        layout=get_variant(cell.model),
        n_win=int(cell.n_win.split(",")[0]),
        batch=cell.problem.batch,
        item_bytes=ITEM_BYTES[cell.problem.dtype],
    )
    return found if cell.part == "model" else tuple(p for p in found if p.stage == cell.stage)[:PAIR]


def obstacles(cell: Cell, machine: Machine) -> tuple[str, ...]:
    """Every reason of the cell's mixer against its places, and of the backend that it names; empty: none."""
    kind = registry.get(cell.backend)
    _, _, backend = cell.backend.partition(":")
    found = []
    for place in places_of(cell):
        reasons = list(kind.why_not(place))
        problem = problem_at(place, cell.problem) if backend not in ("", "auto") else None
        if not reasons and problem is not None:
            reasons += backends.get(backend).why_not(problem, machine)
        found += [f"stage {place.stage}: {reason}" for reason in reasons]
    return tuple(dict.fromkeys(found))


def mixer_macs(cell: Cell) -> int:
    """Multiply-adds of a forward pass of a cell: those of its attentions, with MLPs unless it is alone."""
    kind, variant = registry.get(cell.backend), get_variant(cell.model)
    total = sum(kind.macs(place) for place in places_of(cell))
    if cell.part == "mixer":
        return total
    batch = cell.problem.batch
    total += sum(2 * variant.mlp_ratio * p.dim**2 * p.tokens * batch for p in places_of(cell))
    if cell.part == "model":
        before = 0
        for place in (place for place in places_of(cell) if place.block == 0):
            total += batch * place.tokens * place.dim * (4 * before or 16 * 3)
            before = place.dim
    return total


def mixer_modules(name: str) -> tuple[str, ...]:
    """Names of the modules that compute a mixer in its network: what a row is reused by."""
    return ("bratune.kernels.mixers.network", registry.module_of(name))


def network_for(cell: Cell, device: str) -> MixerNetwork:
    """The network of one mixer, its weights seeded, on the device."""
    with _seeded(cell):
        model = MixerNetwork(
            registry.get(cell.backend),
            *cell.image,
            layout=get_variant(cell.model),
            n_win=int(cell.n_win.split(",")[0]),
            features_only=bool(cell.task) and get_task(cell.task).features_only,
        )
    made = model.to(device=device, dtype=_dtype(cell))
    if cell.layout == "nhwc":
        nn.Module.to(made, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    return made.train(cell.problem.backward)


def pair_for(cell: Cell, device: str) -> nn.Sequential:
    """The first two blocks of a stage, their weights seeded, on the device."""
    kind, variant = registry.get(cell.backend), get_variant(cell.model)
    with _seeded(cell):
        blocks = [MixerBlock(kind, place, mlp_ratio=variant.mlp_ratio) for place in places_of(cell)]
    return nn.Sequential(*blocks).to(device=device, dtype=_dtype(cell)).eval()


def difference(cell: Cell, reached: Sequence[tuple[nn.Module, Tensor]]) -> tuple[float, float]:
    """How far attentions are from their definitions, and how far the data type allows.

    Each is compared at some tokens of its map: its output and, where the cell asks for gradients, those that
    these tokens give of the map and of every weight. An error is relative to the largest number.

    Args:
        cell: Whose attentions they are.
        reached: Modules and the maps that reach them; see `reaching`.
    """
    routed = cell.backend.partition(":")[0] == registry.ROUTED
    limit = AGREE[cell.problem.dtype] if routed else TOLERANCES[cell.problem.dtype].gradient
    return max(_apart(cell, attention, x) for attention, x in reached), limit


def reaching(module: nn.Module, call: Callable[[], Any]) -> list[tuple[nn.Module, Tensor]]:
    """The attentions of the first two blocks of each stage, each with the map that reaches it in a call.

    Args:
        module: A `MixerNetwork`, or the blocks of one stage.
        call: Runs the module.
    """
    caught: list[tuple[nn.Module, Tensor]] = []

    def keep(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append((attention, inputs[0].detach()))

    stages: Any = getattr(module, "stages", [module])
    blocks = [block for stage in stages for block in list(getattr(stage, "blocks", stage))[:PAIR]]
    handles = [block.attn.register_forward_pre_hook(keep) for block in blocks]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _apart(cell: Cell, module: nn.Module, x: Tensor) -> float:
    """The largest relative error of a module on a map, at `CHECKED_TOKENS` of its tokens."""
    backward, kind = cell.problem.backward, registry.get(cell.backend)
    tokens = x.shape[1] * x.shape[2]
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))[:CHECKED_TOKENS]
    at = torch.tensor(sorted({0, tokens - 1, *drawn.tolist()}), device=x.device)
    images = sorted({0, len(x) - 1})[:CHECKED_IMAGES]
    definition = kind.definition(module)
    leaf, exact = (t.detach().clone().requires_grad_(backward) for t in (x, x[images]))
    device = x.device.type
    with torch.set_grad_enabled(backward):
        with torch.autocast(device, dtype=getattr(torch, cell.problem.dtype), enabled=cell.amp):
            found = module(leaf).flatten(1, 2)[images][:, at]
        expected = definition(exact, at)
    worst = _relative(found, expected)
    if not backward:
        return worst
    signs = torch.randint(0, 2, found.shape, generator=torch.Generator().manual_seed(1)).to(found) * 2 - 1
    mine = torch.autograd.grad(found, [leaf, *module.parameters()], signs, allow_unused=True)
    true = torch.autograd.grad(
        expected, [exact, *definition.parameters()], signs.to(expected), allow_unused=True
    )
    assert mine[0] is not None
    pairs = list(zip((mine[0][images], *mine[1:]), true, strict=True))
    least = SMALL_GRADIENT * max(float(b.abs().max()) for _, b in pairs if b is not None)
    for a, b in pairs:
        if (a is None) != (b is None):
            return float("inf")
        if a is not None and b is not None:
            worst = max(worst, _relative(a, b, least))
    return worst


def _relative(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """The largest error over the largest number, or over ``least``; infinity for what is no number."""
    error = float((found.detach().double() - expected.detach().double()).abs().max())
    scale = max(float(expected.detach().abs().max()), least)
    return error / (scale or 1.0) if error == error else float("inf")


@contextlib.contextmanager
def _seeded(cell: Cell) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        yield


def _dtype(cell: Cell) -> torch.dtype:
    """Of the weights."""
    dtype: torch.dtype = torch.float32 if cell.amp else getattr(torch, cell.problem.dtype)
    return dtype


def normalised(x: Tensor) -> Tensor:
    """What a norm without weights, as every block begins, makes of a map."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
