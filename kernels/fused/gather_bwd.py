"""Backward pass of routed gather: queries along the routes, keys and values along the inverse routes.

`gather_bwd_dq` mirrors the forward pass and leaves ``delta``, the row sums of output times its gradient.
`gather_bwd_dkv` owns a tile of keys and walks over the queries that were routed to it, densified: 64 rows may
be one region of 64 or sixteen of four. Every element is written once, by one program, in a fixed order: no
atomics, the same bits every time, and zeros for regions that nobody chose.

Where a query region attends to a single key region, the walk over its keys is the whole row: the second
kernel then also writes the gradient of the queries (``FUSE_DQ``) and reads everything once.

A hub, a key region that very many queries were routed to, would keep its one program busy long after the
others. With ``CHUNK`` the list of all entries is cut after every so many: the program of a region stops at
the second cut that it meets, each further stretch between two cuts has a program of its own, and a third
kernel adds up their float32 sums in order. How many stretches there are at most is known beforehand, and with
it the grid; a program whose stretch belongs to no hub returns at once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from bratune.kernels.fused.call import Call, is_wide, precision, route_strides
from bratune.kernels.fused.direct import launch_kernel
from bratune.kernels.fused.tiles import (
    SIZES,
    channels,
    exponents,
    known,
    load_rows,
    load_statistics,
    position,
    product,
    routed_keys,
    split,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "gather_bwd_dkv",
    "gather_bwd_dkv_kernel",
    "gather_bwd_dq",
    "gather_bwd_dq_kernel",
    "gather_bwd_hub_kernel",
]


@triton.jit(do_not_specialize=SIZES)
def gather_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_b, q_y, q_x, q_c, k_b, k_y, k_x, k_c, v_b, v_y, v_x, v_c, r_b, r_h, r_r, r_s, o_b, o_y, o_x,
    g_b, g_y, g_x, g_c, dq_b, dq_y, dq_x,
    height, width, kv_height, kv_width, logit_scale, scale,
    regions, rh, rw, grid_w, kv_regions, krh, krw, kv_grid_w,
    REGIONS: tl.constexpr, HEADS: tl.constexpr, TOPK: tl.constexpr,
    RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    KRH: tl.constexpr, KRW: tl.constexpr, KV_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, KV_EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SAME_KV: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Grid: images x regions x tiles of a region x heads, all on the first axis."""
    STATIC: tl.constexpr = RH > 0
    FULL: tl.constexpr = STATIC and (TOPK * KRH * KRW) % BLOCK_N == 0
    PADS_OFF: tl.constexpr = MASKED and not KV_EVEN
    GUARD_Q: tl.constexpr = (not EVEN) or (not STATIC) or D != BLOCK_D or (RH * RW) % BLOCK_M != 0
    GUARD_K: tl.constexpr = (not KV_EVEN) or D != BLOCK_D or not FULL

    regions, grid_w, kv_grid_w = known(regions, REGIONS), known(grid_w, GRID_W), known(kv_grid_w, KV_GRID_W)
    rh, rw, krh, krw = known(rh, RH), known(rw, RW), known(krh, KRH), known(krw, KRW)
    region_tokens = rh * rw
    keys = TOPK * krh * krw
    tiles = (region_tokens + BLOCK_M - 1) // BLOCK_M
    size = regions * region_tokens
    pid = tl.program_id(0)
    head = (pid % HEADS).to(tl.int64)
    pid = pid // HEADS
    token = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    region = (pid // tiles) % regions
    b = (pid // (tiles * regions)).to(tl.int64)

    c = channels(BLOCK_D, WIDE)
    lane = c < D
    y, x = position(region, token, grid_w, rh, rw, STATIC, WIDE)
    query_ok = token < region_tokens
    if not EVEN:
        query_ok = query_ok & (y < height) & (x < width)
    q_mask = query_ok[:, None] & lane[None, :]
    q_base = q_ptr + b * q_b + head * D * q_c
    g_base = grad_ptr + b * g_b + head * D * g_c
    o_base = out_ptr + b * o_b + head * D
    q = load_rows(q_base + (y * q_y + x * q_x)[:, None] + (c * q_c)[None, :], q_mask, GUARD_Q)  # [M, D]
    g = load_rows(g_base + (y * g_y + x * g_x)[:, None] + (c * g_c)[None, :], q_mask, GUARD_Q)  # [M, D]
    o = load_rows(o_base + (y * o_y + x * o_x)[:, None] + c[None, :], q_mask, GUARD_Q)  # [M, D]
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    row = (b * HEADS + head) * size
    at = region * region_tokens + token
    top, log_total = load_statistics(lse_ptr + PLANES * row, at, query_ok, size, PLANES)  # [M]
    tl.store(delta_ptr + row + at, delta, mask=query_ok)  # [M]

    k_base = k_ptr + b * k_b + head * D * k_c
    v_base = v_ptr + b * v_b + head * D * v_c
    routes = routes_ptr + b * r_b + head * r_h + region * r_r
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, keys, BLOCK_N):
        k_offsets, v_offsets, _listed, on_map = routed_keys(
            routes, r_s, first, c, k_y, k_x, k_c, v_y, v_x, v_c, kv_height, kv_width,
            keys, krh, krw, kv_grid_w, BLOCK_N, FULL, KV_EVEN, SAME_KV, STATIC, WIDE,
        )  # fmt: skip
        k_mask = on_map[:, None] & lane[None, :]
        k = load_rows(k_base + k_offsets, k_mask, GUARD_K)  # [N, D]
        v = load_rows(v_base + v_offsets, k_mask, GUARD_K)  # [N, D]
        s = product(q, tl.trans(k), PRECISION, UPCAST)  # [M, N]
        e = exponents(s, logit_scale, top[:, None], log_total[:, None], PLANES)
        if PADS_OFF or not FULL:
            # Keys that do not count are rows of zeros: they add nothing, as long as their weight is finite.
            e = tl.minimum(e, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = tl.exp2(e)
        dp = product(g, tl.trans(v), PRECISION, UPCAST)  # [M, N]
        ds = p * (dp - delta[:, None])
        dq += product(ds.to(k.dtype), k, PRECISION, UPCAST)
    dq_base = dq_ptr + b * dq_b + head * D
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_base + (y * dq_y + x * dq_x)[:, None] + c[None, :], dq, mask=q_mask)  # [M, D]


def gather_bwd_dq(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    dq: Tensor, call: Call,
) -> None:  # fmt: skip
    """Write the gradient of the queries and ``delta``."""
    settings, product = call.kernels["gather_dq"], precision(q.dtype)
    launch_kernel(
        gather_bwd_dq_kernel, call.grids["gather_dq"], (q, k, v, routes, out, grad, lse, delta, dq),
        (
            *q.stride(), *k.stride(), *v.stride(), *route_strides(routes), *out.stride()[:3],
            *grad.stride(), *dq.stride()[:3], *call.sizes, call.logit_scale, call.scale, *call.geometry,
        ),
        lambda: {
            "SAME_KV": k.stride() == v.stride(), "WIDE": is_wide(q, k, v, out, grad, dq),
            **product, "PLANES": call.planes, **settings,
        },
        *product.values(), owner=settings,
    )  # fmt: skip


@triton.jit
def _region_at(starts, place, kv_regions):
    """The key region whose entries hold a place of the list of all entries."""
    BLOCK: tl.constexpr = 128
    region = 0
    for first in range(0, kv_regions, BLOCK):
        j = first + tl.arange(0, BLOCK)
        ends = tl.load(starts + 1 + j, mask=j < kv_regions, other=0x7FFFFFFF)
        region += tl.sum((ends <= place).to(tl.int32), 0)
    return region


@triton.jit(do_not_specialize=SIZES)
def gather_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, entries_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr,
    dq_ptr, dk_ptr, dv_ptr, dk_sums_ptr, dv_sums_ptr,
    q_b, q_y, q_x, q_c, k_b, k_y, k_x, k_c, v_b, v_y, v_x, v_c, o_b, o_y, o_x, g_b, g_y, g_x, g_c,
    dq_b, dq_y, dq_x, dk_b, dk_y, dk_x, dv_b, dv_y, dv_x,
    height, width, kv_height, kv_width, logit_scale, scale,
    regions, rh, rw, grid_w, kv_regions, krh, krw, kv_grid_w, stretches,
    REGIONS: tl.constexpr, KV_REGIONS: tl.constexpr, HEADS: tl.constexpr, TOPK: tl.constexpr,
    RH: tl.constexpr, RW: tl.constexpr, GRID_W: tl.constexpr,
    KRH: tl.constexpr, KRW: tl.constexpr, KV_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, KV_EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_HEAD: tl.constexpr, FUSE_DQ: tl.constexpr,
    CHUNK: tl.constexpr, STRETCHES: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Grid: images x (stretches, then key regions) x tiles of a key region x heads, on the first axis."""
    MAPS: tl.constexpr = HEADS if PER_HEAD else 1  # inverse maps of an image
    STATIC: tl.constexpr = RH > 0
    FILLED: tl.constexpr = STATIC and (KRH * KRW) % BLOCK_N == 0
    GUARD_K: tl.constexpr = (not KV_EVEN) or D != BLOCK_D or not FILLED
    ALL_COUNT: tl.constexpr = FILLED and (KV_EVEN or not MASKED)

    regions, grid_w, kv_grid_w = known(regions, REGIONS), known(grid_w, GRID_W), known(kv_grid_w, KV_GRID_W)
    rh, rw, krh, krw = known(rh, RH), known(rw, RW), known(krh, KRH), known(krw, KRW)
    kv_regions = known(kv_regions, KV_REGIONS)
    region_tokens, kv_tokens = rh * rw, krh * krw
    tiles = (kv_tokens + BLOCK_N - 1) // BLOCK_N
    size = regions * region_tokens
    stretches = known(stretches, STRETCHES) if CHUNK > 0 else 0
    pid = tl.program_id(0)
    head = (pid % HEADS).to(tl.int64)
    pid = pid // HEADS
    token = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    region = (pid // tiles) % (stretches + kv_regions) - stretches
    b = (pid // (tiles * (stretches + kv_regions))).to(tl.int64)
    inverse = b * MAPS
    if PER_HEAD:
        inverse += head
    starts = starts_ptr + inverse * (kv_regions + 1)
    cut = 0
    if CHUNK > 0:  # noqa: SIM102  (one condition is known to the compiler, the other is not)
        if region < 0:  # the stretch from this cut to the next, unless a region's own program has it
            cut = region + stretches + 1
            region = _region_at(starts, cut * CHUNK, kv_regions)
            if tl.load(starts + region) > (cut - 1) * CHUNK:
                return
    begin = tl.load(starts + region)
    end = tl.load(starts + region + 1)
    in_parts = False
    if CHUNK > 0:
        first_cut = (begin + CHUNK - 1) // CHUNK
        in_parts = end > (first_cut + 1) * CHUNK
        if cut == 0:
            cut = first_cut
        else:
            begin = cut * CHUNK
        end = tl.minimum(end, (cut + 1) * CHUNK)

    c = channels(BLOCK_D, WIDE)
    lane = c < D
    y, x = position(region, token, kv_grid_w, krh, krw, STATIC, WIDE)
    on_map = token < kv_tokens
    if not KV_EVEN:
        on_map = on_map & (y < kv_height) & (x < kv_width)
    k_mask = on_map[:, None] & lane[None, :]
    k_base = k_ptr + b * k_b + head * D * k_c
    v_base = v_ptr + b * v_b + head * D * v_c
    k = load_rows(k_base + (y * k_y + x * k_x)[:, None] + (c * k_c)[None, :], k_mask, GUARD_K)  # [N, D]
    v = load_rows(v_base + (y * v_y + x * v_x)[:, None] + (c * v_c)[None, :], k_mask, GUARD_K)  # [N, D]

    total = (end - begin) * region_tokens
    entries = entries_ptr + inverse * (regions * TOPK) + begin
    row = (b * HEADS + head) * size
    q_base = q_ptr + b * q_b + head * D * q_c
    g_base = grad_ptr + b * g_b + head * D * g_c
    o_base = out_ptr + b * o_b + head * D
    dq_base = dq_ptr + b * dq_b + head * D
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, total, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        query_ok = m < total
        place, q_token = split(m, region_tokens, STATIC)
        q_region = tl.load(entries + place, mask=query_ok, other=0)
        qy, qx = position(q_region, q_token, grid_w, rh, rw, STATIC, WIDE)
        if not EVEN:
            query_ok = query_ok & (qy < height) & (qx < width)
        q_mask = query_ok[:, None] & lane[None, :]
        q_offsets = (qy * q_y + qx * q_x)[:, None] + (c * q_c)[None, :]
        g_offsets = (qy * g_y + qx * g_x)[:, None] + (c * g_c)[None, :]
        q = tl.load(q_base + q_offsets, mask=q_mask, other=0.0)  # [M, D]
        g = tl.load(g_base + g_offsets, mask=q_mask, other=0.0)  # [M, D]
        at = q_region * region_tokens + q_token
        top, log_total = load_statistics(lse_ptr + PLANES * row, at, query_ok, size, PLANES)
        if FUSE_DQ:
            o_offsets = (qy * o_y + qx * o_x)[:, None] + c[None, :]
            o = tl.load(o_base + o_offsets, mask=q_mask, other=0.0)  # [M, D]
            delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + row + at, mask=query_ok, other=0.0)  # [M]
        s = product(k, tl.trans(q), PRECISION, UPCAST)  # [N, M]
        e = exponents(s, logit_scale, top[None, :], log_total[None, :], PLANES)
        if FUSE_DQ and not ALL_COUNT:
            # As in `gather_bwd_dq`. The sums of such keys themselves are not stored.
            e = tl.minimum(e, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = tl.exp2(e)
        dv += product(p.to(g.dtype), g, PRECISION, UPCAST)
        dp = product(v, tl.trans(g), PRECISION, UPCAST)  # [N, M]
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk += product(ds, q, PRECISION, UPCAST)
        if FUSE_DQ:
            dq = product(tl.trans(ds), k, PRECISION, UPCAST) * scale  # [M, D]
            dq_offsets = (qy * dq_y + qx * dq_x)[:, None] + c[None, :]
            tl.store(dq_base + dq_offsets, dq.to(dq_ptr.dtype.element_ty), mask=q_mask)
    if in_parts:
        sums = ((b * HEADS + head) * (stretches + 1) + cut) * (kv_tokens * D)
        offsets = sums + token[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(dk_sums_ptr + offsets, dk, mask=k_mask)  # [N, D]
        tl.store(dv_sums_ptr + offsets, dv, mask=k_mask)  # [N, D]
    else:
        dk_base = dk_ptr + b * dk_b + head * D
        dv_base = dv_ptr + b * dv_b + head * D
        dk_rows = dk_base + (y * dk_y + x * dk_x)[:, None] + c[None, :]
        dv_rows = dv_base + (y * dv_y + x * dv_x)[:, None] + c[None, :]
        tl.store(dk_rows, (dk * scale).to(dk_ptr.dtype.element_ty), mask=k_mask)  # [N, D]
        tl.store(dv_rows, dv.to(dv_ptr.dtype.element_ty), mask=k_mask)  # [N, D]


@triton.jit(do_not_specialize=SIZES)
def gather_bwd_hub_kernel(
    starts_ptr, dk_sums_ptr, dv_sums_ptr, dk_ptr, dv_ptr,
    dk_b, dk_y, dk_x, dv_b, dv_y, dv_x, kv_height, kv_width, scale,
    kv_regions, krh, krw, kv_grid_w, stretches,
    KV_REGIONS: tl.constexpr, HEADS: tl.constexpr,
    KRH: tl.constexpr, KRW: tl.constexpr, KV_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PER_HEAD: tl.constexpr,
    CHUNK: tl.constexpr, STRETCHES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: images x stretches x tiles of a key region x heads, all on the first axis.

    The sums of a region lie one after the other: its own program's first, at the first cut that it meets.
    The program of the stretch that follows adds them up.
    """
    MAPS: tl.constexpr = HEADS if PER_HEAD else 1  # inverse maps of an image
    STATIC: tl.constexpr = KRH > 0
    kv_regions, stretches = known(kv_regions, KV_REGIONS), known(stretches, STRETCHES)
    krh, krw, kv_grid_w = known(krh, KRH), known(krw, KRW), known(kv_grid_w, KV_GRID_W)
    kv_tokens = krh * krw
    tiles = (kv_tokens + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    head = (pid % HEADS).to(tl.int64)
    pid = pid // HEADS
    token = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    cut = (pid // tiles) % stretches
    b = (pid // (tiles * stretches)).to(tl.int64)
    inverse = b * MAPS
    if PER_HEAD:
        inverse += head
    starts = starts_ptr + inverse * (kv_regions + 1)
    region = _region_at(starts, (cut + 1) * CHUNK, kv_regions)
    if (tl.load(starts + region) + CHUNK - 1) // CHUNK != cut:
        return
    end_cut = (tl.load(starts + region + 1) + CHUNK - 1) // CHUNK

    c = channels(BLOCK_D, WIDE)
    y, x = position(region, token, kv_grid_w, krh, krw, STATIC, WIDE)
    mask = ((token < kv_tokens) & (y < kv_height) & (x < kv_width))[:, None] & (c < D)[None, :]
    offsets = token[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for part in range(cut, end_cut):
        sums = ((b * HEADS + head) * (stretches + 1) + part) * (kv_tokens * D)
        dk += tl.load(dk_sums_ptr + sums + offsets, mask=mask, other=0.0)  # [N, D]
        dv += tl.load(dv_sums_ptr + sums + offsets, mask=mask, other=0.0)  # [N, D]
    dk_rows = dk_ptr + b * dk_b + head * D + (y * dk_y + x * dk_x)[:, None] + c[None, :]
    dv_rows = dv_ptr + b * dv_b + head * D + (y * dv_y + x * dv_x)[:, None] + c[None, :]
    tl.store(dk_rows, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)  # [N, D]
    tl.store(dv_rows, dv.to(dv_ptr.dtype.element_ty), mask=mask)  # [N, D]


_HUB_CONSTANTS = (
    "KV_REGIONS",
    "HEADS",
    "KRH",
    "KRW",
    "KV_GRID_W",
    "D",
    "BLOCK_D",
    "BLOCK_N",
    "PER_HEAD",
    "CHUNK",
    "STRETCHES",
)


def gather_bwd_dkv(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, entries: Tensor, out: Tensor, grad: Tensor, lse: Tensor,
    delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, call: Call,
) -> None:  # fmt: skip
    """Write the gradients of keys and values; in the family ``key`` that of the queries too.

    That family does not read ``delta``; the other does not write ``dq``.
    """
    kernel = "k1_bwd" if call.backward == "key" else "gather_dkv"
    constants, product = call.kernels[kernel], precision(q.dtype)

    def wide() -> bool:
        return is_wide(q, k, v, out, grad, dq, dk, dv)

    dk_sums = dv_sums = lse  # not touched
    if constants["CHUNK"]:
        parts = q.shape[0] * constants["HEADS"] * (call.stretches + 1)
        tokens = call.geometry[5] * call.geometry[6]
        dk_sums, dv_sums = q.new_empty((2, parts, tokens, constants["D"]), dtype=torch.float32)
    strides = (*q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *grad.stride())
    own = (*dk.stride()[:3], *dv.stride()[:3])
    launch_kernel(
        gather_bwd_dkv_kernel, call.grids[kernel],
        (q, k, v, starts, entries, out, grad, lse, delta, dq, dk, dv, dk_sums, dv_sums),
        (
            *strides, *dq.stride()[:3], *own, *call.sizes, call.logit_scale, call.scale, *call.geometry,
            call.stretches,
        ),
        lambda: {"WIDE": wide(), **product, "PLANES": call.planes, **constants},
        *product.values(), owner=constants,
    )  # fmt: skip
    if constants["CHUNK"]:
        launch_kernel(
            gather_bwd_hub_kernel, call.grids["hub"], (starts, dk_sums, dv_sums, dk, dv),
            (*own, *call.sizes[2:], call.scale, *call.geometry[4:], call.stretches),
            lambda: {"WIDE": wide(), "num_warps": 4, **{name: constants[name] for name in _HUB_CONSTANTS}},
            *strides, *dq.stride()[:3], owner=constants,
        )  # fmt: skip
