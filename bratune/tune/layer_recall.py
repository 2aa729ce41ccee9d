"""What layers see of what full attention would see, as numbers and as text; see `bratune.tune.recall`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LayerRecall", "recall_lines", "recall_text"]


@dataclass(frozen=True, kw_only=True)
class LayerRecall:
    """What one routed layer sees of what full attention with its own queries and keys would see.

    Attributes:
        stage: From 1.
        block: From 1, within the stage.
        regions: Key regions of the map.
        topk: Of which every query region attends to so many.
        routed: Share of the attention mass in the regions of the router.
        best: Share in the best regions of that number, chosen by the mass itself.
    """

    stage: int
    block: int
    regions: int
    topk: int
    routed: float
    best: float


def recall_text(layers: Sequence[LayerRecall]) -> str:
    """Recall per stage in one line, mean over its layers: that of the router, of the best regions, and k."""
    parts = []
    for stage in sorted({layer.stage for layer in layers}):
        some = [layer for layer in layers if layer.stage == stage]
        routed, best = (sum(getattr(x, name) for x in some) / len(some) for name in ("routed", "best"))
        share = f"{some[0].topk}/{some[0].regions}"
        parts.append(f"stage {stage} {routed:.2f} of {best:.2f} (k {share})")
    return " · ".join(parts)


def recall_lines(diagnostics: Mapping[str, Any]) -> list[str]:
    """One line for the plan and one for the reference; none where nothing was looked at.

    Args:
        diagnostics: Those of a plan (`bratune.tune.plan.Plan`).
    """
    return [
        f"attention mass in routed regions, of the best possible ({name}; decides nothing): "
        + recall_text([LayerRecall(**layer) for layer in layers])
        for name, layers in diagnostics.get("recall", {}).items()
    ]
