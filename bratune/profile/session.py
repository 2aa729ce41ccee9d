"""Session: a request from its first cell to its last.

Attention by every backend comes first, then the other parts of a block; the fastest backend of each stage is
then put into a whole block, and the fastest of all stages together into the whole model, beside the baseline.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.profile.cells import BASELINE, Scene, scenes
from bratune.profile.engine import Baselines
from bratune.profile.request import Request
from bratune.profile.summary import best_attention
from bratune.record import Record

__all__ = ["Planned", "plan", "run"]


@dataclass(frozen=True)
class Planned:
    """A cell that a session will run, as far as it is known before.

    Attributes:
        cell: The cell; None where it depends on what turns out to be fastest.
        text: What it is, in words.
    """

    cell: Cell | None
    text: str


def plan(request: Request, stages: tuple[int, ...] = ()) -> list[Planned]:
    """What `run` will measure, in its order."""
    found: list[Planned] = []
    for scene in scenes(request):
        for stage in scene.stages:
            if stages and stage.index not in stages:
                continue
            cells = [*scene.attention_cells(stage), *scene.part_cells(stage)]
            found += [Planned(cell, _words(scene, cell)) for cell in cells]
            if cells:
                found.append(Planned(None, f"{scene.model} stage {stage.index} block by the fastest backend"))
        if request.whole_model:
            found.append(Planned(None, f"{scene.model} batch {scene.batch}, {_baseline(request)} everywhere"))
            found.append(Planned(None, f"{scene.model} batch {scene.batch}, fastest backend of each stage"))
    return found


def run(request: Request, engine: Engine, stages: tuple[int, ...] = ()) -> Iterator[Record]:
    """Measure what a request asks for; every row as soon as it is known.

    Args:
        request: What is asked.
        engine: Turns cells into rows.
        stages: Only these stages (1 is the first); all without any.
    """
    for scene in scenes(request):
        rows: list[Record] = []
        baselines = Baselines()
        for record in _scene_rows(scene, engine, rows, stages):
            cell = Cell.from_dict(json.loads(record.cell))
            rows.append(baselines.compared(cell, record))
            yield rows[-1]


def _scene_rows(
    scene: Scene, engine: Engine, rows: list[Record], stages: tuple[int, ...]
) -> Iterator[Record]:
    """Rows of one scene; ``rows`` holds those that were yielded so far."""
    for stage in scene.stages:
        if stages and stage.index not in stages:
            continue
        yield from engine.run(scene.attention_cells(stage))
        yield from engine.run(scene.part_cells(stage))
        best = best_attention(rows, stage.index)
        if best is not None:
            yield from engine.run([scene.block_cell(stage, best.backend)])
    if scene.request.whole_model:
        yield from engine.run(_model_cells(scene, rows))


def _model_cells(scene: Scene, rows: list[Record]) -> list[Cell]:
    """The baseline everywhere, then the fastest backend of each stage, if that is something else."""
    baseline = _baseline(scene.request)
    cells = [scene.model_cell((baseline,))]
    fastest = []
    for stage in scene.stages:
        best = best_attention(rows, stage.index)
        fastest.append(best.backend if best else baseline)
    if set(fastest) != {baseline}:
        cells.append(scene.model_cell(fastest))
    return cells


def _baseline(request: Request) -> str:
    """What speedups are relative to; the first backend where the baseline is not asked for."""
    return BASELINE if BASELINE in request.backends else request.backends[0]


def _words(scene: Scene, cell: Cell) -> str:
    by = f" by {cell.backend}" if cell.backend else ""
    routes = f" on {cell.route_distribution} routes" if cell.route_distribution != "recorded" else ""
    return f"{scene.model} stage {cell.stage} {cell.part}{by}{routes}"
