"""Tiles: attention within tiles of a map: windows, grids of distant tokens, stripes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.kernels.mixers.mixer import Place, join_heads, split_heads
from bratune.problem import ceil_div

__all__ = ["RelativeBias", "from_grid", "from_windows", "pad_to", "to_grid", "to_windows"]


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """``[B, H, W, C]`` with zeros below and on the right until both sides are multiples."""
    bottom, right = -x.shape[1] % height, -x.shape[2] % width
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def to_windows(x: Tensor, height: int, width: int) -> Tensor:
    """Windows of neighbouring tokens: ``[B, H, W, C]`` to ``[B, H / h * W / w, h * w, C]``."""
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows // height, height, columns // width, width, channels)
    return x.transpose(2, 3).reshape(batch, -1, height * width, channels)


def from_windows(x: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """The inverse of `to_windows`, for a map of ``rows x columns`` tokens."""
    batch, _, _, channels = x.shape
    x = x.reshape(batch, rows // height, columns // width, height, width, channels)
    return x.transpose(2, 3).reshape(batch, rows, columns, channels)


def to_grid(x: Tensor, height: int, width: int) -> Tensor:
    """Tiles of ``height x width`` tokens that lie evenly over the map, as far apart as there are tiles."""
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, height, rows // height, width, columns // width, channels)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, height * width, channels)


def from_grid(x: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """The inverse of `to_grid`, for a map of ``rows x columns`` tokens."""
    batch, _, _, channels = x.shape
    x = x.reshape(batch, rows // height, columns // width, height, width, channels)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, rows, columns, channels)


class RelativeBias(nn.Module):
    """A learned bias for every offset between two tokens of a window, per head.

    Args:
        height: Rows of the window.
        width: Columns of the window.
        heads: Heads.

    Source: Swin Transformer, arXiv 2103.14030, equation 4.
    """

    index: Tensor

    def __init__(self, height: int, width: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        y = torch.arange(height).repeat_interleave(width)
        x = torch.arange(width).repeat(height)
        dy = y[:, None] - y[None, :] + height - 1
        dx = x[:, None] - x[None, :] + width - 1
        self.register_buffer("index", dy * (2 * width - 1) + dx, persistent=False)

    def forward(self) -> Tensor:
        """``[heads, h * w, h * w]``, added to the logits."""
        return self.table[self.index].permute(2, 0, 1).contiguous()


class Projected(nn.Module):
    """Queries, keys and values from one projection, and a projection of what was attended to."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., N, C]`` to queries, keys and values, ``[..., heads, N, d]`` each."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of every tile with itself, ``[..., heads, N, d]`` to ``[..., N, heads * d]``.

    Args:
        q: Queries, ``[..., heads, N, d]``.
        k: Keys, ``[..., heads, M, d]``.
        v: Values, as ``k``.
        bias: Added to the logits, of a shape that fits ``[..., heads, N, M]``.
    """
    lead = q.shape[:-3]
    q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    if bias is not None:
        bias = bias.to(q.dtype)
        if bias.ndim > 3:  # of every tile another
            bias = bias.expand(*lead, *bias.shape[-3:]).flatten(0, -4)
    out = join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    return out.reshape(*lead, *out.shape[-2:])


def projection_macs(place: Place, *, qkv: int = 3, out: int = 1) -> int:
    """Multiply-adds of projections of every token: ``qkv`` and ``out`` maps of all channels."""
    return (qkv + out) * place.tokens * place.dim**2


def tile_macs(place: Place, height: int, width: int) -> int:
    """Multiply-adds of both products of attention within tiles, padding included."""
    tokens = ceil_div(place.height, height) * ceil_div(place.width, width) * (height * width)
    return 2 * tokens * height * width * place.dim
