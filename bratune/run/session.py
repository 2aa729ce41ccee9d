"""Session: a request from its first cell to its last.

Attention by every backend comes first; the fastest backend of each stage is then put into a whole block,
beside its parts, and the fastest of all stages together into the whole model, beside the baseline, unless
``auto``, which is there too, is that model. Where a budget may end it early, the whole models come before
all else: they are the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.errors import UnsupportedError
from bratune.kernels import tuned
from bratune.machine import Machine
from bratune.record import Record
from bratune.run.groups import Baselines, group_of, is_baseline
from bratune.run.summary import best_attention
from bratune.variant import Stage
from bratune.work.cells import BASELINE, Scene, scenes
from bratune.work.request import Request
from bratune.work.yours import YoursRequest

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


def plan(request: Request | YoursRequest, stages: tuple[int, ...] = ()) -> list[Planned]:
    """What `run` will measure, in its order."""
    if isinstance(request, YoursRequest):
        known = [*request.attention_cells(), *_yours_models(request)]
        text = f"{request.model}, fastest backend of each layer"
        return [*(Planned(cell, str(cell)) for cell in known), Planned(None, text)]
    found: list[Planned] = []
    if request.mixers:
        return [Planned(cell, _of_mixer(cell)) for cell in _mixer_cells(request, stages)]
    for scene in scenes(request):
        for stage in _chosen(scene, stages):
            cells = [*scene.attention_cells(stage), *scene.part_cells(stage)]
            found += [Planned(cell, _words(scene, cell)) for cell in cells]
            if cells:
                found.append(Planned(None, f"{scene.model} stage {stage.index} block by the fastest backend"))
        if request.whole_model:
            cells = [*scene.form_cells(), *scene.peer_cells()]
            found += [Planned(cell, f"{_whole(cell)}, batch {scene.batch}, {scene.regime}") for cell in cells]
            if request.parts:
                text = f"{scene.model} batch {scene.batch}, fastest backend of each stage"
                found.append(Planned(None, text))
    return found


def run(
    request: Request | YoursRequest,
    engine: Engine,
    stages: tuple[int, ...] = (),
    *,
    answer_first: bool = False,
) -> Iterator[Record]:
    """Measure what a request asks for; every row as soon as it is known.

    Args:
        request: What is asked.
        engine: Turns cells into rows.
        stages: Only these stages (1 is the first); all without any.
        answer_first: For a run that may be cut off: the whole model, then the backends of the stages where
            most can be gained, then the parts of blocks, which explain and do not decide.
    """
    if isinstance(request, YoursRequest):
        yield from _yours(request, engine, answer_first=answer_first)
        return
    if request.mixers:
        compared = Baselines()
        for record in engine.run(_mixer_cells(request, stages, answer_first=answer_first)):
            yield compared.compared(record.to_cell(), record)
        return
    if engine.slots > 1 or engine.passes > 1:
        yield from _together(request, engine, stages, answer_first=answer_first)
        return
    for scene in scenes(request):
        rows: list[Record] = []
        baselines = Baselines()
        for record in _scene_rows(scene, engine, rows, stages, answer_first):
            cell = record.to_cell()
            rows.append(baselines.compared(cell, record))
            yield rows[-1]


def _mixer_cells(request: Request, stages: tuple[int, ...], *, answer_first: bool = False) -> list[Cell]:
    """Those of every scene; what is compared with the baseline waits for it where cells follow each other."""
    cells = [cell for scene in scenes(request) for cell in scene.mixer_cells(stages)]
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(group_of(cell), []).append(cell)
    order = sorted(groups.values(), key=lambda group: answer_first and group[0].stage > 0)
    return [c for g in order for c in sorted(g, key=lambda cell: not is_baseline(cell))]


def _of_mixer(cell: Cell) -> str:
    where = f"stage {cell.stage} " if cell.stage else ""
    return f"{where}{cell.part} of {cell.backend}, batch {cell.problem.batch}, {cell.problem.direction}"


def _yours(request: YoursRequest, engine: Engine, *, answer_first: bool) -> Iterator[Record]:
    """The routed layers of somebody's model by every backend, then the whole model."""
    rows: list[Record] = []
    baselines = Baselines()
    given: set[Cell] = set()

    def measure(cells: list[Cell]) -> Iterator[Record]:
        for record in engine.run(cells):
            cell = record.to_cell()
            if cell in given:  # it only takes turns with others once more
                continue
            given.add(cell)
            rows.append(baselines.compared(cell, record))
            yield rows[-1]

    models = _yours_models(request)
    if answer_first:
        yield from measure(models)
    yield from measure(request.attention_cells())
    best = [best_attention(rows, number + 1) for number in range(len(request.sites))]
    if any(best):
        models.append(request.model_cell(*(row.backend if row else "auto" for row in best)))
    models = list(dict.fromkeys(models))
    if not given.issuperset(models):
        yield from measure(models)


def _yours_models(request: YoursRequest) -> list[Cell]:
    """The whole model as it is, by the baseline, and by what ``auto`` takes."""
    named = [name for name in (BASELINE,) if name in request.backends]
    return [request.model_cell(), *(request.model_cell(name) for name in (*named, "auto"))]


def _together(
    request: Request, engine: Engine, stages: tuple[int, ...], *, answer_first: bool
) -> Iterator[Record]:
    """Rows of all scenes at once, for an engine that measures many cells at a time, or each several times.

    First everything that is known before, so that the passes of it are spread over the run; then the blocks
    and models that depend on what was fastest, the blocks in turn with their parts.
    """
    found = scenes(request)
    rows: list[list[Record]] = [[] for _ in found]
    baselines = [Baselines() for _ in found]
    given: set[Cell] = set()

    def measure(cells_of: Callable[[int, Scene], list[Cell]]) -> Iterator[Record]:
        owners = {cell: number for number, scene in enumerate(found) for cell in cells_of(number, scene)}
        for record in engine.run(owners):
            cell = record.to_cell()
            if cell in given:  # it only takes turns with others once more
                continue
            given.add(cell)
            number = owners[cell]
            rows[number].append(baselines[number].compared(cell, record))
            yield rows[number][-1]

    def models(number: int, scene: Scene) -> list[Cell]:
        return _model_cells(scene, [], engine.machine) if request.whole_model else []

    def attention(number: int, scene: Scene) -> list[Cell]:
        order = sorted(_chosen(scene, stages), key=_possible_gain, reverse=True)
        return [cell for stage in order for cell in scene.attention_cells(stage)]

    def known_before(number: int, scene: Scene) -> list[Cell]:
        return attention(number, scene) + models(number, scene)

    def known_after(number: int, scene: Scene) -> list[Cell]:
        whole = _model_cells(scene, rows[number], engine.machine) if request.whole_model else []
        cells = [cell for cell in whole if cell not in given]
        if cells and engine.passes > 1:  # in turn with the others, whose rows are there
            cells = whole
        for stage in sorted(_chosen(scene, stages), key=_possible_gain, reverse=True):
            block = _best_block(scene, rows[number], stage)
            cells += [*scene.part_cells(stage), *([] if block is None else [block])]
        return cells

    for phase in (models, attention, known_after) if answer_first else (known_before, known_after):
        yield from measure(phase)


def _scene_rows(
    scene: Scene, engine: Engine, rows: list[Record], stages: tuple[int, ...], answer_first: bool
) -> Iterator[Record]:
    """Rows of one scene; ``rows`` holds those that were yielded so far."""
    chosen = _chosen(scene, stages)
    if answer_first:
        given = _model_cells(scene, [], engine.machine) if scene.request.whole_model else []
        yield from engine.run(given)
        chosen.sort(key=_possible_gain, reverse=True)
        for stage in chosen:
            yield from engine.run(scene.attention_cells(stage))
        later = _model_cells(scene, rows, engine.machine) if scene.request.whole_model else []
        yield from engine.run([cell for cell in later if cell not in given])
        for stage in chosen:
            yield from _block_rows(scene, engine, rows, stage)
        return
    for stage in chosen:
        yield from engine.run(scene.attention_cells(stage))
        yield from _block_rows(scene, engine, rows, stage)
    yield from _model_rows(scene, engine, rows)


def _chosen(scene: Scene, stages: tuple[int, ...]) -> list[Stage]:
    """The stages whose parts are measured."""
    if not scene.request.parts:
        return []
    return [stage for stage in scene.stages if not stages or stage.index in stages]


def _possible_gain(stage: Stage) -> int:
    """Bytes that a model's blocks of a stage move beyond the fewest, by the published method.

    It stands for the time that the best backend can save there: a stage with 18 of 30 blocks comes first.
    """
    if stage.problem is None:
        return 0
    return stage.blocks * (stage.problem.gathered_bytes + 3 * stage.problem.score_bytes)


def _block_rows(scene: Scene, engine: Engine, rows: list[Record], stage: Stage) -> Iterator[Record]:
    """The parts of a block that no backend computes, and the block with the fastest backend."""
    yield from engine.run(scene.part_cells(stage))
    cell = _best_block(scene, rows, stage)
    if cell is not None:
        yield from engine.run([cell])


def _best_block(scene: Scene, rows: list[Record], stage: Stage) -> Cell | None:
    """The block of a stage with its fastest backend; None where no backend has a time."""
    best = best_attention(rows, stage.index)
    return scene.block_cell(stage, best.backend) if best is not None else None


def _model_rows(scene: Scene, engine: Engine, rows: list[Record]) -> Iterator[Record]:
    if scene.request.whole_model:
        yield from engine.run(_model_cells(scene, rows, engine.machine))


def _model_cells(scene: Scene, rows: list[Record], machine: Machine) -> list[Cell]:
    """The model in its forms and with the fastest backend of each stage, and its peers, each cell once.

    Where ``auto`` is among the forms and takes these backends, the model with them is there already.
    """
    baseline = _baseline(scene.request)
    best = [best_attention(rows, stage.index) for stage in scene.stages]
    # The baseline first: where cells follow each other, what is compared with it waits for it.
    cells = sorted(scene.form_cells(), key=lambda cell: not is_baseline(cell))
    if any(best) and not ("auto" in scene.request.forms and _takes_these(scene, best, machine)):
        cells.append(scene.model_cell([row.backend if row else baseline for row in best]))
    return list(dict.fromkeys([*cells, *scene.peer_cells()]))


def _takes_these(scene: Scene, best: Sequence[Record | None], machine: Machine) -> bool:
    """Whether ``auto`` runs the fastest backend, with its default settings, in every routed stage."""
    for stage, row in zip(scene.stages, best, strict=True):
        if stage.kind != "routed" or stage.problem is None:
            continue
        try:
            backend, planned = tuned.choose(stage.problem, machine)
        except UnsupportedError:
            return False
        if row is None or backend.name != row.backend or planned:
            return False
    return True


def _baseline(request: Request) -> str:
    """What speedups are relative to; the first backend where the baseline is not asked for."""
    return BASELINE if BASELINE in request.backends else request.backends[0]


def _whole(cell: Cell) -> str:
    return f"{cell.model} ({cell.form if cell.form != 'plain' else f'{cell.backend} everywhere'})"


def _words(scene: Scene, cell: Cell) -> str:
    by = f" by {cell.backend}" if cell.backend else ""
    routes = f" on {cell.route_distribution} routes" if cell.route_distribution != "recorded" else ""
    return f"{scene.model} stage {cell.stage} {cell.part}{by}{routes}"
