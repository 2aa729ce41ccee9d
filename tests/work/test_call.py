"""Work: a block taken apart computes the block, and a cell runs on the data that it names."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bratune.cell import PARTS, Cell
from bratune.errors import CheckpointError, UsageError
from bratune.kernels.biformer import build
from bratune.kernels.blocks import Residual
from bratune.machine import detect
from bratune.measure import gate
from bratune.variant import VARIANTS, get_task
from bratune.work import call as work
from bratune.work.cells import Scene
from bratune.work.modules import block_for, check_checkpoint, model_for, scenery_for
from bratune.work.parts import State, Step, steps_of
from bratune.work.request import Request

CPU = detect("cpu")


def scene(model: str = "biformer_tiny", image: tuple[int, int] = (64, 64), **changes: Any) -> Scene:
    values: dict[str, Any] = {
        "models": (model,),
        "task": get_task("classification"),
        "image": image,
        "batches": (2,),
        "n_win": (2,),
        "topks": (1, 2, 3, -1 if model == "biformer_stl_nchw" else -2),
        "dtype": "float32",
        "amp": False,
        "layout": "nchw",
        "direction": "fwd",
        "backends": ("gather", "gather-sdpa"),
        "routes": ("recorded",),
        "regimes": ("eager",),
        "l2": ("warm",),
    }
    request = Request(**(values | changes))
    return Scene(request=request, model=model, batch=request.batches[0], regime="eager", l2="warm")


def cells(found: Scene, stage: int) -> dict[str, Cell]:
    """One cell per part of a stage, by part; attention and block by gather."""
    at = found.stages[stage - 1]
    parts = {cell.part: cell for cell in found.part_cells(at)}
    parts["attention"] = next(iter(found.attention_cells(at)))
    return parts | {"block": found.block_cell(at, "gather")}


def output(result: Any) -> Tensor:
    """The single tensor in what a forward call returned."""
    ((made),) = [tensor for state in result for tensor in state.values()]
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("stage", [1, 2, 4])
@pytest.mark.parametrize("model", VARIANTS)
def test_the_steps_of_a_block_compute_the_block(model: str, stage: int) -> None:
    cell = cells(scene(model), stage)["block"]
    block = block_for(cell, "cpu")
    state = {"x": scenery_for(cell, "cpu").maps[stage - 1]}
    with torch.no_grad():
        expected = block(state["x"])
        for step in steps_of(block):
            state = state | step.run(state)
    assert torch.equal(state["x"], expected)


def test_the_steps_compute_the_block_on_a_padded_map() -> None:
    cell = cells(scene(image=(72, 40), n_win=(3,)), 1)["block"]
    block = block_for(cell, "cpu")
    state = {"x": scenery_for(cell, "cpu").maps[0]}
    assert state["x"].shape[1:3] == (18, 10)
    with torch.no_grad():
        expected = block(state["x"])
        for step in steps_of(block):
            state = state | step.run(state)
    assert state["q"].shape[1:3] == (18, 12)
    assert torch.equal(state["x"], expected)


@pytest.mark.parametrize("direction", ["fwd", "fwd-bwd"])
@pytest.mark.parametrize("stage", [1, 4])
def test_every_part_of_a_block_can_be_called(stage: int, direction: str) -> None:
    found = cells(scene(direction=direction), stage)
    assert set(found) == set(PARTS) - {"model", "mixer"} - ({"routing"} if stage == 4 else set())
    for cell in found.values():
        made = work.build(cell, CPU)
        assert made.images == 2
        made.call()


def test_the_attention_part_runs_on_the_map_and_routes_of_the_model() -> None:
    cell = cells(scene(), 2)["attention"]
    (call,) = work.build(cell, CPU).attentions()
    assert call.q.shape == (2, 8, 8, 128)
    assert call.q.stride() == call.k.stride() == (8 * 8 * 384, 8 * 384, 384, 1), "slices of one qkv tensor"
    assert call.routes.shape == (2, 4, 2)
    assert gate.check(call.backend, call.problem, call.q, call.k, call.v, call.routes).ok


def test_made_routes_replace_those_of_the_model() -> None:
    found = scene(routes=("same",))
    cell = next(iter(found.attention_cells(found.stages[1])))
    (call,) = work.build(cell, CPU).attentions()
    assert set(call.routes.flatten().tolist()) == {0, 1}


def test_candidates_of_a_stage_see_the_same_map_whatever_s_and_top_k_they_try() -> None:
    one = scenery_for(cells(scene(), 2)["block"], "cpu")
    other = scenery_for(cells(scene(n_win=(4,), topks=(2, 5, 16, -2)), 2)["block"], "cpu")
    assert torch.equal(one.maps[1], other.maps[1])


def test_a_block_has_the_weights_of_the_published_model() -> None:
    cell = cells(scene(), 1)["block"]
    weights = block_for(cell, "cpu").state_dict()
    assert all(torch.equal(weights[k], v) for k, v in scenery_for(cell, "cpu").weights[0].items())


def test_a_model_cell_runs_the_model_with_its_backends_stage_by_stage() -> None:
    found = scene()
    cell = found.model_cell(("gather", "gather-sdpa", "dense", "gather-sdpa"))
    made = work.build(cell, CPU)
    assert made.call().shape == (2, 1000)
    calls = made.attentions()
    assert [call.backend.name for call in calls] == ["gather", "gather-sdpa", "dense", "full"]
    assert [call.problem.topk for call in calls] == [1, 2, 3, 1]
    for call in calls:
        assert gate.check(call.backend, call.problem, call.q, call.k, call.v, call.routes).ok


def test_a_dense_task_returns_the_maps_of_its_stages() -> None:
    found = scene(task=get_task("segmentation"))
    maps = work.build(found.model_cell(("gather-sdpa",)), CPU).call()
    assert [tuple(m.shape) for m in maps] == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2)]


def test_forward_and_backward_give_the_gradients_of_inputs_and_weights() -> None:
    cell = cells(scene(direction="fwd-bwd"), 1)["mlp"]
    ((x, y, *rest),) = work.build(cell, CPU).call()
    shapes = {tuple(g.shape) for g in (x, y, *rest) if g is not None}
    assert {(192, 64), (64, 192), (2, 16, 16, 64)} <= shapes


def test_amp_computes_attention_in_the_lower_dtype_with_float32_weights() -> None:
    cell = cells(scene(dtype="bfloat16", amp=True), 1)["attention"]
    (call,) = work.build(cell, CPU).attentions()
    assert call.q.dtype == torch.bfloat16
    assert next(block_for(cell, "cpu").parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["recorded", "random"])
def test_a_bare_attention_call_needs_no_model(kind: str) -> None:
    problem = scene().stages[0].problem
    assert problem is not None
    cell = Cell(part="attention", problem=problem, backend="gather", route_distribution=kind)
    made = work.build(cell, CPU)
    assert output(made.call()).shape == (2, 16, 16, 64)
    (call,) = made.attentions()
    assert gate.check(call.backend, call.problem, call.q, call.k, call.v, call.routes).ok


def test_a_part_that_is_not_there_is_named() -> None:
    routing = cells(scene(), 1)["routing"]
    last = cells(scene(), 4)["mlp"]
    with pytest.raises(UsageError, match="stage 4 of biformer_tiny has no part called routing"):
        work.build(last.replace(part="routing"), CPU)
    with pytest.raises(UsageError, match="needs a model"):
        work.build(routing.replace(model="", part="mlp"), CPU)


def test_blocks_are_what_the_steps_take() -> None:
    assert isinstance(block_for(cells(scene(), 1)["block"], "cpu"), Residual)


@pytest.mark.parametrize("part", ["norm", "routing", "mlp"])
def test_a_warm_part_is_preceded_by_the_rest_of_its_block(part: str) -> None:
    warm = cells(scene(), 1)[part]
    made = work.build(warm, CPU)
    assert made.before is not None
    assert made.before() is None
    assert work.build(warm.replace(l2="cold"), CPU).before is None
    assert work.build(cells(scene(), 1)["block"], CPU).before is None


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("block", "model", "mixer")])
@pytest.mark.parametrize("routes", ["recorded", "same"])
def test_a_part_takes_what_the_rest_of_its_block_has_just_made(
    part: str, routes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Tensor] = []

    def noting(block: Residual) -> tuple[Step, ...]:
        return tuple(Step(step.part, functools.partial(note, step)) for step in steps_of(block))

    def note(step: Step, state: State) -> State:
        if step.part == part:
            taken.append(state["x"])
        return step.run(state)

    monkeypatch.setattr(work, "steps_of", noting)
    made = work.build(cells(scene(routes=(routes,)), 2)[part], CPU)
    stored = made.call()
    assert made.before is not None
    for _ in range(2):
        made.before()
        before, again = taken[-1], made.call()
        assert taken[-1] is not before, "not the input of the sample before"
        for state, expected in zip(again, stored, strict=True):
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("block", "model", "mixer")])
def test_nothing_of_the_old_map_is_left_when_a_new_one_begins(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[weakref.ref[Tensor]]] = []
    left: list[int] = []

    def noting(block: Residual) -> tuple[Step, ...]:
        return tuple(Step(step.part, functools.partial(note, step)) for step in steps_of(block))

    def note(step: Step, state: State) -> State:
        if step.part == "pos_embed":  # a new map
            left.append(sum(ref() is not None for ref in (seen[-1] if seen else ())))
            seen.append([])
        made = step.run(state)
        seen[-1] += map(weakref.ref, made.values())
        return made

    monkeypatch.setattr(work, "steps_of", noting)
    made = work.build(cells(scene(), 2)[part], CPU)
    assert made.before is not None
    for _ in range(3):
        made.before()
        made.call()
    if part == "pos_embed":  # the first and last of the chain is the timed call: its old input has to go
        assert left[-1] <= 1
    else:
        assert left[-2:] == [0, 0]


def test_the_rest_of_a_block_is_every_other_step_in_the_order_of_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def noting(block: Residual) -> tuple[Step, ...]:
        return tuple(Step(step.part, functools.partial(note, step)) for step in steps_of(block))

    def note(step: Step, state: State) -> State:
        ran.append(step.part)
        return step.run(state)

    monkeypatch.setattr(work, "steps_of", noting)
    made = work.build(cells(scene(), 1)["routing"], CPU)
    ran.clear()
    assert made.before is not None
    made.before()
    made.call()
    expected = ["attention", "lepe", "proj", "norm", "mlp", "pos_embed", "norm", "qkv", "routing"]
    assert ran == expected


def test_a_checkpoint_gives_the_weights_of_blocks_and_models(tmp_path: Path) -> None:
    published = build("biformer_tiny", num_classes=10)
    path = tmp_path / "weights.pth"
    torch.save({"model": published.state_dict()}, path)
    found = scene(checkpoint=str(path))
    block = block_for(cells(found, 2)["block"], "cpu").state_dict()
    weights = published.state_dict()
    assert all(torch.equal(value, weights[f"stages.1.0.{name}"]) for name, value in block.items())
    model = model_for(found.model_cell(("gather",)), "cpu").state_dict()
    assert torch.equal(model["downsample_layers.0.0.weight"], weights["downsample_layers.0.0.weight"])
    with pytest.raises(CheckpointError, match="does not fit"):
        check_checkpoint("biformer_base", "classification", str(path))
