"""Explain: what a model asks of a backend at every stage, and which backends accept; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bratune.kernels import registry
from bratune.machine import Machine
from bratune.record import Record
from bratune.variant import Stage, get_variant
from bratune.work.capacity import Fit, fit_backends
from bratune.work.cells import Scene
from bratune.work.count import block_macs, optimal_n_win, part_macs
from bratune.work.measured_n_win import MeasuredNWin, measured_n_win

__all__ = ["StageFacts", "explain_fit", "explain_stage", "explain_stages"]


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
