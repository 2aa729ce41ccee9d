"""Attention over the whole map under a region mask: the backend ``dense``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.backend import Config
from bratune.kernels import layout, routing
from bratune.machine import Machine
from bratune.problem import Problem

__all__ = ["DenseBackend"]

# The mask may take this share of the device's memory.
_MASK_SHARE = 0.25


class DenseBackend:
    """Every query meets every key, and what is not routed is masked: the same result, no sparsity used.

    The mask is added to the logits: minus infinity where a region is not routed and the logarithm of
    how often it is routed elsewhere, so that duplicates count with multiplicity. Tokens stay where they
    are. On small maps this is the fastest way, because nothing is gathered and one large product runs
    better than many small ones.
    """

    name = "dense"

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """The mask must fit into the memory of the device."""
        room = machine.memory_gib * _MASK_SHARE
        needed = self._mask_bytes(problem) / 2**30
        if room and needed > room:
            return (
                f"its mask over the whole map takes {needed:.1f} GiB; at most {room:.1f} GiB, "
                f"{_MASK_SHARE:.0%} of the memory of this device, would be allowed",
            )
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
        if problem.padding == "zeros":
            k, v = (layout.pad_to_regions(x, problem.kv_region) for x in (k, v))
        queries, keys, values = (
            x.reshape(q.shape[0], -1, problem.heads, x.shape[3] // problem.heads).transpose(1, 2)
            for x in (q, k, v)
        )
        mask = self._mask(routes, problem, q.dtype)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=problem.scale
        )  # [B, heads, H * W, Dv]
        return attended.transpose(1, 2).reshape(q.shape[0], problem.height, problem.width, -1)

    @staticmethod
    def _mask(routes: Tensor, problem: Problem, dtype: torch.dtype) -> Tensor:
        """What is added to the logits, ``[B, 1 or heads, H * W, Nk]``."""
        by_region = routing.multiplicity_bias(routes, problem, dtype)  # [B, 1 or heads, R, Rk]
        # Masked padding is left out of the keys altogether.
        height, width = (
            problem.kv_padded if problem.padding == "zeros" else (problem.kv_height, problem.kv_width)
        )
        keys = layout.token_regions(height, width, problem.kv_region, routes.device)
        queries = layout.token_regions(problem.height, problem.width, problem.region, routes.device)
        # Keys first: then every query takes a whole row.
        return by_region.index_select(3, keys).index_select(2, queries)

    @staticmethod
    def _keys(problem: Problem) -> int:
        rows, cols = (
            problem.kv_padded if problem.padding == "zeros" else (problem.kv_height, problem.kv_width)
        )
        return rows * cols

    def _mask_bytes(self, problem: Problem) -> int:
        heads = problem.heads if problem.per_head else 1
        return problem.batch * heads * problem.tokens * self._keys(problem) * problem.item_bytes

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """There is nothing to set."""
        return ({},)

    def workspace_bytes(self, problem: Problem) -> int:
        """The mask, and padded keys and values."""
        maps = problem.io_bytes * (1 if problem.divisible else 2)
        return self._mask_bytes(problem) + maps

    def flops(self, problem: Problem) -> int:
        """Two operations per multiply-add of all pairs, routed or not."""
        pairs = problem.batch * problem.tokens * self._keys(problem)
        return 2 * pairs * (problem.channels + problem.v_channels)
