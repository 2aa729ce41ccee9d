"""Cells of a model of somebody else: every routed layer, the whole model, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn

from bratune.cell import Cell
from bratune.engine import Engine
from bratune.errors import UsageError
from bratune.foreign import swap
from bratune.machine import detect
from bratune.record import Record
from bratune.run import session
from bratune.run.groups import group_of, is_baseline
from bratune.run.measure_cell import check, refusals
from bratune.run.repro import command_for
from bratune.work import factory, yours
from bratune.work.call import build
from bratune.work.contents import contents_of
from bratune.work.yours import YoursRequest, find_sites, live, request_of

CPU = detect("cpu")
YOLO, UNET = "somebodys_nets:make_yolo", "somebodys_nets:make_unet"
NAMES = ("gather", "reference", "gather-sdpa", "dense")


def request(model: str = YOLO, shape: str = "2x3x16x24", **asked: Any) -> YoursRequest:
    sites, left = find_sites(model, shape, dtype=asked.get("dtype", "float32"), device="cpu")
    return request_of(model, shape, CPU, sites=sites, left=left, backends=NAMES, **asked)


def test_layers_are_found_with_the_calls_that_they_make() -> None:
    sites = {site.name: site for site in request(UNET, "1x3x10x14").sites}
    assert list(sites) == ["attn"]  # `again` is the same layer
    assert sites["attn"].calls == 2
    problem = sites["attn"].problem
    assert (problem.height, problem.width, problem.region, problem.topk) == (6, 8, (3, 4), 2)
    left = request(UNET, "1x3x10x14").left
    assert "differs" in left["alike"]
    assert left["unused"] == "was not called in a run of the example"


@pytest.mark.parametrize("direction", ["fwd", "fwd-bwd"])
@pytest.mark.parametrize(("model", "shape"), [(YOLO, "2x3x16x24"), (UNET, "1x3x10x14")], ids=["yolo", "unet"])
def test_every_layer_and_the_whole_model_pass_the_gate(model: str, shape: str, direction: str) -> None:
    asked = request(model, shape, direction=direction)
    cells = asked.attention_cells()
    assert len(cells) == len(NAMES) * len(asked.sites)
    for cell in cells:
        assert Cell.from_dict(cell.to_dict()) == cell
        if not refusals(cell, CPU):
            work = build(cell, CPU)
            found = check(work)
            assert "reason" not in found, found
            assert found["max_rel_err"] < 1e-5
            assert (found["grad_rel_err"] is not None) == (direction == "fwd-bwd")
            work.call()
    assert build(asked.model_cell(), CPU).agreement() is None
    each = asked.model_cell(*["dense", "gather-sdpa"][: len(asked.sites)])
    for cell in (asked.model_cell("auto"), asked.model_cell("gather"), each):
        work = build(cell, CPU)
        agreement = work.agreement()
        assert agreement is not None
        assert agreement[0] < 1e-4
        given = work.call()
        assert direction == "fwd" or sum(g is not None and bool(g.abs().max() > 0) for g in given) > 5


def test_a_swap_that_computes_something_else_is_incorrect(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request()

    def wrong(model: nn.Module, *args: Any) -> None:
        swap(model, *args)
        with torch.no_grad():
            model.get_submodule("c2f.0").scale = 1.0  # type: ignore[assignment]

    monkeypatch.setattr(yours, "swap", wrong)
    with torch.no_grad():
        found = check(build(asked.model_cell("gather"), CPU))
    assert "differs from the plain model" in found["reason"]


def test_layers_run_by_the_backends_that_the_cell_names_and_the_model_itself_is_not_changed() -> None:
    asked = request()
    model: Any = yours.model_of(asked.model_cell("dense", "gather"), "cpu")[0].model
    assert [layer.backend for layer in model.c2f] == ["dense", "gather"]
    plain: Any = yours.model_of(asked.model_cell(), "cpu")[0].model
    assert not any(hasattr(layer, "backend") for layer in plain.c2f)


def test_cells_of_one_question_take_turns_with_the_model_as_it_is() -> None:
    asked = request()
    cells = [asked.model_cell(), asked.model_cell("gather"), asked.model_cell("auto")]
    assert len({group_of(cell) for cell in cells}) == 1
    assert [is_baseline(cell) for cell in cells] == [True, False, False]
    attention = asked.attention_cells()
    assert len({group_of(cell) for cell in attention}) == 2
    assert [cell.backend for cell in attention if is_baseline(cell)] == ["gather"] * 2


@pytest.mark.parametrize("answer_first", [True, False])
def test_under_a_budget_the_whole_model_comes_before_its_layers(answer_first: bool) -> None:
    asked = request()
    turns: list[list[Cell]] = []

    class Anything:
        def run(self, cells: list[Cell]) -> Iterator[Record]:
            turns.append(cells)
            yield from (Record.of(c, CPU, median_ms=1.0 if c.backend == "dense" else 2.0) for c in cells)

    rows = list(session.run(asked, cast(Engine, Anything()), answer_first=answer_first))
    assert (turns[0][0] == asked.model_cell()) is answer_first
    assert turns[-1][0] == asked.model_cell()  # the fastest of every layer takes turns with it
    assert turns[-1][-1] == asked.model_cell("dense", "dense")
    assert len({row.cell_id for row in rows}) == len(rows) == len(asked.attention_cells()) + 4


def test_the_command_of_a_row_names_the_function_and_rows_follow_its_sources(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = request().model_cell("gather")
    command = command_for(cell)
    assert command.startswith(f"bratune profile --model {YOLO} --input 2x3x16x24 --dtype fp32 ")
    assert command.endswith("--backend gather")
    before = contents_of(cell)["backend_package"]
    assert before.startswith("somebodys_nets ")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "another_net.py").write_text("x = 1")
    first = factory.source_of("another_net:x")
    factory.source_of.cache_clear()
    (tmp_path / "another_net.py").write_text("x = 2")
    assert factory.source_of("another_net:x") != first


def test_a_live_model_has_cells_in_this_process_with_what_else_it_is_called_with() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = factory.load_factory(YOLO)

        def forward(self, *, number: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.net(x) + number}

    model = Two().eval()
    name, shape = live(model, {"number": 2, "x": torch.randn(1, 3, 16, 16)})
    assert shape == "1x3x16x16"
    sites, left = find_sites(name, shape, dtype="float32", device="cpu")
    assert [site.name for site in sites] == ["net.c2f.0", "net.c2f.1"]
    cell = request_of(name, shape, CPU, sites=sites, left=left).model_cell("gather")
    agreement = build(cell, CPU).agreement()
    assert agreement is not None
    assert agreement[0] < 1e-5
    assert command_for(cell) == ""


def test_a_model_without_routed_layers_is_told_so() -> None:
    with pytest.raises(UsageError, match=r"nets:none has no routed layer that is proved to be one .a: why"):
        request_of("nets:none", "1x3x8x8", CPU, sites=[], left={"a": "why"})


def test_a_shape_that_the_model_does_not_take_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=f"{YOLO} cannot be called with 1x4x16x16: .*channels"):
        find_sites(YOLO, "1x4x16x16", dtype="float32", device="cpu")
