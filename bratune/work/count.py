"""Counted work: the multiply-adds of each part of a block, of a stage and of a whole model.

What is counted is what runs, padding of maps included: convolutions, linear layers and matrix products, as
torch's ``FlopCounterMode`` counts them, so that the sum over a model at 224 is the published number. What a
block multiplies by weights is listed once, in `bratune.predict.parts`; a prediction fills the same products
up to whole tiles, which no count does.
"""

from __future__ import annotations

from collections.abc import Sequence

from bratune.predict.parts import products, stage_block
from bratune.variant import Stage, Variant

__all__ = ["block_macs", "model_macs", "optimal_n_win", "part_macs"]


def part_macs(variant: Variant, stage: Stage, batch: int = 1) -> dict[str, int]:
    """Multiply-adds of each part of one block of a stage, by the names of `bratune.cell.PARTS`.

    Args:
        variant: The model that the stage belongs to.
        stage: The stage; its problem's batch is not used.
        batch: Images.
    """
    listed = products(stage_block(variant, stage, batch))
    macs = {part: sum(product.macs for product in found) for part, found in listed.items()}
    problem = stage.problem
    if problem is not None:
        macs["attention"] = batch * problem.attention_macs // problem.batch
    if problem is not None and stage.kind == "routed":
        macs["routing"] = batch * problem.regions * problem.kv_regions * stage.dim
    return macs


def block_macs(variant: Variant, stage: Stage, batch: int = 1) -> int:
    """Multiply-adds of one block of a stage."""
    return sum(part_macs(variant, stage, batch).values())


def model_macs(variant: Variant, stages: Sequence[Stage], batch: int = 1, classes: int = 0) -> int:
    """Multiply-adds of a whole model: stem, downsampling, every block and, with classes, the head."""
    total = sum(stage.blocks * block_macs(variant, stage) for stage in stages)
    for before, stage in zip([None, *stages], stages, strict=False):
        tokens = stage.height * stage.width
        if variant.layout == "biformer":
            if before is None:  # two 3x3 convolutions of stride 2; the first leaves four times the tokens
                half = stage.dim // 2
                total += 9 * half * (3 * 4 * tokens + stage.dim * tokens)
            else:
                total += 9 * before.dim * stage.dim * tokens
        else:
            total += tokens * stage.dim * (16 * 3 if before is None else 4 * before.dim)
    return batch * (total + classes * stages[-1].dim)


def optimal_n_win(height: int, width: int, topk: int) -> float:
    """The S with the fewest multiply-adds of routing and attention, ``(topk (HW)^2)^(1/6)``.

    `part_macs` counts ``S^4 C + 2 topk (HW)^2 C / S^2`` with HW in tokens. The paper's count (BiFormer,
    arXiv 2303.08810, equations 7 to 9) has the first term twice and the second once, which puts its optimum
    a ninth lower. Both ignore memory, padding and everything that a machine does; it is a place to start.
    """
    return float((topk * (height * width) ** 2) ** (1 / 6))
