"""Which cells a request stands for: attention by every backend, the rest of a block, the block, the model.

Every verb asks here, so that the same question is the same cell, whoever asks it.

The parts of a block follow each other and each includes the residual addition that ends it, so that their
times add up to the time of the block.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bratune.cell import FORMS, Cell
from bratune.problem import Problem
from bratune.variant import Stage, get_variant, stages
from bratune.work.request import BASELINE, MIXER_BASELINE, Request

__all__ = ["BASELINE", "MIXER_BASELINE", "Scene", "joined_backends", "model_stages", "parts_of", "scenes"]

# Backends that stand for the two forms of full attention: scores written out, and fused. The first is what
# these two backends run, the second is what every other name does (`bratune.kernels.full_attention`).
FULL_ATTENTION_FORMS = (BASELINE, "gather-sdpa")
_WRITES_SCORES = ("reference", BASELINE)


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
                yield self.stage_cell("attention", stage, backend=backend, route_distribution=kind)

    def part_cells(self, stage: Stage) -> Iterator[Cell]:
        """The parts of a block that no backend computes."""
        for part in parts_of(get_variant(self.model).layout, stage.kind):
            if part != "attention":
                yield self.stage_cell(part, stage)

    def block_cell(self, stage: Stage, backend: str, config: str = "{}") -> Cell:
        """A whole block with a backend and its settings."""
        return self.stage_cell("block", stage, backend=backend, config=config)

    def stage_cell(self, part: str, stage: Stage, **values: Any) -> Cell:
        """A part of a block of a stage, or the block; ``values`` are further fields of the cell."""
        assert stage.problem is not None
        own: dict[str, Any] = {"stage": stage.index, "block_count": stage.blocks}
        own |= {"n_win": str(stage.n_win), "topk": str(stage.topk)}
        return self._cell(part, stage.problem, **own, **values)

    def model_cell(
        self,
        backends: Sequence[str],
        *,
        form: str = "plain",
        stages: Sequence[Stage] = (),
        configs: Mapping[str, Any] | None = None,
    ) -> Cell:
        """The whole model.

        Args:
            backends: One for all stages or one per stage, see `joined_backends`; not for ``published``,
                which has its own attention.
            form: See `bratune.cell.FORMS`.
            stages: Of a setting that is not the request's; by default `Scene.stages`.
            configs: Settings of the backends by stage, ``{"1": {...}}``.
        """
        found = tuple(stages) or self.stages
        first = next((s for s in found if s.kind == "routed"), None) or next(s for s in found if s.problem)
        assert first.problem is not None
        return self._cell(
            "model",
            first.problem,
            form=form,
            backend="" if form == "published" else joined_backends(found, backends),
            config=json.dumps(dict(configs or {})),
            n_win=",".join(str(stage.n_win) for stage in found),
            topk=",".join(str(stage.topk) for stage in found),
        )

    def form_cells(self) -> list[Cell]:
        """The whole model in every form of the request."""
        found = []
        for name in self.request.forms:
            form = name if name in FORMS else "plain"
            found.append(self.model_cell(("auto" if form == name else name,), form=form))
        return found

    def peer_cells(self) -> list[Cell]:
        """The models of timm that stand beside it."""
        return [self.peer_cell(name) for name in self.request.peers]

    def peer_cell(self, name: str) -> Cell:
        """A model of timm, by the name that timm knows, on the images of this scene.

        It has no routed attention: its problem carries the batch, the dtype and the direction.
        """
        height, width = self.request.task.padded(*self.request.image)
        problem = Problem(
            batch=self.batch,
            height=height,
            width=width,
            heads=1,
            head_dim=3,
            region=(height, width),
            topk=1,
            dtype=self.request.dtype,
            direction=self.request.direction,
        )
        return self._cell("model", problem, form="timm", model=name, extra="{}")

    def mixer_cells(self, stages: Sequence[int] = ()) -> list[Cell]:
        """Every mixer of the request: its attentions in two blocks of each stage, the blocks, its network.

        The problem of a cell is one of full attention: it carries the map, the heads, the batch, the data
        type and the direction. S and top-k are those of bi-level routing there.

        Args:
            stages: Only these; all without any.
        """
        request, variant = self.request, get_variant(self.model)
        size = request.task.padded(*request.image)
        s, found = str(request.n_win[0]), []
        for index, (height, width) in enumerate(variant.maps(*size), start=1):
            problem = Problem(
                batch=self.batch,
                height=height,
                width=width,
                heads=variant.dims[index - 1] // variant.head_dim,
                head_dim=variant.head_dim,
                region=(height, width),
                topk=1,
                dtype=request.dtype,
                direction=request.direction,
            )
            own: dict[str, Any] = {"form": "mixer", "stage": index, "n_win": s}
            own |= {"block_count": variant.depths[index - 1] // 2, "topk": str(variant.topks[index - 1])}
            if request.parts and (not stages or index in stages):
                for part in ("mixer", "block"):
                    found += [self._cell(part, problem, **own, backend=name) for name in request.mixers]
            if request.whole_model and index == 1:
                own |= {"stage": 0, "block_count": 1, "n_win": ",".join([s] * len(variant.dims))}
                own |= {"topk": ",".join(map(str, variant.topks))}
                whole = [self._cell("model", problem, **own, backend=name) for name in request.mixers]
        return [*found, *whole] if request.whole_model else found

    def _cell(self, part: str, problem: Problem, **values: Any) -> Cell:
        request = self.request
        data = {"images": request.images, "checkpoint": request.checkpoint}
        common: dict[str, Any] = {
            "model": self.model,
            "task": request.task.name,
            "image": request.task.padded(*request.image),
            "regime": self.regime,
            "l2": self.l2,
            "layout": request.layout,
            "amp": request.amp,
            "seed": request.seed,
            "extra": json.dumps({name: path for name, path in data.items() if path}),
        }
        return Cell(part=part, problem=problem, **(common | values))


def joined_backends(stages: Sequence[Stage], backends: Sequence[str]) -> str:
    """The backends of a whole model as its cell spells them: what runs alike is spelt alike.

    One name where every stage runs what that name alone would run, else one per stage joined by ``,``. Full
    attention has two forms (`FULL_ATTENTION_FORMS`), the fused one where nothing is said; a stage of
    convolutions has none.

    >>> joined_backends(stages, ("dense", "dense", "dense", "gather-sdpa"))    # the last one is full
    'dense'

    Args:
        stages: Of the model.
        backends: One for all or one per stage.
    """
    asked = tuple(backends) * len(stages) if len(backends) == 1 else tuple(backends)
    pairs = list(zip(stages, asked, strict=True))
    names = [
        name if stage.kind == "routed" else "" if stage.kind == "conv" else _full_form(name)
        for stage, name in pairs
    ]
    routed = {name for (stage, _), name in zip(pairs, names, strict=True) if stage.kind == "routed"}
    full = {name for (stage, _), name in zip(pairs, names, strict=True) if stage.kind == "full"}
    one = next(iter(routed or full), "")
    if len(routed | {one}) == 1 and full <= {_full_form(one)}:
        return one
    return ",".join(names)


def _full_form(backend: str) -> str:
    return FULL_ATTENTION_FORMS[0 if backend in _WRITES_SCORES else 1]


def scenes(request: Request) -> tuple[Scene, ...]:
    """Every combination of direction, model, batch size, regime and L2 state of a request."""
    return tuple(
        Scene(
            request=dataclasses.replace(request, direction=way),
            model=model,
            batch=batch,
            regime=regime,
            l2=l2,
        )
        for way in (request.directions or (request.direction,))
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
