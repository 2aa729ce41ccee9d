"""PyTorch's FlexAttention with a block mask made from the routes: the backend ``flex``."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import types
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bratune.backend import Config
from bratune.kernels import layout, routing
from bratune.machine import Machine
from bratune.problem import Problem, ceil_div

__all__ = ["FlexBackend"]

# Who asks for ``compiled: False`` knows, and where nothing can be compiled `configs` says so.
warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")

# The compiled kernels work on blocks of tokens; a block of fewer than 16 cannot use matrix units.
_BLOCKS = (16, 32, 64, 128)
_COMPILED_DTYPES = ("float16", "bfloat16", "float32")
_COMPILED_MIN_HEAD_DIM = 16  # on CUDA
# Uncompiled FlexAttention writes out all scores, about this many copies of them.
_EAGER_COPIES = 4
_EAGER_SHARE = 0.25


class FlexBackend:
    """FlexAttention over tokens in region order; blocks of keys that no route touches are skipped.

    A score gets the logarithm of how often its key region is routed: minus infinity outside the routes,
    so that regions and blocks need not be of one size, and duplicates count with multiplicity.

    Settings: ``compiled``, through `torch.compile`, once per problem and setting, which takes seconds to a
    minute; else FlexAttention runs uncompiled, right for any problem and slow, because it computes every
    score. ``block`` is the number of tokens in a block of the mask.
    """

    name = "flex"

    def why_not(self, problem: Problem, machine: Machine) -> tuple[str, ...]:
        """No gradients on a CPU; all scores in memory where it cannot be compiled."""
        reasons = []
        if problem.backward and not machine.is_cuda:
            reasons.append("FlexAttention has no backward pass on a CPU; the direction fwd would work")
        if _why_not_compiled(problem, machine.kind, here=machine.device != "absent"):
            room = machine.memory_gib * _EAGER_SHARE
            needed = _EAGER_COPIES * _all_scores(problem) * problem.item_bytes / 2**30
            if room and needed > room:
                why = "; ".join(_why_not_compiled(problem, machine.kind, here=machine.device != "absent"))
                reasons.append(
                    f"uncompiled FlexAttention would write {needed:.1f} GiB of scores and at most "
                    f"{room:.1f} GiB, {_EAGER_SHARE:.0%} of this device, are allowed; "
                    f"it is not compiled because of {why}"
                )
        return tuple(reasons)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        problem: Problem,
        config: Config | None = None,
    ) -> Tensor:
        """Attend from every query region to its routed key regions; see `bratune.backend.Backend`."""
        settings: Config = config or {}
        heads, block = problem.heads, int(settings.get("block", _default_block(problem)))
        queries = layout.to_head_regions(q, problem.region, heads).flatten(2, 3)  # [B, heads, R * T, D]
        keys = layout.to_head_regions(k, problem.kv_region, heads).flatten(2, 3)
        values = layout.to_head_regions(v, problem.kv_region, heads).flatten(2, 3)
        bias = routing.multiplicity_bias(routes, problem, q.dtype)  # [B, 1 or heads, R, Rk]
        real = None
        if problem.padding == "masked":
            real = layout.valid_tokens(
                problem.kv_height, problem.kv_width, problem.kv_region, q.device
            ).flatten()
        counts, columns = _key_blocks(bias, problem, block)
        attend = _attend
        compiled = settings.get("compiled", not _why_not_compiled(problem, q.device.type))
        if compiled and not torch.compiler.is_compiling():
            attend = _compiled(problem, block, str(q.device))
        attended = attend(queries, keys, values, bias, real, counts, columns, problem, block)
        split = attended.reshape(q.shape[0], heads, problem.regions, problem.region_tokens, -1)
        return layout.from_head_regions(split, problem.height, problem.width, problem.region)

    def configs(self, problem: Problem, machine: Machine) -> tuple[Config, ...]:
        """Compiled with the block nearest to a region, with the other blocks, and uncompiled."""
        best = _default_block(problem)
        eager: Config = {"compiled": False, "block": best}
        if _why_not_compiled(problem, machine.kind, here=machine.device != "absent"):
            return (eager,)
        blocks = (best, *(block for block in _BLOCKS if block != best))
        return (*({"compiled": True, "block": block} for block in blocks), eager)

    def workspace_bytes(self, problem: Problem) -> int:
        """Maps in regions, routes and lists of blocks; where the dtype cannot be compiled, all scores."""
        groups = problem.batch * (problem.heads if problem.per_head else 1)
        table = groups * problem.regions * problem.kv_regions * problem.item_bytes
        rows, columns = _blocks(problem, _default_block(problem))
        scores = 0 if problem.dtype in _COMPILED_DTYPES else _EAGER_COPIES * _all_scores(problem)
        lists = groups * rows * columns * 16
        return 2 * problem.io_bytes + 3 * table + lists + scores * problem.item_bytes

    def flops(self, problem: Problem) -> int:
        """Two operations per multiply-add in the most blocks that routes of this problem can touch."""
        block = _default_block(problem)
        rows, columns = _blocks(problem, block)
        regions = ceil_div(block - 1, problem.region_tokens) + 1
        touched = regions * problem.topk * (ceil_div(problem.kv_region_tokens - 1, block) + 1)
        if block % problem.region_tokens == 0 and block % problem.kv_region_tokens == 0:
            touched = block // problem.region_tokens * problem.topk
        pairs = problem.batch * rows * min(columns, touched) * block**2
        return 2 * pairs * (problem.channels + problem.v_channels)


def _why_not_compiled(problem: Problem, kind: str, *, here: bool = True) -> tuple[str, ...]:
    """What keeps `torch.compile` from building this; what is installed counts where that is ``here``."""
    reasons = []
    if problem.dtype not in _COMPILED_DTYPES:
        reasons.append(f"dtype {problem.dtype}, compiled are {', '.join(_COMPILED_DTYPES)}")
    smallest = min(problem.head_dim, problem.v_head_dim)
    if kind == "cuda" and smallest < _COMPILED_MIN_HEAD_DIM:
        reasons.append(f"{smallest} channels per head, {_COMPILED_MIN_HEAD_DIM} are needed")
    if here and not _has_compiler(kind):
        reasons.append("triton is not installed" if kind == "cuda" else "no C++ compiler is on the path")
    return tuple(reasons)


@functools.cache
def _has_compiler(kind: str) -> bool:
    if kind == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def _default_block(problem: Problem) -> int:
    """The largest block that fits into a region, 16 where none does."""
    tokens = min(problem.region_tokens, problem.kv_region_tokens)
    return max((block for block in _BLOCKS if block <= tokens), default=_BLOCKS[0])


def _blocks(problem: Problem, block: int) -> tuple[int, int]:
    """Blocks of queries and blocks of keys."""
    queries = problem.regions * problem.region_tokens
    keys = problem.kv_regions * problem.kv_region_tokens
    return ceil_div(queries, block), ceil_div(keys, block)


def _all_scores(problem: Problem) -> int:
    queries = problem.regions * problem.region_tokens
    keys = problem.kv_regions * problem.kv_region_tokens
    return problem.batch * problem.heads * queries * keys


def _cover(regions: int, tokens: int, block: int, like: Tensor) -> Tensor:
    """Which regions every block of tokens holds a part of, ``[blocks, regions]`` of 0 and 1."""
    blocks = ceil_div(regions * tokens, block)
    first = torch.arange(blocks, device=like.device)[:, None] * block
    start = torch.arange(regions, device=like.device)[None, :] * tokens
    return ((start < first + block) & (start + tokens > first)).to(torch.float32)


def _key_blocks(bias: Tensor, problem: Problem, block: int) -> tuple[Tensor, Tensor]:
    """How many and which blocks of keys every block of queries needs, ``[B, h, blocks(, blocks)]`` int32."""
    rows = _cover(problem.regions, problem.region_tokens, block, bias)
    columns = _cover(problem.kv_regions, problem.kv_region_tokens, block, bias)
    needed = rows @ bias.isfinite().to(torch.float32) @ columns.T > 0
    order = torch.sort(needed.to(torch.int32), dim=-1, descending=True, stable=True)[1]
    return needed.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    real: Tensor | None,
    counts: Tensor,
    columns: Tensor,
    problem: Problem,
    block: int,
) -> Tensor:
    tokens, kv_tokens = problem.region_tokens, problem.kv_region_tokens
    # A number among the indices would be read from the device by releases before 2.9.
    bias = bias.expand(-1, problem.heads, -1, -1)

    def routed(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = score + bias[b, h, query // tokens, key // kv_tokens]
        return score if real is None else torch.where(real[key], score, -torch.inf)

    mask = BlockMask.from_kv_blocks(
        counts, columns, BLOCK_SIZE=(block, block), seq_lengths=(q.shape[2], k.shape[2])
    )
    # The tiles of the kernels must divide the blocks of the mask.
    tile = min(block, 64)
    tiles: Any = {f"{axis}{pass_}": tile for axis in ("BLOCK_M", "BLOCK_N") for pass_ in ("", "1", "2")}
    attended = flex_attention(
        q,
        k,
        v,
        score_mod=routed,
        block_mask=mask,
        scale=problem.scale,
        kernel_options=tiles if q.device.type == "cuda" else None,
    )
    assert isinstance(attended, Tensor)
    return attended


@functools.lru_cache(maxsize=256)
def _compiled(problem: Problem, block: int, device: str) -> Callable[..., Tensor]:
    """`_attend`, compiled for one problem."""
    # torch.compile counts recompilations per code object and gives up at eight: every problem gets its own.
    # Its name is the same in every process, so that what one has compiled is found on disk by the next.
    code = _attend.__code__.replace(co_name=f"_attend_{zlib.crc32(repr((problem, block, device)).encode())}")
    own = types.FunctionType(code, _attend.__globals__)
    return torch.compile(own, dynamic=False, fullgraph=True)
