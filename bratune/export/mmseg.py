"""mmseg: a segmentation config around the tuned backbone, with Semantic FPN or UPerNet."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bratune.export import mm
from bratune.tune.plan import Plan
from bratune.variant import get_variant

__all__ = ["HEADS", "mmseg_config"]

HEADS = ("sfpn", "upernet")
_DROP_PATH = {
    ("sfpn", "biformer_tiny"): 0.1,
    ("sfpn", "biformer_small"): 0.15,
    ("sfpn", "biformer_base"): 0.3,
    ("upernet", "biformer_tiny"): 0.2,
    ("upernet", "biformer_small"): 0.3,
    ("upernet", "biformer_base"): 0.4,
}


def mmseg_config(
    plan: Plan,
    *,
    style: str = "0.x",
    head: str = "sfpn",
    bases: Sequence[str] = (),
    replaced: Collection[str] = (),
) -> str:
    """The source of the config.

    Args:
        plan: What to export; a plan for segmentation, of a BiFormer.
        style: ``0.x`` or ``1.x``; see `bratune.export.mm`.
        head: ``sfpn`` or ``upernet``.
        bases: Config files to inherit from, e.g. a dataset.
        replaced: What they define; see `bratune.export.mm.base_names`.

    Raises:
        PlanError: the backbone cannot hold the plan.
        UnknownNameError: style or head are not known.
    """
    mm.check_names(style, head, HEADS)
    dims = list(get_variant(plan.model).dims)
    rate = _DROP_PATH.get((head, plan.model), 0.15)
    size = f"({plan.height}, {plan.width})"
    # Before mmengine only the dataset's pipelines crop, with a size of their own.
    crop = (
        f"# The plan was tuned at {size}: let the pipelines of the dataset crop to that.\n"
        if style == "0.x"
        else f"crop_size = {size}  # model: what the plan was tuned at\n"
    )
    body = _sfpn(dims) if head == "sfpn" else _upernet(dims)
    preprocessor = ""
    if style == "1.x":
        preprocessor = (
            "    data_preprocessor=dict(type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53],\n"
            "        std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_val=0, seg_pad_val=255, "
            "size=crop_size),\n"
        )
    schedule = (
        {"lr": 2e-4, "decay": 1e-4, "iterations": 80_000, "schedule": "cosine"}
        if head == "sfpn"
        else {"lr": 6e-5, "decay": 0.01, "iterations": 160_000, "schedule": "poly"}
    )
    training = mm.training(style, metric="'mIoU'", replaced=replaced, **schedule)  # type: ignore[arg-type]
    first = "    _delete_=True,\n" if "model" in replaced else ""
    return (
        f"{mm.preamble(plan, style, bases)}{crop}norm_cfg = dict(type='SyncBN', requires_grad=True)\n"
        f"model = dict(\n{first}    type='EncoderDecoder',\n    pretrained=None,\n{preprocessor}"
        f"{mm.backbone(plan, style, f'an mmseg {style} config', rate)}\n{body}"
        "    train_cfg=dict(),\n    test_cfg=dict(mode='whole'),\n)\n"
        f"{training}"
    )


_LOSS = "loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight={weight})"


def _sfpn(dims: list[int]) -> str:
    return (
        f"    neck=dict(type='FPN', in_channels={dims}, out_channels=256, num_outs=4),\n"
        "    decode_head=dict(type='FPNHead', in_channels=[256, 256, 256, 256], in_index=[0, 1, 2, 3],\n"
        "        feature_strides=[4, 8, 16, 32], channels=128, dropout_ratio=0.1, num_classes=150,\n"
        f"        norm_cfg=norm_cfg, align_corners=False, {_LOSS.format(weight=1.0)}),\n"
    )


def _upernet(dims: list[int]) -> str:
    return (
        f"    decode_head=dict(type='UPerHead', in_channels={dims}, in_index=[0, 1, 2, 3],\n"
        "        pool_scales=(1, 2, 3, 6), channels=512, dropout_ratio=0.1, num_classes=150,\n"
        f"        norm_cfg=norm_cfg, align_corners=False, {_LOSS.format(weight=1.0)}),\n"
        f"    auxiliary_head=dict(type='FCNHead', in_channels={dims[2]}, in_index=2, channels=256,\n"
        "        num_convs=1, concat_input=False, dropout_ratio=0.1, num_classes=150,\n"
        f"        norm_cfg=norm_cfg, align_corners=False, {_LOSS.format(weight=0.4)}),\n"
    )
