"""Routed attention for inference, from the map that is projected to the map that is enhanced.

A layer that is not trained can do less than a backend must: queries, keys and values lie in one tensor, so
that keys and values move together and both region means are one reduction; routes come from top-k, so
that none occurs twice; maps are padded before. Two ways, both exact:

* *gathered*: the map is brought into regions before it is projected, so that queries need no copy and a
  region of keys and values is one row to gather; then fused attention. ``topk`` copies of keys and values.
* *masked*: fused attention over the whole map under a mask. No copy of the map, and ``tokens ** 2`` mask
  entries: better where a map is small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.kernels import layout
from bratune.kernels.constants import kept
from bratune.kernels.routing import region_means
from bratune.problem import Problem

__all__ = ["PackedAttention", "prefers_mask"]


def prefers_mask(problem: Problem) -> bool:
    """Whether the mask of a problem is cheaper than its gathered keys.

    A query looks at all tokens in the place of ``keys_per_query``; the factor of four between them is where
    both took equally long on the CPU that this was written on (stage 3 at 224: 196 tokens against 64 keys).
    """
    return problem.kv_tokens <= 4 * problem.keys_per_query


class PackedAttention:
    """Both levels of attention of one layer.

    Args:
        heads: Attention heads.
        qk_dim: Channels of queries, and of keys.
        n_win: Regions per side, S.
        topk: Key regions per query region.
        scale: Factor of the logits.
    """

    def __init__(self, *, heads: int, qk_dim: int, n_win: int, topk: int, scale: float) -> None:
        self.heads = heads
        self.qk_dim = qk_dim
        self.n_win = n_win
        self.topk = topk
        self.scale = scale

    def __call__(
        self,
        y: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        masked: bool,
        routes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Project, route where no routes are given, and attend.

        Args:
            y: The layer's input ``[B, H, W, C]``; S divides H and W.
            project: Takes ``[..., C]`` to queries, keys and values, ``[..., 2 * qk_dim + V]``.
            masked: Attend under a mask; gather keys and values otherwise.
            routes: ``[B, R, topk]``, none twice in a row.

        Returns:
            What was attended to, and the values, ``[B, H, W, V]`` each; the first is contiguous and nobody
            else's.
        """
        height, width = layout.sides(y)
        region = (height // self.n_win, width // self.n_win)
        if masked or self.topk == self.n_win**2:
            qkv = project(y)
            return self._attend_map(qkv, region, routes), qkv[..., 2 * self.qk_dim :]
        qkv = project(layout.to_regions(y, region))  # [B, R, T, q | k | v]
        if routes is None:
            routes = self._route(qkv[..., : 2 * self.qk_dim].mean(2))
        out, values = self._attend_regions(qkv, routes), qkv[..., 2 * self.qk_dim :]
        return (
            layout.from_regions(out, height, width, region),
            layout.from_regions(values, height, width, region),
        )

    def _route(self, means: Tensor) -> Tensor:
        """The key regions of every query region ``[B, R, topk]``, from the means ``[B, R, q | k]``."""
        q, k = means.chunk(2, dim=-1)
        routes: Tensor = torch.topk(q @ k.transpose(1, 2), self.topk, dim=-1).indices
        return routes

    def _attend_map(self, qkv: Tensor, region: tuple[int, int], routes: Tensor | None) -> Tensor:
        batch, (height, width) = qkv.shape[0], layout.sides(qkv)
        mask = None
        if self.topk < self.n_win**2:
            if routes is None:
                # The values' means come along for nothing; to leave them out would copy queries and keys.
                routes = self._route(region_means(qkv, region)[..., : 2 * self.qk_dim])
            # Out of place, so that the constant stays; routes are distinct, so that the mask is exact.
            nothing = _nothing(self.n_win**2, qkv.dtype, qkv.device)
            regions = nothing.expand(batch, -1, -1).scatter(2, routes, 0.0)
            pairs = _region_pairs(height, width, self.n_win, qkv.device)
            mask = regions.flatten(1).index_select(1, pairs)
            mask = mask.view(batch, 1, height * width, height * width)
        q, k, v = (self._by_head(x) for x in torch.split(qkv.flatten(1, 2), self._sizes(qkv), dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out.transpose(1, 2).reshape(batch, height, width, v.shape[1] * v.shape[3])

    def _attend_regions(self, qkv: Tensor, routes: Tensor) -> Tensor:
        batch, regions, tokens, _ = qkv.shape
        if torch.jit.is_tracing() or batch > 1:  # type: ignore[attr-defined, no-untyped-call]
            routes = layout.flat_routes(routes, regions)
        qk, _, v_dim = self._sizes(qkv)
        flat = qkv.flatten(0, 1)  # [B * R, T, q | k | v]
        pairs = (
            flat[..., qk:]
            .index_select(0, routes.flatten())
            .view(batch * regions, self.topk * tokens, qk + v_dim)
        )
        k, v = (self._by_head(x) for x in torch.split(pairs, [qk, v_dim], dim=-1))
        q = self._by_head(flat[..., :qk])
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.transpose(1, 2).reshape(batch, regions, tokens, v_dim)

    def _by_head(self, x: Tensor) -> Tensor:
        """``[N, L, heads * D]`` as ``[N, heads, L, D]`` without a copy."""
        return x.view(*x.shape[:-1], self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def _sizes(self, x: Tensor) -> list[int]:
        return [self.qk_dim, self.qk_dim, x.shape[-1] - 2 * self.qk_dim]


@kept
def _nothing(regions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask that hides everything, ``[1, R, R]``."""
    return torch.full((1, regions, regions), -torch.inf, dtype=dtype, device=device)


@kept
def _region_pairs(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """Where in a mask between regions the mask between two tokens is found, ``[N * N]`` for N tokens."""
    region = (height // side, width // side)
    own = layout.token_regions(height, width, region, device)
    return (own[:, None] * side**2 + own).flatten()
