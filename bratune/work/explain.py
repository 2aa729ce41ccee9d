"""Explain: what a model asks of a backend at every stage, and which backends accept; nothing is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bratune.kernels import registry
from bratune.kernels.mixers import registry as mixers
from bratune.kernels.mixers.mixer import Place
from bratune.machine import Machine
from bratune.record import Record
from bratune.variant import Stage, get_variant
from bratune.work.capacity import Fit, fit_backends
from bratune.work.cells import Scene
from bratune.work.count import block_macs, optimal_n_win, part_macs
from bratune.work.measured_n_win import MeasuredNWin, measured_n_win
from bratune.work.mixers import mixer_macs, obstacles, places_of

__all__ = [
    "MixerFacts",
    "StageFacts",
    "explain_fit",
    "explain_mixers",
    "explain_stage",
    "explain_stages",
]

# How far apart the two maps are whose work gives an exponent, in tokens per side; and how much larger the
# first is than that of the resolution asked about, where the fastest growing term has outgrown the others.
_STEP, _FAR = 8, 64


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One stage in numbers; sizes are of one block and the whole batch.

    Attributes:
        stage: The stage.
        padding_waste: Tokens added by padding over tokens.
        keys_per_query: Keys that a query attends to, padding included; 0 without attention.
        pairs: Query-key pairs of one head.
        gathered_bytes: What gather-then-dense copies out.
        score_bytes: One copy of the score matrix of all heads.
        attention_macs: Multiply-adds of both attention products.
        block_macs: Multiply-adds of the block.
        optimal_n_win: The S with the fewest multiply-adds of routing and attention; None without routing.
        optimal_keys: Keys per query at that S with the stage's top-k, without padding.
        measured_n_win: The fastest S that was measured on this machine; None where none was.
        reasons: Every backend with its reasons for refusing; empty reasons: it accepts.
    """

    stage: Stage
    padding_waste: float
    keys_per_query: int
    pairs: int
    gathered_bytes: int
    score_bytes: int
    attention_macs: int
    block_macs: int
    optimal_n_win: float | None
    optimal_keys: float | None
    measured_n_win: MeasuredNWin | None
    reasons: dict[str, tuple[str, ...]]


def explain_stages(scene: Scene, machine: Machine, blocks: Sequence[Record] = ()) -> tuple[StageFacts, ...]:
    """The facts of every stage of a model.

    Args:
        scene: The model, S, top-k and batch size.
        machine: Where it would run.
        blocks: What was measured there; see `bratune.work.measured_n_win.stored_blocks`.
    """
    return tuple(explain_stage(scene, machine, stage, blocks) for stage in scene.stages)


def explain_fit(scene: Scene, machine: Machine, memory_bytes: int) -> tuple[Fit, ...]:
    """The largest batch of a scene's model in so much memory, per backend."""
    stages = scene.request.stages(scene.model, 1)
    return fit_backends(get_variant(scene.model), stages, machine, memory_bytes, scene.request.backends)


def explain_stage(scene: Scene, machine: Machine, stage: Stage, blocks: Sequence[Record] = ()) -> StageFacts:
    """The facts of one stage; see `explain_stages`."""
    request, model, batch = scene.request, scene.model, scene.batch
    variant, problem = get_variant(model), stage.problem
    if problem is None:
        pairs = gathered = scores = keys = 0
        reasons: dict[str, tuple[str, ...]] = {}
    else:
        keys = problem.keys_per_query
        pairs = batch * problem.regions * problem.region_tokens * keys
        gathered, scores = problem.gathered_bytes, problem.score_bytes
        reasons = {name: registry.get(name).why_not(problem, machine) for name in request.backends}
    best = optimal_n_win(stage.height, stage.width, stage.topk) if stage.kind == "routed" else None
    return StageFacts(
        stage=stage,
        padding_waste=stage.padding_waste,
        keys_per_query=keys,
        pairs=pairs,
        gathered_bytes=gathered,
        score_bytes=scores,
        attention_macs=part_macs(variant, stage, batch).get("attention", 0),
        block_macs=block_macs(variant, stage, batch),
        optimal_n_win=best,
        optimal_keys=stage.topk * stage.height * stage.width / best**2 if best else None,
        measured_n_win=measured_n_win(
            blocks,
            model=model,
            image=request.image,
            batch=batch,
            dtype=request.dtype,
            direction=request.direction,
            stage=stage,
        ),
        reasons=reasons,
    )


@dataclass(frozen=True, kw_only=True)
class MixerFacts:
    """One attention in one stage, in numbers of two blocks and the whole batch.

    Attributes:
        mixer: Its name, with what becomes of S at larger resolutions where it has one.
        stage: 1 for the first.
        height: Rows of the map.
        width: Columns of the map.
        macs: Multiply-adds of both attentions, projections included.
        block_macs: The same with MLPs.
        workspace_bytes: What the larger of both allocates beside its input and output, an upper estimate.
        order: How its work grows with the number of tokens N, as its paper states it.
        exponent: Of N in its multiply-adds, from this map to one of twice the side.
        far_exponent: The same on maps so large that the fastest growing term is all there is.
        memory_exponent: Of N in its workspace, from this map to one of twice the side.
        reasons: Every obstacle; with any, there are no numbers.
    """

    mixer: str
    stage: int
    height: int
    width: int
    macs: int = 0
    block_macs: int = 0
    workspace_bytes: int = 0
    order: str = ""
    exponent: float = 0.0
    far_exponent: float = 0.0
    memory_exponent: float = 0.0
    reasons: tuple[str, ...] = ()


def explain_mixers(scene: Scene, machine: Machine) -> tuple[MixerFacts, ...]:
    """The facts of every mixer of a request in every stage.

    Bi-level routing is there twice: with S as it is at every resolution, and with S growing as the cube root
    of the number of tokens, which its paper's order assumes.
    """
    found = []
    for cell in (cell for cell in scene.mixer_cells() if cell.part == "mixer"):
        kind, pair = mixers.get(cell.backend), places_of(cell)
        known: dict[str, Any] = {"mixer": cell.backend, "stage": cell.stage, "order": kind.order}
        known |= {"height": pair[0].height, "width": pair[0].width}
        reasons = obstacles(cell, machine)
        if reasons:
            found.append(MixerFacts(**known, reasons=reasons))
            continue
        known |= {
            "macs": mixer_macs(cell),
            "block_macs": mixer_macs(cell.replace(part="block")),
            "workspace_bytes": max(kind.workspace_bytes(place) for place in pair),
        }
        routed = cell.backend.partition(":")[0] == mixers.ROUTED
        for grows in (False, True) if routed else (False,):
            name = f"{cell.backend}, S {'~ N^(1/3)' if grows else f'= {pair[0].n_win}'}"
            found.append(
                MixerFacts(
                    **known | {"mixer": name if routed else cell.backend},
                    exponent=_exponent(kind.macs, pair, 1, 2, grows=grows),
                    far_exponent=_exponent(kind.macs, pair, _FAR, _STEP, grows=grows),
                    memory_exponent=_exponent(kind.workspace_bytes, pair, 1, 2, grows=grows),
                )
            )
    return tuple(found)


def _exponent(
    cost: Callable[[Place], int], pair: Sequence[Place], first: int, step: int, *, grows: bool
) -> float:
    """Of the number of tokens, in the cost of blocks on maps whose sides are so many times as long."""
    small, large = (
        sum(cost(_larger(place, n, grows=grows)) for place in pair) for n in (first, first * step)
    )
    return math.log(large / small) / (2 * math.log(step))


def _larger(place: Place, factor: int, *, grows: bool) -> Place:
    n_win = round(place.n_win * factor ** (2 / 3)) if grows else place.n_win
    larger = place.at(factor * place.height, factor * place.width)
    return dataclasses.replace(larger, n_win=n_win)
