"""Window attention, shifted windows, and MaxViT's turns of windows and grids."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from bratune.kernels.mixers.definition import Definition, of_table, under_mask
from bratune.kernels.mixers.mixer import Mixer, Place
from bratune.kernels.mixers.tiles import (
    Projected,
    RelativeBias,
    attended,
    from_grid,
    from_windows,
    pad_to,
    projection_macs,
    tile_macs,
    to_grid,
    to_windows,
)
from bratune.problem import ceil_div

__all__ = ["GRID", "SHIFTED", "WINDOW", "GridAttention", "WindowAttention"]

SIDE = 7  # of a window, in Swin and MaxViT at 224 pixels


class WindowAttention(Projected):
    """Attention within windows that do not overlap, with a learned bias per offset.

    A map that the window does not divide is padded below and on the right with zeros after the projection's
    input, which are attended to, as the published code does. A shifted window moves the map by ``shift``
    tokens first; tokens that were no neighbours before do not see each other.

    Args:
        dim: Channels.
        heads: Heads.
        side: Tokens per side of a window.
        shift: Tokens that the map is moved by; 0 where a window covers the map.

    Source: Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030.
    """

    def __init__(self, dim: int, heads: int, side: int = SIDE, shift: int = 0) -> None:
        super().__init__(dim, heads)
        self.side, self.shift = side, shift
        self.bias = RelativeBias(side, side, heads)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        height, width, side = x.shape[1], x.shape[2], self.side
        x = pad_to(x, side, side)
        rows, columns = x.shape[1], x.shape[2]
        shift = self.shift if min(rows, columns) > side else 0
        bias = self.bias()
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            bias = bias + self._apart(rows, columns, shift, x)
        q, k, v = self.split(to_windows(x, side, side))
        out = from_windows(self.proj(attended(q, k, v, bias)), side, side, rows, columns)
        if shift:
            out = out.roll((shift, shift), (1, 2))
        return out[:, :height, :width]

    def _apart(self, rows: int, columns: int, shift: int, x: Tensor) -> Tensor:
        """``[windows, 1, h * w, h * w]``: minus infinity between tokens that only rolling made neighbours."""
        place = x.new_zeros(1, rows, columns, 1)
        bands = (slice(-self.side), slice(-self.side, -shift), slice(-shift, None))
        for number, (tall, wide) in enumerate(itertools.product(bands, bands)):
            place[:, tall, wide] = number
        windows = to_windows(place, self.side, self.side)[0, :, :, 0]
        differ = windows[:, :, None] != windows[:, None, :]
        return torch.zeros_like(differ, dtype=x.dtype).masked_fill_(differ, float("-inf"))[:, None]


class GridAttention(Projected):
    """Attention among tokens that lie evenly over the map, a dilated window, with a learned bias per offset.

    Args:
        dim: Channels.
        heads: Heads.
        side: Tokens per side of the grid.

    Source: Tu et al., MaxViT, ECCV 2022, arXiv 2204.01697.
    """

    def __init__(self, dim: int, heads: int, side: int = SIDE) -> None:
        super().__init__(dim, heads)
        self.side = side
        self.bias = RelativeBias(side, side, heads)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        height, width, side = x.shape[1], x.shape[2], self.side
        x = pad_to(x, side, side)
        rows, columns = x.shape[1], x.shape[2]
        q, k, v = self.split(to_grid(x, side, side))
        out = from_grid(self.proj(attended(q, k, v, self.bias())), side, side, rows, columns)
        return out[:, :height, :width]


def _windows_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    """Tokens of one window see each other; windows begin ``shift`` tokens from the edge, cut off there."""
    side = module.side
    shift = module.shift if min(x.shape[1:3]) > side else 0

    def near(y: Tensor, x: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
        rows, columns = (
            (y - shift) // side == (ky - shift) // side,
            (x - shift) // side == (kx - shift) // side,
        )
        both: Tensor = rows & columns
        return both

    return under_mask(module, x, at, near, of_table(module.bias, side), pad=side)


def _grid_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    """Tokens see those that are whole strides away, so many that ``side`` of them span the map."""
    side = module.side
    tall, wide = (-(-n // side) for n in x.shape[1:3])

    def far(y: Tensor, x: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
        rows, columns = y % tall == ky % tall, x % wide == kx % wide
        both: Tensor = rows & columns
        return both

    return under_mask(module, x, at, far, of_table(module.bias, side, (tall, wide)), pad=side)


def _define(module: nn.Module) -> Definition:
    return Definition(module, _grid_at if isinstance(module, GridAttention) else _windows_at)


def _macs(place: Place) -> int:
    padded = place.at(ceil_div(place.height, SIDE) * SIDE, ceil_div(place.width, SIDE) * SIDE)
    return projection_macs(padded) + tile_macs(place, SIDE, SIDE)


def _maps(place: Place) -> int:
    """Queries, keys and values, what was attended to, a copy into tiles, and scores if they are written."""
    tokens = ceil_div(place.height, SIDE) * ceil_div(place.width, SIDE) * SIDE**2
    return tokens * (6 * place.dim + place.heads * SIDE**2)


_SWIN = "Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030"

WINDOW = Mixer(
    name="window",
    paper=_SWIN,
    order="N",
    build=lambda place: WindowAttention(place.dim, place.heads),
    define=_define,
    count=_macs,
    maps=_maps,
)
SHIFTED = Mixer(
    name="shifted-window",
    paper=_SWIN,
    order="N",
    build=lambda place: WindowAttention(place.dim, place.heads, shift=SIDE // 2 * (place.block % 2)),
    define=_define,
    count=_macs,
    maps=_maps,
)
GRID = Mixer(
    name="block-grid",
    paper="Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022, arXiv 2204.01697",
    order="N",
    build=lambda place: (GridAttention if place.block % 2 else WindowAttention)(place.dim, place.heads),
    define=_define,
    count=_macs,
    maps=_maps,
)
