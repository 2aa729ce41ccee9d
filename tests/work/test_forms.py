"""Forms of a whole model: the same weights, the same results, one training step for all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from bratune.cell import Cell
from bratune.errors import UnsupportedError
from bratune.machine import detect
from bratune.run.measure_cell import check
from bratune.work.call import build, training_step
from bratune.work.cells import Scene, scenes
from bratune.work.forms import build_form
from bratune.work.request import make_request

CPU = detect("cpu")


def scene(**asked: Any) -> Scene:
    given = {"image": (64, 64), "n_win": (2,), "topks": (1, 2, 4, -2), "batches": (2,), **asked}
    (found,) = scenes(make_request(CPU, **given))
    return found


def cell_of(form: str, **asked: Any) -> Cell:
    return scene(**asked).model_cell(("auto",), form=form)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("direction", ["fwd", "fwd-bwd"])
@pytest.mark.parametrize("form", ["published", "plain", "runtime", "lean"])
def test_every_form_agrees_with_the_plain_model_or_says_why_it_is_none(
    form: str, direction: str, task: str
) -> None:
    cell = cell_of(form, direction=direction, task=task)
    if (form, direction) in (("runtime", "fwd-bwd"), ("lean", "fwd")):
        with pytest.raises(UnsupportedError, match="would work"):
            build(cell, CPU)
        return
    work = build(cell, CPU)
    agreement = work.agreement()
    assert (agreement is None) == (form == "plain")
    if agreement:
        assert agreement[0] <= agreement[1]
    given = work.call()
    if direction == "fwd-bwd":
        assert sum(g is not None and bool(g.abs().max() > 0) for g in given) > 50
    else:
        assert len(given) == (2 if task == "classification" else 4)


@pytest.mark.parametrize("direction", ["fwd", "fwd-bwd"])
def test_a_form_that_computes_something_else_is_incorrect(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> Any:
            return 1.1 * self.model(x)

    monkeypatch.setattr("bratune.work.forms.as_published", Wrong)
    work = build(cell_of("published", direction=direction), CPU)
    found = check(dataclasses.replace(work, attentions=tuple))
    assert "differs from the plain model by" in found["reason"]


def test_forms_run_the_same_weights() -> None:
    published, runtime = (build_form(cell_of(form), "cpu") for form in ("published", "runtime"))
    assert torch.equal(published.images, runtime.images)
    assert published.plain is not None
    assert runtime.plain is not None
    for a, b in zip(published.plain.parameters(), runtime.plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_official_models_have_a_published_form() -> None:
    cell = cell_of("published", models=("biformer_stl",), topks=(1, 2, 4, 4))
    with pytest.raises(UnsupportedError, match="official composition"):
        build(cell, CPU)


def test_the_loss_of_a_step_counts_every_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a * x, self.b * 2 * x

    a, b = training_step(Two(), torch.ones(3, 2))
    assert a is not None
    assert b is not None
    ramp = torch.linspace(-1, 1, 6).view(3, 2).sum(0)
    assert torch.allclose(a, ramp)
    assert torch.allclose(b, 2 * ramp)
