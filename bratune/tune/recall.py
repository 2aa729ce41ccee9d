"""Recall: how much of the full attention mass falls into the regions that level one chose. A diagnostic.

It never serves as an objective: for weights that were trained sparse it does not rank settings (on small
networks its rank correlation with accuracy was between -0.5 and 0.7). Beside the recall of the best possible
regions it shows what the router loses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bratune.kernels.backbone import Backbone
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bratune.kernels.layout import to_head_regions
from bratune.kernels.nhwc import to_nhwc
from bratune.kernels.routing import region_means
from bratune.tune.evidence import LayerRecall
from bratune.work.parts import queries_and_keys

__all__ = ["is_read", "map_of", "model_recall", "recall_curves"]

# Scores held at a time; a whole score matrix of stage 1 would be gigabytes at 512 pixels.
MOST_SCORES = 2**24


def model_recall(model: Backbone, images: Tensor, *, batch: int = 8) -> tuple[LayerRecall, ...]:
    """The recall of every routed layer of a model, mean over images.

    Layers that pool their keys are left out.

    Args:
        model: In evaluation mode afterwards; S and top-k are what it has in place.
        images: ``[N, 3, H, W]``.
        batch: Images per forward pass.
    """
    layers: list[tuple[int, int, Any]] = []
    for number, stage in enumerate(model.stages, 1):
        routed = [m for m in stage.modules() if is_read(m)]
        layers += [(number, block, module) for block, module in enumerate(routed, 1)]
    sums: dict[int, tuple[Tensor, Tensor]] = {}

    def read(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            q, k, region = queries_and_keys(module, map_of(module, inputs[0]))
            attn: Any = module
            curves = recall_curves(q, k, region=region, heads=attn.num_heads, scale=attn.scale)
            weighted = [len(q) * curve.double() for curve in curves]
            before = sums.get(place, (torch.zeros_like(weighted[0]), torch.zeros_like(weighted[1])))
            sums[place] = before[0] + weighted[0], before[1] + weighted[1]

        return hook

    model.eval()
    first = next(model.parameters())
    handles = [m.register_forward_pre_hook(read(place)) for place, (_, _, m) in enumerate(layers)]
    try:
        with torch.no_grad():
            for some in torch.split(images, batch):
                model(some.to(device=first.device, dtype=first.dtype))
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for place, (number, block, module) in enumerate(layers):
        routed_sum, best_sum = sums[place]
        topk = min(module.topk, len(routed_sum))
        found.append(
            LayerRecall(
                stage=number,
                block=block,
                regions=len(routed_sum),
                topk=topk,
                routed=float(routed_sum[topk - 1]) / len(images),
                best=float(best_sum[topk - 1]) / len(images),
            )
        )
    return tuple(found)


def recall_curves(
    q: Tensor, k: Tensor, *, region: tuple[int, int], heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention mass that the first k regions hold, for every k at once.

    Args:
        q: Queries ``[B, H, W, C]``; where regions do not tile the map, zeros fill it up for level two alone.
        k: Keys, the same shape.
        region: In tokens.
        heads: Attention heads.
        scale: Factor of the logits.

    Returns:
        Two curves ``[R]`` in [0, 1], mean over images, heads and queries: entry ``i`` is the mass in the
        ``i + 1`` regions that the router likes best, and in the ``i + 1`` best for each query region.
    """
    affinity = region_means(q, region) @ region_means(k, region).transpose(-1, -2)
    order = affinity.argsort(-1, descending=True)
    routed, best = [], []
    for i in range(q.shape[0]):
        own, keys = (to_head_regions(x[i : i + 1], region, heads)[0].float() for x in (q, k))
        count, tokens = own.shape[1], own.shape[2]
        flat = keys.flatten(1, 2).transpose(-1, -2) * scale
        rows = max(MOST_SCORES // (heads * count * tokens * tokens), 1)
        parts = []
        for some in torch.split(own, rows, dim=1):
            weights = (some.flatten(1, 2) @ flat).softmax(-1)  # [heads, rows * tokens, R * tokens]
            by_region = weights.view(heads, some.shape[1], tokens, count, tokens).sum(-1)
            parts.append(by_region.mean((0, 2)))
        mass = torch.cat(parts)  # [R, R]
        routed.append(mass.gather(-1, order[i]).cumsum(-1).mean(0))
        best.append(mass.sort(-1, descending=True).values.cumsum(-1).mean(0))
    return torch.stack(routed).mean(0), torch.stack(best).mean(0)


def is_read(module: nn.Module) -> bool:
    """Whether a module is a routed layer that does not pool its keys."""
    if isinstance(module, BiLevelRoutingAttention):
        return isinstance(module.kv_down, nn.Identity)
    return isinstance(module, NCHWBiLevelRoutingAttention)


def map_of(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer as ``[B, H, W, C]``."""
    return to_nhwc(x) if isinstance(module, NCHWBiLevelRoutingAttention) else x
