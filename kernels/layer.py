"""Bi-Level Routing Attention as a layer: the two official modules with any backend behind them.

Both keep the official constructor arguments, ``state_dict`` keys and numerics, so that released weights
load unchanged. They agree on maps that S divides and are different functions on others: the NHWC module
pads its *input* to S x S regions (with ``auto_pad``), the NCHW module rounds regions down and pads queries,
keys and values with zeros. Weights trained with one must be run with the same one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bratune import machine as machines
from bratune.backend import Config
from bratune.errors import ProblemError, UnknownNameError
from bratune.kernels import layout, tuned
from bratune.kernels.api import route, routed_attention
from bratune.kernels.composed import TopkRouting, composed_attention, require_composition
from bratune.kernels.kv_pool import kv_pool, pool_regions
from bratune.kernels.lean import norm_linear
from bratune.kernels.native.training import AttentionParts
from bratune.kernels.nhwc import conv_nhwc, depthwise, is_1x1, keeps_size, linear_1x1, to_nchw, to_nhwc
from bratune.kernels.packed import split_packed
from bratune.kernels.plain import is_plain
from bratune.kernels.registry import get
from bratune.kernels.routing import region_means, route_pooled
from bratune.problem import Problem, split_map

__all__ = ["Attending", "BiLevelRoutingAttention", "NCHWBiLevelRoutingAttention", "RoutedLayer", "problem_of"]


class _QKVLinear(nn.Module):
    """One linear layer for queries, keys and values; a module of its own for the official key names."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.qkv(x)
        return out


class Attending(nn.Module):
    """What every routed layer has: channels, heads, top-k, and the backend that attends.

    Args:
        dim: Channels of values and output.
        num_heads: Attention heads.
        qk_dim: Channels of queries and keys.
        qk_scale: Factor of the logits; by default ``qk_dim ** -0.5`` (all channels, not a head's).
        topk: Key regions per query region.
        backend: Which implementation attends, a name of `bratune.kernels.registry.names` or ``auto``.
        config: Settings of the backend.

    Raises:
        ProblemError: heads do not divide the channels.
        UnknownNameError: no backend has this name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim: int,
        qk_scale: float | None,
        topk: int,
        *,
        backend: str,
        config: Config | None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.qk_dim, self.topk = dim, num_heads, qk_dim, topk
        self.scale = qk_scale or qk_dim**-0.5
        self.set_backend(backend, config)
        if num_heads < 1 or dim % num_heads or qk_dim % num_heads:
            channels = f"{dim} channels" if dim == qk_dim else f"{dim} channels of v and {qk_dim} of q and k"
            raise ProblemError(f"{num_heads} heads do not divide {channels}")

    def set_backend(self, backend: str, config: Config | None = None) -> None:
        """Let another backend attend from now on."""
        if backend != "auto":
            get(backend)
        self.backend, self.config = backend, config

    def attend_regions(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        region: tuple[int, int],
        kv_region: tuple[int, int],
    ) -> Tensor:
        """Level two, from every query region to its routed key regions, by the layer's backend."""
        return routed_attention(
            q,
            k,
            v,
            routes,
            heads=self.num_heads,
            region=region,
            kv_region=kv_region,
            scale=self.scale,
            backend=self.backend,
            config=self.config,
        )


class RoutedLayer(Attending):
    """What both layers share: the parts of a forward pass on NHWC maps.

    The layers differ in the modules that hold their weights and in how a map is divided. ``qkv_layer`` and
    ``output_layer`` are the projections, a linear layer or a 1x1 convolution.
    """

    lepe: nn.Conv2d | None
    soft_routing = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int,
        qk_dim: int,
        qk_scale: float | None,
        topk: int,
        *,
        backend: str,
        config: Config | None,
        pooled_routing: bool,
    ) -> None:
        super().__init__(dim, num_heads, qk_dim, qk_scale, topk, backend=backend, config=config)
        self.n_win = n_win
        self.pooled_routing = pooled_routing

    @property
    def qkv_layer(self) -> nn.Linear | nn.Conv2d:
        """The projection to queries, keys and values."""
        raise NotImplementedError

    @property
    def output_layer(self) -> nn.Module:
        """The output projection."""
        raise NotImplementedError

    def region_of(self, height: int, width: int) -> tuple[int, int]:
        """The region in tokens on a map of this size."""
        raise NotImplementedError

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        """The key regions of every query region, ``[B, R, topk]``, without gradient."""
        return route(q, k, region=self.region_of(*layout.sides(q)), topk=self.topk)

    def route_pooled(self, x: Tensor) -> Tensor:
        """The routes of `route`, from the map that ``project`` takes."""
        rows, layer = 2 * self.qk_dim, self.qkv_layer
        return route_pooled(
            x,
            layer.weight.flatten(1)[:rows],
            None if layer.bias is None else layer.bias[:rows],
            region=self.region_of(*layout.sides(x)),
            topk=self.topk,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> Tensor:
        """Level two: from every query region to its routed regions."""
        region = self.region_of(*layout.sides(q))
        return self.attend_regions(q, k, v, routes, region, region)

    def enhance(self, v: Tensor) -> Tensor | None:
        """The depthwise convolution of the values (LePE); None without one."""
        return None if self.lepe is None else conv_nhwc(self.lepe, v)

    def merge(self, x: Tensor) -> Tensor:
        """The output projection, on an NHWC map."""
        raise NotImplementedError

    def takes_norm(self, height: int, width: int) -> bool:
        """Whether `forward_normed` can run on a map of this size: what else reads the layer's input?"""
        return not self.pooled_routing and is_plain(self, type(self)) and self.reads_projection()

    def reads_projection(self) -> bool:
        """Whether the weights of ``qkv_layer`` may be read in the place of a call of it."""
        raise NotImplementedError

    def reads_all(self) -> bool:
        """Whether all weights may be read: what a layer must be to be made ready for inference."""
        fits_local = self.lepe is None or keeps_size(self.lepe)
        return is_plain(self, type(self)) and self.reads_projection() and fits_local

    def trained_parts(self, x: Tensor) -> AttentionParts | None:
        """What a block in training takes of the layer on a map like this one; None where it is called.

        Args:
            x: ``[B, H, W, dim]``.
        """
        sides = layout.sides(x)
        if not (self.takes_norm(*sides) and self.reads_all() and self.dim == self.qk_dim):
            return None
        region = self.region_of(*sides)
        tiled = (region[0] * self.n_win, region[1] * self.n_win) == sides and self.topk <= self.n_win**2
        if not tiled or self.config is not None or self.backend not in ("auto", "native"):
            return None
        numbers = (x.shape[0], *sides, self.num_heads, self.dim, region, self.topk, "float32")
        if self.backend == "auto" and not _trains_natively(*numbers, scale=self.scale):
            return None
        return AttentionParts(
            self.qkv_layer, self.lepe, self.output_layer, self.num_heads, self.scale, region, self.topk, False
        )

    def forward_normed(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The layer of ``norm(x)``, NHWC, which keeps x for the backward pass and not the norm's output."""
        qkv = norm_linear(x, norm, self.qkv_layer)
        q, k, v = split_packed(qkv, (self.qk_dim, self.qk_dim, self.dim))
        out, local = self.attend(q, k, v, self.route(q, k)), self.enhance(v)
        return self.merge(out if local is None else out + local)


class BiLevelRoutingAttention(RoutedLayer):
    """Routed attention on an NHWC map (the official ``BiLevelRoutingAttention``).

    Args:
        dim: Channels of input, values and output.
        num_heads: Attention heads.
        n_win: Regions per side, S.
        qk_dim: Channels of queries and keys; by default ``dim``.
        qk_scale: Factor of the logits; by default ``qk_dim ** -0.5`` (all channels, not a head's).
        kv_per_win: Side of a key region after ``ada_avgpool`` or ``ada_maxpool``.
        kv_downsample_ratio: Side of the window of ``avgpool`` and ``maxpool``.
        kv_downsample_kernel: Unused, as in the official module.
        kv_downsample_mode: How keys and values of a region are pooled: ``identity``, ``ada_avgpool``,
            ``ada_maxpool``, ``avgpool`` or ``maxpool``.
        topk: Key regions per query region.
        param_attention: ``qkvo``, or ``qkv`` for no output projection.
        param_routing: Learn a projection of the region means; needs ``diff_routing``.
        diff_routing: Let gradients flow through the routing weights; needs ``soft_routing``.
        soft_routing: Multiply gathered keys and values by the routing weight of their region. Runs as
            a composition (gather, weigh, attend), so that only the backends ``auto``, ``reference``,
            ``gather`` and ``gather-sdpa`` accept it.
        side_dwconv: Side of the depthwise convolution of the values (LePE); 0 leaves it out.
        auto_pad: Pad maps that S does not divide with zeros at the bottom and on the right.
        backend: Which implementation attends, a name of `bratune.kernels.registry.names` or ``auto``.
        config: Settings of the backend.
        pooled_routing: Route by the region means of the input, projected, instead of those of q and k. The
            routes are the same in exact arithmetic, and found without reading q and k.

    Raises:
        ProblemError: sizes or options that contradict each other.
        UnknownNameError: an option, or a backend, that does not exist.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "identity",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        *,
        backend: str = "auto",
        config: Config | None = None,
        pooled_routing: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            n_win,
            qk_dim or dim,
            qk_scale,
            topk,
            backend=backend,
            config=config,
            pooled_routing=pooled_routing,
        )
        _check_routes(n_win, topk)
        self.auto_pad = auto_pad
        if soft_routing:
            require_composition(backend, "soft routing")
        self.soft_routing = soft_routing
        if param_attention not in ("qkvo", "qkv"):
            raise UnknownNameError("param_attention", param_attention, ("qkvo", "qkv"))
        if param_routing and not diff_routing:
            raise ProblemError("param_routing learns nothing without gradients; diff_routing=True would work")
        if diff_routing and not soft_routing:
            raise ProblemError("diff_routing has no weights to differentiate; soft_routing=True would work")
        if pooled_routing and soft_routing:
            raise ProblemError("pooled_routing gives no weights for soft_routing; one of them would work")

        self.lepe = depthwise(dim, side_dwconv)
        self.router = TopkRouting(
            self.qk_dim, topk, self.scale, param_routing=param_routing, diff_routing=diff_routing
        )
        self.qkv = _QKVLinear(dim, self.qk_dim)
        self.wo: nn.Module = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()
        self.kv_down = kv_pool(kv_downsample_mode, kv_per_win, kv_downsample_ratio)

    def forward(
        self, x: Tensor, ret_attn_mask: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            x: ``[B, H, W, dim]``.
            ret_attn_mask: Return what attention looked at, too; runs as a composition.

        Returns:
            ``[B, H, W, dim]``; with ``ret_attn_mask`` also the routing weights and the routes,
            ``[B, R, topk]`` each, and the attention matrix ``[B * R, heads, T, topk * Tk]``.
        """
        _check_map(x, "[B, H, W, channels]", self.dim, -1)
        height, width = layout.sides(x)
        x = self.pad(x)
        q, k, v = self.project(x)
        if ret_attn_mask:
            require_composition(self.backend, "the attention matrix")
            routes, weights = self.route_soft(q, k)
            out, attn = self._compose(q, k, v, routes, weights, fused=False)
            assert attn is not None
            out = self._finish(out, v, height, width)
            return out, weights, routes, attn.transpose(1, 2).flatten(0, 1)
        if self.soft_routing:
            routes, weights = self.route_soft(q, k)
            out, _ = self._compose(
                q, k, v, routes, weights, fused=self.backend not in ("reference", "gather")
            )
        else:
            pooled = self.pooled_routing and self.reads_projection()
            routes = self.route_pooled(x) if pooled else self.route(q, k)
            out = self.attend(q, k, v, routes)
        return self._finish(out, v, height, width)

    def set_backend(self, backend: str, config: Config | None = None) -> None:
        """Let another backend attend from now on."""
        if self.soft_routing:
            require_composition(backend, "soft routing")
        super().set_backend(backend, config)

    @property
    def qkv_layer(self) -> nn.Linear | nn.Conv2d:
        """The projection to queries, keys and values."""
        return self.qkv.qkv

    @property
    def output_layer(self) -> nn.Module:
        """The output projection; an identity where the layer has none."""
        return self.wo

    def takes_norm(self, height: int, width: int) -> bool:
        """Whether `forward_normed` can run on a map of this size: what else reads the layer's input?"""
        rh, rw = self.region_of(height, width)
        tiled = (rh * self.n_win, rw * self.n_win) == (height, width)
        return tiled and not self.soft_routing and super().takes_norm(height, width)

    def reads_projection(self) -> bool:
        """Whether the weights of ``qkv_layer`` may be read in the place of a call of it."""
        return is_plain(self.qkv, _QKVLinear) and is_plain(self.qkv.qkv, nn.Linear)

    def reads_all(self) -> bool:
        """Whether all weights may be read: what a layer must be to be made ready for inference."""
        return (
            super().reads_all()
            and not self.soft_routing
            and is_plain(self.router, TopkRouting)
            and is_plain(self.kv_down, nn.Identity)
            and is_plain(self.wo, nn.Linear)
        )

    # --- the parts, on padded maps -------------------------------------------------------------------

    def pad(self, x: Tensor) -> Tensor:
        """The map with zeros at the bottom and on the right, so that S divides it; itself where it does.

        Raises:
            ProblemError: S does not divide the map, and ``auto_pad`` is off.
        """
        height, width = layout.sides(x)
        rh, rw = self.region_of(height, width)
        bottom, right = rh * self.n_win - height, rw * self.n_win - width
        return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x

    def region_of(self, height: int, width: int) -> tuple[int, int]:
        """The region in tokens on a map of this size, before or after padding."""
        try:
            return split_map(height, width, self.n_win, pad=self.auto_pad)
        except ProblemError as error:
            raise ProblemError(f"{error}, or auto_pad=True") from None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a padded map: views of one tensor, ``[B, H, W, channels]``."""
        q, k, v = split_packed(self.qkv(x), (self.qk_dim, self.qk_dim, self.dim))
        return q, k, v

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        """The key regions of every query region, ``[B, R, topk]``, without gradient."""
        called = self.soft_routing or not is_plain(self.router, TopkRouting)
        return self.route_soft(q, k)[0] if called else super().route(q, k)

    def route_soft(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Routes and their softmax weights, ``[B, R, topk]`` each."""
        region = self.region_of(*layout.sides(q))
        routes, weights = self.router(region_means(q, region), region_means(k, region))
        return routes, weights

    def attend(self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> Tensor:
        """Level two: from every query region to its routed regions, pooled as the layer says."""
        region = self.region_of(*layout.sides(q))
        k, v, kv_region = self._pool(k, v, region)
        return self.attend_regions(q, k, v, routes, region, kv_region)

    def merge(self, x: Tensor) -> Tensor:
        """The output projection."""
        out: Tensor = self.wo(x)
        return out

    # --- helpers -------------------------------------------------------------------------------------

    def _finish(self, out: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        local = self.enhance(v)
        return layout.crop_tokens(self.merge(out if local is None else out + local), height, width)

    def _compose(
        self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor, *, fused: bool
    ) -> tuple[Tensor, Tensor | None]:
        region = self.region_of(*layout.sides(q))
        k, v, kv_region = self._pool(k, v, region)
        return composed_attention(
            q,
            k,
            v,
            routes,
            heads=self.num_heads,
            region=region,
            kv_region=kv_region,
            scale=self.scale,
            weights=weights if self.soft_routing else None,
            fused=fused,
        )

    def _pool(self, k: Tensor, v: Tensor, region: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Keys and values pooled within each region, and the region that is left."""
        if is_plain(self.kv_down, nn.Identity):
            return k, v, region
        (k, kv_region), (v, _) = (pool_regions(x, region, self.kv_down) for x in (k, v))
        return k, v, kv_region


class NCHWBiLevelRoutingAttention(RoutedLayer):
    """Routed attention on an NCHW map (the official ``nchwBRA``).

    Regions are ``(H // S, W // S)`` tokens, so that a map that S does not divide has more than ``S x S`` of
    them; queries, keys and values are padded with zeros, which are keys like any other. Inside, the map is
    read as NHWC, which costs nothing where it is ``channels_last`` in memory; so is the output.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        n_win: Regions per side where S divides the map.
        qk_scale: Factor of the logits; by default ``dim ** -0.5`` (all channels, not a head's).
        topk: Key regions per query region.
        side_dwconv: Side of the depthwise convolution of the values (LePE); 0 leaves it out.
        auto_pad: Accepted and ignored, as in the official module: padding is always on.
        attn_backend: ``torch``, the only official value; `backend` is what chooses here.
        backend: Which implementation attends, a name of `bratune.kernels.registry.names` or ``auto``.
        config: Settings of the backend.
        pooled_routing: Route by the region means of the input, projected, instead of those of q and k. The
            routes are the same in exact arithmetic, and found without reading q and k.

    Raises:
        ProblemError: sizes or options that contradict each other.
        UnknownNameError: an option, or a backend, that does not exist.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        attn_backend: str = "torch",
        *,
        backend: str = "auto",
        config: Config | None = None,
        pooled_routing: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            n_win,
            dim,
            qk_scale,
            topk,
            backend=backend,
            config=config,
            pooled_routing=pooled_routing,
        )
        if attn_backend != "torch":
            raise UnknownNameError("attn_backend", attn_backend, ("torch",))
        if n_win < 1 or topk < 1:
            raise ProblemError(f"n_win and topk must be at least 1, not {n_win} and {topk}")
        self.lepe = depthwise(dim, side_dwconv)
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, kernel_size=1)
        self.output_linear = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: ``[B, dim, H, W]``.
            ret_attn_mask: Return the attention matrix, too; runs as a composition.

        Returns:
            ``[B, dim, H, W]``; with ``ret_attn_mask`` also the matrix ``[B, heads, R, T, topk * T]``.
        """
        _check_map(x, "[B, channels, H, W]", self.dim, 1)
        x = to_nhwc(x)
        q, k, v = self.project(x)
        pooled = self.pooled_routing and self.reads_projection()
        routes = self.route_pooled(x) if pooled else self.route(q, k)
        attn = None
        if ret_attn_mask:
            require_composition(self.backend, "the attention matrix")
            region = self.region_of(*layout.sides(q))
            out, attn = composed_attention(
                q,
                k,
                v,
                routes,
                heads=self.num_heads,
                region=region,
                kv_region=region,
                scale=self.scale,
            )
        else:
            out = self.attend(q, k, v, routes)
        local = self.enhance(v)
        out = to_nchw(self.merge(out if local is None else out + local))
        return out if attn is None else (out, attn)

    @property
    def qkv_layer(self) -> nn.Linear | nn.Conv2d:
        """The projection to queries, keys and values."""
        return self.qkv_linear

    @property
    def output_layer(self) -> nn.Module:
        """The output projection."""
        return self.output_linear

    def reads_projection(self) -> bool:
        """Whether the weights of ``qkv_layer`` may be read in the place of a call of it."""
        return is_1x1(self.qkv_linear)

    def reads_all(self) -> bool:
        """Whether all weights may be read: what a layer must be to be made ready for inference."""
        return super().reads_all() and is_1x1(self.output_linear)

    # --- the parts, on NHWC maps ---------------------------------------------------------------------

    def region_of(self, height: int, width: int) -> tuple[int, int]:
        """The region in tokens on a map of this size.

        Raises:
            ProblemError: the map is smaller than S.
        """
        if self.n_win > min(height, width):
            raise ProblemError(
                f"{self.n_win} regions per side do not fit a {height}x{width} map; "
                f"1 to {min(height, width)} would work"
            )
        return height // self.n_win, width // self.n_win

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of an NHWC map: views of one tensor, ``[B, H, W, dim]`` each."""
        q, k, v = split_packed(linear_1x1(self.qkv_linear, x), (self.dim,) * 3)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        """The output projection, on an NHWC map."""
        return linear_1x1(self.output_linear, x)


def problem_of(
    batch: int,
    height: int,
    width: int,
    heads: int,
    qk_dim: int,
    region: tuple[int, int],
    topk: int,
    dtype: str,
    **more: Any,
) -> Problem:
    """The attention of a layer on a map, its data type as PyTorch writes it; ``more`` are other fields."""
    return Problem(
        batch=batch,
        height=height,
        width=width,
        heads=heads,
        head_dim=qk_dim // heads,
        region=region,
        topk=topk,
        dtype=dtype.removeprefix("torch."),
        **more,
    )


@functools.lru_cache(maxsize=256)
def _trains_natively(*numbers: Any, scale: float) -> bool:
    """Whether ``auto`` chooses the C kernels, as they are by default, in training; see `problem_of`."""
    problem = problem_of(*numbers, direction="fwd-bwd", scale=scale)
    backend, config = tuned.choose(problem, machines.detect("cpu"))
    return backend.name == "native" and not config


def _check_map(x: Tensor, form: str, dim: int, axis: int) -> None:
    if x.ndim != 4 or layout.comparable(x.shape)[axis] != dim:
        hint = "; x[None] is a batch of one" if x.ndim == 3 else ""
        raise ProblemError(f"the map must be {form} with {dim} channels, not {list(x.shape)}{hint}")


def _check_routes(n_win: int, topk: int) -> None:
    if n_win < 1:
        raise ProblemError(f"regions per side must be at least 1, not {n_win}")
    if not 1 <= topk <= n_win**2:
        raise ProblemError(
            f"top-k {topk} of {n_win}x{n_win} = {n_win**2} regions; 1 to {n_win**2} would work"
        )
