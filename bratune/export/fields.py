"""Fields: a plan as arguments of the official constructors, marked as changing the model or the cost."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bratune.errors import PlanError, UsageError
from bratune.text import one_line
from bratune.tune.plan import Plan
from bratune.variant import Variant, get_variant

__all__ = [
    "Field",
    "backbone_fields",
    "classifier_fields",
    "header",
    "identifier",
    "render_call",
    "shared_n_win",
]

# Drop-path rates of the released models, for training from scratch.
DROP_PATH = {
    "biformer_tiny": 0.1,
    "biformer_small": 0.15,
    "biformer_base": 0.4,
    "biformer_stl": 0.1,
    "biformer_stl_nchw": 0.1,
}


@dataclass(frozen=True)
class Field:
    """One argument.

    Attributes:
        name: Of the official constructor.
        value: Plain Python.
        note: What it is, where a reader needs to know: a tuned value that changes the model, or only the
            cost.
    """

    name: str
    value: Any
    note: str = ""


def shared_n_win(plan: Plan, target: str) -> int:
    """The one S of a plan.

    Raises:
        PlanError: stages differ, and the official BiFormer takes one S for all.
    """
    found = plan.shared_n_win
    if found is None:
        sides = "/".join(map(str, plan.n_win))
        raise PlanError(
            f"{target} cannot hold S={sides}: the official BiFormer takes one S for all stages; "
            "`bratune tune --shared-s` finds one, and `--to plan` keeps this one for bratune.create_model"
        )
    return found


def classifier_fields(plan: Plan, target: str) -> list[Field]:
    """Every argument of the official ``BiFormer``, ``BiFormerSTL`` or ``nchwBiFormerSTL`` but the head's."""
    variant = get_variant(plan.model)
    model, count = "model: tuned", len(variant.dims)
    common = [Field("depth", list(variant.depths)), Field("embed_dim", list(variant.dims))]
    if variant.layout != "biformer":
        return [
            *common,
            Field("head_dim", variant.head_dim),
            Field("mlp_ratios", [variant.mlp_ratio] * count),
            Field("n_wins", list(plan.n_win), model),
            Field("topks", list(plan.topks), model),
            Field("side_dwconv", variant.side_dwconv),
            Field("use_checkpoint_stages", [], "cost: memory against time"),
        ]
    return [*common, *_biformer_fields(plan, variant, target)]


def _biformer_fields(plan: Plan, variant: Variant, target: str) -> list[Field]:
    count = len(variant.dims)
    return [
        Field("mlp_ratios", [variant.mlp_ratio] * count),
        Field("n_win", shared_n_win(plan, target), "model: tuned, regions per side of every stage"),
        Field("kv_downsample_mode", "identity"),
        Field("kv_per_wins", [-1] * count),
        Field("topks", list(plan.topks), "model: tuned"),
        Field("side_dwconv", variant.side_dwconv),
        Field("before_attn_dwconv", 3),
        Field("layer_scale_init_value", -1),
        Field("qk_dims", list(variant.dims)),
        Field("head_dim", variant.head_dim),
        Field("param_routing", False),
        Field("diff_routing", False),
        Field("soft_routing", False),
        Field("pre_norm", True),
        Field("pe", None),
        Field("auto_pad", plan.pads, "model: zero padding where S does not divide a map"),
        Field("use_checkpoint_stages", [], "cost: memory against time"),
    ]


def backbone_fields(plan: Plan, target: str) -> list[Field]:
    """Every argument of the official dense-task backbone ``BiFormer_mm``.

    Raises:
        PlanError: the plan's model has no such backbone, or its stages differ in S.
    """
    variant = get_variant(plan.model)
    if variant.layout != "biformer":
        raise PlanError(
            f"{target} has no backbone for {plan.model}; plans of biformer_small and _base have one"
        )
    fields = classifier_fields(plan, target)
    padded = {"auto_pad": Field("auto_pad", True, "model: crops and test images come in any size")}
    return [padded.get(field.name, field) for field in fields]


def cost_fields(plan: Plan) -> list[Field]:
    """What bratune's own models take beyond the official ones."""
    return [
        Field("backend", [name or "auto" for name in plan.backends], "cost: the result is the same"),
        Field("config", [config or None for config in plan.configs], "cost: settings of the backend"),
    ]


def render_call(fields: list[Field], *, indent: int) -> str:
    """Arguments as Python source, one per line, notes as comments."""
    pad = " " * indent
    lines = []
    for field in fields:
        note = f"  # {field.note}" if field.note else ""
        lines.append(f"{pad}{field.name}={field.value!r},{note}")
    return "\n".join(lines)


def identifier(plan: Plan, name: str = "") -> str:
    """The name that the exported model is registered under.

    Raises:
        UsageError: the name that was asked for is no Python identifier.
    """
    if name:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(f"--name {name!r} is no Python identifier; biformer_small_tuned would be one")
        return name
    key = re.sub(r"[^a-z0-9]+", "_", plan.machine.gpu_key.lower()).strip("_")
    size = str(plan.height) if plan.height == plan.width else f"{plan.height}x{plan.width}"
    return f"{plan.model}_bratune_{key}_{size}"


def header(plan: Plan, *, has_backends: bool = False) -> str:
    """What a reader of an export must know, as comments of Python or YAML.

    Every text of a plan stands on the line of its comment, whatever is in it.

    Args:
        plan: What is exported.
        has_backends: The export holds the backends; else they are listed here, for they are lost.
    """
    lines = [
        f"{plan.model}, {plan.task} at {plan.height}x{plan.width}, batch {plan.batch}, {plan.dtype}, "
        f"{plan.direction}: {plan.setting}",
        f"Measured on {plan.machine.gpu_name} ({plan.measured}): {_compared(plan)}",
        f"Accuracy: {plan.evidence}",
        "Fields marked `model` change what is computed: weights must be trained with them.",
        "Fields marked `cost` change time and memory only.",
    ]
    if has_backends:
        return _as_comments(lines)
    backends = ", ".join(f"stage {i + 1} {name}" for i, name in enumerate(plan.backends) if name)
    lines.append(f"Backends (cost; the official code has no such argument): {backends}")
    configs: Mapping[int, str] = {i + 1: text for i, text in enumerate(plan.setting.configs) if text != "{}"}
    if configs:
        lines.append(f"Backend settings (cost): {json.dumps(configs)}")
    return _as_comments(lines)


def _compared(plan: Plan) -> str:
    """What the plan may claim against the default."""
    end = plan.end_to_end
    if plan.setting == plan.default:
        return "the default itself"
    if end.speedup_vs_default is None:
        return "not compared with the default"
    gain = end.speedup_vs_default
    interval = "" if gain.lo is None or gain.hi is None else f" [{gain.lo:.3f}, {gain.hi:.3f}]"
    return f"{end.verdict}, {gain.value:.3f}x{interval} against the default {plan.default}"


def _as_comments(lines: list[str]) -> str:
    return "\n".join(f"# {one_line(line)}" for line in lines)
