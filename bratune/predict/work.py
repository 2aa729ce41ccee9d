"""Work: what each part of a model reads, writes, multiplies and launches, backend by backend.

A part is a short list of `Op`, one per kernel that PyTorch (or a fused backend) launches for it. Counts are of
what the hardware performs, not of what the formula needs: a region of 4 queries occupies a 16-row matrix tile,
a gathered key is read and written once per copy, a masked product is computed before it is masked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from bratune.problem import Problem, ceil_div

__all__ = ["ATTENTION", "Op", "attention_ops", "backward_ops", "conv_op", "fuse", "routing_ops", "useful_macs"]

# Rows of the smallest tensor-core tile; a matrix with fewer rows is filled up with zeros.
TILE = 16
# Rows that one program of a matrix product or a fused attention computes.
BLOCK_ROWS = 64
# Instructions of the general cores per score of a softmax: subtract, scale, sum, maximum and the
# exponential, which issues at an eighth of their rate.
SOFTMAX_SLOTS = 16
# Instructions per multiply-add of a depthwise convolution written without reuse (load, convert, address).
DEPTHWISE_SLOTS = 5
# Elements that one block of an elementwise kernel handles.
ELEMENTS_PER_BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class Op:
    """One kernel.

    Attributes:
        name: What it does.
        kind: ``copy``, ``pointwise``, ``gather``, ``matmul``, ``fused`` (attention in one kernel), ``conv``,
            ``reduce`` or ``sort``; decides what its backward costs and whether a compiler fuses it.
        read: Distinct bytes read.
        written: Bytes written.
        cold: Bytes of `read` that are inputs of the part, so that nothing has just written them.
        reread: Bytes that are read again and again out of the last-level cache, beyond `read`.
        macs: Multiply-adds on the matrix units, tile padding included.
        slots: Instructions on the general cores, one lane each.
        blocks: Independent blocks, which decide how much of the device is busy.
        launches: Kernels that it really is, where several small ones are counted together.
    """

    name: str
    kind: str
    read: float
    written: float
    cold: float = 0.0
    reread: float = 0.0
    macs: float = 0.0
    slots: float = 0.0
    blocks: float = 1.0
    launches: int = 1

    def scaled(self, name: str, bytes_factor: float, work_factor: float, launches: int) -> Op:
        """The same kernel with more or less of everything, e.g. its backward pass."""
        return dataclasses.replace(
            self,
            name=name,
            read=self.read * bytes_factor,
            written=self.written * bytes_factor,
            reread=self.reread * bytes_factor,
            cold=0.0,
            macs=self.macs * work_factor,
            slots=self.slots * work_factor,
            launches=launches,
        )


def pad_to(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that holds ``value``."""
    return ceil_div(value, multiple) * multiple


def elementwise(name: str, read: float, written: float, *, cold: float = 0.0, item: int = 2, slots: float = 1) -> Op:
    """A kernel that does a little with every element that it writes."""
    elements = max(read, written) / item
    return Op(
        name=name,
        kind="pointwise",
        read=read,
        written=written,
        cold=cold,
        slots=elements * slots,
        blocks=elements / ELEMENTS_PER_BLOCK,
    )


def copy(name: str, moved: float, *, cold: bool = False, item: int = 2) -> Op:
    """A change of layout: everything read once and written once."""
    return Op(
        name=name,
        kind="copy",
        read=moved,
        written=moved,
        cold=moved if cold else 0.0,
        blocks=moved / item / ELEMENTS_PER_BLOCK,
    )


def matmul(
    name: str,
    rows: int,
    inner: int,
    cols: int,
    item: int,
    *,
    batch: int = 1,
    weights: bool = True,
    cold: bool = False,
) -> Op:
    """A matrix product ``[batch, rows, inner] @ [inner, cols]``, filled up to whole tiles.

    Args:
        name: What it computes.
        rows: Rows of the left matrix.
        inner: Summed axis.
        cols: Columns of the right matrix.
        item: Bytes of a number.
        batch: Independent products.
        weights: The right matrix is shared by the batch (a linear layer) and not read from the part's input.
        cold: The left matrix is an input of the part.
    """
    left, right, out = rows * inner * batch, inner * cols * (1 if weights else batch), rows * cols * batch
    tiles = ceil_div(rows, BLOCK_ROWS) * ceil_div(cols, BLOCK_ROWS) * batch
    return Op(
        name=name,
        kind="matmul",
        read=(left + right) * item,
        written=out * item,
        cold=left * item if cold else 0.0,
        macs=batch * pad_to(rows, TILE) * pad_to(inner, TILE) * pad_to(cols, TILE),
        blocks=tiles,
    )


def conv_op(name: str, elements_in: float, elements_out: float, taps: int, item: int, *, depthwise: bool) -> Op:
    """A convolution with ``taps`` multiply-adds per output element."""
    macs = elements_out * taps
    return Op(
        name=name,
        kind="conv",
        read=elements_in * item,
        written=elements_out * item,
        cold=elements_in * item,
        macs=0.0 if depthwise else macs,
        slots=macs * DEPTHWISE_SLOTS if depthwise else 0.0,
        blocks=elements_out / ELEMENTS_PER_BLOCK,
    )


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
    full = p.topk == p.kv_regions
    layout = tuple(copy(f"heads of {n}", b, cold=True, item=s.item) for n, b in _heads_of(s))
    if full:
        kernel = _fused(p, s, read=s.q + s.kv, reread=0.0, keys=keys, rows=queries)
        return (*layout, kernel, copy("heads together", s.out, item=s.item))
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
    """FlexAttention over tokens in region order, in blocks of 128: a small region drags its neighbours along."""
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
        p, s, read=s.q + s.kv, reread=max(0.0, passes * per_pass - s.kv), keys=visited, rows=min(block, queries)
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


def attention_ops(p: Problem, backend: str) -> tuple[Op, ...]:
    """The kernels of one attention call; raises KeyError for a backend that is not counted here."""
    return ATTENTION[backend](p)


# --- whole passes -------------------------------------------------------------------------------------

# Per kind: bytes, matrix and general work of the backward pass relative to the forward, and its launches.
_BACKWARD = {
    "copy": (1.0, 1.0, 1),
    "pointwise": (1.5, 1.5, 1),
    "gather": (2.0, 2.0, 2),  # scatter-add: read, add, write
    "matmul": (2.0, 2.0, 2),  # one product per operand
    "fused": (2.0, 2.5, 3),  # scores again, then both operands
    "conv": (2.0, 2.0, 2),
    "reduce": (1.0, 1.0, 1),
    "sort": (0.0, 0.0, 0),  # no gradient
}


def backward_ops(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """The kernels of the backward pass, last operation first."""
    found = []
    for op in reversed(ops):
        moved, worked, launches = _BACKWARD[op.kind]
        if launches:
            found.append(op.scaled(f"{op.name}, backward", moved, worked, launches * op.launches))
    return tuple(found)


def fuse(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """What a compiler makes of them: runs of elementwise kernels and copies become one kernel each."""
    found: list[Op] = []
    for op in ops:
        if found and op.kind in _FUSABLE and found[-1].kind in _FUSABLE:
            last = found[-1]
            # What the first wrote and the second read stays in registers.
            shared = min(last.written, op.read)
            found[-1] = dataclasses.replace(
                last,
                name=f"{last.name} + {op.name}",
                read=last.read + op.read - shared,
                written=last.written + op.written - shared,
                slots=last.slots + op.slots,
                blocks=max(last.blocks, op.blocks),
                launches=max(last.launches, op.launches),
            )
        else:
            found.append(op)
    return tuple(found)


_FUSABLE = {"copy", "pointwise"}


def useful_macs(p: Problem) -> int:
    """Multiply-adds that the attention of a problem needs, without tile padding; both directions."""
    return p.attention_macs * (3 if p.backward else 1)
