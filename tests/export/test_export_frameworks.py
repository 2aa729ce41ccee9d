"""Exports for segmentation, detection and YOLO are built and run by the libraries that they are for.

`.ci/frameworks` makes an environment for each generation of them and runs this file there.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks import require, require_mm
from sample_plans import RUN, make_plan

import bratune
from bratune.export.write import export
from bratune.kernels.biformer import BiFormer
from bratune.tune.plan import Plan, load_plan

pytestmark = pytest.mark.slow

IMAGE = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
# One small model for every target; a plan for another task is exported just as well.
PLANS = {
    "sample": make_plan(backend="gather-sdpa", dtype="float32"),
    "run": load_plan(RUN),
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]


class OfficialBackbone(BiFormer):
    """A stand-in for the official ``BiFormer_mm``: its arguments, not one more."""

    def __init__(
        self,
        *,
        pretrained: Any = None,
        norm_eval: bool = True,
        disable_bn_grad: bool = False,
        **arguments: Any,
    ) -> None:
        known = [
            p.name
            for p in inspect.signature(BiFormer).parameters.values()
            if p.kind is not inspect.Parameter.KEYWORD_ONLY  # ours: backend, config, features_only
        ]
        unknown = set(arguments) - set(known)
        if unknown:
            raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
        super().__init__(**arguments, features_only=True, backend="gather-sdpa")

    def init_weights(self) -> None:
        """As the official one without a file: nothing."""


def register_official(registry: Any) -> None:
    registry.register_module(name="BiFormer_mm", force=True, module=OfficialBackbone)


@pytest.mark.parametrize("head", ["sfpn", "upernet"])
def test_before_mmengine_the_segmentor_is_built_and_runs(plan: Plan, tmp_path: Path, head: str) -> None:
    mmseg = require_mm("mmseg", 0)
    from mmcv import Config
    from mmcv.cnn.utils import revert_sync_batchnorm

    register_official(mmseg.models.BACKBONES)
    config = Config.fromfile(str(export(plan, "mmseg", tmp_path, force=True, style="0.x", head=head)))
    model = revert_sync_batchnorm(mmseg.models.build_segmentor(config.model))
    labels = torch.zeros(1, 1, 96, 128, dtype=torch.int64)
    meta = {"ori_shape": (96, 128, 3), "img_shape": (96, 128, 3), "pad_shape": (96, 128, 3), "flip": False}
    losses = model.eval().forward_train(IMAGE, [meta], gt_semantic_seg=labels)
    assert torch.isfinite(losses["decode.loss_ce"])
    assert model.forward_dummy(IMAGE).shape == (1, 150, 96, 128)


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_before_mmengine_the_detector_is_built_and_runs_up_to_its_operators(
    plan: Plan, tmp_path: Path, head: str
) -> None:
    mmdet = require_mm("mmdet", 0)
    from mmcv import Config

    register_official(mmdet.models.BACKBONES)
    config = Config.fromfile(str(export(plan, "mmdet", tmp_path, force=True, style="0.x", head=head)))
    model = mmdet.models.build_detector(config.model)
    maps = model.eval().extract_feat(IMAGE)
    assert [m.shape[1] for m in maps] == [256] * 5
    if head == "retinanet":
        meta = {"img_shape": (96, 128, 3), "pad_shape": (96, 128, 3), "scale_factor": 1.0}
        boxes, classes = torch.tensor([[8.0, 8.0, 72.0, 80.0]]), torch.tensor([3])
        losses = model.bbox_head.forward_train(maps, [meta], boxes[None], classes[None])
        assert all(torch.isfinite(value).all() for values in losses.values() for value in values)
    else:
        scores, boxes = model.rpn_head(maps)
        assert len(scores) == len(boxes) == 5


@pytest.mark.parametrize("head", ["sfpn", "upernet"])
def test_with_mmengine_the_segmentor_is_built_and_runs(plan: Plan, tmp_path: Path, head: str) -> None:
    require_mm("mmseg", 1)
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    init_default_scope("mmseg")
    config = Config.fromfile(str(export(plan, "mmseg", tmp_path, force=True, style="1.x", head=head)))
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 96, 128, dtype=torch.int64)))
    losses = model(IMAGE, [sample], mode="loss")
    assert torch.isfinite(losses["decode.loss_ce"])
    assert model(IMAGE, mode="tensor").shape == (1, 150, 24, 32)
    check_backbone(model.backbone, plan)


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_with_mmengine_the_detector_is_built_and_runs_up_to_its_operators(
    plan: Plan, tmp_path: Path, head: str
) -> None:
    require_mm("mmdet", 1)
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    init_default_scope("mmdet")
    config = Config.fromfile(str(export(plan, "mmdet", tmp_path, force=True, style="1.x", head=head)))
    model = MODELS.build(config.model).eval()
    maps = model.extract_feat(IMAGE)
    assert [m.shape[1] for m in maps] == [256] * 5
    if head == "retinanet":
        shape = {"img_shape": (96, 128), "batch_input_shape": (96, 128), "pad_shape": (96, 128)}
        found = InstanceData(bboxes=torch.tensor([[8.0, 8.0, 72.0, 80.0]]), labels=torch.tensor([3]))
        losses = model(IMAGE, [DetDataSample(metainfo=shape, gt_instances=found)], mode="loss")
        assert all(torch.isfinite(value).all() for values in losses.values() for value in values)
    else:
        scores, boxes = model.rpn_head(maps)
        assert len(scores) == len(boxes) == 5
    check_backbone(model.backbone, plan)


def check_backbone(backbone: Any, plan: Plan) -> None:
    """It computes what `bratune.create_model` does with the same weights."""
    own = bratune.create_model(plan, features_only=True, auto_pad=True).eval()
    own.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        for made, expected in zip(backbone(IMAGE), own(IMAGE), strict=True):
            torch.testing.assert_close(made, expected)


def test_ultralytics_builds_and_trains_the_model_file(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    require("ultralytics")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    from bratune.export.yolo_block import BRABlock

    path = export(plan, "yolo", tmp_path, force=True)
    model = DetectionModel(str(path), ch=3, nc=5, verbose=False)
    blocks: list[Any] = [m.block.attn for m in model.modules() if isinstance(m, BRABlock)]
    routed = [(a.n_win, a.topk, a.backend) for a in blocks[:2]]
    assert routed == [(plan.n_win[i], plan.topks[i], plan.backends[i]) for i in (1, 2)]
    assert model.stride.tolist() == [8, 16, 32]
    model.args = get_cfg()
    batch = {
        "img": torch.rand(1, 3, 96, 128),
        "batch_idx": torch.tensor([0.0]),
        "cls": torch.tensor([[3.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]]),
    }
    loss, _ = model.train().loss(batch)
    torch.autograd.backward(loss.sum())
    gradients = [p.grad for attention in blocks for p in attention.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    with torch.no_grad():
        assert model.eval()(batch["img"])[0].shape == (1, 9, 252)
