"""Forward pass that stays with one head of one image: for regions of few tokens.

A region of 16 or 4 tokens reads as many keys as one of 64, so its keys and values come from the L2 cache topk
times over, and that is what such a layer waits for. Here a program goes through the regions of one head of
one image, ``GROUP`` at a time as a batch of products, so that they are read again from L1 instead. Loads must
not be pipelined (``num_stages`` 1): asynchronous copies go past L1.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from bratune.kernels.fused.call import Call, is_wide, precision, route_strides
from bratune.kernels.fused.direct import launch_kernel
from bratune.kernels.fused.tiles import channels, load_rows, position, product, store_statistics

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["stationary_fwd", "stationary_fwd_kernel"]


@triton.jit
def stationary_fwd_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr, lse_ptr,
    q_b, q_y, q_x, q_c, k_b, k_y, k_x, k_c, v_b, v_y, v_x, v_c, r_b, r_h, r_r, r_s, o_b, o_y, o_x,
    height, width, kv_height, kv_width, logit_scale,
    REGIONS: tl.constexpr, HEADS: tl.constexpr, TOPK: tl.constexpr,
    RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    KRH: tl.constexpr, KRW: tl.constexpr, KV_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, KV_EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
    REGIONS_PER_PROGRAM: tl.constexpr, KEEP_LSE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Grid: images x heads x splits of the regions, all on the first axis. One tile holds all keys."""
    TOKENS: tl.constexpr = RH * RW
    KEYS: tl.constexpr = TOPK * KRH * KRW
    PADS_OFF: tl.constexpr = MASKED and not KV_EVEN
    GUARD_Q: tl.constexpr = (
        (not EVEN) or D != BLOCK_D or TOKENS != BLOCK_M or REGIONS % GROUP != 0 or SPLITS > 1
    )
    GUARD_K: tl.constexpr = (not KV_EVEN) or D != BLOCK_D or KEYS != BLOCK_N
    pid = tl.program_id(0)
    first_region = (pid % SPLITS) * REGIONS_PER_PROGRAM
    head = ((pid // SPLITS) % HEADS).to(tl.int64)
    b = (pid // (SPLITS * HEADS)).to(tl.int64)
    c = channels(BLOCK_D, WIDE)
    lane = (c < D)[None, None, :]
    m = tl.arange(0, BLOCK_M)[None, :]
    n = tl.arange(0, BLOCK_N)[None, :]
    listed = n < KEYS
    q_base = q_ptr + b * q_b + head * D * q_c
    k_base = k_ptr + b * k_b + head * D * k_c
    v_base = v_ptr + b * v_b + head * D * v_c
    o_base = out_ptr + b * o_b + head * D
    routes = routes_ptr + b * r_b + head * r_h
    rows = lse_ptr + (b * HEADS + head) * (PLANES * REGIONS * TOKENS)

    for first in range(0, REGIONS_PER_PROGRAM, GROUP):
        g = first + tl.arange(0, GROUP)[:, None]
        region = first_region + g
        exists = (region < REGIONS) & (g < REGIONS_PER_PROGRAM)
        region = tl.where(exists, region, 0)
        slots = routes + region * r_r + (n // (KRH * KRW)) * r_s
        if KEYS == BLOCK_N:
            key_region = tl.load(slots).to(tl.int32)  # [G, N]
        else:
            key_region = tl.load(slots, mask=listed, other=0).to(tl.int32)  # [G, N]
        ky, kx = position(key_region, n % (KRH * KRW), KV_GRID_W, KRH, KRW, WIDE)
        on_map = listed & (ky >= 0)
        if not KV_EVEN:
            on_map = on_map & (ky < kv_height) & (kx < kv_width)
        qy, qx = position(region, m, GRID_W, RH, RW, WIDE)
        query_ok = exists & (m < TOKENS)
        if not EVEN:
            query_ok = query_ok & (qy < height) & (qx < width)
        q_mask = query_ok[:, :, None] & lane
        k_mask = on_map[:, :, None] & lane
        q = load_rows(q_base + (qy * q_y + qx * q_x)[:, :, None] + (c * q_c)[None, None, :], q_mask, GUARD_Q)
        k = load_rows(k_base + (ky * k_y + kx * k_x)[:, :, None] + (c * k_c)[None, None, :], k_mask, GUARD_K)
        v = load_rows(v_base + (ky * v_y + kx * v_x)[:, :, None] + (c * v_c)[None, None, :], k_mask, GUARD_K)
        s = product(q, tl.permute(k, (0, 2, 1)), PRECISION, UPCAST)  # [G, M, N]
        if PADS_OFF:
            s = tl.where(on_map[:, None, :], s, float("-inf"))
        elif KEYS != BLOCK_N:
            s = tl.where(listed[:, None, :], s, float("-inf"))
        top = tl.max(s, 2) * logit_scale
        if PADS_OFF:
            top = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s * logit_scale - top[:, :, None])
        total = tl.sum(p, 2)
        weight = total
        if PADS_OFF:
            weight = tl.where(total == 0.0, 1.0, total)
        acc = product(p.to(v.dtype), v, PRECISION, UPCAST) * (1.0 / weight)[:, :, None]  # [G, M, D]
        o_offsets = (qy * o_y + qx * o_x)[:, :, None] + c[None, None, :]
        tl.store(o_base + o_offsets, acc.to(out_ptr.dtype.element_ty), mask=q_mask)
        if KEEP_LSE:
            at = region * TOKENS + m  # [G, M]
            mask = exists & (m < TOKENS)
            store_statistics(rows, at, top, total, mask, REGIONS * TOKENS, PLANES, PADS_OFF)


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
            *call.sizes, call.logit_scale,
        ),
        lambda: {
            "KEEP_LSE": keeps, "WIDE": is_wide(q, k, v, out), **product, "PLANES": call.planes, **settings
        },
        keeps, *product.values(), owner=settings,
    )  # fmt: skip
