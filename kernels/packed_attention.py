"""Routed attention for inference, straight from the packed projection ``[B, H, W, q | k | v]``.

A layer that is not trained can do less than a backend must: queries, keys and values lie in one tensor, so
that keys and values move together and both region means are one reduction; routes come from top-k, so
that none occurs twice; maps are padded before. Two ways, both exact:

* *gathered*: whole rows of keys and values are copied out per query region, then fused attention. Five
  operations, ``topk`` copies of the map.
* *masked*: fused attention over the whole map under a mask. Three operations, no copy of the map, and
  ``tokens ** 2`` mask entries: better where a map is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.problem import Problem

__all__ = ["PackedAttention", "prefers_mask"]


def prefers_mask(problem: Problem) -> bool:
    """Whether the mask of a problem is cheaper than its gathered keys.

    A query looks at all tokens in the place of ``keys_per_query``; the factor of four between them is where
    both took equally long on the CPU that this was written on (stage 3 at 224: 196 tokens against 64 keys).
    """
    return problem.kv_tokens <= 4 * problem.keys_per_query


@dataclass
class _Tables:
    """Constant index tensors of a map size and batch."""

    image: Tensor  # [B, 1, 1]
    rows: Tensor  # [B, R, T]: row numbers of the tokens of every region, over the batch
    query_region: Tensor  # [N, 1]: which region a token lies in
    key_region: Tensor  # [1, N]
    nothing: Tensor  # [1, R, R] of -inf


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
        self._tables: dict[tuple[object, ...], _Tables] = {}

    def __call__(self, qkv: Tensor, *, masked: bool, routes: Tensor | None = None) -> Tensor:
        """Route, where no routes are given, and attend.

        Args:
            qkv: ``[B, H, W, 2 * qk_dim + C]``, contiguous; S divides H and W.
            masked: Attend under a mask; gather keys and values otherwise.
            routes: ``[B, R, topk]``, none twice in a row.

        Returns:
            ``[B, H, W, C]``, contiguous.
        """
        tables = self._tables_of(qkv)
        if self.topk == self.n_win**2:
            return self._attend_whole(qkv, None)
        if routes is None:
            routes = self.route(qkv)
        if masked:
            # Out of place, so that the constant stays; routes are distinct, so that the mask is exact.
            regions = tables.nothing.expand(qkv.shape[0], -1, -1).scatter(2, routes, 0.0)
            mask = regions[:, tables.query_region, tables.key_region]  # [B, N, N]
            return self._attend_whole(qkv, mask[:, None])
        return self._attend_gathered(qkv, tables.rows[tables.image, routes])

    def route(self, qkv: Tensor) -> Tensor:
        """The key regions of every query region, ``[B, R, topk]``."""
        means = self._tiles(qkv)[..., : 2 * self.qk_dim].mean((2, 4)).flatten(1, 2)  # [B, R, q | k]
        q, k = means.chunk(2, dim=-1)
        routes: Tensor = torch.topk(q @ k.transpose(1, 2), self.topk, dim=-1).indices
        return routes

    def _attend_whole(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        batch, height, width, _ = qkv.shape
        q, k, v = (self._split(x) for x in torch.split(qkv.flatten(1, 2), self._sizes(qkv), dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out.transpose(1, 2).reshape(batch, height, width, -1)

    def _attend_gathered(self, qkv: Tensor, rows: Tensor) -> Tensor:
        batch, height, width, channels = qkv.shape
        regions, side = self.n_win**2, self.n_win
        rh, rw = height // side, width // side
        qk, _, v_dim = self._sizes(qkv)
        pairs = qkv.view(-1, channels)[:, qk:].index_select(0, rows.flatten())
        k, v = (
            self._split(x)
            for x in torch.split(pairs.view(batch * regions, -1, qk + v_dim), [qk, v_dim], dim=-1)
        )
        q = self._tiles(qkv)[..., :qk].transpose(2, 3).reshape(batch * regions, rh * rw, self.heads, -1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=self.scale)
        out = out.transpose(1, 2).reshape(batch, side, side, rh, rw, v_dim)
        return out.transpose(2, 3).reshape(batch, height, width, v_dim)

    def _split(self, x: Tensor) -> Tensor:
        """``[N, L, heads * D]`` as ``[N, heads, L, D]`` without a copy."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def _tiles(self, qkv: Tensor) -> Tensor:
        batch, height, width, channels = qkv.shape
        side = self.n_win
        return qkv.view(batch, side, height // side, side, width // side, channels)

    def _sizes(self, qkv: Tensor) -> list[int]:
        return [self.qk_dim, self.qk_dim, qkv.shape[-1] - 2 * self.qk_dim]

    def _tables_of(self, qkv: Tensor) -> _Tables:
        batch, height, width, _ = qkv.shape
        key = (batch, height, width, qkv.device, qkv.dtype)
        if key not in self._tables:
            self._tables[key] = self._made(batch, height, width, qkv)
        return self._tables[key]

    def _made(self, batch: int, height: int, width: int, like: Tensor) -> _Tables:
        side, device = self.n_win, like.device
        tokens = torch.arange(height * width, device=device).view(height, width)
        tiled = tokens.view(side, height // side, side, width // side).transpose(1, 2)
        rows = tiled.reshape(1, side * side, -1)
        first = torch.arange(batch, device=device)[:, None, None] * (height * width)
        region = torch.empty(height * width, dtype=torch.long, device=device)
        region[rows[0]] = torch.arange(side * side, device=device)[:, None]
        return _Tables(
            image=torch.arange(batch, device=device)[:, None, None],
            rows=rows + first,
            query_region=region[:, None],
            key_region=region[None, :],
            nothing=torch.full((1, side * side, side * side), -torch.inf, dtype=like.dtype, device=device),
        )
