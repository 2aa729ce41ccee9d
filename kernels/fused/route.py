"""Routing in two Triton kernels: region means of q and k in one pass, then affinity, top-k and its maps.

The first kernel reads q and k once and keeps their region means in float32. The second holds a block of
the affinity matrix in registers and takes its largest entries one after the other: no matrix in memory,
no sort, no atomics, nothing that the host waits for, the same result every time. Where one program sees
a whole image (up to 64 regions) it also writes the inverse of the routes; above, a third kernel does.

Order and ties: routes come best first, as from ``torch.topk``; of equal affinities the lowest region
index comes first (`torch.topk` leaves that to the device). NaN counts as the largest number, as in
`torch.topk`. An index is in range whatever the inputs hold.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# The language of kernels has no types for its tensors.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from bratune.errors import ProblemError, UnsupportedError
from bratune.kernels.constants import constant_in_graphs
from bratune.kernels.dispatch import is_observed, on_device_of
from bratune.kernels.fused import launch
from bratune.kernels.fused.call import is_compiled_in
from bratune.kernels.fused.direct import launch_kernel
from bratune.kernels.fused.tiles import SIZES, known
from bratune.problem import ceil_div

__all__ = [
    "MAX_REGIONS",
    "Routing",
    "check",
    "region_means",
    "route_by_means",
    "route_fused",
    "why_not",
]

# Affinities of a block of rows live in registers: 16 rows of this many columns fill eight warps.
MAX_REGIONS = 1024
# One program takes a whole image up to here, and can then write the inverse map as well.
_ONE_PROGRAM = 64
_WORD_BITS = 64


class Routing(NamedTuple):
    """Routes and what follows from them.

    Attributes:
        routes: ``[B, R, topk]`` int64, key regions of every query region, best first.
        mask: ``[B, R, ceil(Rk / 64)]`` int64, bit ``j % 64`` of word ``j // 64`` is set when region ``j``
            is among the routes.
        starts: ``[B, Rk + 1]`` int32; see ``entries``.
        entries: ``[B, R * topk]`` int32. Key region ``j`` was chosen by the query regions
            ``entries[b, starts[b, j]:starts[b, j + 1]]``, in ascending order.
    """

    routes: Tensor
    mask: Tensor
    starts: Tensor
    entries: Tensor


@triton.jit
def _region_mean(
    x_ptr, b, region, c, lane, x_b, x_y, x_x, x_c, height, width,
    rh, rw, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of the real tokens of one region, [BLOCK_C] in float32."""
    columns = (width + rw - 1) // rw
    wide_c = c.to(tl.int64)  # channels of NCHW maps are far apart
    first_y, first_x = (region // columns) * rh, (region % columns) * rw
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rh * rw, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        y, x = first_y + token // rw, first_x + token % rw
        real = (token < rh * rw) & (y < height) & (x < width)
        rows = x_ptr + b * x_b + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x  # [T]
        tile = tl.load(rows[:, None] + (wide_c * x_c)[None, :], mask=real[:, None] & lane[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32), 0)
    count = tl.minimum(height - first_y, rh) * tl.minimum(width - first_x, rw)
    return total / count.to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def region_means_kernel(
    q_ptr, k_ptr, q_means_ptr, k_means_ptr,
    q_b, q_y, q_x, q_c, k_b, k_y, k_x, k_c, height, width, kv_height, kv_width,
    rh, rw, krh, krw,
    REGIONS: tl.constexpr, KV_REGIONS: tl.constexpr, CHANNELS: tl.constexpr,
    RH: tl.constexpr, RW: tl.constexpr, KRH: tl.constexpr, KRW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: images x (query regions, then key regions) x blocks of channels, all on the first axis."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = (pid % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = c < CHANNELS
    region = (pid // BLOCKS) % (REGIONS + KV_REGIONS)
    b = (pid // (BLOCKS * (REGIONS + KV_REGIONS))).to(tl.int64)
    rh, rw, krh, krw = known(rh, RH), known(rw, RW), known(krh, KRH), known(krw, KRW)
    if region < REGIONS:
        mean = _region_mean(
            q_ptr, b, region, c, lane, q_b, q_y, q_x, q_c, height, width, rh, rw, BLOCK_T, BLOCK_C
        )
        tl.store(q_means_ptr + (b * REGIONS + region) * CHANNELS + c, mean, mask=lane)
    else:
        region -= REGIONS
        mean = _region_mean(
            k_ptr, b, region, c, lane, k_b, k_y, k_x, k_c, kv_height, kv_width, krh, krw, BLOCK_T, BLOCK_C
        )
        tl.store(k_means_ptr + (b * KV_REGIONS + region) * CHANNELS + c, mean, mask=lane)


@triton.jit
def _sortable(x):
    """Integers in the order of the floats: NaN above all, the two zeros equal, none the smallest integer."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, ordered, 0x7FFFFFFF)


@triton.jit
def route_kernel(
    q_means_ptr, k_means_ptr, routes_ptr, mask_ptr, starts_ptr, entries_ptr,
    REGIONS: tl.constexpr, KV_REGIONS: tl.constexpr, CHANNELS: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, WORDS: tl.constexpr,
    KEEP_MASK: tl.constexpr, KEEP_INVERSE: tl.constexpr,
):  # fmt: skip
    """Grid: images x blocks of query regions, on the first axis; `KEEP_INVERSE` needs a single block."""
    BLOCKS: tl.constexpr = (REGIONS + BLOCK_Q - 1) // BLOCK_Q
    TAKEN: tl.constexpr = -0x80000000  # below the key of every number
    pid = tl.program_id(0)
    i = (pid % BLOCKS) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_K)
    b = (pid // BLOCKS).to(tl.int64)
    row = i < REGIONS
    column = j < KV_REGIONS

    affinity = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lane = c < CHANNELS
        q = tl.load(
            q_means_ptr + (b * REGIONS + i)[:, None] * CHANNELS + c[None, :],
            mask=row[:, None] & lane[None, :],
            other=0.0,
        )  # [Q, C]
        k = tl.load(
            k_means_ptr + (b * KV_REGIONS + j)[None, :] * CHANNELS + c[:, None],
            mask=column[None, :] & lane[:, None],
            other=0.0,
        )  # [C, K]
        affinity += tl.dot(q, k, input_precision="ieee")
    keys = tl.where(column[None, :], _sortable(affinity), TAKEN)

    routes = routes_ptr + (b * REGIONS + i) * TOPK
    for slot in range(TOPK):
        best = tl.max(keys, 1)
        at = tl.min(tl.where(keys == best[:, None], j[None, :], BLOCK_K), 1)
        tl.store(routes + slot, at.to(tl.int64), mask=row)
        keys = tl.where(j[None, :] == at[:, None], TAKEN, keys)

    chosen = (keys == TAKEN) & column[None, :] & row[:, None]  # [Q, K]
    if KEEP_MASK:
        bits = chosen.to(tl.int64) << (j % 64).to(tl.int64)[None, :]
        words = tl.sum(tl.reshape(bits, (BLOCK_Q, WORDS, BLOCK_K // WORDS)), 2)  # [Q, W]
        w = tl.arange(0, WORDS)
        MASK_WORDS: tl.constexpr = (KV_REGIONS + 63) // 64
        tl.store(
            mask_ptr + (b * REGIONS + i)[:, None] * MASK_WORDS + w[None, :],
            words,
            mask=row[:, None] & (w < MASK_WORDS)[None, :],
        )
    if KEEP_INVERSE:
        hits = chosen.to(tl.int32)
        counts = tl.sum(hits, 0)
        ends = tl.cumsum(counts, 0)  # [K]
        starts = starts_ptr + b * (KV_REGIONS + 1)
        tl.store(starts + j + 1, ends, mask=column)
        tl.store(starts + j, ends - counts, mask=j == 0)
        place = tl.cumsum(hits, 0) - hits + (ends - counts)[None, :]
        source = tl.broadcast_to(i[:, None], (BLOCK_Q, BLOCK_K))
        tl.store(entries_ptr + b * REGIONS * TOPK + place, source, mask=chosen)


def _regions(height: int, width: int, region: list[int]) -> int:
    return ceil_div(height, region[0]) * ceil_div(width, region[1])


def launch_region_means(
    q: Tensor, k: Tensor | None, region: list[int], kv_region: list[int]
) -> tuple[Tensor, Tensor]:
    """Launch `region_means_kernel`; see `region_means`."""
    batch, height, width, channels = q.shape
    keys = q if k is None else k
    kv_height, kv_width = keys.shape[1:3]
    regions = _regions(height, width, region)
    kv_regions = 0 if k is None else _regions(kv_height, kv_width, kv_region)
    q_means = torch.empty((batch, regions, channels), dtype=torch.float32, device=q.device)
    k_means = torch.empty((batch, kv_regions, channels), dtype=torch.float32, device=q.device)
    tokens = max(region[0] * region[1], kv_region[0] * kv_region[1])
    block_t = min(64, triton.next_power_of_2(tokens))
    # Tiles of about 4096 numbers: small regions take more channels at a time.
    block_c = min(triton.next_power_of_2(channels), max(64, min(512, 4096 // block_t)))
    grid = (batch * (regions + kv_regions) * triton.cdiv(channels, block_c),)
    fixed = is_compiled_in((height, width), region) and is_compiled_in((kv_height, kv_width), kv_region)
    sides = (*region, *kv_region) if fixed else (0, 0, 0, 0)
    with on_device_of(q):
        launch_kernel(
            region_means_kernel, grid, (q, keys, q_means, k_means),
            (*q.stride(), *keys.stride(), height, width, kv_height, kv_width, *region, *kv_region),
            lambda: {
                "REGIONS": regions, "KV_REGIONS": kv_regions, "CHANNELS": channels,
                **dict(zip(("RH", "RW", "KRH", "KRW"), sides, strict=True)),
                "BLOCK_T": block_t, "BLOCK_C": block_c,
                "num_warps": max(1, min(4, block_t * block_c // 1024)), "num_stages": 1,
            },
            regions, kv_regions, channels, *sides, block_t, block_c,
        )  # fmt: skip
    return q_means, k_means


def launch_route(q_means: Tensor, k_means: Tensor, topk: int, maps: bool) -> Routing:
    """Launch `route_kernel`, and the kernel that inverts routes where one program does not see an image."""
    batch, regions, channels = q_means.shape
    kv_regions = k_means.shape[1]
    whole = max(regions, kv_regions) <= _ONE_PROGRAM
    block_k = max(16, triton.next_power_of_2(kv_regions))
    block_q = max(16, triton.next_power_of_2(regions)) if whole else max(16, min(32, 8192 // block_k))

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q_means.device)

    words = ceil_div(kv_regions, _WORD_BITS)
    found = Routing(
        routes=empty(batch, regions, topk, dtype=torch.int64),
        mask=empty(batch, regions, words if maps else 0, dtype=torch.int64),
        starts=empty(batch, kv_regions + 1 if maps else 0, dtype=torch.int32),
        entries=empty(batch, regions * topk if maps else 0, dtype=torch.int32),
    )
    with on_device_of(q_means):
        launch_kernel(
            route_kernel, (batch * triton.cdiv(regions, block_q),), (q_means, k_means, *found), (),
            lambda: {
                "REGIONS": regions, "KV_REGIONS": kv_regions, "CHANNELS": channels, "TOPK": topk,
                "BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_C": 32 if block_k <= 256 else 16,
                "WORDS": max(1, block_k // _WORD_BITS), "KEEP_MASK": maps, "KEEP_INVERSE": maps and whole,
                "num_warps": 4 if block_k <= 64 else 8, "num_stages": 1,
            },
            regions, kv_regions, channels, topk, maps,
        )  # fmt: skip
    if maps and not whole:
        from bratune.kernels.fused.inverse import inverse_routes

        with on_device_of(q_means):
            starts, entries = inverse_routes(found.routes, kv_regions)
        found = found._replace(starts=starts.squeeze(1), entries=entries.squeeze(1))
    return found


@library.custom_op("bratune::region_means", mutates_args=())
def _region_means_op(
    q: Tensor, k: Tensor | None, region: list[int], kv_region: list[int]
) -> tuple[Tensor, Tensor]:
    return launch_region_means(q, k, region, kv_region)


@_region_means_op.register_fake
def _(q: Tensor, k: Tensor | None, region: list[int], kv_region: list[int]) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = q.shape
    kv_regions = 0 if k is None else _regions(k.shape[1], k.shape[2], kv_region)
    regions = _regions(height, width, region)
    return (
        q.new_empty((batch, regions, channels), dtype=torch.float32),
        q.new_empty((batch, kv_regions, channels), dtype=torch.float32),
    )


def _route(q_means: Tensor, k_means: Tensor, topk: int, maps: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(launch_route(q_means.contiguous(), k_means.contiguous(), topk, maps))  # type: ignore[return-value]


_route_op = library.custom_op("bratune::route", _route, mutates_args=())


@_route_op.register_fake
def _(q_means: Tensor, k_means: Tensor, topk: int, maps: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, regions, _ = q_means.shape
    kv_regions = k_means.shape[1]
    words = ceil_div(kv_regions, _WORD_BITS) if maps else 0
    return (
        q_means.new_empty((batch, regions, topk), dtype=torch.int64),
        q_means.new_empty((batch, regions, words), dtype=torch.int64),
        q_means.new_empty((batch, kv_regions + 1 if maps else 0), dtype=torch.int32),
        q_means.new_empty((batch, regions * topk if maps else 0), dtype=torch.int32),
    )


@register_flop_formula(torch.ops.bratune.route)
def _route_flops(q_means: torch.Size, k_means: torch.Size, *args: object, **kwargs: object) -> int:
    """Operations of the affinity product, as `torch.bmm` counts them."""
    batch, regions, channels = q_means
    return 2 * batch * regions * k_means[1] * channels


def why_not(q: Tensor, k: Tensor, *, region: tuple[int, int], kv_region: tuple[int, int]) -> tuple[str, ...]:
    """Every reason for which these tensors cannot be routed by the Triton kernels; empty: they can."""
    kv_regions = _regions(k.shape[1], k.shape[2], list(kv_region))
    reasons: tuple[str, ...] = _reasons(str(q.device), q.dtype, k.dtype, kv_regions)
    return reasons


@constant_in_graphs
def _reasons(device: str, q_dtype: torch.dtype, k_dtype: torch.dtype, kv_regions: int) -> tuple[str, ...]:
    reasons = launch.not_here(device)
    known = (torch.float16, torch.bfloat16, torch.float32)
    if q_dtype not in known or k_dtype not in known:
        reasons.append(f"q is {q_dtype} and k is {k_dtype}; float16, bfloat16 and float32 are routed")
    if kv_regions > MAX_REGIONS:
        reasons.append(f"there are {kv_regions} key regions; up to {MAX_REGIONS} fit into registers")
    return tuple(reasons)


def check(q: Tensor, k: Tensor, *, region: tuple[int, int], kv_region: tuple[int, int] | None = None) -> None:
    """Raise `UnsupportedError` with every reason of `why_not`, where there is one."""
    reasons = why_not(q, k, region=region, kv_region=kv_region or region)
    if reasons:
        raise UnsupportedError("triton", reasons, f"routing q {tuple(q.shape)} to k {tuple(k.shape)}")


def region_means(
    q: Tensor, k: Tensor | None = None, *, region: tuple[int, int], kv_region: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The means of the real tokens of every region of q and of k, in float32, in one launch.

    Args:
        q: ``[B, H, W, C]``, any strides.
        k: ``[B, Hk, Wk, C]``, any strides; without it its means are empty.
        region: Tokens of a region of q.
        kv_region: Tokens of a region of k; by default those of q.

    Returns:
        ``[B, R, C]`` and ``[B, Rk, C]``.
    """
    run = _region_means_op if is_observed(q) else launch_region_means
    means: tuple[Tensor, Tensor] = run(q, k, list(region), list(kv_region or region))
    return means


def route_by_means(q_means: Tensor, k_means: Tensor, *, topk: int, maps: bool = True) -> Routing:
    """Route between regions whose descriptors are known already.

    Args:
        q_means: ``[B, R, C]`` float32.
        k_means: ``[B, Rk, C]`` float32.
        topk: Key regions per query region.
        maps: Also make the bit mask and the inverse; without, those are empty.

    Raises:
        ProblemError: there are fewer than ``topk`` key regions, or more than the kernel can hold.
    """
    count = k_means.shape[1]
    if not 1 <= topk <= count:
        raise ProblemError(f"top-k {topk} of {count} key regions; 1 to {count} would work")
    if count > MAX_REGIONS:
        raise ProblemError(f"{count} key regions do not fit into registers; up to {MAX_REGIONS} do")
    run = _route_op if is_observed(q_means) else _route
    return Routing(*run(q_means.float(), k_means.float(), topk, maps))


def route_fused(
    q: Tensor,
    k: Tensor,
    *,
    region: tuple[int, int],
    topk: int,
    kv_region: tuple[int, int] | None = None,
    maps: bool = True,
) -> Routing:
    """Route q to k, with the maps that the attention kernels read.

    Means and affinities are float32 whatever the dtype, so that near ties fall as they would in exact
    arithmetic more often than in the official order of operations, which rounds both to the input's dtype.

    Args:
        q: Queries ``[B, Hq, Wq, C]``, any strides.
        k: Keys ``[B, Hk, Wk, C]``, any strides.
        region: Query region ``(rh, rw)`` in tokens.
        topk: Key regions per query region.
        kv_region: Key region in tokens; by default that of the queries.
        maps: Also make the bit mask and the inverse; without, those are empty.

    Raises:
        UnsupportedError: the kernels cannot take these tensors; the message has every reason.
        ProblemError: there are fewer than ``topk`` key regions.
    """
    check(q, k, region=region, kv_region=kv_region)
    with torch.no_grad():
        means = region_means(q, k, region=region, kv_region=kv_region)
        return route_by_means(*means, topk=topk, maps=maps)
