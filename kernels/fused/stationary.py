"""Forward pass that stays with one head of one image: for regions of few tokens.

A region of 16 or 4 tokens reads as many keys as one of 64, so its keys and values come from the L2 cache topk
times over, and that is what such a layer waits for. Here a program goes through the regions of one head of
one image, ``GROUP`` at a time as a batch of products, so that they are read again from L1 instead. Large
groups leave room for one or two programs on an SM, which then share its L1 with fewer others. A row of a head
may be half a line of the cache: a program of two heads uses all of it. Loads must not be pipelined
(``num_stages`` 1): asynchronous copies go past L1. Where one tile holds all keys of a region it is multiplied
as a whole; more keys than that go through a running softmax.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from bratune.kernels.fused.call import Call, is_wide, precision, route_strides
from bratune.kernels.fused.direct import launch_kernel
from bratune.kernels.fused.tiles import (
    SIZES,
    channels,
    known,
    load_rows,
    position,
    product,
    split,
    store_statistics,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["stationary_fwd", "stationary_fwd_kernel"]


@triton.jit
def _keys(
    routes, r_s, n, listed, c, k_y, k_x, k_c, v_y, v_x, v_c, kv_height, kv_width, krh, krw, kv_grid_w,
    FULL: tl.constexpr, KV_EVEN: tl.constexpr, STATIC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of k and v [G, N, D] and which keys are on the map [G, N]; ``routes`` are [G, 1]."""
    slot, token = split(n, krh * krw, STATIC)
    if FULL:
        key_region = tl.load(routes + slot * r_s).to(tl.int32)  # [G, N]
    else:
        key_region = tl.load(routes + slot * r_s, mask=listed, other=0).to(tl.int32)  # [G, N]
    y, x = position(key_region, token, kv_grid_w, krh, krw, STATIC, WIDE)
    on_map = listed & (y >= 0)
    if not KV_EVEN:
        on_map = on_map & (y < kv_height) & (x < kv_width)
    k_offsets = (y * k_y + x * k_x)[:, :, None] + (c * k_c)[None, None, :]
    v_offsets = (y * v_y + x * v_x)[:, :, None] + (c * v_c)[None, None, :]
    return k_offsets, v_offsets, on_map


@triton.jit
def _scores(
    q, k, listed, on_map,
    PADS_OFF: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    s = product(q, tl.permute(k, (0, 2, 1)), PRECISION, UPCAST)  # [G, M, N]
    if PADS_OFF:
        s = tl.where(on_map[:, None, :], s, float("-inf"))
    elif not FULL:
        s = tl.where(listed[:, None, :], s, float("-inf"))
    return s


@triton.jit(do_not_specialize=SIZES)
def stationary_fwd_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr, lse_ptr,
    q_b, q_y, q_x, q_c, k_b, k_y, k_x, k_c, v_b, v_y, v_x, v_c, r_b, r_h, r_r, r_s, o_b, o_y, o_x,
    height, width, kv_height, kv_width, logit_scale,
    regions, rh, rw, grid_w, kv_regions, krh, krw, kv_grid_w,
    REGIONS: tl.constexpr, HEADS: tl.constexpr, TOPK: tl.constexpr,
    RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    KRH: tl.constexpr, KRW: tl.constexpr, KV_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, KV_EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr, PER_HEAD: tl.constexpr, KEEP_LSE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Grid: images x groups of heads x splits of the regions, on the first axis."""
    STATIC: tl.constexpr = RH > 0
    FULL: tl.constexpr = STATIC and (TOPK * KRH * KRW) % BLOCK_N == 0
    PADS_OFF: tl.constexpr = MASKED and not KV_EVEN
    GUARD_Q: tl.constexpr = (
        (not EVEN) or D != BLOCK_D or RH * RW != BLOCK_M or REGIONS % GROUP != 0 or SPLITS > 1
    )
    GUARD_K: tl.constexpr = (not KV_EVEN) or D != BLOCK_D or not FULL
    regions, grid_w, kv_grid_w = known(regions, REGIONS), known(grid_w, GRID_W), known(kv_grid_w, KV_GRID_W)
    rh, rw, krh, krw = known(rh, RH), known(rw, RW), known(krh, KRH), known(krw, KRW)
    region_tokens = rh * rw
    keys = TOPK * krh * krw
    size = regions * region_tokens
    regions_per_program = (regions + SPLITS - 1) // SPLITS
    pid = tl.program_id(0)
    first_region = (pid % SPLITS) * regions_per_program
    HEAD_GROUPS: tl.constexpr = HEADS // HEADS_PER_PROGRAM
    first_head = (((pid // SPLITS) % HEAD_GROUPS) * HEADS_PER_PROGRAM).to(tl.int64)
    b = (pid // (SPLITS * HEAD_GROUPS)).to(tl.int64)
    c = channels(BLOCK_D, WIDE)
    lane = (c < D)[None, None, :]
    m = tl.arange(0, BLOCK_M)[None, :]
    n = tl.arange(0, BLOCK_N)[None, :]
    listed = n < keys

    for first in range(0, regions_per_program, GROUP):
        g = first + tl.arange(0, GROUP)[:, None]
        region = first_region + g
        exists = (region < regions) & (g < regions_per_program)
        region = tl.where(exists, region, 0)
        qy, qx = position(region, m, grid_w, rh, rw, STATIC, WIDE)
        query_ok = exists & (m < region_tokens)
        if not EVEN:
            query_ok = query_ok & (qy < height) & (qx < width)
        q_mask = query_ok[:, :, None] & lane
        q_offsets = (qy * q_y + qx * q_x)[:, :, None] + (c * q_c)[None, None, :]
        o_offsets = (qy * o_y + qx * o_x)[:, :, None] + c[None, None, :]
        for i in tl.static_range(HEADS_PER_PROGRAM):
            head = first_head + i
            region_routes = routes_ptr + b * r_b + head * r_h + region * r_r  # [G, 1]
            q = load_rows(q_ptr + b * q_b + head * D * q_c + q_offsets, q_mask, GUARD_Q)
            k_base, v_base = k_ptr + b * k_b + head * D * k_c, v_ptr + b * v_b + head * D * v_c
            if ONE_TILE:
                if i == 0 or PER_HEAD:
                    k_offsets, v_offsets, on_map = _keys(
                        region_routes, r_s, n, listed, c, k_y, k_x, k_c, v_y, v_x, v_c,
                        kv_height, kv_width, krh, krw, kv_grid_w, FULL, KV_EVEN, STATIC, WIDE,
                    )  # fmt: skip
                    k_mask = on_map[:, :, None] & lane
                k = load_rows(k_base + k_offsets, k_mask, GUARD_K)
                v = load_rows(v_base + v_offsets, k_mask, GUARD_K)
                s = _scores(q, k, listed, on_map, PADS_OFF, FULL, PRECISION, UPCAST)
                top = tl.max(s, 2) * logit_scale
                if PADS_OFF:
                    top = tl.where(top == float("-inf"), 0.0, top)
                p = tl.exp2(s * logit_scale - top[:, :, None])
                total = tl.sum(p, 2)
                acc = product(p.to(v.dtype), v, PRECISION, UPCAST)  # [G, M, D]
            else:
                top = tl.full((GROUP, BLOCK_M), float("-inf"), tl.float32)
                total = tl.zeros((GROUP, BLOCK_M), tl.float32)
                acc = tl.zeros((GROUP, BLOCK_M, BLOCK_D), tl.float32)
                for first_key in range(0, keys, BLOCK_N):
                    key = first_key + n
                    tile_listed = key < keys
                    tile_k, tile_v, tile_on_map = _keys(
                        region_routes, r_s, key, tile_listed, c, k_y, k_x, k_c, v_y, v_x, v_c,
                        kv_height, kv_width, krh, krw, kv_grid_w, FULL, KV_EVEN, STATIC, WIDE,
                    )  # fmt: skip
                    tile_mask = tile_on_map[:, :, None] & lane
                    k = load_rows(k_base + tile_k, tile_mask, GUARD_K)
                    v = load_rows(v_base + tile_v, tile_mask, GUARD_K)
                    s = _scores(q, k, tile_listed, tile_on_map, PADS_OFF, FULL, PRECISION, UPCAST)
                    new_top = tl.maximum(top, tl.max(s, 2) * logit_scale)
                    shift = new_top
                    if PADS_OFF:
                        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                    p = tl.exp2(s * logit_scale - shift[:, :, None])
                    keep = tl.exp2(top - shift)
                    total = total * keep + tl.sum(p, 2)
                    acc = acc * keep[:, :, None] + product(p.to(v.dtype), v, PRECISION, UPCAST)
                    top = new_top
            weight = total
            if PADS_OFF:
                weight = tl.where(total == 0.0, 1.0, total)
            acc = acc * (1.0 / weight)[:, :, None]  # [G, M, D]
            o_base = out_ptr + b * o_b + head * D
            tl.store(o_base + o_offsets, acc.to(out_ptr.dtype.element_ty), mask=q_mask)
            if KEEP_LSE:
                rows = lse_ptr + (b * HEADS + head) * (PLANES * size)
                at = region * region_tokens + m  # [G, M]
                mask = exists & (m < region_tokens)
                store_statistics(rows, at, top, total, mask, size, PLANES, PADS_OFF)


def stationary_fwd(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor, call: Call
) -> None:
    """Write the output, and where it has elements the log-sum-exp, of routed attention."""
    settings, keeps = call.kernels["kv_stationary_fwd"], lse.numel() > 0
    product = precision(q.dtype)
    launch_kernel(
        stationary_fwd_kernel, call.grids["kv_stationary_fwd"], (q, k, v, routes, out, lse),
        (
            *q.stride(), *k.stride(), *v.stride(), *route_strides(routes), *out.stride()[:3],
            *call.sizes, call.logit_scale, *call.geometry,
        ),
        lambda: {
            "KEEP_LSE": keeps, "WIDE": is_wide(q, k, v, out), **product, "PLANES": call.planes, **settings
        },
        keeps, *product.values(), owner=settings,
    )  # fmt: skip
