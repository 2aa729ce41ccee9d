"""What the fused kernels share: where the tokens of a region lie, and the product of two tiles.

Letters in shape notes: ``M`` query rows of a tile, ``N`` keys of a tile, ``D`` channels of a head, padded to
a power of two.
"""
# The language of kernels has no types for its tensors.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

# What differs from one size of a map to the next: whether such a number is 1 or a multiple of 16 must not
# make another kernel of it. Sizes of the map, of both kinds of regions and their grids, strides of routes.
SIZES = (
    "height", "width", "kv_height", "kv_width", "regions", "kv_regions", "rh", "rw", "grid_w", "krh", "krw",
    "kv_grid_w", "stretches", "rows", "rows_per_sum", "tokens", "r_b", "r_h",
)  # fmt: skip


@triton.jit
def known(size, SIZE: tl.constexpr):
    """A size: ``SIZE`` where it is compiled in, else (0) what was given at the launch."""
    if SIZE > 0:
        return SIZE
    else:
        return size


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``a @ b`` in float32.

    ``UPCAST`` is for the interpreter alone, which multiplies the raw bits of bfloat16 numbers.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def split(n, size, STATIC: tl.constexpr):
    """``n // size`` and ``n % size`` of numbers from 0 to 2^20; where ``STATIC`` is set, of any.

    Division by a number that the compiler does not know takes some thirty instructions, this four: the
    product with the reciprocal is off by less than the half that is added, divided by ``size``.
    """
    if STATIC:
        return n // size, n % size
    else:
        whole = ((n.to(tl.float32) + 0.5) * (1.0 / size.to(tl.float32))).to(tl.int32)
        return whole, n - whole * size


@triton.jit
def position(region, token, grid_w, rh, rw, STATIC: tl.constexpr, WIDE: tl.constexpr):
    """Row and column on the map of a token of a region.

    ``WIDE`` makes them 64-bit, for maps of which one image holds 2^31 numbers or more.
    """
    row, column = split(region, grid_w, STATIC)
    dy, dx = split(token, rw, STATIC)
    y = row * rh + dy
    x = column * rw + dx
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return y, x


@triton.jit
def channels(BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """The channels of a head, 64-bit where `position` is: they may be far apart."""
    c = tl.arange(0, BLOCK_D)
    if WIDE:
        c = c.to(tl.int64)
    return c


@triton.jit
def load_rows(pointers, mask, GUARD: tl.constexpr):
    """A tile; where ``GUARD`` is set, zeros wherever ``mask`` is off."""
    if GUARD:
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_statistics(
    rows, at, top, total, mask, size, PLANES: tl.constexpr, MAY_BE_EMPTY: tl.constexpr
):  # fmt: skip
    """Keep what the softmax of a row was divided by, for the backward pass.

    A row without any key, whose sum is zero, gets an infinite maximum: every weight is then exp2(-inf) = 0.


    One plane: the base-2 log-sum-exp. Two, ``size`` numbers apart: the maximum and the base-2 logarithm of
    the sum, because a float32 holds both only to the last digit of the maximum, which may be large.
    """
    weight = total
    if MAY_BE_EMPTY:
        weight = tl.where(total == 0.0, 1.0, total)
    log_total = tl.log2(weight)
    first = top if PLANES == 2 else top + log_total
    if MAY_BE_EMPTY:
        first = tl.where(total == 0.0, float("inf"), first)
    tl.store(rows + at, first, mask=mask)
    if PLANES == 2:
        tl.store(rows + size + at, log_total, mask=mask)


@triton.jit
def load_statistics(rows, at, mask, size, PLANES: tl.constexpr):
    """What `store_statistics` kept, as two terms; infinite and thus without weight where ``mask`` is off."""
    top = tl.load(rows + at, mask=mask, other=float("inf"))
    log_total = top
    if PLANES == 2:
        log_total = tl.load(rows + size + at, mask=mask, other=0.0)
    return top, log_total


@triton.jit
def exponents(s, logit_scale, top, log_total, PLANES: tl.constexpr):
    """Base-2 logarithms of the weights of a row, from its products and `load_statistics`."""
    if PLANES == 2:
        # In this order: the first difference is exact where it matters, at the largest weights.
        return (s * logit_scale - top) - log_total
    else:
        return s * logit_scale - top


@triton.jit
def routed_keys(
    routes, r_s, first, c, k_y, k_x, k_c, v_y, v_x, v_c, kv_height, kv_width,
    keys, krh, krw, kv_grid_w,
    BLOCK_N: tl.constexpr, FULL: tl.constexpr, KV_EVEN: tl.constexpr, SAME_KV: tl.constexpr,
    STATIC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the keys ``first ... first + BLOCK_N`` lie, in the order of the routes.

    A region's keys are one flat list of ``keys = topk * krh * krw``, so that one tile holds a part of a large
    region or many small ones; with ``FULL`` tiles fill it without a rest.

    Returns:
        Offsets of k and of v ``[N, D]``, which keys are in the list ``[N]``, and which of those are on the
        map ``[N]`` and not padding.
    """
    n = first + tl.arange(0, BLOCK_N)
    listed = n < keys
    slot, token = split(n, krh * krw, STATIC)
    if FULL:
        region = tl.load(routes + slot * r_s).to(tl.int32)
    else:
        region = tl.load(routes + slot * r_s, mask=listed, other=0).to(tl.int32)
    y, x = position(region, token, kv_grid_w, krh, krw, STATIC, WIDE)
    k_offsets = (y * k_y + x * k_x)[:, None] + (c * k_c)[None, :]
    v_offsets = k_offsets if SAME_KV else (y * v_y + x * v_x)[:, None] + (c * v_c)[None, :]
    on_map = listed
    if not KV_EVEN:
        on_map = listed & (y < kv_height) & (x < kv_width)
    return k_offsets, v_offsets, listed, on_map
