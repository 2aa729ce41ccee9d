"""Rerouting: another S and another top-k for a model that exists; its weights stay.

S and top-k own no parameters, so that any setting can be tried on given weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bratune.kernels.backbone import Backbone

__all__ = ["reroute"]


def reroute(model: Backbone, n_win: Sequence[int], topks: Sequence[int]) -> None:
    """Let the routed stages of a model use another S and top-k from now on.

    Args:
        model: Stages that are not routed are left alone.
        n_win: Regions per side of each stage.
        topks: Of each stage.
    """
    for stage, s, k in zip(model.stages, n_win, topks, strict=True):
        for module in stage.modules():
            if _is_routed(module):
                module.n_win, module.topk = s, k  # type: ignore[assignment]  # nn.Module types them as tensors
    if hasattr(model, "n_wins"):
        model.n_wins = tuple(n_win)  # type: ignore[assignment]


def _is_routed(module: nn.Module) -> bool:
    return hasattr(module, "n_win") and hasattr(module, "topk") and hasattr(module, "region_of")
