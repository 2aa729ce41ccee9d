"""yolo block: importing this module makes ``BRABlock`` known to Ultralytics' model files.

Where Ultralytics is not installed it has no effect, so that the block can be used without it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bratune.errors import ProblemError
from bratune.kernels.blocks import Block

__all__ = ["BRABlock"]

HEAD_DIM = 32


class BRABlock(nn.Module):
    """One BiFormer block on an NCHW map of any size, for the rows of a YOLO model file.

    Args:
        channels: Of the map; a multiple of 32.
        n_win: Regions per side, S.
        topk: Key regions per query region; -2 is full attention.
        backend: Name of a backend, or ``auto``.
        config: Settings of the backend: a mapping, which is what Ultralytics makes of most texts in a model
            file, or JSON (single quotes will do).

    Raises:
        ProblemError: the channels are no multiple of 32.
    """

    def __init__(
        self,
        channels: int,
        n_win: int = 8,
        topk: int = 4,
        backend: str = "auto",
        config: Mapping[str, Any] | str = "{}",
    ) -> None:
        super().__init__()
        if channels % HEAD_DIM:
            raise ProblemError(f"BRABlock needs a multiple of {HEAD_DIM} channels, not {channels}")
        settings = json.loads(config.replace("'", '"')) if isinstance(config, str) else dict(config)
        self.block = Block(
            dim=channels,
            num_heads=channels // HEAD_DIM,
            n_win=n_win,
            topk=topk,
            kv_downsample_mode="identity",
            mlp_ratio=3,
            side_dwconv=5,
            auto_pad=True,
            backend=backend,
            config=settings or None,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to the same shape."""
        out: torch.Tensor = self.block(x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


if importlib.util.find_spec("ultralytics") is not None:
    from ultralytics.nn import tasks

    tasks.BRABlock = BRABlock
