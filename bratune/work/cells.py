"""Which cells a request stands for: attention by every backend, the rest of a block, the block, the model.

The parts of a block follow each other and each includes the residual addition that ends it, so that their
times add up to the time of the block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bratune.cell import Cell
from bratune.variant import Stage, get_variant, stages
from bratune.work.request import Request

__all__ = ["BASELINE", "Scene", "model_stages", "parts_of", "scenes"]

# What speedups are relative to: the implementation that the paper describes and the official code has.
BASELINE = "gather"
# Backends that stand for the two forms of full attention: scores written out, and fused.
FULL_ATTENTION_FORMS = (BASELINE, "gather-sdpa")


def parts_of(layout: str, kind: str) -> tuple[str, ...]:
    """The parts that a block consists of, in the order in which they run.

    Args:
        layout: See `bratune.variant.Variant`.
        kind: See `bratune.variant.Stage`. A ``conv`` stage has no attention and is timed as a block only.
    """
    if kind == "conv":
        return ()
    parts = ["norm", "qkv", "routing", "attention", "lepe", "proj", "mlp"]
    if kind == "full":
        parts.remove("routing")
    return ("pos_embed", *parts) if layout == "biformer" else tuple(parts)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One model at one batch size, run in one way: what the cells of a table have in common."""

    request: Request
    model: str
    batch: int
    regime: str
    l2: str

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the model at this batch size."""
        return self.request.stages(self.model, self.batch)

    def attention_cells(self, stage: Stage) -> Iterator[Cell]:
        """The attention of a stage by every backend, the baseline first, for every kind of routes.

        Full attention has two forms only: with its scores written out, and fused (see
        `bratune.kernels.full_attention`); it is measured by one backend for each.
        """
        names = sorted(self.request.backends, key=lambda name: name != BASELINE)
        if stage.kind == "full":
            names = [name for name in names if name in FULL_ATTENTION_FORMS] or names[:1]
        kinds = self.request.routes if stage.kind == "routed" else ("recorded",)
        for kind in kinds:
            for backend in names if stage.problem else ():
                yield self._cell("attention", stage, backend=backend, route_distribution=kind)

    def part_cells(self, stage: Stage) -> Iterator[Cell]:
        """The parts of a block that no backend computes."""
        for part in parts_of(get_variant(self.model).layout, stage.kind):
            if part != "attention":
                yield self._cell(part, stage)

    def block_cell(self, stage: Stage, backend: str) -> Cell:
        """A whole block with a backend."""
        return self._cell("block", stage, backend=backend)

    def model_cell(self, backends: Sequence[str]) -> Cell:
        """The whole model with one backend per stage (or one for all)."""
        found = self.stages
        first = next((s for s in found if s.kind == "routed"), found[0])
        cell = self._cell("model", first, backend=",".join(backends))
        return cell.replace(
            stage=0,
            block_count=1,
            n_win=",".join(str(stage.n_win) for stage in found),
            topk=",".join(str(stage.topk) for stage in found),
        )

    def _cell(self, part: str, stage: Stage, **values: Any) -> Cell:
        request = self.request
        assert stage.problem is not None
        data = {"images": request.images, "checkpoint": request.checkpoint}
        data = {name: path for name, path in data.items() if path}
        return Cell(
            part=part,
            problem=stage.problem,
            model=self.model,
            task=request.task.name,
            image=request.task.padded(*request.image),
            stage=stage.index,
            block_count=stage.blocks,
            n_win=str(stage.n_win),
            topk=str(stage.topk),
            regime=self.regime,
            l2=self.l2,
            layout=request.layout,
            amp=request.amp,
            seed=request.seed,
            extra=json.dumps(data),
            **values,
        )


def scenes(request: Request) -> tuple[Scene, ...]:
    """Every combination of model, batch size, regime and L2 state of a request."""
    return tuple(
        Scene(request=request, model=model, batch=batch, regime=regime, l2=l2)
        for model in request.models
        for batch in request.batches
        for regime in request.regimes
        for l2 in request.l2
    )


def model_stages(cell: Cell) -> tuple[Stage, ...]:
    """The stages of a ``model`` cell, from its S and top-k per stage."""
    return stages(
        get_variant(cell.model),
        *cell.image,
        batch=cell.problem.batch,
        n_win=[max(1, int(s)) for s in cell.n_win.split(",")],
        topks=[int(k) for k in cell.topk.split(",")],
        dtype=cell.problem.dtype,
        direction=cell.problem.direction,
    )
