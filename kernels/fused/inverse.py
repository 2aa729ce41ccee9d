"""The inverse of the routes, made on the device: which query regions were routed to every key region.

A program owns a block of key regions and scans the routes of an image twice: to count what lies before and in
its block, and to put every match in its place. Entries keep the order of the query regions, duplicates stay,
nothing waits for the host and nothing depends on the order in which programs run.

Plain PyTorch, for one image::

    order = torch.sort(routes.flatten(), stable=True).indices
    starts = torch.searchsorted(routes.flatten()[order], torch.arange(kv_regions + 1))
    entries = order // topk
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bratune.kernels.fused.direct import launch_kernel

__all__ = ["inverse_routes", "inverse_routes_kernel"]

# A block of key regions per program and how many routes are looked at together.
_BLOCK_REGIONS = 16
_BLOCK_ROUTES = 256


@triton.jit
def inverse_routes_kernel(
    routes_ptr, starts_ptr, entries_ptr,
    r_b, r_h, r_r, r_s,
    COUNT: tl.constexpr, TOPK: tl.constexpr, KV_REGIONS: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_REGIONS: tl.constexpr, BLOCK_ROUTES: tl.constexpr,
):  # fmt: skip
    """Grid: images x heads with routes of their own x blocks of key regions, all on the first axis."""
    BLOCKS: tl.constexpr = (KV_REGIONS + BLOCK_REGIONS - 1) // BLOCK_REGIONS
    pid = tl.program_id(0)
    first_region = (pid % BLOCKS) * BLOCK_REGIONS
    inverse = (pid // BLOCKS).to(tl.int64)
    routes = routes_ptr + (inverse // MAPS) * r_b + (inverse % MAPS) * r_h
    starts = starts_ptr + inverse * (KV_REGIONS + 1)
    entries = entries_ptr + inverse * COUNT
    region = first_region + tl.arange(0, BLOCK_REGIONS)
    lane = tl.arange(0, BLOCK_ROUTES)

    before = 0
    counts = tl.zeros((BLOCK_REGIONS,), tl.int32)
    for first in range(0, COUNT, BLOCK_ROUTES):
        i = first + lane
        route = tl.load(routes + (i // TOPK) * r_r + (i % TOPK) * r_s, mask=i < COUNT, other=KV_REGIONS)
        route = route.to(tl.int32)
        before += tl.sum((route < first_region).to(tl.int32), 0)
        counts += tl.sum((route[:, None] == region[None, :]).to(tl.int32), 0)
    ends = tl.cumsum(counts, 0) + before
    tl.store(starts + region + 1, ends, mask=region < KV_REGIONS)
    tl.store(starts + region, ends - counts, mask=region == 0)

    place = ends - counts
    for first in range(0, COUNT, BLOCK_ROUTES):
        i = first + lane
        route = tl.load(routes + (i // TOPK) * r_r + (i % TOPK) * r_s, mask=i < COUNT, other=KV_REGIONS)
        match = route.to(tl.int32)[:, None] == region[None, :]
        hits = match.to(tl.int32)
        target = place[None, :] + tl.cumsum(hits, 0) - hits
        source = tl.broadcast_to((i // TOPK)[:, None], (BLOCK_ROUTES, BLOCK_REGIONS))
        tl.store(entries + target, source, mask=match & (region < KV_REGIONS)[None, :])
        place += tl.sum(hits, 0)


def inverse_routes(routes: Tensor, kv_regions: int) -> tuple[Tensor, Tensor]:
    """For every key region, the query regions that were routed to it.

    Args:
        routes: ``[B, R, topk]`` or ``[B, heads, R, topk]``, integers, any strides.
        kv_regions: How many key regions there are.

    Returns:
        ``starts`` ``[B, maps, kv_regions + 1]`` and ``entries`` ``[B, maps, R * topk]``, both int32, where
        ``maps`` is the number of heads with routes of their own, or 1. Key region ``j`` was chosen by
        ``entries[..., starts[..., j]:starts[..., j + 1]]``, in ascending order, once per mention.
    """
    if routes.dim() == 3:
        routes = routes.unsqueeze(1)
    batch, maps, regions, topk = routes.shape
    starts = torch.empty((batch, maps, kv_regions + 1), dtype=torch.int32, device=routes.device)
    entries = torch.empty((batch, maps, regions * topk), dtype=torch.int32, device=routes.device)
    grid = (batch * maps * triton.cdiv(kv_regions, _BLOCK_REGIONS),)
    launch_kernel(
        inverse_routes_kernel, grid, (routes, starts, entries), routes.stride(),
        lambda: {
            "COUNT": regions * topk, "TOPK": topk, "KV_REGIONS": kv_regions, "MAPS": maps,
            "BLOCK_REGIONS": _BLOCK_REGIONS, "BLOCK_ROUTES": _BLOCK_ROUTES, "num_warps": 4,
        },
        regions, topk, kv_regions, maps,
    )  # fmt: skip
    return starts, entries
