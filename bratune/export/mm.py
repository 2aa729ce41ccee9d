"""mm: what configs for mmsegmentation and mmdetection have in common.

Style ``0.x`` is for the official repository as it is (mmcv 1.x, mmseg 0.x, mmdet 2.x), whose backbone
``BiFormer_mm`` needs no import. Style ``1.x`` is for mmengine (mmseg 1.x, mmdet 3.x), for which the official
code was never written: there the backbone is bratune's own, with the tuned backends.
"""

from __future__ import annotations

from collections.abc import Sequence

from bratune.errors import UnknownNameError
from bratune.export.fields import Field, backbone_fields, cost_fields, header, render_call
from bratune.tune.plan import Plan

__all__ = ["STYLES", "backbone", "check_names", "preamble", "training"]

STYLES = ("0.x", "1.x")


def check_names(style: str, head: str, heads: Sequence[str]) -> None:
    """Raise `UnknownNameError` where a style or a head is not known."""
    if style not in STYLES:
        raise UnknownNameError("config style", style, STYLES)
    if head not in heads:
        raise UnknownNameError("head", head, heads)


def preamble(plan: Plan, style: str, bases: Sequence[str]) -> str:
    """Comments, the base files, and the import that style ``1.x`` needs."""
    lines = [header(plan)]
    lines.append("# Give the dataset and its pipelines in _base_ (`bratune export --base FILE`).")
    lines.append(f"_base_ = {list(bases)!r}")
    if style == "1.x":
        lines.append(
            "custom_imports = dict(imports=['bratune.export.mm_backbone'], allow_failed_imports=False)"
        )
    return "\n".join(lines) + "\n"


def backbone(plan: Plan, style: str, target: str, drop_path: float, extra: Sequence[Field] = ()) -> str:
    """The backbone's dictionary, every key spelled out."""
    fields = backbone_fields(plan, target)
    kind = "BiFormer_mm"
    if style == "1.x":
        kind = "BratuneBiFormer"
        fields += cost_fields(plan)
    fields = [Field("type", kind), *extra, *fields, Field("drop_path_rate", drop_path)]
    return f"    backbone=dict(\n{render_call(fields, indent=8)}\n    ),"


def training(style: str, *, lr: float, decay: float, iterations: int = 0, epochs: int = 0) -> str:
    """AdamW as the authors use it, without weight decay on norms, and the length of the run."""
    norms = "paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)})"
    adamw = f"type='AdamW', lr={lr!r}, betas=(0.9, 0.999), weight_decay={decay!r}"
    if style == "0.x":
        length = (
            f"runner = dict(type='IterBasedRunner', max_iters={iterations})"
            if iterations
            else f"runner = dict(type='EpochBasedRunner', max_epochs={epochs})"
        )
        return f"optimizer = dict({adamw}, {norms})\noptimizer_config = dict(grad_clip=None)\n{length}\n"
    every = iterations // 10
    length = (
        f"train_cfg = dict(type='IterBasedTrainLoop', max_iters={iterations}, val_interval={every})"
        if iterations
        else f"train_cfg = dict(type='EpochBasedTrainLoop', max_epochs={epochs}, val_interval=1)"
    )
    wrapper = f"optim_wrapper = dict(type='OptimWrapper', optimizer=dict({adamw}), {norms})"
    return f"{wrapper}\n{length}\nval_cfg = dict(type='ValLoop')\ntest_cfg = dict(type='TestLoop')\n"
