"""Attention in kernels: what level one and every backend's level two read, write, multiply and launch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from bratune.predict.work import (
    BLOCK_ROWS,
    ELEMENTS_PER_BLOCK,
    SOFTMAX_SLOTS,
    TILE,
    Op,
    copy,
    elementwise,
    matmul,
    pad_to,
)
from bratune.problem import Problem, ceil_div

__all__ = ["ATTENTION", "COMPOSED", "attention_ops", "full_attention_ops", "routing_ops"]

# Full attention has two forms only: with these backends its scores are written out, with others they are not.
COMPOSED = ("reference", "gather")

# --- level one: routing -------------------------------------------------------------------------------


def routing_ops(p: Problem) -> tuple[Op, ...]:
    """Region means of q and k, their affinity, and the top-k."""
    item, c = p.item_bytes, p.channels
    q, k = p.batch * p.tokens * c * item, p.batch * p.kv_tokens * c * item
    means_q, means_k = p.batch * p.regions * c * item, p.batch * p.kv_regions * c * item
    affinity = p.batch * p.regions * p.kv_regions * item
    return (
        _reduce("mean of q", q, means_q, item),
        _reduce("mean of k", k, means_k, item),
        matmul("affinity", p.regions, c, p.kv_regions, item, batch=p.batch, weights=False),
        Op(
            name="top-k",
            kind="sort",
            read=affinity,
            written=p.batch * p.regions * p.topk * (8 + item),
            slots=p.batch * p.regions * p.kv_regions * 32,
            blocks=p.batch * p.regions,
            launches=2,
        ),
    )


def _reduce(name: str, read: float, written: float, item: int) -> Op:
    return Op(
        name=name,
        kind="reduce",
        read=read,
        written=written,
        cold=read,
        slots=2 * read / item,
        blocks=max(1.0, written / item / 64),
    )


# --- level two: attention, one function per backend ---------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """The tensors of an attention call, in bytes, and the number of scores of all heads."""

    q: float
    kv: float
    out: float
    gathered: float
    scores: float
    score_count: float
    item: int


def _sizes(p: Problem) -> _Sizes:
    rows, cols = p.padded
    kv_rows, kv_cols = p.kv_padded
    item = p.item_bytes
    return _Sizes(
        q=p.batch * rows * cols * p.channels * item,
        kv=p.batch * kv_rows * kv_cols * (p.channels + p.v_channels) * item,
        out=p.batch * rows * cols * p.v_channels * item,
        gathered=p.gathered_bytes,
        scores=p.score_bytes,
        score_count=p.score_bytes / item,
        item=item,
    )


def _region_layout(s: _Sizes) -> tuple[Op, ...]:
    """Cutting q, k and v into regions copies them, because a region is not contiguous in a map."""
    return (
        copy("q into regions", s.q, cold=True, item=s.item),
        copy("k into regions", s.kv / 2, cold=True, item=s.item),
        copy("v into regions", s.kv / 2, cold=True, item=s.item),
    )


def _gather_kv(s: _Sizes) -> tuple[Op, ...]:
    half = s.gathered / 2
    gather = Op(
        name="gather k",
        kind="gather",
        read=s.kv / 2,
        written=half,
        reread=max(0.0, half - s.kv / 2),
        blocks=half / s.item / ELEMENTS_PER_BLOCK,
    )
    return gather, dataclasses.replace(gather, name="gather v")


def _region_products(p: Problem, s: _Sizes) -> tuple[Op, Op]:
    """Both products as batched matrix products, one small matrix per region and head."""
    batch = p.batch * p.regions * p.heads
    rows, keys = p.region_tokens, p.keys_per_query
    return (
        matmul("q k", rows, p.head_dim, keys, s.item, batch=batch, weights=False),
        matmul("p v", rows, keys, p.v_head_dim, s.item, batch=batch, weights=False),
    )


def _softmax(s: _Sizes) -> Op:
    return Op(
        name="softmax",
        kind="pointwise",
        read=s.scores,
        written=s.scores,
        slots=s.score_count * SOFTMAX_SLOTS,
        blocks=s.score_count / ELEMENTS_PER_BLOCK,
    )


def _gather(p: Problem) -> tuple[Op, ...]:
    """Gather, then dense: keys and values are copied out, split into heads (copied again) and multiplied."""
    s = _sizes(p)
    qk, pv = _region_products(p, s)
    return (
        *_region_layout(s),
        *_gather_kv(s),
        copy("heads of k", s.gathered / 2, item=s.item),
        copy("heads of v", s.gathered / 2, item=s.item),
        elementwise("scale q", s.q, s.q, item=s.item),
        qk,
        _softmax(s),
        pv,
        copy("out of regions", s.out, item=s.item),
    )


def _gather_sdpa(p: Problem) -> tuple[Op, ...]:
    """Gather, then one fused attention kernel: no score matrix in memory."""
    s = _sizes(p)
    return (
        *_region_layout(s),
        *_gather_kv(s),
        _fused(p, s, read=s.q + s.gathered, reread=0.0, keys=p.keys_per_query, rows=p.region_tokens),
        copy("out of regions", s.out, item=s.item),
    )


def _fused(
    p: Problem, s: _Sizes, *, read: float, reread: float, keys: int, rows: int, cold: float = 0.0
) -> Op:
    """One kernel that attends from ``rows`` queries at a time to ``keys`` keys."""
    padded_rows = pad_to(rows, TILE)
    groups = p.batch * p.heads * p.padded[0] * p.padded[1] / rows
    pairs = groups * padded_rows * pad_to(keys, TILE)
    return Op(
        name="attention",
        kind="fused",
        read=read,
        written=s.out,
        cold=cold,
        reread=reread,
        macs=pairs * (pad_to(p.head_dim, TILE) + pad_to(p.v_head_dim, TILE)),
        slots=pairs * SOFTMAX_SLOTS,
        blocks=groups * ceil_div(rows, BLOCK_ROWS),
    )


def _triton(p: Problem) -> tuple[Op, ...]:
    """Fused: q, k, v read from the packed projection, keys fetched k-fold through the cache."""
    s = _sizes(p)
    passes = ceil_div(p.region_tokens, BLOCK_ROWS)
    return (
        _fused(
            p,
            s,
            read=s.q + s.kv,
            cold=s.q + s.kv,
            reread=max(0.0, s.gathered * passes - s.kv),
            keys=p.keys_per_query,
            rows=p.region_tokens,
        ),
    )


def _dense(p: Problem) -> tuple[Op, ...]:
    """Every query against every key, then the mask: the mask is built and read once per head."""
    s = _sizes(p)
    queries, keys = p.padded[0] * p.padded[1], p.kv_padded[0] * p.kv_padded[1]
    if p.topk == p.kv_regions:
        return full_attention_ops(p, composed=False)
    layout = tuple(copy(f"heads of {n}", b, cold=True, item=s.item) for n, b in _heads_of(s))
    mask = float(p.batch * queries * keys * s.item)
    build = Op(
        name="region mask",
        kind="copy",
        read=mask / s.item,
        written=mask,
        blocks=mask / s.item / ELEMENTS_PER_BLOCK,
        launches=5,
    )
    kernel = _fused(p, s, read=s.q + s.kv + mask, reread=mask * (p.heads - 1), keys=keys, rows=queries)
    return (*layout, build, kernel, copy("heads together", s.out, item=s.item))


def _heads_of(s: _Sizes) -> tuple[tuple[str, float], ...]:
    return ("q", s.q), ("k", s.kv / 2), ("v", s.kv / 2)


def _flex(p: Problem) -> tuple[Op, ...]:
    """FlexAttention over tokens in region order, in blocks of 128: small regions drag neighbours along."""
    s = _sizes(p)
    block = 128
    queries, keys = p.padded[0] * p.padded[1], p.kv_padded[0] * p.kv_padded[1]
    regions_per_block = max(1, block // p.region_tokens)
    wanted = p.topk * regions_per_block * pad_to(p.kv_region_tokens, block)
    visited = min(pad_to(keys, block), wanted)
    passes = ceil_div(queries, block)
    per_pass = p.batch * visited * (p.channels + p.v_channels) * s.item
    mask = Op(name="block mask", kind="sort", read=0.0, written=0.0, blocks=p.batch * passes, launches=12)
    kernel = _fused(
        p,
        s,
        read=s.q + s.kv,
        reread=max(0.0, passes * per_pass - s.kv),
        keys=visited,
        rows=min(block, queries),
    )
    return (*_region_layout(s), mask, kernel, copy("out of regions", s.out, item=s.item))


def _sparse(p: Problem) -> tuple[Op, ...]:
    """Sampled product, sparse softmax and sparse product, on the general cores with an index per score."""
    s = _sizes(p)
    indexed = s.score_count * (s.item + 8)
    macs = s.score_count * p.head_dim
    blocks = s.score_count / ELEMENTS_PER_BLOCK
    return (
        *(copy(f"heads of {n}", b, cold=True, item=s.item) for n, b in _heads_of(s)),
        Op(name="pattern", kind="gather", read=indexed, written=indexed, blocks=blocks, launches=6),
        Op(name="sampled q k", kind="gather", read=indexed, written=s.scores, reread=macs * s.item,
           slots=2 * macs, blocks=blocks),
        dataclasses.replace(_softmax(s), read=2 * indexed, written=indexed, launches=4),
        Op(name="sparse p v", kind="gather", read=indexed, written=s.out, reread=macs * s.item,
           slots=2 * macs, blocks=blocks),
        copy("heads together", s.out, item=s.item),
    )  # fmt: skip


def _reference(p: Problem) -> tuple[Op, ...]:
    """The oracle: `gather` without any of its care for memory."""
    return tuple(dataclasses.replace(op, launches=op.launches + 1) for op in _gather(p))


ATTENTION: dict[str, Callable[[Problem], tuple[Op, ...]]] = {
    "reference": _reference,
    "sparse": _sparse,
    "gather": _gather,
    "gather-sdpa": _gather_sdpa,
    "dense": _dense,
    "flex": _flex,
    "triton": _triton,
}


def full_attention_ops(p: Problem, *, composed: bool) -> tuple[Op, ...]:
    """Every token attends to every token: with the scores written out, or in one kernel."""
    s = _sizes(p)
    layout = tuple(copy(f"heads of {n}", b, cold=True, item=s.item) for n, b in _heads_of(s))
    last = copy("heads together", s.out, item=s.item)
    if not composed:
        queries, keys = p.padded[0] * p.padded[1], p.kv_padded[0] * p.kv_padded[1]
        return (*layout, _fused(p, s, read=s.q + s.kv, reread=0.0, keys=keys, rows=queries), last)
    qk, pv = _region_products(p, s)
    return (*layout, elementwise("scale q", s.q, s.q, item=s.item), qk, _softmax(s), pv, last)


def attention_ops(p: Problem, backend: str) -> tuple[Op, ...]:
    """The kernels of one attention call; raises KeyError for a backend that is not counted here."""
    return ATTENTION[backend](p)
