"""Proxies: what may say, without labels, how much a setting of trained weights loses; a study compares them.

The product keeps two of them, the divergence and the count of answers that differ (docs/tune.md says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bratune.kernels import layout
from bratune.kernels.backbone import Backbone
from bratune.problem import ceil_div
from bratune.tune.fidelity import divergence
from bratune.tune.recall import is_read, map_of
from bratune.work.parts import queries_and_keys

__all__ = ["PROXIES", "ROUTING_PICTURES", "Observed", "overlap", "proxies_of", "routed_regions"]

# What ranks settings, each larger for a setting that is further from the reference.
PROXIES = {
    "divergence": "divergence",
    "disagreement": "disagreement",
    "margin": "margin-weighted disagreement",
    "features": "distance of features",
    "routing": "lost overlap of routes",
}
# Pictures on which routes are compared; they cost more than the other proxies.
ROUTING_PICTURES = 32


@dataclass(frozen=True)
class Observed:
    """What a model does with some pictures.

    Attributes:
        logits: ``[N, classes]``, or of every pixel ``[N, classes, H, W]``.
        features: What its head reads: pooled, or maps.
        seen: Per routed layer, which token sees which, ``[N, tokens, tokens]`` bool.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    seen: tuple[Tensor, ...]

    @property
    def top(self) -> Tensor:
        """The top class of each picture, or of each pixel."""
        return self.logits.argmax(1)

    @property
    def margin(self) -> Tensor:
        """By how much the top class leads, as a probability."""
        best = self.logits.softmax(1).topk(2, 1).values
        return best[:, 0] - best[:, 1]


def proxies_of(before: Observed, after: Observed, *, features: float) -> dict[str, float]:
    """Every proxy by its name, see `PROXIES`.

    Args:
        before: The model with its own setting.
        after: With another, on the same pictures.
        features: How far features are apart.
    """
    same = before.top == after.top
    return {
        "divergence": float(divergence(before.logits, after.logits).mean()),
        "disagreement": float((~same).float().mean()),
        "margin": float((before.margin * ~same).mean()),
        "features": features,
        "routing": 1 - overlap(before.seen, after.seen),
    }


def overlap(own: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Share of what tokens saw that they still see, mean over layers."""
    shares = [float((a & b).sum() / a.sum()) for a, b in zip(own, other, strict=True)]
    return sum(shares) / len(shares)


def routed_regions(model: Backbone, images: Tensor) -> tuple[Tensor, ...]:
    """Which token sees which in every routed layer, ``[N, tokens, tokens]`` bool each, padding left out.

    Args:
        model: In evaluation mode; S and top-k are what it has in place.
        images: ``[N, 3, H, W]``; on few of them, for maps of few tokens.
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        attn: Any = module
        tokens = map_of(module, inputs[0])
        q, k, (rh, rw) = queries_and_keys(module, tokens)
        routes = attn.route(q, k)  # [N, R, topk]
        count = routes.shape[1]
        regions = torch.zeros(len(q), count, count, dtype=torch.bool).scatter_(2, routes.cpu(), True)
        rows, columns = layout.sides(q)
        of_row, of_column = torch.arange(rows) // rh, torch.arange(columns) // rw
        region = of_row[:, None] * ceil_div(columns, rw) + of_column
        region = layout.crop_tokens(region[None], *layout.sides(tokens)).flatten()
        seen.append(regions[:, region][:, :, region])

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if is_read(m)]
    first = next(model.parameters())
    try:
        with torch.no_grad():
            model(images.to(device=first.device, dtype=first.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(seen)
