"""Convolutions and norms on NHWC maps.

Inside the models a map is ``[B, H, W, C]`` and contiguous, which torch calls ``channels_last`` when it is
viewed as ``[B, C, H, W]``. Both views are free, so that nothing is copied between convolutions, norms,
projections and attention.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bratune.errors import ProblemError
from bratune.kernels.depthwise import depthwise as convolve
from bratune.kernels.plain import is_plain

__all__ = [
    "LayerNorm2d",
    "conv_nhwc",
    "depthwise",
    "is_1x1",
    "keeps_size",
    "linear_1x1",
    "to_nchw",
    "to_nhwc",
]


def to_nhwc(x: Tensor) -> Tensor:
    """The same numbers, ``[B, C, H, W]`` seen as ``[B, H, W, C]``; copies nothing."""
    return x.permute(0, 2, 3, 1)


def to_nchw(x: Tensor) -> Tensor:
    """The same numbers, ``[B, H, W, C]`` seen as ``[B, C, H, W]``; copies nothing."""
    return x.permute(0, 3, 1, 2)


def conv_nhwc(conv: nn.Module, x: Tensor, *, add: Tensor | None = None) -> Tensor:
    """Apply a 2-d convolution (or any NCHW module) to an NHWC map.

    A depthwise convolution that keeps the map's size is computed as `bratune.kernels.depthwise` chooses,
    unless something could notice that it is not called (`bratune.kernels.plain`).

    Args:
        conv: The module.
        x: ``[B, H, W, C]``.
        add: A map that the result is added to.
    """
    if keeps_size(conv):
        return convolve(x, conv.weight, conv.bias, add=add)  # type: ignore[arg-type]
    y = to_nhwc(conv(to_nchw(x)))
    return y if add is None else add + y


def keeps_size(conv: nn.Module) -> bool:
    """Whether a module is a plain depthwise convolution of stride 1 with zeros all around the map."""
    return (
        is_plain(conv, nn.Conv2d)
        and isinstance(conv, nn.Conv2d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.padding_mode == "zeros"
    )


def linear_1x1(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to an NHWC map as the matrix product that it is; any other module is called."""
    if not is_1x1(conv):
        return to_nhwc(conv(to_nchw(x)))
    assert isinstance(conv, nn.Conv2d)
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def is_1x1(conv: nn.Module) -> bool:
    """Whether a module is a plain convolution of single tokens."""
    return (
        is_plain(conv, nn.Conv2d)
        and isinstance(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
    )


def depthwise(dim: int, side: int) -> nn.Conv2d | None:
    """A depthwise convolution that keeps the map's size; None for side 0.

    Raises:
        ProblemError: the side is even or negative: the convolution would change the map's size.
    """
    if side == 0:
        return None
    if side < 0 or side % 2 == 0:
        raise ProblemError(f"the depthwise convolution must have an odd side, or 0 for none, not {side}")
    return nn.Conv2d(dim, dim, kernel_size=side, padding=side // 2, groups=dim)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an NCHW map, eps 1e-6."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        return to_nchw(super().forward(to_nhwc(x)))
