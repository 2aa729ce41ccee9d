"""Attention to fewer keys: spatial reduction (PVT), and Twins' turns of windows and sub-sampled keys."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bratune.kernels.mixers.definition import Definition, attend_at, under_mask
from bratune.kernels.mixers.mixer import Mixer, Place, join_heads, split_heads
from bratune.kernels.mixers.tiles import (
    Projected,
    attended,
    from_windows,
    pad_to,
    projection_macs,
    tile_macs,
    to_windows,
)
from bratune.kernels.nhwc import conv_nhwc
from bratune.problem import ceil_div

__all__ = ["REDUCED", "SEPARABLE", "LocalAttention", "ReducedAttention"]

SIDE = 7
# How many tokens per side one key stands for, by stage: PVT, Twins and their successors.
STRIDES = (8, 4, 2, 1)


class ReducedAttention(nn.Module):
    """Every token attends to a map that a strided convolution has made smaller.

    Args:
        dim: Channels.
        heads: Heads.
        stride: Tokens per side that one key stands for; 1 attends to every token.

    Source: Wang et al., Pyramid Vision Transformer, ICCV 2021, arXiv 2102.12122; the same operation is the
    global sub-sampled attention of Chu et al., Twins, NeurIPS 2021, arXiv 2104.13840.
    """

    def __init__(self, dim: int, heads: int, stride: int) -> None:
        super().__init__()
        self.heads, self.stride = heads, stride
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr: nn.Module | None = None
        self.norm: nn.Module | None = None
        if stride > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=stride, stride=stride)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        batch, height, width, dim = x.shape
        small = x
        if self.sr is not None and self.norm is not None:
            small = self.norm(conv_nhwc(self.sr, x))
        q = split_heads(self.q(x).reshape(batch, height * width, dim), self.heads)
        k, v = self.kv(small).reshape(batch, -1, 2 * dim).chunk(2, dim=-1)
        k, v = split_heads(k, self.heads), split_heads(v, self.heads)
        out = join_heads(F.scaled_dot_product_attention(q, k, v))
        return self.proj(out).reshape(batch, height, width, dim)  # type: ignore[no-any-return]


class LocalAttention(Projected):
    """Attention within windows, without a bias: the local half of Twins.

    A map that the window does not divide is padded with zeros, which are attended to; the published code
    masks them.

    Args:
        dim: Channels.
        heads: Heads.
        side: Tokens per side of a window.

    Source: Chu et al., Twins, NeurIPS 2021, arXiv 2104.13840.
    """

    def __init__(self, dim: int, heads: int, side: int = SIDE) -> None:
        super().__init__(dim, heads)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        height, width = x.shape[1], x.shape[2]
        x = pad_to(x, self.side, self.side)
        q, k, v = self.split(to_windows(x, self.side, self.side))
        out = from_windows(self.proj(attended(q, k, v)), self.side, self.side, x.shape[1], x.shape[2])
        return out[:, :height, :width]


def stride_at(place: Place) -> int:
    """How many tokens per side one key stands for in a stage."""
    return STRIDES[place.stage - 1]


def _too_small(place: Place) -> tuple[str, ...]:
    stride = stride_at(place)
    if min(place.height, place.width) >= stride:
        return ()
    return (f"its keys stand for {stride}x{stride} tokens, and the map has {place.height}x{place.width}",)


def _reduced_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    """Keys are products of whole patches with the convolution's weights."""
    small, stride, dim = x, module.stride, x.shape[-1]
    if module.sr is not None:
        rows, columns = (n // stride for n in x.shape[1:3])
        cut = x[:, : rows * stride, : columns * stride]
        patches = cut.reshape(len(x), rows, stride, columns, stride, dim).permute(0, 1, 3, 5, 2, 4)
        small = patches.reshape(len(x), rows, columns, -1) @ module.sr.weight.flatten(1).T + module.sr.bias
        small = module.norm(small)
    k, v = (split_heads(t, module.heads) for t in module.kv(small.flatten(1, 2)).chunk(2, dim=-1))
    q = split_heads(module.q(x.flatten(1, 2)[:, at]), module.heads)
    out: Tensor = module.proj(join_heads(attend_at(q, k, v)))
    return out


def _local_at(module: Any, x: Tensor, at: Tensor) -> Tensor:
    side = module.side

    def near(y: Tensor, x: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
        rows, columns = y // side == ky // side, x // side == kx // side
        both: Tensor = rows & columns
        return both

    return under_mask(module, x, at, near, pad=side)


def _define(module: nn.Module) -> Definition:
    return Definition(module, _local_at if isinstance(module, LocalAttention) else _reduced_at)


def _reduced_macs(place: Place) -> int:
    stride = stride_at(place)
    keys = (place.height // stride) * (place.width // stride)
    made = keys * place.dim**2 * (2 + (stride**2 if stride > 1 else 0))
    return projection_macs(place, qkv=1) + made + 2 * place.tokens * keys * place.dim


def _reduced_maps(place: Place) -> int:
    stride = stride_at(place)
    keys = (place.height // stride) * (place.width // stride)
    return 3 * place.tokens * place.dim + 4 * keys * place.dim + place.tokens * keys * place.heads


def _local_macs(place: Place) -> int:
    padded = place.at(ceil_div(place.height, SIDE) * SIDE, ceil_div(place.width, SIDE) * SIDE)
    return projection_macs(padded) + tile_macs(place, SIDE, SIDE)


def _local_maps(place: Place) -> int:
    tokens = ceil_div(place.height, SIDE) * ceil_div(place.width, SIDE) * SIDE**2
    return tokens * (6 * place.dim + place.heads * SIDE**2)


def _is_local(place: Place) -> bool:
    return place.block % 2 == 0


REDUCED = Mixer(
    name="spatial-reduction",
    paper="Wang et al., Pyramid Vision Transformer, ICCV 2021, arXiv 2102.12122",
    order="N^2 / r^2",
    build=lambda place: ReducedAttention(place.dim, place.heads, stride_at(place)),
    define=_define,
    count=_reduced_macs,
    maps=_reduced_maps,
    refuse=_too_small,
)
SEPARABLE = Mixer(
    name="spatially-separable",
    paper="Chu et al., Twins: Revisiting the Design of Spatial Attention, NeurIPS 2021, arXiv 2104.13840",
    order="N and N^2 / r^2 in turn",
    build=lambda place: (
        LocalAttention(place.dim, place.heads)
        if _is_local(place)
        else ReducedAttention(place.dim, place.heads, stride_at(place))
    ),
    define=_define,
    count=lambda place: _local_macs(place) if _is_local(place) else _reduced_macs(place),
    maps=lambda place: _local_maps(place) if _is_local(place) else _reduced_maps(place),
    refuse=lambda place: () if _is_local(place) else _too_small(place),
)
