"""Gather first, then attend densely: the backends ``gather`` and ``gather-sdpa``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.backend import Config
from bratune.kernels import layout
from bratune.machine import Machine
from bratune.problem import Problem

__all__ = ["GatherBackend", "GatherSDPABackend"]

# CUDA launches at most this many blocks along the grid axis that fused attention uses for its batch.
_CUDA_MAX_BATCH = 65535


def _mask_matters(problem: Problem) -> bool:
    """Whether some keys are padding that must get no weight."""
    return problem.padding == "masked" and problem.kv_padded != (problem.kv_height, problem.kv_width)


class GatherBackend:
    """The composition of the paper and of the official code, at its full cost.

    Keys and values are brought into regions, an expanded view of them is gathered with one index per
    element, and the two products and the softmax are run one after the other.
    """

    name = "gather"

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """Nothing stands in its way but memory, and that is for the device to say."""
        return ()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        """Attend from every query region to its routed key regions; see `bratune.backend.Backend`."""
        heads = problem.heads
        queries = layout.to_head_regions(q, problem.region, heads)  # [B, heads, R, T, D]
        graph = routes.long() if problem.per_head else routes.long()[:, None].expand(-1, heads, -1, -1)
        keys = self._gather(layout.to_head_regions(k, problem.kv_region, heads), graph)
        values = self._gather(layout.to_head_regions(v, problem.kv_region, heads), graph)
        logits = (queries * problem.scale) @ keys.transpose(-2, -1)  # [B, heads, R, T, topk * Tk]
        if _mask_matters(problem):
            valid = layout.valid_tokens(problem.kv_height, problem.kv_width, problem.kv_region, q.device)
            real = valid[routes].flatten(-2)  # [B, R, topk * Tk], per head [B, heads, R, topk * Tk]
            real = real if problem.per_head else real[:, None]
            logits = logits.masked_fill(~real[:, :, :, None, :], -torch.inf)
        attended = logits.softmax(-1) @ values  # [B, heads, R, T, Dv]
        return layout.from_head_regions(attended, problem.height, problem.width, problem.region)

    @staticmethod
    def _gather(x: Tensor, graph: Tensor) -> Tensor:
        """The routed regions of ``[B, heads, Rk, Tk, D]`` side by side, ``[B, heads, R, topk * Tk, D]``."""
        regions, topk = graph.shape[2:]
        tokens, channels = x.shape[3:]
        everything = x[:, :, None].expand(-1, -1, regions, -1, -1, -1)
        index = graph[..., None, None].expand(-1, -1, -1, topk, tokens, channels)
        return everything.gather(3, index).flatten(3, 4)

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """There is nothing to set."""
        return ({},)

    def workspace_bytes(self, problem: Problem) -> int:
        """Maps in regions, gathered keys and values, logits and their softmax, and the padded output."""
        return 2 * problem.io_bytes + problem.gathered_bytes + 2 * problem.score_bytes

    def flops(self, problem: Problem) -> int:
        """Two operations per multiply-add of both products."""
        return 2 * problem.attention_macs


class GatherSDPABackend:
    """Whole rows of routed keys and values gathered straight from the maps, then PyTorch's fused attention.

    A row is a token with all its channels, so one index moves ``heads * head_dim`` numbers, and the maps
    are not brought into regions first. Regions are the batch of the fused attention: the score matrix
    is never written out.
    """

    name = "gather-sdpa"

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """Nothing stands in its way but memory, and that is for the device to say."""
        return ()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        """Attend from every query region to its routed key regions; see `bratune.backend.Backend`."""
        keys, values = self._keys_and_values(k, v, routes, problem)
        mask = self._mask(routes, problem) if _mask_matters(problem) else None
        batch, heads, tokens = q.shape[0], problem.heads, problem.region_tokens
        if problem.per_head:
            # Every head is an image of its own: one sequence per image, head and region.
            queries = layout.to_head_regions(q, problem.region, heads).flatten(0, 2)[:, None]
            attended = _fused_attention(queries, keys, values, mask, problem.scale)
            attended = attended.view(batch, heads, problem.regions, tokens, -1)
            return layout.from_head_regions(attended, problem.height, problem.width, problem.region)
        queries = layout.to_regions(q, problem.region).view(-1, tokens, heads, problem.head_dim)
        attended = _fused_attention(queries.transpose(1, 2), keys, values, mask, problem.scale)
        by_token = attended.transpose(1, 2).flatten(2)  # [B * R, T, heads * Dv]
        return layout.from_regions(by_token, problem.height, problem.width, problem.region)

    def _keys_and_values(
        self, k: Tensor, v: Tensor, routes: Tensor, problem: Problem
    ) -> tuple[Tensor, Tensor]:
        """What every query region sees, ``[B * R, heads, topk * Tk, D]`` each.

        Per head, ``[B * heads * R, 1, topk * Tk, D]``.
        """
        if problem.kv_regions == 1:
            return self._only_region(k, problem), self._only_region(v, problem)
        rows = self._rows(routes, problem)
        keys = self._take(k, rows, problem, problem.head_dim)
        return keys, self._take(v, rows, problem, problem.v_head_dim)

    def _rows(self, routes: Tensor, problem: Problem) -> Tensor:
        """Where the routed tokens are in the padded maps of all images as one list, one number each.

        Per head, a row of that list is one head of one token.
        """
        ids = layout.token_ids(problem.kv_height, problem.kv_width, problem.kv_region, routes.device)
        tokens = ids.index_select(0, routes.flatten())  # [B (* heads) * R * topk, Tk]
        if problem.per_head:
            tokens = tokens.view(routes.shape[0], problem.heads, -1)
            head = torch.arange(problem.heads, device=routes.device)[:, None]
            tokens = (tokens + self._first(problem, routes)[:, None, None]) * problem.heads + head
        elif torch.jit.is_tracing() or routes.shape[0] != 1:  # type: ignore[attr-defined, no-untyped-call]
            tokens = tokens.view(routes.shape[0], -1) + self._first(problem, routes)[:, None]
        return tokens.flatten()

    @staticmethod
    def _first(problem: Problem, routes: Tensor) -> Tensor:
        """Where the tokens of every image begin, ``[B]``."""
        tokens = problem.kv_padded[0] * problem.kv_padded[1]
        return torch.arange(routes.shape[0], device=routes.device) * tokens

    @staticmethod
    def _take(x: Tensor, rows: Tensor, problem: Problem, head_dim: int) -> Tensor:
        """The routed rows of a map as sequences; see `_keys_and_values`."""
        heads = 1 if problem.per_head else problem.heads  # of a row
        x = layout.pad_to_regions(x, problem.kv_region)
        taken = x.reshape(-1, heads * head_dim).index_select(0, rows)
        return taken.view(-1, problem.keys_per_query, heads, head_dim).transpose(1, 2)

    def _only_region(self, x: Tensor, problem: Problem) -> Tensor:
        """The whole map, seen by every query region: with one key region there is nothing to gather."""
        heads, regions = problem.heads, problem.regions
        whole = layout.to_head_regions(x, problem.kv_region, heads)[:, :, 0]  # [B, heads, Tk, D]
        if problem.per_head:
            return whole.flatten(0, 1)[:, None].repeat_interleave(regions, 0)
        return whole if regions == 1 else whole.repeat_interleave(regions, 0)

    @staticmethod
    def _mask(routes: Tensor, problem: Problem) -> Tensor:
        """Which routed tokens are real, ``[N, 1, 1, topk * Tk]`` of bool."""
        valid = layout.valid_tokens(problem.kv_height, problem.kv_width, problem.kv_region, routes.device)
        return valid[routes].flatten(-2).flatten(0, -2)[:, None, None, :]

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """There is nothing to set."""
        return ({},)

    def workspace_bytes(self, problem: Problem) -> int:
        """Gathered keys and values, queries and output in regions, and the row numbers."""
        maps = problem.io_bytes
        rows = problem.batch * problem.regions * problem.keys_per_query * 3 * 8
        return problem.gathered_bytes + maps + rows * (problem.heads if problem.per_head else 1)

    def flops(self, problem: Problem) -> int:
        """Two operations per multiply-add of both products."""
        return 2 * problem.attention_macs


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's fused attention over ``[N, heads, L, D]``, in pieces where a CUDA grid is too short for N."""
    if q.device.type != "cuda" or q.shape[0] <= _CUDA_MAX_BATCH:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    pieces = []
    for first in range(0, q.shape[0], _CUDA_MAX_BATCH):
        some = slice(first, first + _CUDA_MAX_BATCH)
        part = None if mask is None else mask[some]
        pieces.append(F.scaled_dot_product_attention(q[some], k[some], v[some], attn_mask=part, scale=scale))
    return torch.cat(pieces)
