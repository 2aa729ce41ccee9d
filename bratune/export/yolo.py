"""yolo: rows for an Ultralytics model file, and the block that they name.

The three detection levels have strides 8, 16 and 32, as stages 2 to 4 of BiFormer. After the last block of
each level a row is added that attends with the plan's S, top-k and backend. Channels are written out,
because Ultralytics scales only the modules that it knows by name.
"""

from __future__ import annotations

import math

import yaml

from bratune.errors import PlanError, UnknownNameError
from bratune.export.fields import header
from bratune.tune.plan import Plan

__all__ = ["SCALES", "yolo_fragment"]

# Channels of P3, P4 and P5, and how often blocks repeat, of the five sizes of YOLOv8.
SCALES = {
    "n": ((64, 128, 256), 1 / 3),
    "s": ((128, 256, 512), 1 / 3),
    "m": ((192, 384, 576), 2 / 3),
    "l": ((256, 512, 512), 1.0),
    "x": ((320, 640, 640), 1.0),
}


def yolo_fragment(plan: Plan, scale: str = "n") -> str:
    """The YAML of a backbone with the tuned blocks; it loads as it is, with a head of your choice below.

    Args:
        plan: What to export; its stages 2 to 4 stand for P3 to P5.
        scale: One of `SCALES`.

    Raises:
        UnknownNameError: the scale is not known.
        PlanError: the plan has no fourth stage with full attention.
    """
    if scale not in SCALES:
        raise UnknownNameError("YOLO scale", scale, SCALES)
    if plan.topks[3] > 0:
        raise PlanError("a YOLO fragment expects full attention in stage 4, and this plan routes there")
    channels, depth = SCALES[scale]
    repeats = [max(round(n * depth), 1) for n in (3, 6, 6, 3)]
    stem = channels[0] // 4
    p3, p4, p5 = channels
    return f"""{header(plan, has_backends=True)}
#
# One line registers the block, before the model is made:
#   import bratune.export.yolo_block
# A BRABlock row has channels, S (model), top-k (model; -2 is full attention), backend and settings (cost).
nc: 80
backbone:
  # [from, repeats, module, args]
  - [-1, 1, Conv, [{stem}, 3, 2]]  # 0-P1/2
  - [-1, 1, Conv, [{2 * stem}, 3, 2]]  # 1-P2/4
  - [-1, {repeats[0]}, C2f, [{2 * stem}, True]]
  - [-1, 1, Conv, [{p3}, 3, 2]]  # 3-P3/8
  - [-1, {repeats[1]}, C2f, [{p3}, True]]
  - [-1, 1, BRABlock, {_row(plan, 1, p3)}]  # 5, stage 2 of the plan
  - [-1, 1, Conv, [{p4}, 3, 2]]  # 6-P4/16
  - [-1, {repeats[2]}, C2f, [{p4}, True]]
  - [-1, 1, BRABlock, {_row(plan, 2, p4)}]  # 8, stage 3 of the plan
  - [-1, 1, Conv, [{p5}, 3, 2]]  # 9-P5/32
  - [-1, {repeats[3]}, C2f, [{p5}, True]]
  - [-1, 1, BRABlock, {_row(plan, 3, p5)}]  # 11, stage 4 of the plan
  - [-1, 1, SPPF, [{p5}, 5]]  # 12
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 8], 1, Concat, [1]]
  - [-1, {repeats[0]}, C2f, [{p4}]]  # 15
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 5], 1, Concat, [1]]
  - [-1, {repeats[0]}, C2f, [{p3}]]  # 18 (P3/8)
  - [-1, 1, Conv, [{p3}, 3, 2]]
  - [[-1, 15], 1, Concat, [1]]
  - [-1, {repeats[0]}, C2f, [{p4}]]  # 21 (P4/16)
  - [-1, 1, Conv, [{p4}, 3, 2]]
  - [[-1, 12], 1, Concat, [1]]
  - [-1, {repeats[0]}, C2f, [{p5}]]  # 24 (P5/32)
  - [[18, 21, 24], 1, Detect, [nc]]
"""


def _row(plan: Plan, index: int, channels: int) -> str:
    topk = plan.topks[index]
    if topk <= 0:
        return f"[{channels}, 1, -2]"
    row = [channels, plan.n_win[index], topk, plan.backends[index], dict(plan.configs[index])]
    return yaml.safe_dump(row, default_flow_style=True, width=math.inf, sort_keys=True).strip()
