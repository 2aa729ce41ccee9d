"""Small maps: attention over the whole map under the table of routes, and its backward pass in one kernel.

On a map of at most 256 tokens a tile holds so many regions that skipping those that were not chosen saves
nothing; what counts is how cheaply a tile learns which of its keys count, and how often. Routes become a
table of counts, *query region x key region*, a byte each. The counts of a tile are then one more product on
the tensor cores: rows of the table times a matrix of ones that repeats every key region over its tokens. A
count of zero masks a key, a count of two weighs it twice, so that duplicates need no case of their own.

Tokens are taken region by region, which makes the statistics those of the other families.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from bratune.kernels.fused.call import Call, is_wide, precision, route_strides
from bratune.kernels.fused.direct import launch_kernel
from bratune.kernels.fused.families import IMAGE_REGIONS
from bratune.kernels.fused.tiles import (
    SIZES,
    channels,
    exponents,
    load_rows,
    load_statistics,
    position,
    product,
    store_statistics,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["image_bwd", "image_bwd_kernel", "image_fwd", "image_fwd_kernel", "route_counts"]

# A row of the table goes on after the last region, with zeros that a tile may read.
_ROW = 2 * IMAGE_REGIONS


@triton.jit(do_not_specialize=SIZES)
def route_counts_kernel(
    routes_ptr, counts_ptr,
    r_b, r_h, r_r, r_s,
    REGIONS: tl.constexpr, TOPK: tl.constexpr, MAPS: tl.constexpr, BLOCK_R: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Grid: images x heads with routes of their own."""
    table = tl.program_id(0).to(tl.int64)
    routes = routes_ptr + (table // MAPS) * r_b + (table % MAPS) * r_h
    region = tl.arange(0, BLOCK_R)
    column = tl.arange(0, ROW)
    counts = tl.zeros((BLOCK_R, ROW), tl.int32)
    for slot in range(0, TOPK):
        route = tl.load(routes + region * r_r + slot * r_s, mask=region < REGIONS, other=ROW).to(tl.int32)
        counts += (route[:, None] == column[None, :]).to(tl.int32)
    rows = counts_ptr + table * (REGIONS * ROW)
    offsets = region[:, None] * ROW + column[None, :]
    tl.store(rows + offsets, counts.to(tl.int8), mask=(region < REGIONS)[:, None])


def route_counts(routes: Tensor, regions: int) -> Tensor:
    """How often every query region was routed to every key region, ``[B, maps, R, 128]`` int8.

    Args:
        routes: ``[B, R, topk]`` or ``[B, heads, R, topk]``, integers, any strides.
        regions: Regions of the map, at most 64; columns beyond are zero.
    """
    maps = routes.shape[1] if routes.dim() == 4 else 1
    counts = routes.new_empty((routes.shape[0], maps, regions, _ROW), dtype=torch.int8)
    topk = routes.shape[-1]
    launch_kernel(
        route_counts_kernel, (routes.shape[0] * maps,), (routes, counts), route_strides(routes),
        lambda: {
            "REGIONS": regions, "TOPK": topk, "MAPS": maps,
            "BLOCK_R": triton.next_power_of_2(regions), "ROW": _ROW, "num_warps": 4,
        },
        regions, topk, maps,
    )  # fmt: skip
    return counts


@triton.jit
def _key_tile(
    first, height, width,
    TOKENS: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Position, presence on the map, weight in the softmax and region (from the tile's first) of keys."""
    n = first + tl.arange(0, BLOCK_N)
    y, x = position(n // (RH * RW), n % (RH * RW), GRID_W, RH, RW, True, WIDE)
    on_map = n < TOKENS
    counted = on_map
    if not EVEN:
        on_map = on_map & (y < height) & (x < width)
        if MASKED:
            counted = on_map
    first_region = first // (RH * RW)
    return y, x, on_map, counted, n // (RH * RW) - first_region, first_region


@triton.jit
def _image_fwd_tile(
    q, acc, top, total, k_base, v_base, count_rows, row_ok, first, c, lane,
    k_y, k_x, k_c, v_y, v_x, v_c, height, width, logit_scale,
    TOKENS: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr, BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, GUARD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    y, x, on_map, counted, key_region, first_region = _key_tile(
        first, height, width, TOKENS, RH, RW, GRID_W, BLOCK_N, EVEN, MASKED, WIDE
    )
    k_mask = on_map[:, None] & lane[None, :]
    k = load_rows(k_base + (y * k_y + x * k_x)[:, None] + (c * k_c)[None, :], k_mask, GUARD)  # [N, D]
    v = load_rows(v_base + (y * v_y + x * v_x)[:, None] + (c * v_c)[None, :], k_mask, GUARD)  # [N, D]
    j = tl.arange(0, SPAN)
    counts = tl.load(count_rows[:, None] + (first_region + j)[None, :], mask=row_ok[:, None], other=0)
    repeat = ((j[:, None] == key_region[None, :]) & counted[None, :]).to(tl.float16)  # [SPAN, N]
    often = tl.dot(counts.to(tl.float16), repeat)  # [M, N], exact: counts are at most 64
    s = tl.where(often > 0, product(q, tl.trans(k), PRECISION, UPCAST), float("-inf"))  # [M, N]
    new_top = tl.maximum(top, tl.max(s, 1) * logit_scale)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * logit_scale - shift[:, None]) * often
    keep = tl.exp2(top - shift)
    total = total * keep + tl.sum(p, 1)
    acc = acc * keep[:, None] + product(p.to(v.dtype), v, PRECISION, UPCAST)
    return acc, new_top, total


@triton.jit(do_not_specialize=SIZES)
def image_fwd_kernel(
    q_ptr, k_ptr, v_ptr, counts_ptr, out_ptr, lse_ptr,
    q_b, q_y, q_x, q_c, k_b, k_y, k_x, k_c, v_b, v_y, v_x, v_c, o_b, o_y, o_x,
    height, width, kv_height, kv_width, logit_scale,
    REGIONS: tl.constexpr, HEADS: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr, TAIL: tl.constexpr,
    TAIL_SPAN: tl.constexpr, PER_HEAD: tl.constexpr, ROW: tl.constexpr,
    KEEP_LSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Grid: images x tiles of queries x heads, all on the first axis."""
    TOKENS: tl.constexpr = REGIONS * RH * RW
    TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    WHOLE: tl.constexpr = TOKENS // BLOCK_N
    GUARD: tl.constexpr = (not EVEN) or D != BLOCK_D
    pid = tl.program_id(0)
    head = (pid % HEADS).to(tl.int64)
    m = ((pid // HEADS) % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (pid // (HEADS * TILES)).to(tl.int64)
    c = channels(BLOCK_D, WIDE)
    lane = c < D
    region = m // (RH * RW)
    y, x = position(region, m % (RH * RW), GRID_W, RH, RW, True, WIDE)
    row_ok = m < TOKENS
    query_ok = row_ok
    if not EVEN:
        query_ok = row_ok & (y < height) & (x < width)
    q_mask = query_ok[:, None] & lane[None, :]
    q_base = q_ptr + b * q_b + head * D * q_c
    k_base = k_ptr + b * k_b + head * D * k_c
    v_base = v_ptr + b * v_b + head * D * v_c
    table = b
    if PER_HEAD:
        table = b * HEADS + head
    count_rows = counts_ptr + table * (REGIONS * ROW) + region * ROW  # [M]
    q = tl.load(q_base + (y * q_y + x * q_x)[:, None] + (c * q_c)[None, :], mask=q_mask, other=0.0)  # [M, D]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(0, WHOLE):
        acc, top, total = _image_fwd_tile(
            q, acc, top, total, k_base, v_base, count_rows, row_ok, tile * BLOCK_N, c, lane,
            k_y, k_x, k_c, v_y, v_x, v_c, height, width, logit_scale,
            TOKENS, RH, RW, GRID_W, BLOCK_N, SPAN, EVEN, MASKED, GUARD, WIDE, PRECISION, UPCAST,
        )  # fmt: skip
    if TAIL > 0:  # a short tile for the rest: 196 tokens are three tiles of 64 and one of 16
        acc, top, total = _image_fwd_tile(
            q, acc, top, total, k_base, v_base, count_rows, row_ok, WHOLE * BLOCK_N, c, lane,
            k_y, k_x, k_c, v_y, v_x, v_c, height, width, logit_scale,
            TOKENS, RH, RW, GRID_W, TAIL, TAIL_SPAN, EVEN, MASKED, True, WIDE, PRECISION, UPCAST,
        )  # fmt: skip
    weight = tl.where(total == 0.0, 1.0, total)
    acc = (acc * (1.0 / weight)[:, None]).to(out_ptr.dtype.element_ty)
    o_base = out_ptr + b * o_b + head * D
    tl.store(o_base + (y * o_y + x * o_x)[:, None] + c[None, :], acc, mask=q_mask)  # [M, D]
    if KEEP_LSE:
        rows = lse_ptr + (b * HEADS + head) * (PLANES * TOKENS)
        store_statistics(rows, m, top, total, row_ok, TOKENS, PLANES, True)


def image_fwd(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
    """Write the output, and where it has elements the log-sum-exp, of routed attention on a small map."""
    counts = route_counts(routes, call.kv_regions)
    settings, keeps = call.kernels["image_fwd"], lse.numel() > 0
    product = precision(q.dtype)
    launch_kernel(
        image_fwd_kernel, call.grids["image_fwd"], (q, k, v, counts, out, lse),
        (*q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *call.sizes, call.logit_scale),
        lambda: {
            "ROW": _ROW, "KEEP_LSE": keeps, "WIDE": is_wide(q, k, v, out),
            **product, "PLANES": call.planes, **settings,
        },
        keeps, *product.values(), owner=settings,
    )  # fmt: skip


@triton.jit
def _image_bwd_step(
    dk, dv, dq, k, v, counted, key_region, first_region, first_query, c, lane,
    q_base, g_base, count_table, lse_rows, delta_rows,
    q_y, q_x, q_c, g_y, g_x, g_c, height, width, logit_scale,
    TOKENS: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    SPAN: tl.constexpr, ROW: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """One tile of keys with the tile of queries whose gradient is ``dq``."""
    m = first_query + tl.arange(0, dq.shape[0])
    region = m // (RH * RW)
    y, x = position(region, m % (RH * RW), GRID_W, RH, RW, True, WIDE)
    query_ok = m < TOKENS
    if not EVEN:
        query_ok = query_ok & (y < height) & (x < width)
    q_mask = query_ok[:, None] & lane[None, :]
    q = tl.load(q_base + (y * q_y + x * q_x)[:, None] + (c * q_c)[None, :], mask=q_mask, other=0.0)  # [M, D]
    g = tl.load(g_base + (y * g_y + x * g_x)[:, None] + (c * g_c)[None, :], mask=q_mask, other=0.0)  # [M, D]
    top, log_total = load_statistics(lse_rows, m, query_ok, TOKENS, PLANES)  # [M]
    delta = tl.load(delta_rows + m, mask=query_ok, other=0.0)  # [M]
    columns = first_region + tl.arange(0, SPAN)
    counts = tl.load(
        count_table + (region * ROW)[:, None] + columns[None, :], mask=query_ok[:, None], other=0
    )  # [M, SPAN]
    repeat = (tl.arange(0, SPAN)[:, None] == key_region[None, :]) & counted[None, :]  # [SPAN, N]
    often = tl.dot(counts.to(tl.float16), repeat.to(tl.float16))  # [M, N]
    s = product(q, tl.trans(k), PRECISION, UPCAST)  # [M, N]
    # A key that does not count may have any score, also one whose power of two is infinite.
    e = exponents(s, logit_scale, top[:, None], log_total[:, None], PLANES)
    p = tl.exp2(tl.where(often > 0, e, float("-inf"))) * often
    dv += product(tl.trans(p.to(g.dtype)), g, PRECISION, UPCAST)
    dp = product(g, tl.trans(v), PRECISION, UPCAST)  # [M, N]
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dk += product(tl.trans(ds), q, PRECISION, UPCAST)
    dq += product(ds, k, PRECISION, UPCAST)
    return dk, dv, dq


@triton.jit
def _image_bwd_keys(
    dq0, dq1, dq2, dq3, first, c, lane,
    q_base, k_base, v_base, g_base, dk_base, dv_base, count_table, lse_rows, delta_rows,
    q_y, q_x, q_c, k_y, k_x, k_c, v_y, v_x, v_c, g_y, g_x, g_c, dk_y, dk_x, dv_y, dv_x,
    height, width, logit_scale, scale,
    TOKENS: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    ROW: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """One tile of keys with all queries: its own gradients are then complete."""
    y, x, on_map, counted, key_region, first_region = _key_tile(
        first, height, width, TOKENS, RH, RW, GRID_W, BLOCK_N, EVEN, MASKED, WIDE
    )
    k_mask = on_map[:, None] & lane[None, :]
    k = tl.load(k_base + (y * k_y + x * k_x)[:, None] + (c * k_c)[None, :], mask=k_mask, other=0.0)  # [N, D]
    v = tl.load(v_base + (y * v_y + x * v_x)[:, None] + (c * v_c)[None, :], mask=k_mask, other=0.0)  # [N, D]
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk, dv, dq0 = _image_bwd_step(
        dk, dv, dq0, k, v, counted, key_region, first_region, 0, c, lane,
        q_base, g_base, count_table, lse_rows, delta_rows, q_y, q_x, q_c, g_y, g_x, g_c, height, width,
        logit_scale, TOKENS, RH, RW, GRID_W, SPAN, ROW, EVEN, WIDE, PRECISION, UPCAST, PLANES,
    )  # fmt: skip
    if TOKENS > BLOCK_M:
        dk, dv, dq1 = _image_bwd_step(
            dk, dv, dq1, k, v, counted, key_region, first_region, BLOCK_M, c, lane,
            q_base, g_base, count_table, lse_rows, delta_rows, q_y, q_x, q_c, g_y, g_x, g_c, height, width,
            logit_scale, TOKENS, RH, RW, GRID_W, SPAN, ROW, EVEN, WIDE, PRECISION, UPCAST, PLANES,
        )  # fmt: skip
    if TOKENS > 2 * BLOCK_M:
        dk, dv, dq2 = _image_bwd_step(
            dk, dv, dq2, k, v, counted, key_region, first_region, 2 * BLOCK_M, c, lane,
            q_base, g_base, count_table, lse_rows, delta_rows, q_y, q_x, q_c, g_y, g_x, g_c, height, width,
            logit_scale, TOKENS, RH, RW, GRID_W, SPAN, ROW, EVEN, WIDE, PRECISION, UPCAST, PLANES,
        )  # fmt: skip
    if TOKENS > 3 * BLOCK_M:
        dk, dv, dq3 = _image_bwd_step(
            dk, dv, dq3, k, v, counted, key_region, first_region, 3 * BLOCK_M, c, lane,
            q_base, g_base, count_table, lse_rows, delta_rows, q_y, q_x, q_c, g_y, g_x, g_c, height, width,
            logit_scale, TOKENS, RH, RW, GRID_W, SPAN, ROW, EVEN, WIDE, PRECISION, UPCAST, PLANES,
        )  # fmt: skip
    dk = (dk * scale).to(dk_base.dtype.element_ty)
    tl.store(dk_base + (y * dk_y + x * dk_x)[:, None] + c[None, :], dk, mask=k_mask)  # [N, D]
    dv = dv.to(dv_base.dtype.element_ty)
    tl.store(dv_base + (y * dv_y + x * dv_x)[:, None] + c[None, :], dv, mask=k_mask)  # [N, D]
    return dq0, dq1, dq2, dq3


@triton.jit
def _store_dq(
    dq, first, c, lane, dq_base, dq_y, dq_x, height, width, scale,
    TOKENS: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    m = first + tl.arange(0, dq.shape[0])
    y, x = position(m // (RH * RW), m % (RH * RW), GRID_W, RH, RW, True, WIDE)
    query_ok = m < TOKENS
    if not EVEN:
        query_ok = query_ok & (y < height) & (x < width)
    dq = (dq * scale).to(dq_base.dtype.element_ty)
    tl.store(
        dq_base + (y * dq_y + x * dq_x)[:, None] + c[None, :], dq, mask=query_ok[:, None] & lane[None, :]
    )


@triton.jit(do_not_specialize=SIZES)
def image_bwd_kernel(
    q_ptr, k_ptr, v_ptr, counts_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_b, q_y, q_x, q_c, k_b, k_y, k_x, k_c, v_b, v_y, v_x, v_c, o_b, o_y, o_x, g_b, g_y, g_x, g_c,
    dq_b, dq_y, dq_x, dk_b, dk_y, dk_x, dv_b, dv_y, dv_x,
    height, width, kv_height, kv_width, logit_scale, scale,
    REGIONS: tl.constexpr, HEADS: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, LAST: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr, TAIL: tl.constexpr,
    TAIL_SPAN: tl.constexpr, PER_HEAD: tl.constexpr, ROW: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Grid: images x heads. At most four tiles of queries: their gradients stay in registers.

    The last tile is a short one of ``LAST`` rows where fewer are left.
    """
    TOKENS: tl.constexpr = REGIONS * RH * RW
    WHOLE: tl.constexpr = TOKENS // BLOCK_N
    M0: tl.constexpr = BLOCK_M if TOKENS >= BLOCK_M else LAST
    M1: tl.constexpr = BLOCK_M if TOKENS >= 2 * BLOCK_M else LAST
    M2: tl.constexpr = BLOCK_M if TOKENS >= 3 * BLOCK_M else LAST
    M3: tl.constexpr = BLOCK_M if TOKENS >= 4 * BLOCK_M else LAST
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    c = channels(BLOCK_D, WIDE)
    lane = c < D
    q_base = q_ptr + b * q_b + head * D * q_c
    k_base = k_ptr + b * k_b + head * D * k_c
    v_base = v_ptr + b * v_b + head * D * v_c
    o_base = out_ptr + b * o_b + head * D
    g_base = grad_ptr + b * g_b + head * D * g_c
    dq_base = dq_ptr + b * dq_b + head * D
    dk_base = dk_ptr + b * dk_b + head * D
    dv_base = dv_ptr + b * dv_b + head * D
    lse_rows = lse_ptr + (b * HEADS + head) * (PLANES * TOKENS)
    delta_rows = delta_ptr + (b * HEADS + head) * TOKENS
    table = b
    if PER_HEAD:
        table = b * HEADS + head
    count_table = counts_ptr + table * (REGIONS * ROW)

    for first in range(0, TOKENS, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        y, x = position(m // (RH * RW), m % (RH * RW), GRID_W, RH, RW, True, WIDE)
        query_ok = m < TOKENS
        if not EVEN:
            query_ok = query_ok & (y < height) & (x < width)
        q_mask = query_ok[:, None] & lane[None, :]
        o = tl.load(o_base + (y * o_y + x * o_x)[:, None] + c[None, :], mask=q_mask, other=0.0)  # [M, D]
        g = tl.load(g_base + (y * g_y + x * g_x)[:, None] + (c * g_c)[None, :], mask=q_mask, other=0.0)
        tl.store(delta_rows + m, tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), mask=query_ok)  # [M]
    tl.debug_barrier()  # the threads that read delta are not those that wrote it

    dq0 = tl.zeros((M0, BLOCK_D), tl.float32)
    dq1 = tl.zeros((M1, BLOCK_D), tl.float32)
    dq2 = tl.zeros((M2, BLOCK_D), tl.float32)
    dq3 = tl.zeros((M3, BLOCK_D), tl.float32)
    for tile in range(0, WHOLE):
        dq0, dq1, dq2, dq3 = _image_bwd_keys(
            dq0, dq1, dq2, dq3, tile * BLOCK_N, c, lane,
            q_base, k_base, v_base, g_base, dk_base, dv_base, count_table, lse_rows, delta_rows,
            q_y, q_x, q_c, k_y, k_x, k_c, v_y, v_x, v_c, g_y, g_x, g_c, dk_y, dk_x, dv_y, dv_x,
            height, width, logit_scale, scale, TOKENS, RH, RW, GRID_W,
            BLOCK_D, BLOCK_M, BLOCK_N, SPAN, ROW, EVEN, MASKED, WIDE, PRECISION, UPCAST, PLANES,
        )  # fmt: skip
    if TAIL > 0:
        dq0, dq1, dq2, dq3 = _image_bwd_keys(
            dq0, dq1, dq2, dq3, WHOLE * BLOCK_N, c, lane,
            q_base, k_base, v_base, g_base, dk_base, dv_base, count_table, lse_rows, delta_rows,
            q_y, q_x, q_c, k_y, k_x, k_c, v_y, v_x, v_c, g_y, g_x, g_c, dk_y, dk_x, dv_y, dv_x,
            height, width, logit_scale, scale, TOKENS, RH, RW, GRID_W,
            BLOCK_D, BLOCK_M, TAIL, TAIL_SPAN, ROW, EVEN, MASKED, WIDE, PRECISION, UPCAST, PLANES,
        )  # fmt: skip
    _store_dq(dq0, 0, c, lane, dq_base, dq_y, dq_x, height, width, scale, TOKENS, RH, RW, GRID_W, EVEN, WIDE)
    if TOKENS > BLOCK_M:
        _store_dq(
            dq1, BLOCK_M, c, lane, dq_base, dq_y, dq_x, height, width, scale,
            TOKENS, RH, RW, GRID_W, EVEN, WIDE,
        )  # fmt: skip
    if TOKENS > 2 * BLOCK_M:
        _store_dq(
            dq2, 2 * BLOCK_M, c, lane, dq_base, dq_y, dq_x, height, width, scale,
            TOKENS, RH, RW, GRID_W, EVEN, WIDE,
        )  # fmt: skip
    if TOKENS > 3 * BLOCK_M:
        _store_dq(
            dq3, 3 * BLOCK_M, c, lane, dq_base, dq_y, dq_x, height, width, scale,
            TOKENS, RH, RW, GRID_W, EVEN, WIDE,
        )  # fmt: skip


def image_bwd(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, grad: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, call: Call,
) -> None:  # fmt: skip
    """Write the gradients of queries, keys and values of a small map."""
    delta = lse.new_empty(call.delta_shape)
    counts = route_counts(routes, call.kv_regions)
    settings, product = call.kernels["image_bwd"], precision(q.dtype)
    launch_kernel(
        image_bwd_kernel, call.grids["image_bwd"], (q, k, v, counts, out, grad, lse, delta, dq, dk, dv),
        (
            *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *grad.stride(),
            *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *call.sizes, call.logit_scale, call.scale,
        ),
        lambda: {
            "ROW": _ROW, "WIDE": is_wide(q, k, v, out, grad, dq, dk, dv),
            **product, "PLANES": call.planes, **settings,
        },
        *product.values(), owner=settings,
    )  # fmt: skip
