"""Deformable attention: every token attends to points that the map itself chooses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.kernels.mixers.definition import Definition, attend_at, bilinear
from bratune.kernels.mixers.mixer import Mixer, Place, join_heads, split_heads
from bratune.kernels.mixers.reduction import stride_at
from bratune.kernels.mixers.tiles import projection_macs
from bratune.kernels.nhwc import to_nchw, to_nhwc

__all__ = ["DEFORMABLE", "DeformableAttention"]

# Side of the convolution that proposes offsets, by stage; offsets reach this many points far.
SIDES = (9, 7, 5, 3)
REACH = (8, 4, 2, 2)
# Heads that share one set of offsets.
HEADS_PER_GROUP = 3


class DeformableAttention(nn.Module):
    """Attention to a grid of points, each moved by an offset that a small network makes of the queries.

    Keys and values are projections of the map, read at the moved points by bilinear interpolation. A table
    of biases is read in the same way, at the distance from a query to each point.

    Args:
        dim: Channels.
        heads: Heads.
        size: The map that the table of biases is made for; on another map it is interpolated.
        stride: Tokens per side that one point stands for.
        side: Side of the convolution that proposes offsets.
        reach: Most points per side that an offset moves a point.
        groups: Sets of offsets; they divide the heads.

    Source: Xia et al., Vision Transformer with Deformable Attention, CVPR 2022, arXiv 2201.00520.
    """

    def __init__(
        self, dim: int, heads: int, *, size: tuple[int, int], stride: int, side: int, reach: int, groups: int
    ) -> None:
        super().__init__()
        self.heads, self.stride, self.reach, self.groups = heads, stride, reach, groups
        width = dim // groups
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.propose = nn.Conv2d(width, width, side, stride, side // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.offset = nn.Conv2d(width, 2, kernel_size=1, bias=False)
        self.table = nn.Parameter(torch.zeros(heads, 2 * size[0] - 1, 2 * size[1] - 1))
        nn.init.trunc_normal_(self.table, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        batch, height, width, dim = x.shape
        q = self.q(x)
        points = self.points(q)  # [B * groups, h, w, 2], x before y as grid_sample wants it
        grouped = to_nchw(x).reshape(batch * self.groups, dim // self.groups, height, width)
        sampled = F.grid_sample(grouped, points, mode="bilinear", padding_mode="zeros", align_corners=True)
        k, v = self.kv(sampled.reshape(batch, dim, -1).transpose(1, 2)).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(
            split_heads(q.reshape(batch, height * width, dim), self.heads),
            split_heads(k, self.heads),
            split_heads(v, self.heads),
            attn_mask=self._bias(points, batch, height, width).to(q.dtype),
        )
        return self.proj(join_heads(out)).reshape(batch, height, width, dim)  # type: ignore[no-any-return]

    def points(self, q: Tensor) -> Tensor:
        """Where keys are read: ``[B * groups, h, w, 2]`` in -1 to 1, x before y."""
        batch, height, width, dim = q.shape
        grouped = to_nchw(q).reshape(batch * self.groups, dim // self.groups, height, width)
        found = to_nchw(F.gelu(self.norm(to_nhwc(self.propose(grouped)))))
        offset = to_nhwc(self.offset(found)).tanh()
        rows, columns = offset.shape[1], offset.shape[2]
        far = offset.new_tensor([self.reach / max(columns - 1, 1), self.reach / max(rows - 1, 1)])
        y, x = (
            (torch.arange(n, device=q.device, dtype=q.dtype) + 0.5) * (2 / n) - 1 for n in (rows, columns)
        )
        grid = torch.stack((x.expand(rows, columns), y[:, None].expand(rows, columns)), dim=-1)
        return grid + offset * far

    def _bias(self, points: Tensor, batch: int, height: int, width: int) -> Tensor:
        """``[B, heads, H * W, h * w]``: the table, read at the distance from each query to each point."""
        per_group = self.heads // self.groups
        y, x = (
            torch.linspace(-1 if n > 1 else 0, 1, n, device=points.device, dtype=points.dtype)
            for n in (height, width)
        )
        queries = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
        distance = 0.5 * (queries.reshape(1, -1, 1, 2) - points.reshape(len(points), 1, -1, 2))
        tables = self.table.reshape(1, self.groups, per_group, *self.table.shape[1:])
        tables = tables.expand(batch, -1, -1, -1, -1).flatten(0, 1)
        bias = F.grid_sample(tables.to(points.dtype), distance, mode="bilinear", align_corners=True)
        return bias.reshape(batch, self.heads, height * width, -1)


def _deformed_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    """Points as the module proposes them; the map and the table of biases are read between tokens by hand."""
    batch, height, width, dim = x.shape
    groups, heads = module.groups, module.heads
    q = module.q(x)
    points = module.points(q)
    grouped = to_nchw(x).reshape(batch * groups, dim // groups, height, width)
    sampled = bilinear(grouped, points).reshape(batch, dim, -1).transpose(1, 2)
    k, v = (split_heads(t, heads) for t in module.kv(sampled).chunk(2, dim=-1))
    place = torch.stack((at % width, at // width), dim=-1).to(q.dtype)
    far = place.new_tensor([width - 1, height - 1])
    here = torch.where(far > 0, 2 * place / far.clamp(min=1) - 1, 0.0)
    distance = 0.5 * (here[:, None] - points.reshape(batch * groups, 1, -1, 2))
    tables = module.table.unflatten(0, (groups, -1)).repeat(batch, 1, 1, 1)
    bias = bilinear(tables, distance).reshape(batch, heads, len(at), -1)
    out = attend_at(split_heads(q.flatten(1, 2)[:, at], heads), k, v, bias=bias)
    done: Tensor = module.proj(join_heads(out))
    return done


def _groups(place: Place) -> int:
    return max(1, place.heads // HEADS_PER_GROUP) if place.heads % HEADS_PER_GROUP == 0 else 1


def _build(place: Place) -> DeformableAttention:
    return DeformableAttention(
        place.dim,
        place.heads,
        size=(place.height, place.width),
        stride=stride_at(place),
        side=SIDES[place.stage - 1],
        reach=REACH[place.stage - 1],
        groups=_groups(place),
    )


def _points(place: Place) -> int:
    stride, side = stride_at(place), SIDES[place.stage - 1]
    rows, columns = ((n + 2 * (side // 2) - side) // stride + 1 for n in (place.height, place.width))
    return rows * columns


def _macs(place: Place) -> int:
    points = _points(place)
    propose = points * place.dim * SIDES[place.stage - 1] ** 2 + 2 * points * place.dim
    sample = 4 * points * place.dim + 4 * points * place.tokens * place.heads
    attend = 2 * place.tokens * points * place.dim
    return projection_macs(place, qkv=1) + 2 * points * place.dim**2 + propose + sample + attend


DEFORMABLE = Mixer(
    name="deformable",
    paper="Xia et al., Vision Transformer with Deformable Attention, CVPR 2022, arXiv 2201.00520",
    order="N^2 / r^2",
    build=_build,
    define=lambda module: Definition(module, _deformed_at),
    count=_macs,
    maps=lambda place: (
        4 * place.tokens * place.dim
        + _points(place) * (6 * place.dim + place.tokens * (2 * place.heads + 2 * _groups(place)))
    ),
)
