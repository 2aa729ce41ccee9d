"""Maps and regions: the only place where tokens change their order.

A *map* is ``[B, H, W, C]``, as a network has it; its channels are head-major, head ``h`` owns
``[h * D, (h + 1) * D)``. *Regions* are ``[B, R, T, C]``: the ``R`` regions of the padded map row by row and
in each its ``T = rh * rw`` tokens row by row. *Head regions* are ``[B, heads, R, T, D]``.

A map that regions do not tile is padded with zeros at the bottom and on the right. The grid of regions is
the smallest that covers the map, so every region holds at least one real token.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, arange, device

from bratune.kernels.constants import kept
from bratune.problem import ceil_div

__all__ = [
    "batch_to_choose_by",
    "checked_routes",
    "comparable",
    "crop_tokens",
    "flat_routes",
    "from_head_regions",
    "from_regions",
    "pad_to_regions",
    "settled",
    "sides",
    "spread",
    "tiles",
    "to_head_regions",
    "to_regions",
    "token_ids",
    "token_regions",
    "valid_tokens",
]


def sides(x: Tensor) -> tuple[int, int]:
    """Height and width of a map ``[B, H, W, C]`` as plain integers.

    A graph that is recorded settles on them: regions are counted in tokens. The batch, the first axis, stays
    what it is, a symbol where it is one.
    """
    height, width = settled(x.shape[1:3])
    return height, width


def settled(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as plain integers: what a graph knows by a symbol becomes one of its constants."""
    if torch.compiler.is_compiling():
        return tuple(operator.index(size) for size in sizes)
    return comparable(sizes)


def batch_to_choose_by(batch: int) -> int:
    """A batch as a plain number: 1 where a graph leaves it open, and where there is no image."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return max(1, operator.index(batch)) if has_static_value(batch) else 1
    return max(1, comparable((batch,))[0])


def comparable(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes to ask questions about, symbols where they are.

    `torch.jit.trace` hands out tensors in their place, and warns of every number that it does not follow.
    """
    if not any(isinstance(size, Tensor) for size in sizes):
        return tuple(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(operator.index(size) for size in sizes)


def tiles(x: Tensor, region: tuple[int, int]) -> Tensor:
    """A map as a view ``[B, rows, rh, cols, rw, C]``, padded where regions do not tile it."""
    height, width = sides(x)
    rh, rw = region
    rows, cols = ceil_div(height, rh), ceil_div(width, rw)
    return pad_to_regions(x, region).view(x.shape[0], rows, rh, cols, rw, x.shape[3])


def to_regions(x: Tensor, region: tuple[int, int]) -> Tensor:
    """A map ``[B, H, W, C]`` as regions ``[B, R, T, C]``.

    Args:
        x: The map, any strides.
        region: Tokens of a region from top to bottom and from left to right.
    """
    split = tiles(x, region)
    batch, rows, rh, cols, rw, channels = split.shape
    return split.transpose(2, 3).reshape(batch, rows * cols, rh * rw, channels)


def from_regions(x: Tensor, height: int, width: int, region: tuple[int, int]) -> Tensor:
    """The inverse of `to_regions`: the map ``[B, height, width, C]``, padding cut off.

    ``[B * R, T, C]`` is as good as ``[B, R, T, C]``.
    """
    rh, rw = region
    rows, cols, channels = ceil_div(height, rh), ceil_div(width, rw), x.shape[-1]
    split = x.reshape(-1, rows, cols, rh, rw, channels)
    return crop_tokens(split.transpose(2, 3).reshape(-1, rows * rh, cols * rw, channels), height, width)


def to_head_regions(x: Tensor, region: tuple[int, int], heads: int) -> Tensor:
    """A map ``[B, H, W, heads * D]`` as head regions ``[B, heads, R, T, D]``."""
    split = tiles(x, region)
    batch, rows, rh, cols, rw, channels = split.shape
    split = split.view(batch, rows, rh, cols, rw, heads, channels // heads)
    return split.permute(0, 5, 1, 3, 2, 4, 6).reshape(batch, heads, rows * cols, rh * rw, channels // heads)


def from_head_regions(x: Tensor, height: int, width: int, region: tuple[int, int]) -> Tensor:
    """The inverse of `to_head_regions`: the map ``[B, height, width, heads * D]``, padding cut off."""
    batch, heads, _, _, channels = x.shape
    rh, rw = region
    rows, cols = ceil_div(height, rh), ceil_div(width, rw)
    split = x.view(batch, heads, rows, cols, rh, rw, channels)
    padded = split.permute(0, 2, 4, 3, 5, 1, 6).reshape(batch, rows * rh, cols * rw, heads * channels)
    return crop_tokens(padded, height, width)


def crop_tokens(x: Tensor, height: int, width: int) -> Tensor:
    """The top left ``height x width`` tokens of a map ``[B, H, W, C]``; the map itself where it fits."""
    if sides(x) == (height, width):
        return x
    return x[:, :height, :width]


def pad_to_regions(x: Tensor, region: tuple[int, int]) -> Tensor:
    """A map ``[B, H, W, C]`` with zeros at the bottom and on the right, so that regions tile it."""
    bottom, right = (-side % tokens for side, tokens in zip(sides(x), region, strict=True))
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


@kept
def token_ids(height: int, width: int, region: tuple[int, int], where: device) -> Tensor:
    """Where the tokens of every region are in the flattened padded map, ``[R, T]`` of int64."""
    padded = ceil_div(height, region[0]) * region[0], ceil_div(width, region[1]) * region[1]
    ids = arange(padded[0] * padded[1], device=where)
    return to_regions(ids.view(1, *padded, 1), region)[0, :, :, 0]


@kept
def token_regions(height: int, width: int, region: tuple[int, int], where: device) -> Tensor:
    """The region that every token of a map is in, ``[height * width]`` of int64, row by row."""
    regions = ceil_div(height, region[0]) * ceil_div(width, region[1])
    return spread(arange(regions, device=where), height, width, region)


def spread(x: Tensor, height: int, width: int, region: tuple[int, int]) -> Tensor:
    """A number per region ``[..., R]`` given to each of its tokens, ``[..., height * width]`` row by row.

    With regions of 1x2 on a 1x3 map, ``[5, 7]`` becomes ``[5, 5, 7]``.
    """
    rh, rw = region
    rows, cols, lead = ceil_div(height, rh), ceil_div(width, rw), x.shape[:-1]
    tokens = x.view(*lead, rows, 1, cols, 1).expand(*lead, rows, rh, cols, rw)
    tokens = tokens.reshape(*lead, rows * rh, cols * rw)
    return tokens[..., :height, :width].flatten(-2)


def flat_routes(routes: Tensor, kv_regions: int) -> Tensor:
    """Routes as indices of the regions of all images (and heads) in one row.

    Args:
        routes: ``[B, R, topk]`` or ``[B, heads, R, topk]``, int32 or int64.
        kv_regions: Key regions of one image.

    Returns:
        int64 of the same shape: in image ``b`` (and head ``h``), region ``i`` becomes
        ``b * kv_regions + i`` (``(b * heads + h) * kv_regions + i``).
    """
    groups = routes.shape[:-2]
    first = arange(math.prod(groups), device=routes.device) * kv_regions
    return routes + first.view(*groups, 1, 1)


def checked_routes(routes: Tensor, kv_regions: int) -> Tensor:
    """The same routes as int64, by an operation that fails where one is out of range, in a graph too."""
    known = arange(kv_regions, device=routes.device)
    return known.index_select(0, routes.flatten()).view(routes.shape)


def valid_tokens(height: int, width: int, region: tuple[int, int], where: device) -> Tensor:
    """Which tokens of the regions of a map are real and which are padding, ``[R, T]`` of bool."""
    rh, rw = region
    rows = arange(ceil_div(height, rh) * rh, device=where) < height
    cols = arange(ceil_div(width, rw) * rw, device=where) < width
    real = rows[:, None] & cols[None, :]
    return to_regions(real[None, :, :, None], region)[0, :, :, 0]
