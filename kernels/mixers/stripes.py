"""Attention along rows and columns: sequential axial, criss-cross, and cross-shaped windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bratune.kernels.mixers.definition import Definition, attend_at, grid_of, under_mask
from bratune.kernels.mixers.mixer import Mixer, Place, join_heads, split_heads
from bratune.kernels.mixers.tiles import (
    Projected,
    attended,
    from_windows,
    pad_to,
    projection_macs,
    to_windows,
)
from bratune.kernels.nhwc import conv_nhwc
from bratune.problem import ceil_div

__all__ = [
    "AXIAL",
    "CRISS_CROSS",
    "CROSS_SHAPED",
    "AxialAttention",
    "CrissCrossAttention",
    "CrossShapedAttention",
]

# Rows (or columns) of a stripe, by stage; the last stage attends to its whole map.
STRIPES = (1, 2, 7, 7)


class AxialAttention(nn.Module):
    """Attention within rows, then within columns, each with a projection of its own.

    Args:
        dim: Channels.
        heads: Heads.

    Source: Ho et al., Axial Attention in Multidimensional Transformers, arXiv 1912.12180.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.rows = Projected(dim, heads)
        self.columns = Projected(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        x = self.rows.proj(attended(*self.rows.split(x)))
        x = x.transpose(1, 2)
        x = self.columns.proj(attended(*self.columns.split(x)))
        return x.transpose(1, 2)


class CrissCrossAttention(Projected):
    """Every token attends to its row and its column in one softmax; to itself once.

    Args:
        dim: Channels.
        heads: Heads.

    Source: Huang et al., CCNet: Criss-Cross Attention, ICCV 2019, arXiv 1811.11721, with the heads of a
    transformer and without the reduced channels of its queries.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        height, width = x.shape[1], x.shape[2]
        q, k, v = self.split(x)  # [B, H, heads, W, d]
        q = q * q.shape[-1] ** -0.5
        across = q @ k.transpose(-1, -2)  # [B, H, heads, W, W']
        # The same, column by column: [B, W, heads, H, d].
        q, k, u = (t.transpose(1, 3) for t in (q, k, v))
        along = q @ k.transpose(-1, -2)  # [B, W, heads, H, H']
        itself = torch.eye(height, dtype=torch.bool, device=x.device)
        along = along.masked_fill(itself, float("-inf")).transpose(1, 3)  # [B, H, heads, W, H']
        weights = torch.cat((across, along), dim=-1).softmax(dim=-1)
        out = weights[..., :width] @ v
        out = out + (weights[..., width:].transpose(1, 3) @ u).transpose(1, 3)
        return self.proj(join_heads(out))  # type: ignore[no-any-return]


class CrossShapedAttention(Projected):
    """Half of the heads attend within stripes of rows, the others within stripes of columns.

    An odd number of heads gives the columns one more. The values' depthwise 3x3 convolution within a
    stripe is added to what was attended to (LePE).

    Args:
        dim: Channels.
        heads: Heads.
        stripe: Rows, or columns, of a stripe; 0 attends to the whole map, with all heads.

    Source: Dong et al., CSWin Transformer, CVPR 2022, arXiv 2107.00652.
    """

    def __init__(self, dim: int, heads: int, stripe: int) -> None:
        super().__init__(dim, heads)
        self.stripe = stripe
        depth = dim // heads
        self.across = depth * (heads // 2) if stripe else dim
        sizes = (self.across, dim - self.across)
        self.lepe = nn.ModuleList(
            nn.Conv2d(size, size, kernel_size=3, padding=1, groups=size) for size in sizes if size
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        height, width, dim = x.shape[1], x.shape[2], x.shape[3]
        if not self.stripe:
            out = self._within(self.qkv(x), self.lepe[0], self.heads, height, width)
        else:
            x = pad_to(x, self.stripe, self.stripe)
            parts = self.qkv(x).unflatten(-1, (3, dim))
            rows, columns = x.shape[1], x.shape[2]
            halves = (
                (parts[..., : self.across], self.stripe, columns),
                (parts[..., self.across :], rows, self.stripe),
            )
            lepe = iter(self.lepe)
            done = []
            for half, tall, wide in halves:
                if half.shape[-1]:
                    heads = half.shape[-1] * self.heads // dim
                    done.append(self._within(half.flatten(-2), next(lepe), heads, tall, wide))
            out = torch.cat(done, dim=-1)
        return self.proj(out[:, :height, :width])  # type: ignore[no-any-return]

    def _within(self, qkv: Tensor, lepe: nn.Module, heads: int, tall: int, wide: int) -> Tensor:
        """Attention within tiles of ``tall x wide`` tokens, ``[B, H, W, 3 * c]`` to ``[B, H, W, c]``."""
        rows, columns = qkv.shape[1], qkv.shape[2]
        q, k, v = to_windows(qkv, tall, wide).chunk(3, dim=-1)
        local = v.reshape(-1, tall, wide, v.shape[-1])
        local = conv_nhwc(lepe, local).reshape(v.shape)
        out = attended(*(split_heads(t, heads) for t in (q, k, v))) + local
        return from_windows(out, tall, wide, rows, columns)


def _axial_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    """The rows' attention for whole columns, then the columns' for the tokens asked for."""
    y, column = at // x.shape[2], at % x.shape[2]
    q, k, v = module.rows.split(x)  # [B, H, heads, W, d]
    across = module.rows.proj(join_heads(attend_at(q[..., column, :], k, v)))  # [B, H, M, C]
    q, k, v = module.columns.split(across.transpose(1, 2))  # [B, M, heads, H, d]
    own = torch.arange(len(at), device=at.device)
    out = attend_at(q[:, own, :, y].unsqueeze(-2).movedim(0, 1), k, v)  # [B, M, heads, 1, d]
    done: Tensor = module.columns.proj(join_heads(out).squeeze(-2))
    return done


def _criss_cross_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    return under_mask(module, x, at, lambda y, x, ky, kx: (y == ky) | (x == kx))


def _cross_shaped_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    """Heads of the first part see their stripe of rows, the others their stripe of columns."""
    stripe, width, dim = module.stripe, x.shape[2], x.shape[3]
    if stripe:
        x = pad_to(x, stripe, stripe)
    rows, columns = x.shape[1:3]
    y, c, ky, kx = grid_of(at, width, rows, columns)
    own = (y * columns + c)[:, 0]
    q, k, v = module.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    done = []
    parts = [(0, module.across), (module.across, dim)]
    for conv, (first, last) in zip(module.lepe, (p for p in parts if p[0] < p[1]), strict=True):
        heads = (last - first) * module.heads // dim
        mine = [split_heads(t[..., first:last], heads) for t in (q, k, v)]
        maps = v[..., first:last].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        seen = None
        if stripe:
            axis = 2 if first == 0 and module.across else 3
            seen = y // stripe == ky // stripe if axis == 2 else c // stripe == kx // stripe
            maps = torch.cat([conv(part) for part in maps.split(stripe, dim=axis)], dim=axis)
        else:
            maps = conv(maps)
        attended_to = join_heads(attend_at(mine[0][..., own, :], mine[1], mine[2], seen))
        done.append(attended_to + maps.flatten(2).transpose(1, 2)[:, own])
    out: Tensor = module.proj(torch.cat(done, dim=-1))
    return out


def _stripe(place: Place) -> int:
    return 0 if place.stage == 4 else STRIPES[place.stage - 1]


def _axial_macs(place: Place) -> int:
    return 2 * projection_macs(place) + 2 * place.tokens * (place.height + place.width) * place.dim


def _criss_macs(place: Place) -> int:
    return projection_macs(place) + 2 * place.tokens * (place.height + place.width) * place.dim


def _cross_macs(place: Place) -> int:
    stripe = _stripe(place)
    local = 9 * place.tokens * place.dim
    if not stripe:
        return projection_macs(place) + local + 2 * place.tokens**2 * place.dim
    height, width = (ceil_div(side, stripe) * stripe for side in (place.height, place.width))
    padded = place.at(height, width)
    across = place.head_dim * (place.heads // 2)
    keys = across * stripe * width + (place.dim - across) * stripe * height
    return (
        projection_macs(padded, out=0)
        + projection_macs(place, qkv=0)
        + (9 * padded.tokens * place.dim + 2 * padded.tokens * keys)
    )


def _cross_maps(place: Place) -> int:
    keys = place.tokens if place.stage == 4 else _stripe(place) * max(place.height, place.width)
    return place.tokens * (8 * place.dim + place.heads * keys)


AXIAL = Mixer(
    name="sequential-axial",
    paper="Ho et al., Axial Attention in Multidimensional Transformers, arXiv 1912.12180",
    order="N^1.5",
    build=lambda place: AxialAttention(place.dim, place.heads),
    define=lambda module: Definition(module, _axial_at),
    count=_axial_macs,
    maps=lambda place: place.tokens * (6 * place.dim + place.heads * max(place.height, place.width)),
)
CRISS_CROSS = Mixer(
    name="criss-cross",
    paper="Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019, arXiv 1811.11721",
    order="N^1.5",
    build=lambda place: CrissCrossAttention(place.dim, place.heads),
    define=lambda module: Definition(module, _criss_cross_at),
    count=_criss_macs,
    maps=lambda place: place.tokens * (8 * place.dim + 5 * place.heads * (place.height + place.width)),
)
CROSS_SHAPED = Mixer(
    name="cross-shaped",
    paper="Dong et al., CSWin Transformer, CVPR 2022, arXiv 2107.00652",
    order="N^1.5",
    build=lambda place: CrossShapedAttention(place.dim, place.heads, _stripe(place)),
    define=lambda module: Definition(module, _cross_shaped_at),
    count=_cross_macs,
    maps=_cross_maps,
)
