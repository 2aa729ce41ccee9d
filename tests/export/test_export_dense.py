"""Exports for segmentation, detection and YOLO are loaded by mmengine and by YOLO's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sample_plans import make_plan

import bratune
from bratune.errors import PlanError, UsageError
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


# Bases in the shape of the frameworks' own: a model on ResNet, SGD with momentum, their runtime.
BASES = {
    "models/resnet.py": """
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='OtherModel',
    data_preprocessor=dict(type='OtherPreprocessor', size_divisor=8),
    backbone=dict(type='ResNetV1c', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), style='pytorch'),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], relu_before_extra_convs=True),
    train_cfg=dict(other=1),
)
""",
    "datasets/data.py": """
dataset_type = 'CustomDataset'
crop_size = (256, 256)
data = dict(samples_per_gpu=4, train=dict(pipeline=[dict(type='RandomCrop', crop_size=crop_size)]))
evaluation = dict(interval=1, metric='other')
""",
    "schedules/schedule.py": """
optimizer = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001)
optimizer_config = dict(grad_clip=dict(max_norm=35, norm_type=2))
lr_config = dict(policy='step', warmup='linear', warmup_ratio=0.5, gamma=0.5, step=[16, 22])
runner = dict(type='EpochBasedRunner', max_epochs=24)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', momentum=0.9), clip_grad=dict(norm=1))
param_scheduler = [dict(type='MultiStepLR', milestones=[16])]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=24, other=1)
""",
    "runtime.py": """
checkpoint_config = dict(interval=1, other=1)
log_config = dict(interval=50, hooks=[dict(type='TextLoggerHook')])
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
resume_from = 'old.pth'
workflow = [('train', 1)]
""",
    "all.py": "_base_ = ['models/resnet.py', './datasets/data.py', 'schedules/schedule.py', 'runtime.py']\n",
}
# What the training code of the generation before mmengine reads of a config.
READ = ("optimizer", "optimizer_config", "lr_config", "runner", "checkpoint_config", "evaluation", "device")


def with_bases(folder: Path) -> None:
    for name, text in BASES.items():
        path = folder / "_base_" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def every_key(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(every_key, value.values()))
    return set().union(*map(every_key, value)) if isinstance(value, list | tuple) else set()


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("target", "head"),
    [("mmseg", "sfpn"), ("mmseg", "upernet"), ("mmdet", "retinanet"), ("mmdet", "mask_rcnn")],
)
def test_config_replaces_what_its_bases_say_of_model_and_training(
    mmengine: Any, tmp_path: Path, target: str, head: str, style: str, nested: bool
) -> None:
    with_bases(tmp_path)
    plan = dense_plan("segmentation" if target == "mmseg" else "detection")
    names = (
        ["all.py"]
        if nested
        else ["models/resnet.py", "datasets/data.py", "schedules/schedule.py", "runtime.py"]
    )
    bases = [f"_base_/{name}" for name in names]
    alone = load(export(plan, target, tmp_path / "alone", style=style, head=head))
    config = load(export(plan, target, tmp_path, style=style, head=head, bases=bases))
    assert "_delete_" not in every_key(dict(config)) | every_key(dict(alone))
    ours = {key: value for key, value in alone.items() if key != "crop_size"}
    assert {key: config[key] for key in ours} == ours  # with a base as without
    assert config.data.samples_per_gpu == 4
    assert config.log_level == "INFO"
    if style == "0.x":
        assert set(READ) <= set(alone)
        assert config.resume_from is None
        assert "crop_size" not in alone  # the pipelines of a dataset have their own
        assert ("fp16" in alone) == (target == "mmdet")
    else:
        assert alone.param_scheduler[-1].end in (80_000, 160_000, 12)
        assert [s.type for s in config.param_scheduler] == [s.type for s in alone.param_scheduler]


def test_optimizer_of_a_config_is_made_by_torch(mmengine: Any, tmp_path: Path) -> None:
    with_bases(tmp_path)
    path = export(dense_plan(), "mmseg", tmp_path, bases=["_base_/all.py"])
    arguments = dict(load(path).optimizer)
    kind, _ = arguments.pop("type"), arguments.pop("paramwise_cfg")
    getattr(torch.optim, kind)([torch.nn.Parameter(torch.zeros(1))], **arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"the base base.py cannot be read at .*-o in the folder where it will stand would work"),
        ("x = (", "the base base.py at .* is no Python config"),
        ("_base_ = f()", "the base base.py computes its own bases"),
        ("_base_ = 'gone.py'", "the base gone.py cannot be read"),
        ("_base_ = 'base.py'\nmodel = dict()", ""),  # a circle ends
        ("open('ran', 'w')\nmodel = dict()", ""),  # nothing of it runs
    ],
)
def test_bases_are_read_as_text_when_the_config_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "base.py").write_text(text)
    if words:
        with pytest.raises(UsageError, match=words):
            export(dense_plan(), "mmseg", tmp_path, bases=["base.py"])
    else:
        assert "_delete_=True" in export(dense_plan(), "mmseg", tmp_path, bases=["base.py"]).read_text()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("target", "task"),
    [
        ("mmseg", "classification"),
        ("mmseg", "detection"),
        ("mmdet", "segmentation"),
        ("yolo", "classification"),
    ],
)
def test_plan_of_another_task_is_refused_unless_forced(tmp_path: Path, target: str, task: str) -> None:
    plan = dense_plan(task)
    with pytest.raises(UsageError, match=f"the plan is for {task} .*--force exports this one"):
        export(plan, target, tmp_path)
    assert export(plan, target, tmp_path, force=True).exists()


def test_backends_are_said_to_be_lost_only_where_they_are(tmp_path: Path) -> None:
    lost = "the official code has no such argument"
    plan = dense_plan(backend="dense")
    assert lost in export(plan, "mmseg", tmp_path, style="0.x").read_text()
    assert lost not in export(plan, "mmseg", tmp_path, style="1.x").read_text()
    assert lost not in export(dense_plan("yolo"), "yolo", tmp_path).read_text()


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
        export(make_plan(model="biformer_stl", task="segmentation"), "mmseg", tmp_path)


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
