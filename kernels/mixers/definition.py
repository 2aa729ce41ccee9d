"""What a mixer computes, from its definition: full attention under a mask, for some tokens of a map.

A mixer's own module finds its keys by cutting, rolling and joining tiles. Here every chosen token looks at
all keys, and a rule says which of them it sees. That costs its number of keys per token, so that some tokens
of a large map are checked in moments, on the very map that the module ran on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bratune.kernels.mixers.mixer import join_heads, split_heads
from bratune.kernels.mixers.tiles import RelativeBias, pad_to

__all__ = ["Definition", "attend_at", "bilinear", "grid_of", "of_table", "under_mask"]

# Rows and columns of queries ``[M, 1]`` and of keys ``[1, N]``, to what is known of each pair ``[M, N]``.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Definition(nn.Module):
    """A copy of a mixer's weights in float64, and what its definition makes of them.

    Args:
        mixer: The module of a mixer.
        compute: Takes such a module, a map ``[B, H, W, C]`` and places of tokens ``[M]``, row by row, and
            returns ``[B, M, C]``.
    """

    def __init__(self, mixer: nn.Module, compute: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mixer = copy.deepcopy(mixer).double()
        self.compute = compute

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """``[B, H, W, C]`` and places ``[M]`` to ``[B, M, C]`` in float64."""
        return self.compute(self.mixer, x.double(), at)


def attend_at(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, bias: Any = 0.0) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v`` where ``seen`` allows it, its scores written out.

    Args:
        q: ``[..., M, d]``.
        k: ``[..., N, d]``.
        v: ``[..., N, e]``.
        seen: ``[M, N]``, which query sees which key; by default everything.
        bias: Added to the scores.
    """
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    out: Tensor = logits.softmax(dim=-1) @ v
    return out


def grid_of(at: Tensor, width: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns of tokens at some places of a map, ``[M, 1]``, and of all its tokens, ``[1, N]``.

    The map of the keys may be larger than that of the queries: it is padded below and on the right.
    """
    key = torch.arange(rows * columns, device=at.device)[None]
    return (at // width)[:, None], (at % width)[:, None], key // columns, key % columns


def under_mask(
    module: Any, x: Tensor, at: Tensor, rule: Rule, bias: Rule | None = None, pad: int = 1
) -> Tensor:
    """What a module with one projection computes at some tokens.

    Args:
        module: A `bratune.kernels.mixers.tiles.Projected`.
        x: ``[B, H, W, C]``.
        at: ``[M]``.
        rule: Which query sees which key.
        bias: Added to the scores, ``[M, N, heads]``.
        pad: The map is padded with zeros to a multiple of this.
    """
    width = x.shape[2]
    x = pad_to(x, pad, pad)
    pairs = grid_of(at, width, x.shape[1], x.shape[2])
    q, k, v = (split_heads(t, module.heads) for t in module.qkv(x.flatten(1, 2)).chunk(3, dim=-1))
    own = (pairs[0] * x.shape[2] + pairs[1])[:, 0]
    added = 0.0 if bias is None else bias(*pairs).permute(2, 0, 1)
    out: Tensor = module.proj(join_heads(attend_at(q[..., own, :], k, v, rule(*pairs), added)))
    return out


def of_table(bias: RelativeBias, side: int, apart: tuple[int, int] = (1, 1)) -> Rule:
    """The learned bias of an offset within a window; of one that no window has, any.

    Args:
        bias: Of a window of ``side x side`` tokens.
        side: See ``bias``.
        apart: How far two neighbours in a window are from each other on the map.
    """
    wide = 2 * side - 1

    def rule(y: Tensor, x: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
        dy, dx = (y - ky) // apart[0] + side - 1, (x - kx) // apart[1] + side - 1
        return bias.table[dy % wide * wide + dx % wide]

    return rule


def bilinear(maps: Tensor, points: Tensor) -> Tensor:
    """Maps read between their tokens: ``[B, C, H, W]`` at ``[B, ..., 2]`` to ``[B, C, ...]``.

    Points are x before y; -1 and 1 are the middles of the outer tokens. Beyond the map there are zeros.
    """
    height, width = maps.shape[-2:]
    flat = points.flatten(1, -2)
    x, y = ((flat[..., i] + 1) / 2 * (n - 1) for i, n in ((0, width), (1, height)))
    found = maps.new_zeros(maps.shape[0], maps.shape[1], flat.shape[1])
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = y.floor() + dy, x.floor() + dx
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            read = maps.flatten(2).gather(2, place[:, None].expand(-1, maps.shape[1], -1))
            found = found + read * (weight * inside)[:, None]
    return found.reshape(*maps.shape[:2], *points.shape[1:-1])
