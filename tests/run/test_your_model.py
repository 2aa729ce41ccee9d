"""A model of somebody else is measured by the one engine: in passes, or in this process, which is said."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from sample_plans import make_plan
from somebodys_nets import UNetLike, YOLOLike

import bratune
from bratune.cli.export import command as export
from bratune.cli.profile import command as profile
from bratune.cli.report import command as report
from bratune.cli.tune import command as tune
from bratune.errors import PlanError, UsageError
from bratune.export.deploy import plan_in
from bratune.machine import detect
from bratune.record import Record
from bratune.run.yours import Measured, ask, measure_model
from bratune.tune.model_plan import ModelPlan, plan_of
from bratune.work.deploy import open_file
from bratune.work.factory import load_factory
from bratune.work.yours import YoursRequest

pytestmark = pytest.mark.usefixtures("forked")

YOLO = "somebodys_nets:make_yolo"
SHORT: dict[str, Any] = {"min_time_s": 0.01, "warmup_s": 0.01, "timeout_s": 1.0, "min_samples": 3}
FEW: dict[str, Any] = {"backends": ("gather", "dense"), "device": "cpu", "effort": "quick", **SHORT}


def test_a_function_is_measured_in_fresh_processes_and_its_rows_are_found_again(tmp_path: Path) -> None:
    store = tmp_path / "records.jsonl"
    found = measure_model(YOLO, "1x3x16x24", passes=2, store=store, **FEW)
    assert [row.outcome for row in found.rows] == ["measured"] * len(found.rows)
    attention = [(row.stage, row.backend) for row in found.rows if row.part == "attention"]
    assert attention == [(1, "gather"), (1, "dense"), (2, "gather"), (2, "dense")]
    whole = [row for row in found.rows if row.part == "model"]
    assert [row.backend for row in whole][:3] == ["", "gather", "auto"]
    assert {row.form for row in found.rows} == {"yours"}
    assert {row.passes for row in found.rows} == {2}
    assert whole[0].ratio is None
    assert all(row.ratio is not None and row.baseline == "" for row in whole[1:])
    assert all(row.repro.startswith(f"bratune profile --model {YOLO}") for row in found.rows)
    again = measure_model(YOLO, "1x3x16x24", passes=2, store=store, **FEW)
    assert [row.median_ms for row in again.rows] == [row.median_ms for row in found.rows]
    plan = plan_of(found)
    assert {layer.name for layer in plan.layers} == {"c2f.0", "c2f.1"}
    assert plan.verdict in ("FASTER", "SLOWER", "SAME", "UNDECIDED")
    assert plan.speedup is not None


def test_a_model_of_this_process_is_measured_in_it_and_that_is_said() -> None:
    torch.manual_seed(0)
    model = YOLOLike().eval()
    layers = list(model.c2f)
    with pytest.warns(UserWarning, match="in one pass: times are shown and no difference is called real"):
        frame = bratune.profile_model(model, torch.randn(1, 3, 16, 16), **FEW)
    assert list(model.c2f) == layers
    assert set(frame["part"]) == {"attention", "model"}
    assert (frame["outcome"] == "measured").all()
    assert set(frame["model"]) == {"live:YOLOLike"}


def test_a_plan_applies_with_accelerate_and_survives_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 10, 14)
    with pytest.warns(UserWarning, match="in one pass"):
        plan = bratune.tune_model(UNetLike().eval(), x, **FEW)
    assert plan.verdict == "not compared"
    assert "nothing is shown" in plan.reason
    assert ModelPlan.load(plan.save(tmp_path / "plan.json")) == plan
    model: Any = UNetLike().eval()
    found = bratune.accelerate(model, x, plan=plan)
    assert {name: model.get_submodule(name).backend for name in found.swapped if name in ("attn",)} == {
        "attn": plan.layers[0].backend
    }
    (tmp_path / "other.json").write_text(json.dumps({"kind": "something else"}))
    with pytest.raises(PlanError, match="is not a plan of tune_model"):
        ModelPlan.load(tmp_path / "other.json")
    for part, name, value, words in (
        ("layers", "backend", 3, r"layers\[0\]\.backend must be text"),
        ("layers", "backend", "a b", r"layers\[0\]\.backend must be a name of letters"),
        ("layers", "gather_ms", "fast", r"layers\[0\]\.gather_ms must be a number or nothing"),
        ("left", "x", "\x1b[2J", "left.x holds characters that are not printed"),
        ("machine", "memory_gib", float("inf"), "machine.memory_gib must be a finite number"),
    ):
        data = json.loads(json.dumps(plan.to_dict()))
        (data[part][0] if part == "layers" else data[part])[name] = value
        with pytest.raises(PlanError, match=words):
            ModelPlan.from_dict(data)
    (tmp_path / "other.json").write_text("[" * 100_000)
    with pytest.raises(PlanError, match="it is not JSON"):
        ModelPlan.load(tmp_path / "other.json")


@functools.cache
def asked() -> YoursRequest:
    return ask(YOLO, "1x3x16x24", detect("cpu"), backends=("gather", "dense"))


def rows_of(ratios: dict[str, float], passes: int = 4) -> Measured:
    """What an engine might have found of the whole model, passes alike."""
    machine, request = detect("cpu"), asked()
    cells = {name: request.model_cell(*name.split(",")) if name else request.model_cell() for name in ratios}
    best = [cell for cell in request.attention_cells() if cell.backend == "dense"]

    def row(cell: Any, ratio: float, number: int | None) -> Record:
        values = {"median_ms": 10 / ratio, "ci_lo_ms": 9.99 / ratio, "ci_hi_ms": 10.01 / ratio, "passes": 4}
        if cell.part == "attention" or cell.backend:
            values |= {"ratio": ratio, "ratio_lo": 0.999 * ratio, "ratio_hi": 1.001 * ratio}
        return Record.of(cell, machine, outcome="measured", run_id="r", pass_number=number, **values)

    rows = [row(cells[name], ratio, None) for name, ratio in ratios.items()]
    rows += [row(cell, 2.0, None) for cell in best]
    behind = [row(cells[name], ratio + 0.001 * n, n) for name, ratio in ratios.items() for n in range(passes)]
    return Measured(request, machine, tuple(rows), tuple(behind))


def test_the_fastest_backend_of_each_layer_is_the_plan_only_where_that_is_shown() -> None:
    faster = plan_of(rows_of({"": 1.0, "auto": 1.5, "dense": 2.0}))
    assert [layer.backend for layer in faster.layers] == ["dense", "dense"]
    assert faster.verdict == "FASTER"
    assert faster.speedup == pytest.approx(2.0, rel=0.01)
    slower = plan_of(rows_of({"": 1.0, "auto": 1.5, "dense": 1.2}))
    assert [layer.backend for layer in slower.layers] == ["auto", "auto"]
    assert [layer.fastest for layer in slower.layers] == ["dense", "dense"]
    assert slower.reason.startswith("auto is kept")
    assert slower.speedup == pytest.approx(1.5, rel=0.01)


def test_a_plan_of_which_a_budget_left_one_pass_claims_no_interval_and_is_saved(tmp_path: Path) -> None:
    plan = plan_of(rows_of({"": 1.0, "auto": 1.5, "dense": 2.0}, passes=1))
    assert (plan.verdict, plan.speedup_ci) == ("UNDECIDED", None)
    assert plan.speedup == pytest.approx(1.5, rel=0.01)
    assert "(one process shows no interval)" in plan.reason
    assert ModelPlan.load(plan.save(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize("target", ["pt2", "onnx", "openvino"])
def test_a_plan_for_layers_exports_its_model_and_travels_along(target: str, tmp_path: Path) -> None:
    for package in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}.get(target, ()):
        pytest.importorskip(package, reason=f"{target} files need {package} (extra deploy)")
    plan = plan_of(rows_of({"": 1.0, "auto": 1.5, "dense": 2.0}))
    path = plan.save(tmp_path / "plan.json")
    result = CliRunner().invoke(export, [str(path), "--to", target, "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "run and compared with PyTorch" in result.stderr
    assert "left" not in result.stderr
    made = Path(result.stdout.strip())
    assert plan_in(made) == plan
    run = open_file(made, target, threads=1)
    model = load_factory(YOLO)
    x = torch.randn(5, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_who_wants_the_other_kind_of_plan_says_what_takes_this_one(tmp_path: Path) -> None:
    plan = plan_of(rows_of({"": 1.0, "auto": 1.5, "dense": 2.0}))
    path = plan.save(tmp_path / "plan.json")
    assert bratune.ModelPlan.load(path) == plan
    words = r"a plan for the layers of somebodys_nets:make_yolo.*plan=bratune.ModelPlan.load\(FILE\)"
    for take in (bratune.load_plan, bratune.create_model):
        with pytest.raises(PlanError, match=words):
            take(path)
    with pytest.raises(PlanError, match=r"bratune\.accelerate takes it"):
        bratune.create_model(plan)  # type: ignore[arg-type]
    rows = str(Path(__file__).parents[2] / "results" / "cpu-xeon-contests-224.jsonl")
    for command, options in ((export, [str(path), "--to", "timm"]), (report, [rows, "--plan", str(path)])):
        result = CliRunner().invoke(command, options)
        assert isinstance(result.exception, PlanError), result.output
        assert "a plan for the layers of" in str(result.exception)
    other = make_plan().save(tmp_path / "other.json")
    with pytest.raises(PlanError, match=r"one for a model by name, which bratune.create_model\(FILE\) makes"):
        ModelPlan.load(other)
    alive = dataclasses.replace(plan, model="live:YOLOLike").save(tmp_path / "alive.json")
    result = CliRunner().invoke(export, [str(alive), "--to", "pt2"])
    assert "the plan is for a YOLOLike of another process" in str(result.exception)


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        ("nowhere:f", "1x3x8x8", "^nowhere:f cannot be imported"),
        (YOLO, "1x4x16x16", f"^{YOLO} cannot be called with 1x4x16x16"),
        (YOLO, "3", "'3' is no shape of an input"),
        ("torch.nn:Identity", "1x3x8x8", "torch.nn:Identity has no routed layer that is proved"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(model: str, shape: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ask(model, shape, detect("cpu"))


def test_commands_take_a_function(tmp_path: Path) -> None:
    common = ["--model", YOLO, "--input", "1x3x16x24", "--device", "cpu", "--backend", "gather"]
    result = CliRunner().invoke(
        profile, [*common, "--passes", "1", "--effort", "quick", "-o", str(tmp_path), "--dry-run"]
    )
    assert result.exit_code == 0, result.output
    assert "layer 1: c2f.0 (nchw outside)" in result.stderr
    assert f"{YOLO} stage 2 attention (yours) by gather" in result.stdout
    quick = ["--passes", "1", "--effort", "quick", "--min-time", "0.01s", "--timeout", "1s"]
    result = CliRunner().invoke(profile, [*common, *quick, "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "as it is" in result.stdout
    assert "gather everywhere" in result.stdout
    for command, more, words in (
        (profile, ["--res", "64"], f"--res says nothing about {YOLO}: its function and --input do"),
        (profile, ["--model", "biformer_tiny"], "is measured alone, with --input"),
        (tune, ["--trials", "3"], f"--trials is about a search; of {YOLO} only backends are measured"),
        (tune, ["--n-win", "7"], "--n-win says nothing about"),
    ):
        found = CliRunner().invoke(command, [*common, *more])
        assert isinstance(found.exception, UsageError)
        assert words in str(found.exception)
    found = CliRunner().invoke(profile, ["--model", YOLO])
    assert "is measured alone, with --input, e.g. 1x3x640x640" in str(found.exception)
    found = CliRunner().invoke(profile, ["--input", "1x3x8x8"])
    assert "--input is the shape of a model of yours" in str(found.exception)
