"""Models by name or by plan, for people who do not care where they are defined."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from bratune.kernels.backbone import Backbone

__all__ = ["create_model"]


@runtime_checkable
class _Plan(Protocol):
    """What a plan says about the model that it was made for."""

    @property
    def model(self) -> str: ...

    def model_arguments(self) -> dict[str, Any]: ...


def create_model(
    name_or_plan: str | _Plan,
    *,
    pretrained: str | Path | None = None,
    num_classes: int = 1000,
    features_only: bool = False,
    **overrides: Any,
) -> Backbone:
    """A BiFormer, ready to run.

    Args:
        name_or_plan: A model's name (``biformer_small``) or a plan of the tuner, whose S, top-k and
            backends it then has.
        pretrained: A weights file; see `bratune.kernels.checkpoint.load_weights`.
        num_classes: Classes; 0 returns pooled features.
        features_only: Return the four maps of the dense-task backbone in the place of class scores.
        overrides: Arguments of the model's constructor, e.g. ``n_win=8``, ``backend="gather"``,
            ``auto_pad=True``; they win over the plan. ``trust_checkpoint=True`` lets the weights file run
            code of its own while it is read.

    Raises:
        UnknownNameError: no model, or no argument, has this name.
        ProblemError: arguments that contradict each other.
        CheckpointError: the weights file cannot be loaded as asked.
    """
    from bratune.kernels.biformer import build

    name, arguments = name_or_plan, {}
    if isinstance(name_or_plan, _Plan):
        name, arguments = name_or_plan.model, name_or_plan.model_arguments()
    assert isinstance(name, str)
    arguments = {"num_classes": num_classes, "features_only": features_only, **arguments, **overrides}
    return build(name, pretrained=pretrained, **arguments)
