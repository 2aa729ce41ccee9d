"""What surrounds attention in a block, in C: LayerNorm, depthwise convolution, routing; without gradients.

Each is an operator of PyTorch (``torch.ops.bratune.native_*``), so that compilers see it, and is called
without the dispatcher where nothing watches. The runtime (`bratune.kernels.runtime`) uses them on a CPU.
A whole block, with its linear layers, is one call of `bratune.kernels.native.whole`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor, library

from bratune.kernels.dispatch import is_observed
from bratune.kernels.native import ops
from bratune.kernels.native.library import Library, find, loaded, variant_number
from bratune.kernels.native.run import DTYPES, MOST_CHANNELS, NativeCall, address_of, map_of, shout
from bratune.problem import ceil_div

__all__ = [
    "attend",
    "attend_fully",
    "can_attend",
    "can_convolve",
    "can_run",
    "depthwise",
    "layer_norm",
    "pack_depthwise",
    "route",
]

# norm_t, depthwise_t and routing_t of call.h.
_NORM = struct.Struct("9qd")
_DEPTHWISE = struct.Struct("15q9q")
_ROUTING = struct.Struct("10q14q")
# Channels come in whole vectors of the widest variant.
_LANES = 16


def can_run(weight: Tensor) -> bool:
    """Whether the library is here and computes on the device and in the data type of this weight."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES and isinstance(find(), Library)


def can_attend(head_dim: int) -> bool:
    """Whether the kernels of attention take heads of so many channels."""
    return head_dim % 8 == 0 and head_dim <= MOST_CHANNELS


def can_convolve(weight: Tensor) -> bool:
    """Whether `depthwise` takes the channels of a weight ``[C, 1, K, K]``."""
    return weight.shape[0] % _LANES == 0 and weight.shape[-1] % 2 == 1


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """LayerNorm over the last dimension of a contiguous tensor; statistics in float32.

    Args:
        x: ``[..., C]``, contiguous.
        weight: ``[C]``, float32.
        bias: ``[C]``, float32.
        eps: Added to the variance.
    """
    if is_observed(x):
        return torch.ops.bratune.native_layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]
    return _layer_norm(x, weight, bias, eps)


def pack_depthwise(weight: Tensor) -> Tensor:
    """The weight ``[C, 1, K, K]`` as `depthwise` reads it: ``[K * K, C]`` float32."""
    return weight.detach().flatten(1).t().contiguous().float()


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """A depthwise convolution with zeros all around, plus a map; sums in float32, rounds once.

    Args:
        x: ``[B, H, W, C]`` with a multiple of 16 channels side by side, else any strides.
        weight: From `pack_depthwise`.
        bias: ``[C]``, float32.
        add: ``[B, H, W, C]``, added to the result; channels side by side.
        out: Where the result goes, ``add`` itself or nothing: a new map.

    Returns:
        ``[B, H, W, C]``; contiguous where ``out`` is not given.
    """
    if is_observed(x):
        found: Tensor = torch.ops.bratune.native_depthwise(x, weight, bias, add)
        return found
    return _depthwise(x, weight, bias, add, out)


def route(
    q: Tensor, k: Tensor, *, region: tuple[int, int], topk: int, kv_region: tuple[int, int] | None = None
) -> Tensor:
    """What `bratune.kernels.routing.route` gives, in one call, with means and affinities in float32.

    Ties give the lower region first.
    """
    kv_region = kv_region or region
    if is_observed(q):
        found: Tensor = torch.ops.bratune.native_route(q, k, region, kv_region, topk)
        return found
    return _route(q, k, region, kv_region, topk)


def attend(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *, heads: int, region: tuple[int, int], scale: float
) -> Tensor:
    """What `bratune.kernels.api.routed_attention` gives, without gradients and without checks."""
    return ops.infer(q, k, v, routes, NativeCall(heads, region, region, scale, False, ""))


def attend_fully(q: Tensor, k: Tensor, v: Tensor, *, heads: int, scale: float) -> Tensor:
    """Every token attends to every token of the map: routed attention with one region."""
    batch, height, width, _ = q.shape
    routes = torch.zeros(batch, 1, 1, dtype=torch.int64)
    return attend(q, k, v, routes, heads=heads, region=(height, width), scale=scale)


# --- what runs ----------------------------------------------------------------------------------------


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    y, channels = torch.empty_like(x), x.shape[-1]
    packed = _NORM.pack(
        x.data_ptr(), address_of(weight), address_of(bias), 0, y.data_ptr(), x.numel() // channels, channels,
        DTYPES[x.dtype], torch.get_num_threads(), eps,
    )  # fmt: skip
    shout(loaded().functions.bratune_norm(variant_number(""), packed))
    return y


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, out: Tensor | None = None
) -> Tensor:
    batch, height, width, channels = x.shape
    if x.stride(-1) != 1 or channels % _LANES:
        raise ValueError(
            f"needs a multiple of {_LANES} channels side by side, not {channels} at {x.stride()}"
        )
    out = x.new_empty(x.shape) if out is None else out
    added = (0, 0, 0, 0, 0) if add is None else map_of(add)
    packed = _DEPTHWISE.pack(
        *map_of(x), *added, *map_of(out), weight.data_ptr(), address_of(bias), batch, height, width, channels,
        round(weight.shape[0] ** 0.5), DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    shout(loaded().functions.bratune_depthwise(variant_number(""), packed))
    return out


def _route(q: Tensor, k: Tensor, region: Sequence[int], kv_region: Sequence[int], topk: int) -> Tensor:
    batch, height, width, channels = q.shape
    regions = ceil_div(height, region[0]) * ceil_div(width, region[1])
    routes = torch.empty(batch, regions, topk, dtype=torch.int64)
    packed = _ROUTING.pack(
        *map_of(q), *map_of(k), routes.data_ptr(), batch, channels, height, width, *region,
        k.shape[1], k.shape[2], *kv_region, topk, DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    shout(loaded().functions.bratune_route(variant_number(""), packed))
    return routes


# --- as operators -------------------------------------------------------------------------------------

library.define("bratune::native_layer_norm", "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")
library.define("bratune::native_depthwise", "(Tensor x, Tensor weight, Tensor? bias, Tensor? add) -> Tensor")
library.define(
    "bratune::native_route", "(Tensor q, Tensor k, int[] region, int[] kv_region, int topk) -> Tensor"
)
library.impl("bratune::native_layer_norm", "CPU", _layer_norm)
library.impl("bratune::native_depthwise", "CPU", _depthwise)
library.impl("bratune::native_route", "CPU", _route)


@library.register_fake("bratune::native_layer_norm")
def _layer_norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@library.register_fake("bratune::native_depthwise")
def _depthwise_fake(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@library.register_fake("bratune::native_route")
def _route_fake(q: Tensor, k: Tensor, region: Sequence[int], kv_region: Sequence[int], topk: int) -> Tensor:
    regions = ceil_div(q.shape[1], region[0]) * ceil_div(q.shape[2], region[1])
    return q.new_empty((q.shape[0], regions, topk), dtype=torch.int64)
