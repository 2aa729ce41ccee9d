"""Exports for segmentation, detection and YOLO are loaded by mmengine and by YOLO's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sample_plans import make_plan

import bratune
from bratune.errors import PlanError
from bratune.export.write import export
from bratune.export.yolo import SCALES
from bratune.export.yolo_block import BRABlock
from bratune.tune.plan import Plan

STYLES = ("0.x", "1.x")


def dense_plan(task: str = "segmentation", **more: Any) -> Plan:
    n_win = 16 if task == "detection" else 8
    return make_plan(model="biformer_small", task=task, size=(512, 512), n_win=n_win, **more)


@pytest.fixture
def mmengine() -> Any:
    return pytest.importorskip("mmengine", reason="the configs are for mmengine, which is not installed")


def load(path: Path) -> Any:
    from mmengine.config import Config

    return Config.fromfile(str(path))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("target", "head"),
    [("mmseg", "sfpn"), ("mmseg", "upernet"), ("mmdet", "retinanet"), ("mmdet", "mask_rcnn")],
)
def test_config_loads_with_a_complete_backbone(
    mmengine: Any, tmp_path: Path, style: str, target: str, head: str
) -> None:
    plan = dense_plan("segmentation" if target == "mmseg" else "detection")
    config = load(export(plan, target, tmp_path, style=style, head=head))
    backbone = config.model.backbone
    assert backbone.type == ("BiFormer_mm" if style == "0.x" else "BratuneBiFormer")
    assert (backbone.n_win, backbone.topks) == (plan.shared_n_win, [1, 4, 16, -2])
    assert backbone.qk_dims == backbone.embed_dim == [64, 128, 256, 512]
    assert backbone.auto_pad is True
    assert backbone.kv_downsample_mode == "identity"
    assert ("backend" in backbone) == (style == "1.x")  # the official backbone has no such argument
    inner = config.model.get("neck", config.model.get("decode_head"))
    assert inner.in_channels == [64, 128, 256, 512]
    assert ("optimizer" in config) == (style == "0.x")
    assert ("optim_wrapper" in config) == (style == "1.x")


def test_config_inherits_from_the_bases_that_were_named(mmengine: Any, tmp_path: Path) -> None:
    base = "data = dict(samples_per_gpu=4)\nmodel = dict(backbone=dict(type='ResNet'))\n"
    (tmp_path / "data.py").write_text(base)
    config = load(export(dense_plan(), "mmseg", tmp_path, bases=["data.py"]))
    assert config.data.samples_per_gpu == 4
    assert config.model.backbone.type == "BiFormer_mm"


@pytest.mark.parametrize("target", ["mmseg", "mmdet"])
def test_framework_builds_the_backbone_that_the_config_names(
    mmengine: Any, tmp_path: Path, target: str
) -> None:
    from mmengine.registry import MODELS

    plan = dense_plan("segmentation" if target == "mmseg" else "detection", backend="gather-sdpa")
    config = load(export(plan, target, tmp_path, style="1.x"))
    model = MODELS.build(config.model.backbone).eval()
    image = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    own_model = bratune.create_model(plan, auto_pad=True).eval()
    own_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        for made, expected in zip(model(image), own_model(image), strict=True):
            torch.testing.assert_close(made, expected)


def test_norms_stay_in_evaluation_mode_where_detection_asks_for_it(mmengine: Any, tmp_path: Path) -> None:
    from mmengine.registry import MODELS

    config = load(export(dense_plan("detection"), "mmdet", tmp_path, style="1.x"))
    model = MODELS.build(config.model.backbone)
    assert model.train() is model
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_stl_plan_has_no_dense_backbone(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no backbone for biformer_stl"):
        export(make_plan(model="biformer_stl"), "mmseg", tmp_path)


def test_cost_and_model_fields_are_marked(tmp_path: Path) -> None:
    text = export(dense_plan(backend="dense"), "mmseg", tmp_path, style="1.x").read_text()
    assert "n_win=8,  # model: tuned" in text
    assert "# cost: the result is the same" in text


# --- YOLO ----------------------------------------------------------------------------------

KNOWN = {"Conv", "C2f", "SPPF", "nn.Upsample", "Concat", "Detect", "BRABlock"}


@pytest.mark.parametrize("scale", SCALES)
def test_yolo_rows_follow_the_rules_of_model_files(tmp_path: Path, scale: str) -> None:
    data = yaml.safe_load(export(dense_plan("yolo"), "yolo", tmp_path, scale=scale).read_text())
    rows = data["backbone"] + data["head"]
    channels: list[int] = []
    strides: list[int] = []
    for index, (source, repeats, module, args) in enumerate(rows):
        sources = source if isinstance(source, list) else [source]
        before = [index + s if s < 0 else s for s in sources]
        assert all(-1 <= b < index for b in before)
        assert isinstance(repeats, int)
        assert repeats >= 1
        assert module in KNOWN
        stride = 1 if index == 0 else strides[before[0]]
        width = 3 if index == 0 else channels[before[0]]
        if module == "BRABlock":
            assert args[0] == width  # the block keeps the channels that reach it
        if module == "Concat":
            assert len({strides[b] for b in before}) == 1
            width = sum(channels[b] for b in before)
        elif module in ("Conv", "C2f", "SPPF"):
            width = args[0]
        channels.append(width)
        strides.append(stride * 2 if module == "Conv" else stride // 2 if module == "nn.Upsample" else stride)
    assert [strides[i] for i in rows[-1][0]] == [8, 16, 32]


def test_yolo_rows_hold_the_plan_and_build_blocks_that_run(tmp_path: Path) -> None:
    plan = dense_plan("yolo", backend="gather-sdpa")
    data = yaml.safe_load(export(plan, "yolo", tmp_path).read_text())
    rows = [row[3] for row in data["backbone"] if row[2] == "BRABlock"]
    assert [row[1:3] for row in rows] == [[8, 4], [8, 16], [1, -2]]
    for args, side in zip(rows, (20, 10, 5), strict=True):
        block = BRABlock(*args).eval()
        x = torch.randn(1, args[0], side, side)
        assert block(x).shape == x.shape


@pytest.mark.parametrize("config", ["{'x': 1}", {"x": 1}])  # Ultralytics makes the second of the first
def test_block_with_settings_passes_them_on(config: Any) -> None:
    block = BRABlock(64, 4, 2, "gather", config)
    assert block.block.attn.config == {"x": 1}
