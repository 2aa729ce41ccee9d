"""Neighbourhood attention: every token attends to the square of tokens around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bratune.kernels.mixers.definition import Definition, under_mask
from bratune.kernels.mixers.mixer import Mixer, Place
from bratune.kernels.mixers.tiles import Projected, projection_macs

__all__ = ["NEIGHBOURHOOD", "NeighbourhoodAttention"]

SIDE = 7


class NeighbourhoodAttention(Projected):
    """Attention to the ``side x side`` tokens around each token, with a learned bias per offset.

    At a border the square moves inwards, so that every token has as many keys. On a map that is smaller than
    the square, the square is the map. Composed of PyTorch's operations: the neighbours of every token are
    gathered, ``side ** 2`` copies of keys and values.

    Args:
        dim: Channels.
        heads: Heads.
        side: Tokens per side of the square, odd.

    Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143.
    """

    def __init__(self, dim: int, heads: int, side: int = SIDE) -> None:
        super().__init__(dim, heads)
        self.side = side
        self.table = nn.Parameter(torch.zeros(heads, 2 * side - 1, 2 * side - 1))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        batch, height, width, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        rows, columns = _first(height, self.side, x.device), _first(width, self.side, x.device)
        tall, wide = min(self.side, height), min(self.side, width)
        near_k = _near(k, rows, columns, tall, wide)  # [B, H, W, C, h, w]
        near_v = _near(v, rows, columns, tall, wide)
        q = q.reshape(batch, height, width, self.heads, 1, dim // self.heads) * (dim // self.heads) ** -0.5
        shape = (batch, height, width, self.heads, dim // self.heads, tall * wide)
        logits = (q @ near_k.reshape(shape)).squeeze(-2)  # [B, H, W, heads, h * w]
        weights = (logits + self._bias(rows, columns, tall, wide)).softmax(dim=-1)
        out = (near_v.reshape(shape) @ weights.unsqueeze(-1)).reshape(batch, height, width, dim)
        return self.proj(out)  # type: ignore[no-any-return]

    def _bias(self, rows: Tensor, columns: Tensor, tall: int, wide: int) -> Tensor:
        """``[H, W, heads, h * w]``: the bias of the offset from every token to each of its neighbours."""
        here_y = torch.arange(len(rows), device=rows.device)
        here_x = torch.arange(len(columns), device=rows.device)
        dy = (rows - here_y)[:, None] + torch.arange(tall, device=rows.device) + self.side - 1
        dx = (columns - here_x)[:, None] + torch.arange(wide, device=rows.device) + self.side - 1
        bias = self.table[:, dy[:, None, :, None], dx[None, :, None, :]]
        return bias.permute(1, 2, 0, 3, 4).flatten(-2)


def _first(length: int, side: int, device: torch.device) -> Tensor:
    """The first neighbour of every token along one side of the map."""
    return (torch.arange(length, device=device) - side // 2).clamp_(0, max(0, length - side))


def _near(x: Tensor, rows: Tensor, columns: Tensor, tall: int, wide: int) -> Tensor:
    """``[B, H, W, C]`` to ``[B, H, W, C, h, w]``: the neighbours of every token."""
    return x.unfold(1, tall, 1).unfold(2, wide, 1)[:, rows][:, :, columns]


def _neighbours_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    """Every token sees a square around it, moved inwards at a border."""
    side, wide = module.side, 2 * module.side - 1
    height, width = x.shape[1:3]

    def near(y: Tensor, x: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
        seen = torch.ones((), dtype=torch.bool, device=y.device)
        for here, there, n in ((y, ky, height), (x, kx, width)):
            first = (here - side // 2).clamp(min=0).clamp(max=max(0, n - side))
            seen = seen & (first <= there) & (there < first + side)
        return seen

    def bias(y: Tensor, x: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
        offsets = (ky - y + side - 1) % wide, (kx - x + side - 1) % wide
        return module.table[:, offsets[0], offsets[1]].permute(1, 2, 0)  # type: ignore[no-any-return]

    return under_mask(module, x, at, near, bias)


def _keys(place: Place) -> int:
    return min(SIDE, place.height) * min(SIDE, place.width)


NEIGHBOURHOOD = Mixer(
    name="neighbourhood",
    paper="Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143",
    order="N",
    build=lambda place: NeighbourhoodAttention(place.dim, place.heads),
    define=lambda module: Definition(module, _neighbours_at),
    count=lambda place: projection_macs(place) + 2 * place.tokens * _keys(place) * place.dim,
    maps=lambda place: place.tokens * (4 * place.dim + 3 * _keys(place) * (place.dim + place.heads)),
)
