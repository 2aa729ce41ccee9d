"""Exports for classification are loaded by timm and hydra, and train."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from frameworks import require
from sample_plans import RUN, make_plan

import bratune
from bratune.cli.export import command
from bratune.errors import PlanError, UnknownNameError, UsageError
from bratune.export.fields import identifier
from bratune.export.hydra import hydra_group
from bratune.export.timm import timm_module
from bratune.export.write import TARGETS, export
from bratune.kernels.biformer import BiFormer, BiFormerSTL, NCHWBiFormerSTL
from bratune.tune.plan import Plan, load_plan

NAME = "biformer_tiny_bratune_h200_224"
# Of every kind of model one, and the plan of a real run.
PLANS = {
    **{model: make_plan(model=model) for model in ("biformer_tiny", "biformer_stl", "biformer_stl_nchw")},
    "run": load_plan(RUN),
}


@pytest.fixture
def timm() -> Any:
    return require("timm")


def official_classes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand-ins for the official repository: its module and class names, with its argument lists."""
    seen: list[dict[str, Any]] = []

    def stand_in(own: Any) -> type:
        known = [
            p.name
            for p in inspect.signature(own).parameters.values()
            if p.kind is not inspect.Parameter.KEYWORD_ONLY  # ours: backend, config, features_only
        ]

        class Official(torch.nn.Module):
            def __init__(self, **arguments: Any) -> None:
                super().__init__()
                unknown = set(arguments) - set(known)
                if unknown:
                    raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
                seen.append(arguments)
                self.net = own(**arguments)

        return Official

    for home, name, own in (
        ("biformer", "BiFormer", BiFormer),
        ("biformer_stl", "BiFormerSTL", BiFormerSTL),
        ("biformer_stl_nchw", "nchwBiFormerSTL", NCHWBiFormerSTL),
    ):
        module = types.ModuleType(f"models.{home}")
        setattr(module, name, stand_in(own))
        monkeypatch.setitem(sys.modules, f"models.{home}", module)
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    return seen


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", PLANS)
def test_timm_builds_the_tuned_model_by_its_registered_name(
    timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seen = official_classes(monkeypatch)
    plan = PLANS[kind]
    path = export(plan, "timm", tmp_path)
    load(path, monkeypatch)
    timm.create_model(path.stem, num_classes=10, drop_path_rate=0.1, drop_rate=0.0)
    (arguments,) = seen
    assert list(arguments["topks"]) == list(plan.topks)
    assert arguments.get("n_win", arguments.get("n_wins")) in (7, [7, 7, 7, 7])
    assert (arguments["num_classes"], arguments["drop_path_rate"]) == (10, 0.1)


@pytest.mark.parametrize("kind", PLANS)
def test_model_with_backends_equals_the_one_that_bratune_makes(
    timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plan = PLANS[kind] if kind == "run" else make_plan(model=kind, backend="dense")
    path = export(plan, "timm", tmp_path)
    load(path, monkeypatch)
    built = timm.create_model(f"{path.stem}_backends", num_classes=10).eval()
    own = bratune.create_model(plan, num_classes=10).eval()
    own.load_state_dict(built.state_dict())
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(built(image), own(image))
    expected = [
        name for name, depth in zip(plan.backends, built_depths(built), strict=True) for _ in range(depth)
    ]
    assert [m.backend for m in built.modules() if hasattr(m, "n_win")] == [name for name in expected if name]


def built_depths(model: Any) -> list[int]:
    return [len(getattr(stage, "blocks", stage)) for stage in model.stages]


@pytest.mark.parametrize("home", ["timm.models", "timm.models.registry"])
def test_module_accepts_the_calls_of_both_generations_of_timm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    registered: dict[str, Any] = {}
    for name in ("timm", "timm.models", "timm.models.registry"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(
        sys.modules[home],
        "register_model",
        lambda f: registered.setdefault(f.__name__, f),
        raising=False,
    )
    seen = official_classes(monkeypatch)
    module = load(export(make_plan(), "timm", tmp_path), monkeypatch)
    assert list(registered) == [NAME, f"{NAME}_backends"]
    build = getattr(module, NAME)
    build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, num_classes=5)
    build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, num_classes=5)
    assert len(seen) == 2
    with pytest.raises(ValueError, match="no weights to download"):
        build(pretrained=True)


def test_model_affecting_and_cost_only_fields_are_marked() -> None:
    text = timm_module(make_plan(backend="dense"))
    lines = {line.split("=")[0].strip(): line for line in text.splitlines() if "=" in line}
    assert "# model: tuned" in lines["n_win"]
    assert "# model: tuned" in lines["topks"]
    assert "# cost" in lines["backend"]
    assert "# cost" in lines["use_checkpoint_stages"]
    assert f"import {NAME}" in text


def compose(folder: Path, group: str, text: str) -> Any:
    hydra = pytest.importorskip("hydra", reason="the group file is for hydra, which is not installed")
    (folder / "bratune").mkdir(parents=True)
    # What the official train_args.yaml has, as far as the group file touches it.
    (folder / "train_args.yaml").write_text(
        "model: biformer_small\ninput_size: 224\nbatch_size: 64\ndrop_path: 0.1\nlr: 1e-3\nepochs: 300\n"
    )
    (folder / "bratune" / f"{group}.yaml").write_text(text)
    with hydra.initialize_config_dir(config_dir=str(folder), version_base=None):
        return hydra.compose(config_name="train_args", overrides=[f"+bratune={group}"])


@pytest.mark.parametrize("kind", ["biformer_tiny", "run"])
def test_hydra_group_replaces_the_model(tmp_path: Path, kind: str) -> None:
    name = identifier(PLANS[kind])
    config = compose(tmp_path, name, hydra_group(PLANS[kind]))
    assert (config.model, config.input_size, config.batch_size, config.epochs) == (name, 224, 128, 300)
    assert config.lr == pytest.approx(5e-4)


def test_hydra_group_without_its_package_line_would_change_nothing(tmp_path: Path) -> None:
    text = hydra_group(make_plan())
    assert text.startswith("# @package _global_\n")
    config = compose(tmp_path, NAME, text.partition("\n")[2])
    assert config.model == "biformer_small"


def test_plan_with_one_s_per_stage_is_refused_where_it_cannot_be_held(tmp_path: Path) -> None:
    plan = make_plan()
    setting = plan.setting.replace(n_win=(14, 7, 7, 7))
    uneven = Plan(**{f: getattr(plan, f) for f in plan.__dataclass_fields__} | {"setting": setting})
    for target in ("timm", "mmseg", "mmdet"):
        with pytest.raises(PlanError, match="takes one S for all stages"):
            export(uneven, target, tmp_path, force=True)
    assert export(uneven, "plan", tmp_path / "plan.json").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_command_writes_every_target(tmp_path: Path, target: str) -> None:
    path = make_plan().save(tmp_path / "plan.json")
    result = CliRunner().invoke(
        command,
        [str(path), "--to", target, "-o", str(tmp_path / "out"), *(["--force"] if target != "plan" else [])],
    )
    assert result.exit_code == 0, result.output
    written = Path(result.stdout.splitlines()[0])
    assert written.exists()
    assert written.stem == NAME


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": "onnx"}, UnknownNameError, "plan, timm, hydra"),
        ({"target": "timm", "name": "my-model"}, UsageError, "no Python identifier"),
        ({"target": "mmseg", "head": "fcn"}, UnknownNameError, "sfpn, upernet"),
        ({"target": "mmdet", "style": "4.x"}, UnknownNameError, "0.x, 1.x"),
        ({"target": "yolo", "scale": "q"}, UnknownNameError, "n, s, m, l, x"),
    ],
)
def test_wrong_requests_say_what_would_work(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        export(make_plan(), output=tmp_path, force=True, **options)


@pytest.mark.parametrize(
    ("target", "option", "words"),
    [
        ("timm", ["--head", "sfpn"], "--head means nothing to timm; it is for mmseg and mmdet"),
        ("hydra", ["--base", "x.py"], "--base means nothing to hydra"),
        ("mmseg", ["--scale", "n"], "--scale means nothing to mmseg; it is for yolo"),
        ("yolo", ["--name", "mine"], "--name means nothing to yolo; it is for timm and hydra"),
    ],
)
def test_option_for_another_target_is_refused(
    tmp_path: Path, target: str, option: list[str], words: str
) -> None:
    path = make_plan().save(tmp_path / "plan.json")
    result = CliRunner().invoke(command, [str(path), "--to", target, *option])
    assert isinstance(result.exception, UsageError)
    assert words in str(result.exception)


def test_launch_line_names_the_model_after_the_file(tmp_path: Path) -> None:
    path = make_plan().save(tmp_path / "plan.json")
    result = CliRunner().invoke(command, [str(path), "--to", "timm", "-o", str(tmp_path / "mine.py")])
    assert "model=mine " in result.stderr
    assert "def mine(" in (tmp_path / "mine.py").read_text()


def test_file_that_cannot_be_written_is_one_sentence() -> None:
    with pytest.raises(PlanError, match="cannot be written"):
        export(make_plan(), "hydra", "/proc/none/x.yaml")


def test_plan_of_a_run_makes_the_model_that_it_was_measured_with(tmp_path: Path) -> None:
    plan = load_plan(export(PLANS["run"], "plan", tmp_path))
    assert plan == PLANS["run"]
    model = bratune.create_model(plan, num_classes=10).eval()
    depths = built_depths(model)
    backends = [b for b, depth in zip(plan.backends, depths, strict=True) for _ in range(depth) if b]
    assert [m.backend for m in model.modules() if hasattr(m, "n_win")] == backends
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 10)


def test_exported_module_needs_neither_bratune_nor_torch_to_be_read(tmp_path: Path) -> None:
    path = export(make_plan(), "timm", tmp_path)
    code = f"import ast; ast.parse(open({str(path)!r}).read())"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_plan_trains_on_real_pixels_with_a_falling_loss(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    digits = datasets.load_digits()
    pixels = torch.tensor(digits.images[:64], dtype=torch.float32)[:, None] / 16.0
    images = torch.nn.functional.interpolate(pixels, size=64, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target[:64])
    plan = make_plan(n_win=2, topks=(1, 2, 3, -2), backend="gather-sdpa", size=(64, 64), dtype="float32")
    torch.manual_seed(0)
    model = bratune.create_model(plan.save(tmp_path / "plan.json"), num_classes=10, depth=(1, 1, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
