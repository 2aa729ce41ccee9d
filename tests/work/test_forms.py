"""Forms of a whole model: the same weights, the same results, one training step for all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bratune
from bratune.cell import RUNTIME_FORMS, Cell
from bratune.errors import UnsupportedError
from bratune.machine import detect
from bratune.run.measure_cell import check
from bratune.work.call import build, training_step
from bratune.work.cells import Scene, scenes
from bratune.work.deploy import RUNTIMES
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


RUNTIME_PACKAGES = {form: runtime.package for form, runtime in RUNTIMES.items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models of one block per stage, and no files of earlier tests."""

    def model_for(cell: Cell, device: str) -> nn.Module:
        torch.manual_seed(cell.seed)
        sizes: dict[str, Any] = {"depth": (1, 1, 1, 1), "embed_dim": (16, 32, 32, 32), "head_dim": 16}
        model = bratune.create_model("biformer_tiny", n_win=2, topks=(1, 2, 4, -2), **sizes)
        return model.eval().to(getattr(torch, cell.problem.dtype))

    monkeypatch.setattr("bratune.work.forms.model_for", model_for)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files of the small model are kept: to write one takes ten seconds, and forms share it."""
    return tmp_path_factory.mktemp("written")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", RUNTIME_FORMS)
def test_a_model_in_another_runtime_agrees_in_the_data_type_that_is_asked(
    form: str, dtype: str, small: None, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(written))
    pytest.importorskip(RUNTIME_PACKAGES[form], reason=f"{form} is not installed (extra deploy)")
    pytest.importorskip("onnxscript", reason="ONNX files need onnxscript (extra deploy)")
    cell = cell_of(form, dtype=dtype)
    if (form, dtype) == ("onnxruntime", "bfloat16"):
        with pytest.raises(UnsupportedError, match="onnxruntime computes float32 models on a CPU, found bf"):
            build(cell, CPU)
        return
    found = check(dataclasses.replace(build(cell, CPU), attentions=tuple))
    in_half = form == "openvino-bf16" or dtype == "bfloat16"
    assert "reason" not in found, found
    assert found["tolerance"] == (0.1 if in_half else 5e-3)
    exact = found["max_rel_err"] < 1e-5
    assert exact != in_half  # bfloat16 shows, float32 does not
    monkeypatch.setattr("bratune.work.forms.write_file", None)  # the file is found on disk
    build(cell, CPU)


def test_the_file_of_a_runtime_follows_from_what_the_model_follows_from(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(model: nn.Module, images: torch.Tensor, path: Path, target: str) -> None:
        path.write_text(target)
        written.append(path)

    monkeypatch.setattr("bratune.work.forms.write_file", write)
    monkeypatch.setattr("bratune.work.forms.require", lambda target: None)
    monkeypatch.setattr("bratune.work.deploy.importlib.metadata.version", lambda name: "1")
    opened: list[tuple[Path, int, tuple[int, ...]]] = []

    def open_file(path: Path, target: str, *, threads: int, dtype: str, shape: tuple[int, ...]) -> nn.Module:
        opened.append((path, threads, tuple(shape)))
        return nn.Identity()

    monkeypatch.setattr("bratune.work.forms.open_file", open_file)
    for asked in ({}, {"batches": (3,)}, {"seed": 1}, {"n_win": (1,), "topks": (1, 1, 1, -2)}):
        build_form(cell_of("openvino", **asked), "cpu")
    build_form(cell_of("openvino-bf16"), "cpu")
    assert len(written) == 3  # another batch and another precision take the same file
    assert [shape[0] for _, _, shape in opened] == [2, 3, 2, 2, 2]
    assert {threads for _, threads, _ in opened} == {torch.get_num_threads()}


@pytest.mark.parametrize("form", RUNTIME_FORMS)
def test_what_other_runtimes_cannot_do_is_said(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, words in (
        ({"direction": "fwd-bwd"}, "is for inference; --direction fwd would work"),
        ({"amp": True, "dtype": "bfloat16"}, "no --amp would work"),
        ({"regimes": ("compile",)}, "--regime eager would work"),
        ({"dtype": "float16"}, "found float16"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            build(cell_of(form, **asked), CPU)
    with pytest.raises(UnsupportedError, match="is measured on CPUs; --device cpu would work"):
        build_form(cell_of(form), "cuda:0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"not installed: pip install 'bratune\[deploy\]'"):
        build(cell_of(form), CPU)


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
