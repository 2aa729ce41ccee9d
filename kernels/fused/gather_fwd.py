"""Forward pass by routed gather.

A program owns a tile of queries of one region and reads the keys and values of the regions that it was routed
to from where they lie.

Nothing is gathered in memory: the keys of a region are a flat list of ``topk * tokens`` addresses. Where that
list fits one tile the whole softmax row is in registers and is computed in one go; otherwise tile by tile
with a running maximum.
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
    routed_keys,
    store_statistics,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gather_fwd", "gather_fwd_kernel"]


@triton.jit
def _scores(
    q, k, listed, on_map,
    PADS_OFF: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    s = product(q, tl.trans(k), PRECISION, UPCAST)  # [M, N]
    if PADS_OFF:
        s = tl.where(on_map[None, :], s, float("-inf"))
    elif not FULL:
        s = tl.where(listed[None, :], s, float("-inf"))
    return s


@triton.jit(do_not_specialize=SIZES)
def gather_fwd_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr, lse_ptr,
    q_b, q_y, q_x, q_c, k_b, k_y, k_x, k_c, v_b, v_y, v_x, v_c, r_b, r_h, r_r, r_s, o_b, o_y, o_x,
    height, width, kv_height, kv_width, logit_scale,
    regions, rh, rw, grid_w, kv_regions, krh, krw, kv_grid_w,
    REGIONS: tl.constexpr, HEADS: tl.constexpr, TOPK: tl.constexpr,
    RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    KRH: tl.constexpr, KRW: tl.constexpr, KV_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, KV_EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    PER_HEAD: tl.constexpr, SAME_KV: tl.constexpr, KEEP_LSE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Grid: images x regions x tiles of a region x groups of heads, all on the first axis."""
    STATIC: tl.constexpr = RH > 0
    GROUPS: tl.constexpr = HEADS // HEADS_PER_PROGRAM
    FULL: tl.constexpr = STATIC and (TOPK * KRH * KRW) % BLOCK_N == 0
    PADS_OFF: tl.constexpr = MASKED and not KV_EVEN  # a row may end up without any key
    GUARD_Q: tl.constexpr = (not EVEN) or (not STATIC) or D != BLOCK_D or (RH * RW) % BLOCK_M != 0
    GUARD_K: tl.constexpr = (not KV_EVEN) or D != BLOCK_D or not FULL

    regions, grid_w, kv_grid_w = known(regions, REGIONS), known(grid_w, GRID_W), known(kv_grid_w, KV_GRID_W)
    rh, rw, krh, krw = known(rh, RH), known(rw, RW), known(krh, KRH), known(krw, KRW)
    region_tokens = rh * rw
    keys = TOPK * krh * krw
    tiles = (region_tokens + BLOCK_M - 1) // BLOCK_M
    size = regions * region_tokens
    pid = tl.program_id(0)
    first_head = ((pid % GROUPS) * HEADS_PER_PROGRAM).to(tl.int64)
    pid = pid // GROUPS
    token = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    region = (pid // tiles) % regions
    b = (pid // (tiles * regions)).to(tl.int64)

    c = channels(BLOCK_D, WIDE)
    lane = c < D
    y, x = position(region, token, grid_w, rh, rw, STATIC, WIDE)
    query_ok = token < region_tokens
    if not EVEN:
        query_ok = query_ok & (y < height) & (x < width)
    q_offsets = (y * q_y + x * q_x)[:, None] + (c * q_c)[None, :]
    o_offsets = (y * o_y + x * o_x)[:, None] + c[None, :]
    q_mask = query_ok[:, None] & lane[None, :]
    routes = routes_ptr + b * r_b + region * r_r

    if ONE_TILE:
        k_offsets, v_offsets, next_listed, next_on_map = routed_keys(
            routes + first_head * r_h, r_s, 0, c, k_y, k_x, k_c, v_y, v_x, v_c, kv_height, kv_width,
            keys, krh, krw, kv_grid_w, BLOCK_N, FULL, KV_EVEN, SAME_KV, STATIC, WIDE,
        )  # fmt: skip
        next_mask = next_on_map[:, None] & lane[None, :]
        next_q = load_rows(q_ptr + b * q_b + first_head * D * q_c + q_offsets, q_mask, GUARD_Q)  # [M, D]
        next_k = load_rows(k_ptr + b * k_b + first_head * D * k_c + k_offsets, next_mask, GUARD_K)  # [N, D]
        next_v = load_rows(v_ptr + b * v_b + first_head * D * v_c + v_offsets, next_mask, GUARD_K)  # [N, D]
    for i in tl.static_range(HEADS_PER_PROGRAM):
        head = first_head + i
        q_base = q_ptr + b * q_b + head * D * q_c
        k_base = k_ptr + b * k_b + head * D * k_c
        v_base = v_ptr + b * v_b + head * D * v_c
        if ONE_TILE:
            q, k, v, listed, on_map = next_q, next_k, next_v, next_listed, next_on_map
            if i + 1 < HEADS_PER_PROGRAM:
                # Loads of the next head are on their way while this one is computed; no compiler would move
                # them before the store of this one.
                if PER_HEAD:
                    k_offsets, v_offsets, next_listed, next_on_map = routed_keys(
                        routes + (head + 1) * r_h, r_s, 0, c, k_y, k_x, k_c, v_y, v_x, v_c,
                        kv_height, kv_width,
                        keys, krh, krw, kv_grid_w, BLOCK_N, FULL, KV_EVEN, SAME_KV, STATIC, WIDE,
                    )  # fmt: skip
                    next_mask = next_on_map[:, None] & lane[None, :]
                next_q = load_rows(q_base + D * q_c + q_offsets, q_mask, GUARD_Q)  # [M, D]
                next_k = load_rows(k_base + D * k_c + k_offsets, next_mask, GUARD_K)  # [N, D]
                next_v = load_rows(v_base + D * v_c + v_offsets, next_mask, GUARD_K)  # [N, D]
            s = _scores(q, k, listed, on_map, PADS_OFF, FULL, PRECISION, UPCAST)
            # The scale is positive, so that the maximum may be taken first: one multiply-add per exponential.
            top = tl.max(s, 1) * logit_scale
            if PADS_OFF:
                top = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s * logit_scale - top[:, None])
            total = tl.sum(p, 1)
            acc = product(p.to(v.dtype), v, PRECISION, UPCAST)  # [M, D]
        else:
            q = load_rows(q_base + q_offsets, q_mask, GUARD_Q)  # [M, D]
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for first in range(0, keys, BLOCK_N):
                k_offsets, v_offsets, listed, on_map = routed_keys(
                    routes + head * r_h, r_s, first, c, k_y, k_x, k_c, v_y, v_x, v_c, kv_height, kv_width,
                    keys, krh, krw, kv_grid_w, BLOCK_N, FULL, KV_EVEN, SAME_KV, STATIC, WIDE,
                )  # fmt: skip
                k_mask = on_map[:, None] & lane[None, :]
                k = load_rows(k_base + k_offsets, k_mask, GUARD_K)  # [N, D]
                v = load_rows(v_base + v_offsets, k_mask, GUARD_K)  # [N, D]
                s = _scores(q, k, listed, on_map, PADS_OFF, FULL, PRECISION, UPCAST)
                new_top = tl.maximum(top, tl.max(s, 1) * logit_scale)
                shift = new_top
                if PADS_OFF:
                    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp2(s * logit_scale - shift[:, None])
                keep = tl.exp2(top - shift)
                total = total * keep + tl.sum(p, 1)
                acc = acc * keep[:, None] + product(p.to(v.dtype), v, PRECISION, UPCAST)
                top = new_top
        weight = total
        if PADS_OFF:
            weight = tl.where(total == 0.0, 1.0, total)
        acc = acc * (1.0 / weight)[:, None]
        o_base = out_ptr + b * o_b + head * D
        if GUARD_Q:
            tl.store(o_base + o_offsets, acc.to(out_ptr.dtype.element_ty), mask=q_mask)  # [M, D]
        else:
            tl.store(o_base + o_offsets, acc.to(out_ptr.dtype.element_ty))  # [M, D]
        if KEEP_LSE:
            rows = lse_ptr + (b * HEADS + head) * (PLANES * size) + region * region_tokens
            store_statistics(rows, token, top, total, token < region_tokens, size, PLANES, PADS_OFF)


def gather_fwd(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
    """Write the output, and where it has elements the log-sum-exp, of routed attention."""
    settings, keeps = call.kernels["gather_fwd"], lse.numel() > 0
    product = precision(q.dtype)
    launch_kernel(
        gather_fwd_kernel, call.grids["gather_fwd"], (q, k, v, routes, out, lse),
        (
            *q.stride(), *k.stride(), *v.stride(), *route_strides(routes), *out.stride()[:3],
            *call.sizes, call.logit_scale, *call.geometry,
        ),
        lambda: {
            "SAME_KV": k.stride() == v.stride(), "KEEP_LSE": keeps, "WIDE": is_wide(q, k, v, out),
            **product, "PLANES": call.planes, **settings,
        },
        keeps, *product.values(), owner=settings,
    )  # fmt: skip
