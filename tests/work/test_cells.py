"""Requests and cells: defaults, what is measured, counted work, and the command that repeats a row."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bratune.cell import Cell
from bratune.cli.options import request_values, settings_of
from bratune.errors import BratuneError, ProblemError, UsageError
from bratune.kernels import registry
from bratune.kernels.blocks import Block, NCHWBlockSTL
from bratune.machine import Machine
from bratune.run import session
from bratune.run.repro import command_for
from bratune.variant import VARIANTS, get_variant, stages
from bratune.work.cells import BASELINE, model_stages, parts_of, scenes
from bratune.work.count import block_macs, model_macs, optimal_n_win, part_macs
from bratune.work.request import Request, make_request

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="Some CPU", memory_gib=8.0)
GPU = Machine(
    kind="cuda",
    device="cuda:0",
    gpu_key="a100",
    gpu_name="NVIDIA A100-SXM4-80GB",
    compute_capability="8.0",
    memory_gib=80.0,
)


def all_cells(request: Request) -> list[Cell]:
    found: list[Cell] = []
    for scene in scenes(request):
        for stage in scene.stages:
            found += [*scene.attention_cells(stage), *scene.part_cells(stage)]
            found.append(scene.block_cell(stage, BASELINE))
        found.append(scene.model_cell((BASELINE,)))
    return found


# --- requests ----------------------------------------------------------------------------------------


def test_defaults_suit_the_machine() -> None:
    here, there = make_request(CPU), make_request(GPU)
    assert (here.models, here.image, here.n_win, here.batches) == (("biformer_tiny",), (224, 224), (7,), (1,))
    assert (here.dtype, here.l2, there.dtype, there.l2) == ("float32", ("warm",), "bfloat16", ("cold",))
    assert here.backends == registry.names()
    assert (here.routes, here.regimes, here.layout) == (("recorded",), ("eager",), "nchw")


@pytest.mark.parametrize(
    ("task", "image", "n_win"), [("segmentation", (512, 512), 8), ("detection", (800, 1333), 16)]
)
def test_a_task_sets_resolution_and_s(task: str, image: tuple[int, int], n_win: int) -> None:
    request = make_request(CPU, task=task)
    assert (request.image, request.n_win) == (image, (n_win,))


def test_the_model_sees_the_padded_image() -> None:
    request = make_request(CPU, task="detection")
    assert {cell.image for cell in all_cells(request)} == {(800, 1344)}
    assert request.stages("biformer_tiny", 1)[0].width == 336


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ({"n_win": (7,), "models": ("biformer_stl",), "image": (512, 512)}, ProblemError, "do not tile"),
        ({"topks": (50, 4, 16, -2)}, ProblemError, "stage 1 of biformer_tiny: top-k 50"),
        ({"topks": (1, 4)}, ProblemError, "one value per stage"),
        ({"topks": (0, 0, 0, 0)}, UsageError, "no stage has attention"),
        ({"backends": ("gather",), "skip": ("gather",)}, UsageError, "no backend is left"),
        ({"l2": "tepid"}, UsageError, "these are: cold, warm"),
        ({"regimes": ("lazy",)}, UsageError, "these are: eager, graph, compile"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met_say_why(
    asked: dict[str, Any], kind: type[BratuneError], said: str
) -> None:
    with pytest.raises(kind) as error:
        make_request(CPU, **asked)
    assert said in str(error.value)


def test_auto_batch_is_a_power_of_two_that_grows_with_memory_and_falls_with_resolution() -> None:
    def batch(machine: Machine, **asked: Any) -> int:
        return make_request(machine, batches=("auto",), **asked).batches[0]

    small = dataclasses.replace(GPU, memory_gib=1.0)
    assert batch(GPU) == 256
    assert batch(small) < batch(GPU)
    assert batch(small, task="detection") < batch(small)
    assert batch(small, direction="fwd-bwd") < batch(small)
    assert batch(small).bit_count() == 1


# --- cells -------------------------------------------------------------------------------------------


def test_a_stage_is_measured_by_every_backend_the_baseline_first() -> None:
    (scene,) = scenes(make_request(CPU))
    names = [cell.backend for cell in scene.attention_cells(scene.stages[0])]
    assert names[0] == BASELINE
    assert sorted(names) == sorted(registry.names())


def test_full_attention_is_measured_in_its_two_forms() -> None:
    (scene,) = scenes(make_request(CPU, routes=("local", "same")))
    names = [cell.backend for cell in scene.attention_cells(scene.stages[3])]
    assert names == ["gather", "gather-sdpa"]


def test_every_kind_of_routes_is_measured_by_every_backend() -> None:
    request = make_request(CPU, routes=("recorded", "local"), backends=("gather", "dense"))
    (scene,) = scenes(request)
    found = [(c.route_distribution, c.backend) for c in scene.attention_cells(scene.stages[1])]
    assert found == [(kind, name) for kind in ("recorded", "local") for name in ("gather", "dense")]


@pytest.mark.parametrize(
    ("layout", "kind", "missing"),
    [
        ("biformer", "routed", set()),
        ("stl", "routed", {"pos_embed"}),
        ("biformer", "full", {"routing"}),
        ("stl_nchw", "full", {"pos_embed", "routing"}),
    ],
)
def test_parts_of_a_block(layout: str, kind: str, missing: set[str]) -> None:
    every = {"pos_embed", "norm", "qkv", "routing", "attention", "lepe", "proj", "mlp"}
    assert set(parts_of(layout, kind)) == every - missing


def test_a_stage_of_convolutions_has_no_attention_to_measure() -> None:
    (scene,) = scenes(make_request(CPU, topks=(0, 4, 16, -2)))
    assert list(scene.attention_cells(scene.stages[0])) == []
    assert list(scene.part_cells(scene.stages[0])) == []
    assert scene.model_cell(("gather",)).problem == scene.stages[1].problem


def test_every_combination_of_model_batch_regime_and_cache_is_a_scene() -> None:
    request = make_request(
        CPU, models=("biformer_tiny", "biformer_stl"), batches=(1, 4), l2="both", regimes=("eager", "compile")
    )
    found = scenes(request)
    assert len(found) == 16
    ids = [cell.cell_id for cell in all_cells(request)]
    assert len(set(ids)) == len(ids)


def test_a_model_cell_knows_its_stages() -> None:
    (scene,) = scenes(make_request(CPU, models=("biformer_small",), task="segmentation"))
    cell = scene.model_cell(("gather", "dense", "gather", "gather-sdpa"))
    assert (cell.backend, cell.n_win, cell.topk) == (
        "gather,dense,gather,gather-sdpa",
        "8,8,8,0",
        "1,4,16,-2",
    )
    assert model_stages(cell) == scene.stages


# --- counted work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_counted_multiply_adds_are_the_published_ones(name: str) -> None:
    variant = VARIANTS[name]
    counted = model_macs(variant, stages(variant, 224, 224), classes=1000)
    assert counted / 1e9 == pytest.approx(variant.gmacs_224, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "image", "n_win", "gmacs"),
    [
        ("biformer_tiny", (512, 512), 8, 13.68),
        ("biformer_small", (512, 512), 16, 23.82),
        ("biformer_base", (448, 448), 7, 44.01),
        ("biformer_small", (800, 1344), 16, 142.36),  # padded in every routed stage
    ],
)
def test_counted_multiply_adds_include_padding(
    name: str, image: tuple[int, int], n_win: int, gmacs: float
) -> None:
    found = stages(get_variant(name), *image, n_win=n_win)
    assert model_macs(get_variant(name), found) / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "topk", "pixels"),
    [
        ("biformer_tiny", 4, 224),
        ("biformer_tiny", 4, 200),  # S does not tile the map: the input is padded, then projected
        ("biformer_tiny", 0, 224),
        ("biformer_tiny", -1, 224),
        ("biformer_tiny", -2, 224),
        ("biformer_stl_nchw", 4, 200),  # queries, keys and values are padded, after the projection
        ("biformer_stl_nchw", -1, 224),
    ],
)
def test_a_block_is_counted_as_it_runs(name: str, topk: int, pixels: int) -> None:
    variant = get_variant(name)
    topks = (topk, *variant.topks[1:])
    stage = stages(variant, pixels, pixels, topks=topks)[0]
    kind = Block if variant.layout == "biformer" else NCHWBlockSTL
    how: dict[str, Any] = {"auto_pad": True, "kv_downsample_mode": "identity"} if kind is Block else {}
    block = kind(
        stage.dim,
        num_heads=stage.dim // variant.head_dim,
        topk=topk,
        mlp_ratio=variant.mlp_ratio,
        side_dwconv=variant.side_dwconv,
        backend="gather",
        **how,
    ).eval()
    x = torch.zeros(1, stage.height, stage.width, stage.dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(x)
    assert counter.get_total_flops() == 2 * block_macs(variant, stage)


def test_parts_add_up_to_the_block_and_scale_with_the_batch() -> None:
    variant = get_variant("biformer_small")
    for stage in stages(variant, 224, 224):
        assert sum(part_macs(variant, stage).values()) == block_macs(variant, stage)
        assert block_macs(variant, stage, batch=8) == 8 * block_macs(variant, stage)


@pytest.mark.parametrize(
    ("side", "topk", "best"), [(56, 1, 14.6), (28, 4, 11.6), (14, 16, 9.2), (224, 4, 46.5)]
)
def test_the_s_with_the_fewest_multiply_adds(side: int, topk: int, best: float) -> None:
    assert round(optimal_n_win(side, side, topk), 1) == best


def test_that_s_is_the_minimum_of_what_is_counted() -> None:
    """Among the S that divide a map of 240 tokens a side, the nearest two on either side are the cheapest."""
    variant = get_variant("biformer_small")

    def counted(s: int) -> int:
        stage = stages(variant, 960, 960, n_win=s)[0]
        macs = part_macs(variant, stage)
        return macs["routing"] + macs["attention"]

    found = {s: counted(s) for s in (20, 24, 30, 40, 48, 60)}
    best = optimal_n_win(240, 240, 1)  # 38.6
    assert min(found, key=lambda s: found[s]) == 40
    assert min(found, key=lambda s: abs(s - best)) == 40


# --- the command that repeats a row ------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"models": ("biformer_stl",), "batches": (4,), "dtype": "float16", "amp": True, "seed": 3},
        {"task": "detection", "models": ("biformer_small",), "channels_last": True, "l2": "cold"},
        {"task": "segmentation", "routes": ("same",), "direction": "fwd-bwd", "regimes": ("compile",)},
        {"n_win": (14,), "topks": (2, 8, 32, -2)},
    ],
    ids=str,
)
def test_the_command_of_a_row_gives_the_row_again(asked: dict[str, Any]) -> None:
    from bratune.cli.profile import command

    for cell in all_cells(make_request(CPU, **asked)):
        words = shlex.split(command_for(cell))
        assert words[:2] == ["bratune", "profile"]
        (given,) = settings_of(command.make_context("profile", words[2:]).params)
        values = request_values(given) | {"regimes": given["regime"], "l2": given["l2"]}
        again = make_request(CPU, **values)
        rows = {c.cell_id for c in all_cells(again)}
        for scene in scenes(again):
            rows |= {scene.block_cell(s, cell.backend).cell_id for s in scene.stages if cell.part == "block"}
        assert cell.cell_id in rows, shlex.join(words)


def test_a_plan_says_every_cell_that_is_known_before() -> None:
    request = make_request(CPU, backends=("gather", "dense"))
    planned = session.plan(request)
    # three routed stages of 2 backends, 7 parts, a block; the last of 1 backend, 6 parts, a block; four
    # forms of the model, and the fastest of each stage
    assert len(planned) == 3 * (2 + 7 + 1) + (1 + 6 + 1) + 5
    assert [p.text for p in planned if p.cell is None][-1].endswith("fastest backend of each stage")
    only = session.plan(dataclasses.replace(request, whole_model=False), stages=(2,))
    assert len(only) == 10


def test_the_command_of_a_whole_model_asks_for_its_form_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from bratune.cli.profile import command

    monkeypatch.setattr("bratune.work.request.peer_name", lambda name: name)
    request = make_request(
        CPU, models=("biformer_tiny",), forms=("published", "gather", "auto", "runtime"), peers=("swin",)
    )
    (scene,) = scenes(request)
    for cell in (*scene.form_cells(), *scene.peer_cells()):
        words = shlex.split(command_for(cell))
        (given,) = settings_of(command.make_context("profile", words[2:]).params)
        assert not given["stages"]
        named: dict[str, Any] = {
            name: tuple((given[name] or "").split(",")) if given[name] else () for name in ("forms", "peers")
        }
        again = make_request(CPU, **request_values(given), regimes=given["regime"], l2=given["l2"], **named)
        (other,) = scenes(again)
        assert cell in (*other.form_cells(), *other.peer_cells()), shlex.join(words)
