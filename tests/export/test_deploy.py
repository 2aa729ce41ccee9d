"""Models as files of other runtimes: run there, equal to PyTorch at any batch, with the plan inside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from sample_plans import make_plan
from torch import Tensor, nn

import bratune
from bratune.cli.export import command
from bratune.errors import MissingPackageError, ProblemError, UnknownNameError, UsageError
from bratune.export.deploy import deploy, plan_in
from bratune.kernels.layer import RoutedLayer
from bratune.kernels.native.library import find
from bratune.work.deploy import TARGETS, open_file

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "pt2": ()}


def need(target: str) -> None:
    for package in PACKAGES[target]:
        pytest.importorskip(package, reason=f"{target} files need {package} (extra deploy)")


class Mixed(nn.Module):
    """A routed layer of this package within a network of somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.attn = bratune.kernels.layer.NCHWBiLevelRoutingAttention(16, num_heads=2, n_win=2, topk=2)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.attn(self.stem(x))
        return {"map": x, "scores": self.head(x).mean((2, 3))}


def small() -> nn.Module:
    torch.manual_seed(0)
    plan = make_plan(n_win=2, topks=(1, 2, 3, -2), backend="gather", size=(32, 32), dtype="float32")
    sizes: dict[str, Any] = {"depth": (1, 1, 1, 1), "embed_dim": (16, 32, 32, 32), "num_classes": 3}
    return bratune.create_model(plan, **sizes, qk_dims=sizes["embed_dim"], head_dim=16).eval()


@pytest.mark.parametrize("target", TARGETS)
def test_one_model_gives_the_same_in_every_runtime_at_batches_that_it_never_saw(
    target: str, tmp_path: Path
) -> None:
    need(target)
    model, plan = small(), make_plan(size=(32, 32))
    path = tmp_path / f"model{TARGETS[target]}"
    made = deploy(model, torch.randn(1, 3, 32, 32), target, path, plan=plan)
    assert made.path == path
    assert made.apart.keys() == {1, 3}
    assert max(made.apart.values()) < 1e-5  # in float32 without a near tie between routes
    run = open_file(path, target, threads=1)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert plan_in(path) == plan
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


@pytest.mark.parametrize("target", TARGETS)
def test_a_foreign_model_keeps_its_layers_and_its_nested_outputs(target: str, tmp_path: Path) -> None:
    need(target)
    torch.manual_seed(0)
    model = Mixed().eval()
    layer = model.attn
    made = deploy(model, torch.randn(2, 3, 16, 16), target, tmp_path / f"m{TARGETS[target]}")
    assert max(made.apart.values()) < 1e-5
    assert model.attn is layer
    assert "a layer of bratune already" in made.left["attn"]
    assert plan_in(made.path) is None


@pytest.mark.parametrize("make", [small, Mixed])
def test_a_file_holds_ordinary_operations_whatever_backend_is_named(make: Any, tmp_path: Path) -> None:
    library = find()
    if isinstance(library, str):
        pytest.skip(library)
    model = make().eval()
    layers = [m for m in model.modules() if isinstance(m, RoutedLayer)]
    for layer in layers:
        layer.set_backend("native")
    made = deploy(model, torch.randn(2, 3, 32, 32), "pt2", tmp_path / "m.pt2")
    assert max(made.apart.values()) < 1e-5
    assert {layer.backend for layer in layers} == {"native"}
    graph = torch.export.load(made.path).graph
    assert not [node for node in graph.nodes if "bratune" in str(node.target)]


class Wrong(nn.Module):
    """Gives something else in a graph than in Python."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_compiling() else x


class Fixed(nn.Module):
    """Is written for one batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1) + torch.arange(2.0)[:, None] if x.shape[0] == 2 else x.flatten(1)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"the pt2 file differs from the model by .* at batch 1"):
        deploy(Wrong().eval(), torch.randn(1, 3, 4, 4), "pt2", tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_settles_on_a_batch_is_told_so_and_exported_for_one(tmp_path: Path) -> None:
    model, x = Fixed().eval(), torch.randn(2, 3, 4, 4)
    with pytest.raises(ProblemError, match=r"settles on one batch.*--batch-size N writes it for one"):
        deploy(model, x, "pt2", tmp_path / "m.pt2")
    made = deploy(model, x, "pt2", tmp_path / "m.pt2", open_batch=False)
    assert made.apart == {2: 0.0}


@pytest.mark.parametrize(
    ("model", "words"),
    [(small().train(), "in training"), (small().double(), "in float32 from the CPU")],
    ids=["training", "double"],
)
def test_what_cannot_be_exported_says_what_could(model: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=words):
        deploy(model, torch.randn(1, 3, 32, 32), "pt2", tmp_path / "m.pt2")


def test_a_missing_tool_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"needs the package openvino.*bratune\[deploy\]"):
        deploy(small(), torch.randn(1, 3, 32, 32), "openvino", tmp_path / "m.xml")


FACTORY = """
import torch
class Net(torch.nn.Sequential):
    pass
def make():
    return Net(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())
number = 3
def broken():
    raise OSError("no such file")
"""


def test_the_command_exports_a_function_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebodys_net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "w.pth"
    torch.save({"0.weight": torch.ones(4, 3, 1, 1), "0.bias": torch.zeros(4)}, weights)
    options = ["--model", "somebodys_net:make", "--input", "1x3x8x8", "--to", "pt2", "-o", "x.pt2"]
    result = CliRunner().invoke(command, [*options, "--checkpoint", str(weights)])
    assert result.exit_code == 0, result.output
    assert result.stdout == "x.pt2\n"
    assert "run and compared with PyTorch" in result.stderr
    run = open_file(Path("x.pt2"), "pt2", threads=1)
    assert torch.equal(run(torch.ones(4, 3, 8, 8)), torch.full((4, 4, 8, 8), 3.0))
    sys.modules.pop("somebodys_net")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "pt2"], "--to pt2 exports one model: that of PLAN, or --model NAME"),
        (["--to", "timm"], "--to timm writes a plan, and none is named"),
        (["--to", "timm", "--input", "1x3x8x8"], "--input means nothing to timm; it is for onnx and"),
        (["--to", "pt2", "--model", "somebodys_net:none"], "somebodys_net:none cannot be imported"),
        (["--to", "pt2", "--model", "nowhere:f"], "nowhere:f cannot be imported: No module named 'nowhere'"),
        (["--to", "pt2", "--model", "somebodys_net:number"], "is a int, not a function that makes a model"),
        (["--to", "pt2", "--model", "somebodys_net:broken"], r"raises OSError: no such file"),
        (["--to", "pt2", "--model", "a b:c"], "names no function that makes a model"),
        (["--to", "pt2", "--model", "somebodys_net:make", "--input", "3xax8"], "'3xax8' is no shape"),
        (["--to", "pt2", "--model", "biformer_tinny"], "did you mean biformer_tiny"),
    ],
)
def test_wrong_commands_are_one_sentence(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebodys_net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, options)
    sys.modules.pop("somebodys_net", None)
    assert isinstance(result.exception, UsageError | UnknownNameError)
    assert words in str(result.exception)


def test_help_of_export_needs_no_torch() -> None:
    code = "import sys, bratune.cli.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
