"""The published composition of routed attention with its intermediate results, and soft routing.

`routed_attention` returns the output alone. Two uses need more: the attention matrix (to draw it), and soft
routing, which scales every gathered key and value by the routing weight of its region and so cannot share
one map of keys between query regions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.errors import UnsupportedError
from bratune.kernels import layout

__all__ = ["TopkRouting", "composed_attention", "require_composition"]

# Backends whose meaning is "gather, then attend": those that a composition can stand for.
COMPOSED = ("auto", "reference", "gather", "gather-sdpa")


def require_composition(backend: str, purpose: str) -> None:
    """Refuse a named backend that does not gather keys and values.

    Args:
        backend: The name that was asked for.
        purpose: What needs the gathered keys, as the subject of a sentence.

    Raises:
        UnsupportedError: the backend is none of `COMPOSED`.
    """
    if backend not in COMPOSED:
        raise UnsupportedError(
            backend,
            (f"{purpose} needs the gathered keys and values themselves; {', '.join(COMPOSED)} have them",),
        )


def composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    heads: int,
    region: tuple[int, int],
    kv_region: tuple[int, int],
    scale: float,
    weights: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gather routed keys and values, weigh them, attend.

    Args:
        q: Queries ``[B, Hq, Wq, C]``.
        k: Keys ``[B, Hk, Wk, C]``; maps that regions do not tile are padded with zero keys.
        v: Values ``[B, Hk, Wk, Cv]``.
        routes: ``[B, R, topk]``.
        heads: Attention heads.
        region: Query region in tokens.
        kv_region: Key region in tokens.
        scale: Factor of the logits.
        weights: ``[B, R, topk]``; every key and every value of a routed region is multiplied by its weight
            (soft routing). None multiplies nothing.
        fused: Attend with PyTorch's fused attention, which writes no attention matrix.

    Returns:
        The output ``[B, Hq, Wq, Cv]`` and the attention matrix ``[B, heads, R, T, topk * Tk]``, None
        where ``fused``.
    """
    queries = layout.to_head_regions(q, region, heads)  # [B, heads, R, T, D]
    keys = _gather(layout.to_head_regions(k, kv_region, heads), routes, weights)
    values = _gather(layout.to_head_regions(v, kv_region, heads), routes, weights)
    attn = None
    if fused:
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    else:
        attn = torch.softmax((queries * scale) @ keys.transpose(-2, -1), dim=-1)
        out = attn @ values
    return layout.from_head_regions(out, *layout.sides(q), region), attn


def _gather(x: Tensor, routes: Tensor, weights: Tensor | None) -> Tensor:
    """Head regions ``[B, heads, R, T, D]`` as routed ones, ``[B, heads, R, topk * T, D]``."""
    images = torch.arange(x.shape[0], device=x.device)[:, None, None]
    routed = x.transpose(1, 2)[images, routes]  # [B, R, topk, heads, T, D]
    if weights is not None:
        routed = routed * weights[:, :, :, None, None, None]
    return routed.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)


class TopkRouting(nn.Module):
    """Level one with its weights, for soft routing.

    Args:
        qk_dim: Channels of queries and keys.
        topk: Key regions per query region.
        scale: Factor of the routing logits.
        param_routing: Send both region means through one learned linear layer first.
        diff_routing: Let gradients flow through the routing weights.
    """

    def __init__(
        self, qk_dim: int, topk: int, scale: float, *, param_routing: bool, diff_routing: bool
    ) -> None:
        super().__init__()
        self.topk = topk
        self.scale = scale
        self.diff_routing = diff_routing
        self.emb: nn.Module = nn.Linear(qk_dim, qk_dim) if param_routing else nn.Identity()

    def forward(self, q_means: Tensor, k_means: Tensor) -> tuple[Tensor, Tensor]:
        """Region means ``[B, R, C]`` to routes ``[B, R, topk]`` and their softmax weights."""
        if not self.diff_routing:
            q_means, k_means = q_means.detach(), k_means.detach()
        logits = (self.emb(q_means) * self.scale) @ self.emb(k_means).transpose(1, 2)
        chosen, routes = logits.topk(self.topk, dim=-1)
        return routes, torch.softmax(chosen, dim=-1)
