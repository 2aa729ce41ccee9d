"""Counted work: the multiply-adds of each part of a block, of a stage and of a whole model.

What is counted is what runs, padding included: convolutions, linear layers and matrix products, as
torch's ``FlopCounterMode`` counts them, so that the sum over a model at 224 is the published number.
"""

from __future__ import annotations

from collections.abc import Sequence

from bratune.variant import Stage, Variant

__all__ = ["block_macs", "model_macs", "optimal_n_win", "part_macs"]


def part_macs(variant: Variant, stage: Stage, batch: int = 1) -> dict[str, int]:
    """Multiply-adds of each part of one block of a stage, by the names of `bratune.cell.PARTS`.

    Args:
        variant: The model that the stage belongs to.
        stage: The stage; its problem's batch is not used.
        batch: Images.
    """
    dim, tokens = stage.dim, stage.height * stage.width
    macs = {"mlp": 2 * variant.mlp_ratio * dim * dim * tokens}
    if variant.layout == "biformer":
        macs["pos_embed"] = 9 * dim * tokens
    side = variant.side_dwconv**2
    problem = stage.problem
    if problem is None:  # two 1x1 convolutions with a 5x5 depthwise one between them
        macs |= {"qkv": dim * dim * tokens, "lepe": 25 * dim * tokens, "proj": dim * dim * tokens}
    else:
        # The legacy module pads its input and projects padding too: its problem is that of the padded map.
        projected = problem.tokens
        macs["qkv"] = 3 * dim * dim * projected
        macs["attention"] = problem.attention_macs // problem.batch
        macs["lepe"] = side * dim * projected
        macs["proj"] = dim * dim * projected
        if stage.kind == "routed":
            macs["routing"] = problem.regions * problem.kv_regions * dim
    return {part: batch * count for part, count in macs.items()}


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
