"""Level one: which key regions every query region attends to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.errors import ProblemError, UnknownNameError
from bratune.kernels import layout
from bratune.kernels.nhwc import to_nchw, to_nhwc
from bratune.problem import Problem

__all__ = ["ROUTERS", "multiplicity_bias", "region_means", "route", "route_pooled"]

# Ways to compute `route`; ``auto`` is the first.
ROUTERS = ("torch", "triton")


def region_means(x: Tensor, region: tuple[int, int], *, dtype: torch.dtype | None = None) -> Tensor:
    """The mean of the real tokens of every region, ``[B, R, C]``.

    Args:
        x: A map ``[B, H, W, C]``, any strides. Padding does not count where regions do not tile it.
        region: Tokens of a region from top to bottom and from left to right.
        dtype: That of the means; by default that of x.

    Sums of float16 and bfloat16 are held in float32 and rounded once.
    """
    height, width = layout.sides(x)
    rh, rw = region
    dtype = dtype or x.dtype
    if height % rh == 0 and width % rw == 0:
        rounds_once = x.dtype == torch.bfloat16 and dtype == x.dtype
        if x.device.type == "cpu" and (x.dtype in (torch.float32, torch.float64) or rounds_once):
            # Four to thirty times faster there than a reduction over two axes of six.
            return to_nhwc(F.avg_pool2d(to_nchw(x), region)).flatten(1, 2).to(dtype)
        return layout.tiles(x, region).mean((2, 4), dtype=dtype).flatten(1, 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = layout.to_regions(x, region).sum(2, dtype=wide)  # [B, R, C]
    counts = layout.valid_tokens(height, width, region, x.device).sum(1, keepdim=True)  # [R, 1]
    return (sums / counts).to(dtype)


def route(
    q: Tensor,
    k: Tensor,
    *,
    region: tuple[int, int],
    topk: int,
    kv_region: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """The key regions that every query region attends to, best first, shared by all heads.

    Region means of q and k, their product over all channels without a scale, then the ``topk`` largest.
    No gradient flows. The product is taken in the dtype of q, under autocast in that of autocast, as the
    official models do: reduced precision then decides near ties differently (of random rows about 0.3 %
    in float16 and 1 to 4 % in bfloat16). Exact ties go as `torch.topk` breaks them, which differs between
    devices. NaN counts as the largest number, so that indices are in range whatever the inputs hold.

    Args:
        q: Queries ``[B, Hq, Wq, C]``, any strides.
        k: Keys ``[B, Hk, Wk, C]``, any strides.
        region: Query region ``(rh, rw)`` in tokens.
        topk: Key regions per query region.
        kv_region: Key region in tokens; by default that of the queries.
        backend: One of `ROUTERS`, or ``auto``. ``triton`` keeps means and affinities in float32, gives the
            lowest region first on a tie, and runs where `bratune.kernels.fused.route.why_not` is empty.

    Returns:
        ``[B, R, topk]`` int64 indices of key regions, numbered row by row.

    Raises:
        ProblemError: there are fewer than ``topk`` key regions, or shapes do not fit.
        UnknownNameError: no router has this name.
        UnsupportedError: ``triton`` was asked for and cannot take these tensors.

    Source: BiFormer, arXiv 2303.08810, equations 3 and 4.
    """
    if backend not in ("auto", *ROUTERS):
        raise UnknownNameError("router", backend, ("auto", *ROUTERS))
    if q.ndim != 4 or k.ndim != 4 or layout.comparable(q.shape)[::3] != layout.comparable(k.shape)[::3]:
        raise ProblemError(
            f"route needs q and k of shape [B, H, W, C] with the same B and C, "
            f"not {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if backend == "triton":
        from bratune.kernels.fused.route import route_fused

        return route_fused(q, k, region=region, topk=topk, kv_region=kv_region, maps=False).routes
    with torch.no_grad():
        means_q = region_means(q, region)
        means_k = region_means(k, kv_region or region)
        (count,) = layout.settled(means_k.shape[1:2])
        if not 1 <= topk <= count:
            raise ProblemError(f"top-k {topk} of {count} key regions; 1 to {count} would work")
        affinity = means_q @ means_k.transpose(1, 2)  # [B, R, Rk]
        return affinity.topk(topk, dim=-1).indices


def route_pooled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    region: tuple[int, int],
    topk: int,
    means: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The routes between the projections of a map, without projecting the map.

    The mean of a region commutes with the projection: ``mean(x W + b) = mean(x) W + b``. Routing then
    reads x once instead of q and k, and need not wait for them. In exact arithmetic the routes are those of
    `route`; here means, projection and affinity are at least float32, also under autocast, so that fewer
    near ties fall differently than they would in exact arithmetic.

    Args:
        x: The input of the projection, ``[B, H, W, C]``, any strides.
        weight: ``[2 * Cq, C]``: the rows that make q, then those that make k.
        bias: ``[2 * Cq]``.
        region: Query and key region ``(rh, rw)`` in tokens.
        topk: Key regions per query region.
        means: The region means of x, ``[B, R, C]``, where they are known: x is not read then.
        backend: As in `route`.

    Returns:
        ``[B, R, topk]`` int64, best first.

    Raises:
        ProblemError: there are fewer than ``topk`` regions.
        UnknownNameError: no router has this name.
        UnsupportedError: ``triton`` was asked for and cannot take these tensors.
    """
    if backend not in ("auto", *ROUTERS):
        raise UnknownNameError("router", backend, ("auto", *ROUTERS))
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if backend == "triton":
            from bratune.kernels.fused import route as route_fused

            route_fused.check(x, x, region=region)
            if means is None:
                means, _ = route_fused.region_means(x, region=region)
        elif means is None:
            means = region_means(x, region, dtype=wide)
        both = F.linear(means, weight.to(wide), None if bias is None else bias.to(wide))
        means_q, means_k = both.chunk(2, dim=-1)
        if backend == "triton":
            return route_fused.route_by_means(means_q, means_k, topk=topk, maps=False).routes
        (count,) = layout.settled(means_k.shape[1:2])
        if not 1 <= topk <= count:
            raise ProblemError(f"top-k {topk} of {count} key regions; 1 to {count} would work")
        return (means_q @ means_k.transpose(1, 2)).topk(topk, dim=-1).indices


def multiplicity_bias(routes: Tensor, problem: Problem, dtype: torch.dtype) -> Tensor:
    """What routes add to the logits of full attention, ``[B, 1 or heads, R, Rk]``.

    Minus infinity where a key region is not routed, else the logarithm of how often it is: 0 for once.
    """
    graph = routes.long() if problem.per_head else routes.long()[:, None]  # [B, 1 or heads, R, topk]
    counts = torch.zeros(*graph.shape[:3], problem.kv_regions, dtype=dtype, device=routes.device)
    return counts.scatter_add(3, graph, torch.ones_like(graph, dtype=dtype)).log()
