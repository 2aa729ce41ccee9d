"""Recall: how much of the full attention mass falls into the regions that level one chose. A diagnostic.

It never serves as an objective: for weights that were trained sparse it does not rank settings (on small
networks its rank correlation with accuracy was between -0.5 and 0.7). Beside the recall of the best possible
regions it shows what the router loses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bratune.kernels.layout import to_head_regions
from bratune.kernels.routing import region_means

__all__ = ["recall_curves"]


def recall_curves(
    q: Tensor, k: Tensor, *, region: tuple[int, int], heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention mass that the first k regions hold, for every k at once.

    Args:
        q: Queries ``[B, H, W, C]`` of a map that regions tile.
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
    for i in range(q.shape[0]):  # one image at a time: the full score matrix is large
        own, keys = (to_head_regions(x[i : i + 1], region, heads)[0].float() for x in (q, k))
        count, tokens = own.shape[1], own.shape[2]
        logits = own.flatten(1, 2) @ keys.flatten(1, 2).transpose(-1, -2) * scale
        mass = logits.softmax(-1).view(heads, count, tokens, count, tokens).sum(-1).mean((0, 2))  # [R, R]
        routed.append(mass.gather(-1, order[i]).cumsum(-1).mean(0))
        best.append(mass.sort(-1, descending=True).values.cumsum(-1).mean(0))
    return torch.stack(routed).mean(0), torch.stack(best).mean(0)
