"""Routed attention between two maps: one map's regions look at the regions of another.

No module of the official code does this; networks that paste it do, with keys of a context (an encoder's map,
a coarser scale, another picture). Both maps are cut into the same grid of regions, rows x columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bratune.backend import Config
from bratune.errors import ProblemError
from bratune.kernels import layout
from bratune.kernels.api import route
from bratune.kernels.layer import Attending
from bratune.problem import ceil_div

__all__ = ["CrossBiLevelRoutingAttention"]


class CrossBiLevelRoutingAttention(Attending):
    """Routed attention of a map to a context, NHWC; of a map to itself where there is none.

    The arithmetic is that of `bratune.kernels.layer.BiLevelRoutingAttention` without its depthwise
    convolution, which needs values on the map of the queries.

    Args:
        dim: Channels of the map, of values and of the output.
        context_dim: Channels of the context; by default ``dim``.
        num_heads: Attention heads.
        n_win: Regions of either map: S for S x S, or ``(rows, columns)``.
        qk_dim: Channels of queries and keys; by default ``dim``.
        qk_scale: Factor of the logits; by default ``qk_dim ** -0.5`` (all channels, not a head's).
        topk: Regions of the context per region of the map.
        auto_pad: Pad maps that regions do not tile with zeros at the bottom and on the right.
        backend: Which implementation attends, a name of `bratune.kernels.registry.names` or ``auto``.
        config: Settings of the backend.

    Raises:
        ProblemError: sizes that contradict each other.
        UnknownNameError: no backend has this name.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        *,
        num_heads: int = 8,
        n_win: int | tuple[int, int] = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        topk: int = 4,
        auto_pad: bool = False,
        backend: str = "auto",
        config: Config | None = None,
    ) -> None:
        super().__init__(dim, num_heads, qk_dim or dim, qk_scale, topk, backend=backend, config=config)
        self.context_dim, self.auto_pad = context_dim or dim, auto_pad
        self.n_win = (n_win, n_win) if isinstance(n_win, int) else n_win
        rows, columns = self.n_win
        if rows < 1 or columns < 1 or not 1 <= topk <= rows * columns:
            raise ProblemError(
                f"top-{topk} of {rows} x {columns} regions; 1 to {max(1, rows * columns)} would work"
            )
        self.q = nn.Linear(dim, self.qk_dim)
        self.kv = nn.Linear(self.context_dim, self.qk_dim + dim)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``[B, H, W, dim]``.
            context: ``[B, Hk, Wk, context_dim]``, of any size; by default x.

        Returns:
            ``[B, H, W, dim]``.

        Raises:
            ProblemError: regions do not tile a map and ``auto_pad`` is off, or a map has another form.
        """
        given = x if context is None else context
        for name, one, channels in (("x", x, self.dim), ("context", given, self.context_dim)):
            if one.ndim != 4 or one.shape[-1] != channels:
                raise ProblemError(
                    f"{name} must be a map [B, H, W, channels] with {channels} channels, "
                    f"not {list(one.shape)}"
                )
        height, width = layout.sides(x)
        region, kv_region = self._region(x), self._region(given)
        x, given = self._padded(x, region), self._padded(given, kv_region)
        q = self.q(x)
        k, v = self.kv(given).split([self.qk_dim, self.dim], dim=-1)
        routes = route(q, k, region=region, kv_region=kv_region, topk=self.topk)
        out = self.attend_regions(q, k, v, routes, region, kv_region)
        return layout.crop_tokens(self.wo(out), height, width)

    def _region(self, x: Tensor) -> tuple[int, int]:
        height, width = layout.sides(x)
        rows, columns = self.n_win
        if not self.auto_pad and (height % rows or width % columns):
            raise ProblemError(
                f"{rows} x {columns} regions do not tile a {height}x{width} map; auto_pad=True pads it"
            )
        return ceil_div(height, rows), ceil_div(width, columns)

    def _padded(self, x: Tensor, region: tuple[int, int]) -> Tensor:
        height, width = layout.sides(x)
        bottom, right = region[0] * self.n_win[0] - height, region[1] * self.n_win[1] - width
        return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x
