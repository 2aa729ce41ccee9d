"""Models by name or by plan, for people who do not care where they are defined."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bratune.errors import PlanError
from bratune.machine import detect
from bratune.tune.plan import Plan, load_plan
from bratune.variant import get_task, get_variant

if TYPE_CHECKING:
    from bratune.kernels.backbone import Backbone

__all__ = ["create_model"]


def create_model(
    name_or_plan: str | os.PathLike[str] | Plan,
    *,
    pretrained: str | Path | None = None,
    num_classes: int = 1000,
    features_only: bool | None = None,
    **overrides: Any,
) -> Backbone:
    """A BiFormer, ready to run.

    Args:
        name_or_plan: A model's name (``biformer_small``), or a plan of the tuner or its ``.json`` file: the
            model then has the plan's S, top-k and backends.
        pretrained: A weights file; see `bratune.kernels.checkpoint.load_weights`.
        num_classes: Classes; 0 returns pooled features.
        features_only: Return the four maps of the dense-task backbone in the place of class scores. By
            default as the plan's task asks, and off for a name.
        overrides: Arguments of the model's constructor, e.g. ``n_win=8``, ``backend="gather"``,
            ``auto_pad=True``; they win over the plan. ``trust_checkpoint=True`` lets the weights file run
            code of its own while it is read.

    Raises:
        UnknownNameError: no model, or no argument, has this name.
        PlanError: the plan file cannot be read.
        ProblemError: arguments that contradict each other.
        CheckpointError: the weights file cannot be loaded as asked.
    """
    from bratune.foreign import LayerPlan
    from bratune.kernels.biformer import build

    if not isinstance(name_or_plan, Plan) and str(name_or_plan).endswith(".json"):
        name_or_plan = load_plan(name_or_plan)
    if isinstance(name_or_plan, LayerPlan):
        raise PlanError("this plan is for the layers of a model of yours; bratune.accelerate takes it")
    if isinstance(name_or_plan, Plan):
        _say_once_where_it_may_not_hold(name_or_plan)
        name, arguments = name_or_plan.model, _planned(name_or_plan)
    else:
        name, arguments = os.fspath(name_or_plan), {}
    if features_only is not None:
        arguments["features_only"] = features_only
    return build(name, pretrained=pretrained, **{**arguments, "num_classes": num_classes, **overrides})


_said: set[tuple[str, ...]] = set()


def _say_once_where_it_may_not_hold(plan: Plan) -> None:
    """Warn, once per process and reason, that a plan was measured on something else than what is here."""
    reasons = plan.obstacles(detect())
    if reasons and reasons not in _said:
        _said.add(reasons)
        warnings.warn(
            f"{'; '.join(reasons)}: the model is the plan's, but its times may not hold here; "
            "`bratune tune` on this machine would make a plan of its own",
            stacklevel=3,
        )


def _planned(plan: Plan) -> dict[str, Any]:
    """Constructor arguments that a plan stands for."""
    arguments = {
        "n_win": plan.n_win,
        "topks": plan.topks,
        "backend": tuple(name or "auto" for name in plan.backends),
        "config": tuple(config or None for config in plan.configs),
        "features_only": get_task(plan.task).features_only,
    }
    if get_variant(plan.model).layout != "stl_nchw":  # which always pads, and has no such argument
        arguments["auto_pad"] = plan.pads
    return arguments
