"""Demo: records to draw on a machine that has none.

What ships in ``results/`` is shown as it was measured; beside it stand modelled rows for three boards, which
look modelled.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from bratune import gpus, store
from bratune import variant as variants
from bratune.cell import Cell
from bratune.errors import StoreError
from bratune.gpus import GPU
from bratune.predict.fit import stored_coefficients
from bratune.predict.model import absent_machine, bound_cell, predict_cell
from bratune.problem import Problem, split_map
from bratune.record import Record
from bratune.work.cells import Scene, scenes
from bratune.work.request import make_request

__all__ = ["demo_records", "modelled_records"]

BOARDS = ("h200", "a100", "rtx4090")
BACKENDS = ("gather", "gather-sdpa", "dense", "triton")
SCALING_SIDES = (128, 224, 320, 448, 640, 768, 1024, 1536)


def demo_records() -> list[Record]:
    """The records that ship, and modelled ones for three boards."""
    boards = [gpus.resolve(key) for key in BOARDS]
    return [*_shipped(), *modelled_records(boards)]


def _shipped() -> list[Record]:
    folder = Path(str(importlib.resources.files("bratune").joinpath("results")))
    try:
        return [r for r in store.read_records([folder]) if r.outcome != "started"]
    except StoreError:
        return []


def modelled_records(
    boards: Sequence[GPU],
    *,
    model: str = "biformer_small",
    task: str = "classification",
    batches: Sequence[int] = (1, 64),
    dtype: str | None = None,
    host: str | None = None,
) -> list[Record]:
    """Modelled and bound rows of a model on boards: parts, backends, and attention over resolution.

    Args:
        boards: The boards.
        model: The model.
        task: The task.
        batches: Images per call.
        dtype: By default that of each board.
        host: Of the boards; see `bratune.predict.coefficients.host_us_of`.
    """
    coefficients = stored_coefficients().on_host(host)
    rows = []
    for board in boards:
        request = make_request(
            absent_machine(board), models=(model,), task=task, batches=batches, dtype=dtype, backends=BACKENDS
        )
        cells = [cell for scene in scenes(request) for cell in _model_cells(scene)]
        for cell in cells + _scaling_cells(model, request.dtype):
            rows.append(predict_cell(cell, board, coefficients))
            if cell.part == "model":
                rows.append(bound_cell(cell, board))
    return [dataclasses.replace(row, timestamp_utc="") for row in rows]


def _model_cells(scene: Scene) -> list[Cell]:
    found = [scene.model_cell((backend,)) for backend in BACKENDS]
    for stage in (stage for stage in scene.stages if stage.kind == "routed"):
        found += [scene.stage_cell("attention", stage, backend=backend) for backend in BACKENDS]
        found += scene.part_cells(stage)
    return found


def _scaling_cells(model: str, dtype: str) -> list[Cell]:
    """Stage-1 attention over image side: S fixed, S growing with the map, and dense attention."""
    variant = variants.get_variant(model)
    found = []
    for side in SCALING_SIDES:
        height, width = variant.maps(side, side)[0]
        windows = {"S = 7": 7, "S ~ N^(1/3)": max(1, round((height * width / 3136) ** (1 / 3) * 7))}
        for rule, n_win in windows.items():
            problem = Problem(
                batch=1,
                height=height,
                width=width,
                heads=variant.dims[0] // variant.head_dim,
                head_dim=variant.head_dim,
                region=split_map(height, width, n_win, pad=True),
                topk=1,
                dtype=dtype,
            )
            cell = Cell(
                part="attention",
                problem=problem,
                backend="triton",
                model=model,
                image=(side, side),
                stage=1,
                n_win=str(n_win),
                topk="1",
                regime="graph",
                extra=f'{{"window_rule":"{rule}"}}',
            )
            found.append(cell)
        every = dataclasses.replace(found[-1].problem, region=(height, width), kv_region=(height, width))
        found.append(
            found[-1].replace(problem=every, backend="dense", n_win="1", extra='{"window_rule":"dense"}')
        )
    return found
