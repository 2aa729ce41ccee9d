"""Pooling of keys and values within each region, the official ``kv_downsample_mode``.

A pooled map has fewer tokens and as many regions: attention sees it as a key map of its own size.
"""

from __future__ import annotations

from torch import Tensor, nn

from bratune.errors import ProblemError, UnknownNameError
from bratune.kernels import layout

__all__ = ["KV_DOWNSAMPLE_MODES", "kv_pool", "pool_regions"]

KV_DOWNSAMPLE_MODES = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")


def kv_pool(mode: str, per_win: int, ratio: int) -> nn.Module:
    """The pooling of keys and values within one region, as an NCHW module."""
    if mode in ("fracpool", "conv"):
        raise ProblemError(
            f"kv_downsample_mode {mode!r} is named by the official code and implemented nowhere; "
            f"these are: {', '.join(KV_DOWNSAMPLE_MODES)}"
        )
    if mode not in KV_DOWNSAMPLE_MODES:
        raise UnknownNameError("kv_downsample_mode", mode, KV_DOWNSAMPLE_MODES)
    if mode.startswith("ada_") and per_win < 1:
        raise ProblemError(f"kv_per_win must be at least 1 with {mode}, not {per_win}")
    if mode == "ada_avgpool":
        return nn.AdaptiveAvgPool2d(per_win)
    if mode == "ada_maxpool":
        return nn.AdaptiveMaxPool2d(per_win)
    if mode == "identity" or ratio <= 1:
        return nn.Identity()
    return nn.AvgPool2d(ratio) if mode == "avgpool" else nn.MaxPool2d(ratio)


def pool_regions(x: Tensor, region: tuple[int, int], pool: nn.Module) -> tuple[Tensor, tuple[int, int]]:
    """A map with every region pooled by itself, and the size of a pooled region."""
    batch = x.shape[0]
    tiled = layout.tiles(x, region)  # [B, rows, rh, cols, rw, C]
    rows, cols, channels = tiled.shape[1], tiled.shape[3], tiled.shape[5]
    kernel = getattr(pool, "kernel_size", 1)
    if kernel > min(region):
        raise ProblemError(
            f"kv_downsample_ratio {kernel} is larger than a region of {region[0]}x{region[1]} tokens; "
            f"1 to {min(region)} would work"
        )
    alone = tiled.permute(0, 1, 3, 5, 2, 4).reshape(batch * rows * cols, channels, *region)
    pooled: Tensor = pool(alone)
    kh, kw = pooled.shape[2:]
    split = pooled.view(batch, rows, cols, channels, kh, kw).permute(0, 1, 4, 2, 5, 3)
    return split.reshape(batch, rows * kh, cols * kw, channels), (kh, kw)
