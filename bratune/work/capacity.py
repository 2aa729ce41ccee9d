"""Fit: how much memory a model needs per image, and the largest batch that a memory holds.

An estimate from shapes alone: nothing is run, so that it speaks of GPUs that are not here. Activations are
counted in maps of a stage (tokens x channels), as they live at the worst moment of a forward pass, or as
autograd keeps them for a backward pass; what a backend needs beside them is its own ``workspace_bytes``.
What an allocator wastes and what libraries keep is in `RESERVED`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bratune.errors import ProblemError, UsageError
from bratune.kernels import registry
from bratune.machine import Machine
from bratune.problem import ITEM_BYTES
from bratune.variant import Stage, Variant

__all__ = ["RESERVED", "Fit", "fit_backends", "needed_bytes", "parse_memory"]

# Share of a device's memory that contexts, libraries and fragmentation take from the model.
RESERVED = 0.08
# Bytes per parameter while training: a float32 weight, its gradient, and two moments of AdamW.
TRAINING_BYTES = 16
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The largest batch of a model with one backend at every routed stage.

    Attributes:
        backend: Its name.
        batch: Images; 0 where not one fits.
        fixed_bytes: Weights, and while training their gradients and the optimizer's state.
        image_bytes: What one image adds.
        stage: Where a forward pass needs the most, from 1; while training, the stage that keeps the most.
        reasons: Why the backend cannot run the model here; empty where it can.
    """

    backend: str
    batch: int
    fixed_bytes: int
    image_bytes: int
    stage: int
    reasons: tuple[str, ...] = ()


def parse_memory(text: str) -> int:
    """``"24GB"``, ``"80GiB"`` or ``"512MB"`` in bytes; GB is 10^9 and GiB 2^30.

    Raises:
        UsageError: the text is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"memory {text!r} is not an amount; 24GB, 80GiB or 512MB would be")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def fit_backends(
    variant: Variant, stages: Sequence[Stage], machine: Machine, memory_bytes: int, backends: Sequence[str]
) -> tuple[Fit, ...]:
    """The largest batch per backend.

    Args:
        variant: The model.
        stages: Its stages at a resolution for one image (``batch=1``), with dtype and direction.
        machine: Where it shall run; decides which backends can.
        memory_bytes: What the device has; `RESERVED` of it is left free.
        backends: Names to try.

    Raises:
        ProblemError: the stages are of more than one image.
    """
    return tuple(_fit(variant, stages, machine, memory_bytes, name) for name in backends)


def _fit(variant: Variant, stages: Sequence[Stage], machine: Machine, memory_bytes: int, backend: str) -> Fit:
    chosen = registry.get(backend)
    reasons: dict[str, None] = {}
    for stage in stages:
        if stage.kind == "routed" and stage.problem is not None:
            reasons |= dict.fromkeys(chosen.why_not(stage.problem, machine))
    workspaces = {
        stage.index: chosen.workspace_bytes(stage.problem)
        for stage in stages
        if stage.kind == "routed" and stage.problem is not None
    }
    fixed, image, worst = needed_bytes(variant, stages, workspaces)
    room = int(memory_bytes * (1 - RESERVED)) - fixed
    return Fit(
        backend=backend,
        batch=0 if reasons else max(room // image, 0),
        fixed_bytes=fixed,
        image_bytes=image,
        stage=worst,
        reasons=tuple(reasons),
    )


def needed_bytes(
    variant: Variant, stages: Sequence[Stage], workspaces: Mapping[int, int]
) -> tuple[int, int, int]:
    """Bytes that do not depend on the batch, bytes per image, and the stage that needs the most.

    Args:
        variant: The model.
        stages: Its stages for one image.
        workspaces: What routed attention allocates beside its inputs and output, by stage.

    Raises:
        ProblemError: the stages are of more than one image.
    """
    problems = [stage.problem for stage in stages if stage.problem is not None]
    if any(problem.batch != 1 for problem in problems):
        raise ProblemError("memory is counted per image: the stages must be of batch 1")
    if not problems:
        raise ProblemError("the model has no attention, so that its data type and direction are unknown")
    training, item = problems[0].backward, ITEM_BYTES[problems[0].dtype]
    needs = {
        stage.index: (_kept if training else _live)(
            variant, stage, stage.padded_tokens * stage.dim * item, workspaces.get(stage.index, 0)
        )
        for stage in stages
    }
    worst = max(needs, key=lambda index: needs[index])
    first = stages[0]
    # The images, as they came and channels-last.
    image = 2 * 3 * 16 * first.height * first.width * item
    if training:
        image += _kept_between(variant, stages) * item
        return variant.parameters * TRAINING_BYTES, sum(needs.values()) + image, worst
    return variant.parameters * item, needs[worst] + image, worst


def _live(variant: Variant, stage: Stage, map_bytes: int, workspace: int) -> int:
    """Bytes alive at the worst moment of a block: in its attention, or between the halves of its MLP.

    Attention: input, its norm, the three projections and the output, and the workspace.
    MLP: input, its norm, and the hidden channels before and after GELU.
    """
    return max(6 * map_bytes + workspace, (2 + 2 * variant.mlp_ratio) * map_bytes)


def _kept(variant: Variant, stage: Stage, map_bytes: int, workspace: int) -> int:
    """Bytes that autograd keeps of a stage.

    Per block: the inputs of the position embedding, of both norms, of the projections and of the MLP, the
    three projections, the attention's output and what went into the output projection, and the hidden
    channels before and after GELU. A workspace is what a backend computes on its way, which it keeps.
    """
    position = 1 if variant.layout == "biformer" else 0
    maps = position + 2 + 2 + 3 + 2 + 2 * variant.mlp_ratio
    return stage.blocks * (maps * map_bytes + workspace)


def _kept_between(variant: Variant, stages: Sequence[Stage]) -> int:
    """Numbers that autograd keeps of stem and downsampling: the inputs of norms and activations.

    A map before a norm of each stage, and in the convolutional stem three of half the channels at twice
    the resolution.
    """
    maps = sum(stage.height * stage.width * stage.dim for stage in stages)
    stem = 3 * 4 * stages[0].height * stages[0].width * stages[0].dim // 2
    return maps + (stem if variant.layout == "biformer" else 0)
