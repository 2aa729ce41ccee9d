"""mmdet: a detection config around the tuned backbone, with RetinaNet or Mask R-CNN."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bratune.export import mm
from bratune.export.fields import Field
from bratune.tune.plan import Plan
from bratune.variant import get_variant

__all__ = ["HEADS", "mmdet_config"]

HEADS = ("retinanet", "mask_rcnn")
_DROP_PATH = {"biformer_tiny": 0.1, "biformer_small": 0.2, "biformer_base": 0.3}


def mmdet_config(
    plan: Plan,
    *,
    style: str = "0.x",
    head: str = "retinanet",
    bases: Sequence[str] = (),
    replaced: Collection[str] = (),
) -> str:
    """The source of the config.

    Args:
        plan: What to export; a plan for detection, of a BiFormer.
        style: ``0.x`` or ``1.x``; see `bratune.export.mm`.
        head: ``retinanet`` or ``mask_rcnn``.
        bases: Config files to inherit from, e.g. a dataset.
        replaced: What they define; see `bratune.export.mm.base_names`.

    Raises:
        PlanError: the backbone cannot hold the plan.
        UnknownNameError: style or head are not known.
    """
    mm.check_names(style, head, HEADS)
    dims = list(get_variant(plan.model).dims)
    rate = _DROP_PATH.get(plan.model, 0.2)
    extra = [Field("num_classes", 80), Field("norm_eval", True)]
    preprocessor = ""
    if style == "1.x":
        mask = "pad_mask=True, " if head == "mask_rcnn" else ""
        preprocessor = (
            "    data_preprocessor=dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53],\n"
            f"        std=[58.395, 57.12, 57.375], bgr_to_rgb=True, {mask}pad_size_divisor=32),\n"
        )
    kind = "RetinaNet" if head == "retinanet" else "MaskRCNN"
    body = _retinanet(dims) if head == "retinanet" else _mask_rcnn(dims)
    decay = 1e-4 if head == "retinanet" else 0.05
    first = "    _delete_=True,\n" if "model" in replaced else ""
    metric = "['bbox']" if head == "retinanet" else "['bbox', 'segm']"
    half = ""
    if style == "0.x":  # what its training code asks for, None where it computes in float32
        half = mm.setting("fp16", "", replaced) if plan.dtype != "float32" else "fp16 = None\n"
    return (
        f"{mm.preamble(plan, style, bases)}"
        f"# Tuned for images of {plan.height}x{plan.width} after padding to a multiple of 32.\n"
        f"model = dict(\n{first}    type='{kind}',\n"
        + ("    pretrained=None,\n" if style == "0.x" else "")
        + f"{preprocessor}{mm.backbone(plan, style, f'an mmdet {style} config', rate, extra)}\n{body})\n"
        + mm.training(
            style, lr=1e-4, decay=decay, epochs=12, schedule="step", metric=metric, replaced=replaced
        )
        + f"{half}find_unused_parameters = True\n"
    )


_BOX = "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds={stds})"


def _retinanet(dims: list[int]) -> str:
    coder = _BOX.format(stds=[1.0] * 4)
    return (
        f"    neck=dict(type='FPN', in_channels={dims}, out_channels=256, start_level=1,\n"
        "        add_extra_convs='on_input', num_outs=5),\n"
        "    bbox_head=dict(type='RetinaHead', num_classes=80, in_channels=256, stacked_convs=4,\n"
        "        feat_channels=256, anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4,\n"
        "            scales_per_octave=3, ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),\n"
        f"        {coder},\n"
        "        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),\n"
        "        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),\n"
        "    train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4,\n"
        "        min_pos_iou=0, ignore_iof_thr=-1), allowed_border=-1, pos_weight=-1, debug=False),\n"
        "    test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05,\n"
        "        nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),\n"
    )


def _mask_rcnn(dims: list[int]) -> str:
    rpn, box = _BOX.format(stds=[1.0] * 4), _BOX.format(stds=[0.1, 0.1, 0.2, 0.2])
    sampler = (
        "sampler=dict(type='RandomSampler', num={num}, pos_fraction={share}, neg_pos_ub=-1,\n"
        "            add_gt_as_proposals={add})"
    )
    assigner = (
        "assigner=dict(type='MaxIoUAssigner', pos_iou_thr={pos}, neg_iou_thr={neg},\n"
        "            min_pos_iou={least}, match_low_quality=True, ignore_iof_thr=-1)"
    )
    proposals = "nms_pre={pre}, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0"
    return (
        f"    neck=dict(type='FPN', in_channels={dims}, out_channels=256, num_outs=5),\n"
        "    rpn_head=dict(type='RPNHead', in_channels=256, feat_channels=256,\n"
        "        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0],\n"
        f"            strides=[4, 8, 16, 32, 64]), {rpn},\n"
        "        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),\n"
        "        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),\n"
        "    roi_head=dict(type='StandardRoIHead',\n"
        "        bbox_roi_extractor=dict(type='SingleRoIExtractor', out_channels=256,\n"
        "            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),\n"
        "            featmap_strides=[4, 8, 16, 32]),\n"
        "        bbox_head=dict(type='Shared2FCBBoxHead', in_channels=256, fc_out_channels=1024,\n"
        f"            roi_feat_size=7, num_classes=80, {box}, reg_class_agnostic=False,\n"
        "            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),\n"
        "            loss_bbox=dict(type='L1Loss', loss_weight=1.0)),\n"
        "        mask_roi_extractor=dict(type='SingleRoIExtractor', out_channels=256,\n"
        "            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),\n"
        "            featmap_strides=[4, 8, 16, 32]),\n"
        "        mask_head=dict(type='FCNMaskHead', num_convs=4, in_channels=256, conv_out_channels=256,\n"
        "            num_classes=80,\n"
        "            loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0))),\n"
        "    train_cfg=dict(\n"
        f"        rpn=dict({assigner.format(pos=0.7, neg=0.3, least=0.3)},\n"
        f"            {sampler.format(num=256, share=0.5, add=False)},\n"
        "            allowed_border=-1, pos_weight=-1, debug=False),\n"
        f"        rpn_proposal=dict({proposals.format(pre=2000)}),\n"
        f"        rcnn=dict({assigner.format(pos=0.5, neg=0.5, least=0.5)},\n"
        f"            {sampler.format(num=512, share=0.25, add=True)},\n"
        "            mask_size=28, pos_weight=-1, debug=False)),\n"
        "    test_cfg=dict(\n"
        f"        rpn=dict({proposals.format(pre=1000)}),\n"
        "        rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100,\n"
        "            mask_thr_binary=0.5)),\n"
    )
