"""The transformer blocks of the official models, on NHWC maps.

A block is position embedding, attention, MLP, each with a residual. Every block has the same parts under
the same names (``pos_embed norm1 attn norm2 mlp``), whatever its attention is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bratune.backend import Config
from bratune.errors import ProblemError
from bratune.kernels import layout
from bratune.kernels.dispatch import is_observed, is_transformed
from bratune.kernels.full_attention import Attention, AttentionLePE, FullAttention, NCHWAttentionLePE
from bratune.kernels.layer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, RoutedLayer
from bratune.kernels.lean import add_conv, add_mlp
from bratune.kernels.native.training import Shape, Weights, is_taken, train_block
from bratune.kernels.nhwc import conv_nhwc, is_1x1, keeps_size, linear_1x1, to_nchw, to_nhwc
from bratune.kernels.plain import is_plain, is_plain_throughout

__all__ = ["Block", "BlockSTL", "ConvAttention", "DropPath", "NCHWBlockSTL", "Residual"]


Layer: TypeAlias = nn.Linear | nn.Conv2d


class DropPath(nn.Module):
    """Drop a whole residual branch per image while training, and scale the others up in return.

    Args:
        rate: Probability that an image loses the branch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ProblemError(f"drop path rate must be at least 0 and below 1, not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` to ``[B, ...]``."""
        if not self.training or self.rate == 0.0:
            return x
        return x * self.draw(x)

    def draw(self, x: Tensor) -> Tensor:
        """A random factor per image, ``[B, 1, ...]``: 0 where the branch is dropped."""
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return mask.div_(keep)

    def extra_repr(self) -> str:
        """The rate, for ``print(model)``."""
        return f"rate={self.rate:.3f}"


class DWConv(nn.Module):
    """A 3x3 depthwise convolution of an NHWC map, inside the MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        return conv_nhwc(self.dwconv, x)


def plain_mlp(mlp: nn.Module) -> tuple[Layer, nn.Conv2d | None, Layer] | None:
    """The two layers of an MLP, and the convolution between them, where their weights may be read.

    None where something in it must be called, or where it is another function.
    """
    parts = list(mlp.children())
    if not is_plain(mlp, nn.Sequential) or len(parts) < 3:
        return None
    widen, *between, narrow = parts
    conv = None
    for part in between:
        if is_plain(part, DWConv) and conv is None and part is between[0]:
            assert isinstance(part, DWConv)
            conv = part.dwconv
        elif not (is_plain(part, nn.Identity) or (is_plain(part, nn.GELU) and part is between[-1])):
            return None
    if getattr(between[-1], "approximate", "") != "none" or (conv is not None and not keeps_size(conv)):
        return None
    if not (_is_layer(widen) and _is_layer(narrow)):
        return None
    return widen, conv, narrow  # type: ignore[return-value]  # _is_layer has looked


def _parameters(module: Any, *, matrix: bool = False) -> tuple[Any, Any]:
    """Weight and bias of a module; None for what it has not. A matrix is one of 1x1 convolutions, too."""
    if module is None:
        return None, None
    return module.weight.flatten(1) if matrix else module.weight, module.bias


def _is_layer(module: nn.Module) -> bool:
    return is_plain(module, nn.Linear) or is_1x1(module)


class ConvAttention(nn.Sequential):
    """Convolutions in the place of attention (official top-k 0), on NHWC maps: 1x1, depthwise 5x5, 1x1."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Identity(),  # keeps the official key names: attn.1, attn.2, attn.3
            nn.Conv2d(dim, dim, kernel_size=1),
            nn.Conv2d(dim, dim, kernel_size=5, padding=2, groups=dim),
            nn.Conv2d(dim, dim, kernel_size=1),
        )

    def project(self, x: Tensor) -> Tensor:
        """The first 1x1 convolution."""
        return linear_1x1(self[1], self[0](x))

    def enhance(self, v: Tensor) -> Tensor:
        """The depthwise convolution."""
        return conv_nhwc(self[2], v)

    def merge(self, x: Tensor) -> Tensor:
        """The last 1x1 convolution."""
        return linear_1x1(self[3], x)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        return self.merge(self.enhance(self.project(x)))


class Residual(nn.Module):
    """A block from its parts: ``x + pos_embed(x)``, then ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``.

    Subclasses add ``norm1``, ``attn``, ``norm2``, ``mlp`` and ``drop_path`` (and ``gamma1``, ``gamma2`` where
    layers are scaled) in the order of the official keys.

    Attributes:
        lean: Keep less for the backward pass; see `bratune.kernels.backbone.Backbone.set_lean`.
    """

    pos_embed: nn.Module | None
    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None
    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path: nn.Module

    def __init__(self, *, pre_norm: bool = True) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.lean = False
        self.pos_embed = None
        self.gamma1 = None
        self.gamma2 = None

    def attend(self, x: Tensor) -> Tensor:
        """The attention part, NHWC."""
        out: Tensor = self.attn(x)
        return out

    def feed(self, x: Tensor) -> Tensor:
        """The MLP part, NHWC."""
        out: Tensor = self.mlp(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, C]``."""
        if self.lean and torch.is_grad_enabled() and not is_transformed():
            return self._forward_lean(x)
        if self.pos_embed is not None:
            x = conv_nhwc(self.pos_embed, x, add=x)
        x = self._add(x, self.attend, self.norm1, self.gamma1)
        return self._add(x, self.feed, self.norm2, self.gamma2)

    def _forward_lean(self, x: Tensor) -> Tensor:
        """`forward` with the parts of `bratune.kernels.lean`, where the block's options allow them."""
        known = self._trained(x)
        if known is not None and is_taken(x, *known):
            return train_block(x, *known, (self._mask(x), self._mask(x)))
        pos = self.pos_embed
        if pos is not None and keeps_size(pos):
            assert isinstance(pos, nn.Conv2d)
            x = add_conv(x, pos)
        elif pos is not None:
            x = conv_nhwc(pos, x, add=x)
        x = self._attend_lean(x)
        return self._feed_lean(x)

    def _attend_lean(self, x: Tensor) -> Tensor:
        attn, norm = self.attn, self.norm1
        known = isinstance(attn, RoutedLayer) and attn.takes_norm(*layout.sides(x))
        if not (self.pre_norm and known and is_plain(norm, nn.LayerNorm)):
            return self._add(x, self.attend, norm, self.gamma1)
        assert isinstance(attn, RoutedLayer)
        assert isinstance(norm, nn.LayerNorm)
        y = attn.forward_normed(x, norm)
        out: Tensor = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        return out

    def _feed_lean(self, x: Tensor) -> Tensor:
        norm, layers = self.norm2, plain_mlp(self.mlp)
        whole = layers is not None and layers[1] is None and is_plain(norm, nn.LayerNorm)
        if not (self.pre_norm and whole and is_plain(self.drop_path, DropPath, nn.Identity)) or (
            self.gamma2 is not None
        ):
            return self._add(x, self.feed, norm, self.gamma2)
        assert layers is not None
        assert isinstance(norm, nn.LayerNorm)
        widen, _, narrow = layers
        return add_mlp(x, norm, widen, narrow, self._mask(x))

    def _mask(self, x: Tensor) -> Tensor | None:
        """What drops a branch per image, ``[B, 1, 1, 1]``; None where none is dropped."""
        drop = self.drop_path
        return drop.draw(x) if isinstance(drop, DropPath) and drop.training and drop.rate else None

    def _trained(self, x: Tensor) -> tuple[Weights, Shape] | None:
        """The block as `bratune.kernels.native.training` takes it; None where one of its parts is called."""
        if x.device.type != "cpu" or is_observed(x) or not is_plain_throughout(self):
            return None
        layers, pos, norms = plain_mlp(self.mlp), self.pos_embed, (self.norm1, self.norm2)
        whole = self.pre_norm and self.gamma1 is None and self.gamma2 is None
        if not whole or layers is None or layers[1] is not None:
            return None
        if not isinstance(self.attn, RoutedLayer | FullAttention) or not (pos is None or keeps_size(pos)):
            return None
        attn = self.attn.trained_parts(x)
        if attn is None or not all(is_plain(norm, nn.LayerNorm) for norm in norms):
            return None
        weights = [
            *_parameters(pos),
            *_parameters(self.norm1),
            *_parameters(attn.project, matrix=True),
            *_parameters(attn.local),
            *_parameters(attn.merge, matrix=True),
            *_parameters(self.norm2),
            *_parameters(layers[0], matrix=True),
            *_parameters(layers[2], matrix=True),
        ]
        eps: list[float] = [norm.eps for norm in norms]  # type: ignore[misc]
        shape = Shape(attn.heads, attn.scale, attn.region, attn.topk, attn.enhances_input, *eps)
        return Weights(*weights), shape

    def _add(
        self, x: Tensor, part: Callable[[Tensor], Tensor], norm: nn.Module, gamma: Tensor | None
    ) -> Tensor:
        y = part(norm(x) if self.pre_norm else x)
        if gamma is not None:
            y = gamma * y
        x = x + self.drop_path(y)
        if not self.pre_norm:
            x = norm(x)
        return x


class Block(Residual):
    """A block of BiFormer, NHWC.

    Args:
        dim: Channels.
        drop_path: Probability of dropping a branch while training.
        layer_scale_init_value: Start value of a learned factor per channel of both branches; none below 0.
        num_heads: Heads of routed attention.
        n_win: Regions per side, S.
        qk_dim: Channels of queries and keys; by default ``dim``.
        qk_scale: See `BiLevelRoutingAttention`.
        kv_per_win: See `BiLevelRoutingAttention`; so for every option below that is not named here.
        topk: More than 0: routed attention. -1: full attention. -2: full attention with local
            enhancement. 0: convolutions.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        mlp_dwconv: Put a 3x3 depthwise convolution into the MLP.
        before_attn_dwconv: Side of the position embedding's convolution: 3, or 0 for none.
        pre_norm: Normalise before a branch; after the sum otherwise.
        backend: See `BiLevelRoutingAttention`; full attention takes it, too.
        config: Settings of the backend.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = -1,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "ada_avgpool",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        mlp_ratio: float = 4,
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        pre_norm: bool = True,
        auto_pad: bool = False,
        *,
        backend: str = "auto",
        config: Config | None = None,
    ) -> None:
        super().__init__(pre_norm=pre_norm)
        if before_attn_dwconv > 0 and before_attn_dwconv != 3:
            raise ProblemError(
                f"the position embedding is padded for a 3x3 convolution: before_attn_dwconv must be 3, "
                f"or 0 for none, not {before_attn_dwconv}"
            )
        if before_attn_dwconv > 0:
            self.pos_embed = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        if topk > 0:
            self.attn = BiLevelRoutingAttention(
                dim=dim,
                num_heads=num_heads,
                n_win=n_win,
                qk_dim=qk_dim,
                qk_scale=qk_scale,
                kv_per_win=kv_per_win,
                kv_downsample_ratio=kv_downsample_ratio,
                kv_downsample_kernel=kv_downsample_kernel,
                kv_downsample_mode=kv_downsample_mode,
                topk=topk,
                param_attention=param_attention,
                param_routing=param_routing,
                diff_routing=diff_routing,
                soft_routing=soft_routing,
                side_dwconv=side_dwconv,
                auto_pad=auto_pad,
                backend=backend,
                config=config,
            )
        else:
            self.attn = _unrouted(dim, topk, side_dwconv, backend)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            DWConv(hidden) if mlp_dwconv else nn.Identity(),
            nn.GELU(),
            nn.Linear(hidden, dim),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if layer_scale_init_value > 0:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))


class BlockSTL(Residual):
    """A block of BiFormer-STL (the layout of Swin-T), NHWC: no position embedding, no layer scale.

    Args:
        dim: Channels.
        drop_path: Probability of dropping a branch while training.
        num_heads: Heads of routed attention.
        n_win: Regions per side, S.
        topk: See `Block`.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        side_dwconv: Side of the depthwise convolution in attention.
        auto_pad: See `BiLevelRoutingAttention`.
        backend: See `Block`.
        config: Settings of the backend.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        mlp_ratio: float = 4,
        side_dwconv: int = 5,
        auto_pad: bool = False,
        *,
        backend: str = "auto",
        config: Config | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        if topk > 0:
            self.attn = BiLevelRoutingAttention(
                dim=dim,
                num_heads=num_heads,
                n_win=n_win,
                topk=topk,
                side_dwconv=side_dwconv,
                auto_pad=auto_pad,
                backend=backend,
                config=config,
            )
        else:
            self.attn = _unrouted(dim, topk, side_dwconv, backend)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()


class NCHWBlockSTL(Residual):
    """A block of the NCHW BiFormer-STL; its projections are 1x1 convolutions, its maps NHWC all the same.

    Args:
        dim: Channels.
        drop_path: Probability of dropping a branch while training.
        num_heads: Heads of routed attention.
        n_win: Regions per side, S.
        topk: More than 0: routed attention. -1: full attention with local enhancement of the values.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        side_dwconv: Side of the depthwise convolution in attention.
        backend: See `Block`.
        config: Settings of the backend.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        mlp_ratio: float = 4,
        side_dwconv: int = 5,
        *,
        backend: str = "auto",
        config: Config | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        if topk > 0:
            self.attn = NCHWBiLevelRoutingAttention(
                dim=dim,
                num_heads=num_heads,
                n_win=n_win,
                topk=topk,
                side_dwconv=side_dwconv,
                backend=backend,
                config=config,
            )
        elif topk == -1:
            self.attn = NCHWAttentionLePE(dim, side_dwconv=side_dwconv, backend=backend)
        else:
            raise ProblemError(
                f"top-k {topk} means nothing to the NCHW model; 1 and more (routed attention) and "
                "-1 (full attention) do"
            )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, kernel_size=1), nn.GELU(), nn.Conv2d(hidden, dim, kernel_size=1)
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def attend(self, x: Tensor) -> Tensor:
        """The attention part, NHWC."""
        return to_nhwc(self.attn(to_nchw(x)))

    def feed(self, x: Tensor) -> Tensor:
        """The MLP part, NHWC."""
        parts = list(self.mlp.children())
        if not is_plain(self.mlp, nn.Sequential) or len(parts) != 3:
            return to_nhwc(self.mlp(to_nchw(x)))
        widen, activate, narrow = parts
        return linear_1x1(narrow, activate(linear_1x1(widen, x)))


def _unrouted(dim: int, topk: int, side_dwconv: int, backend: str) -> nn.Module:
    """What the official models put in the place of routed attention."""
    if topk == 0:
        return ConvAttention(dim)
    if topk == -1:
        return Attention(dim, backend=backend)
    if topk == -2:
        return AttentionLePE(dim, side_dwconv=side_dwconv, backend=backend)
    raise ProblemError(
        f"top-k {topk} means nothing; 1 and more (routed attention), 0 (convolutions), -1 (full attention) "
        "and -2 (full attention with local enhancement) do"
    )
