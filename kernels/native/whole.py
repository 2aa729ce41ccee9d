"""A whole block of the runtime as one call of the library: its parts, its linear layers, nothing between.

PyTorch's part of an operator is 10 microseconds and more, of which a block has ten; and products that are
asked for one by one are written to memory one by one. Here the hidden channels of the MLP never leave the
cache of the core that made them, and norms and residuals are part of the products beside them (``linear.h``,
``amx.c``).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bratune.kernels.dispatch import is_observed
from bratune.kernels.native.library import loaded, variant_number
from bratune.kernels.native.run import ATTENTION, DTYPES, NOWHERE, shout
from bratune.problem import ceil_div

__all__ = [
    "PARTS",
    "AtOnce",
    "BlockCall",
    "BlockParts",
    "Linear",
    "Norm",
    "Strips",
    "can_multiply",
    "pack_linear",
]

# block_t of call.h: position, norm, project, routing, attention, local, merge, mlp, and a flag.
_DEPTHWISE, _NORM, _ROUTING = struct.Struct("24q"), struct.Struct("9qd"), struct.Struct("24q")
_LINEAR = struct.Struct("9qd13q")
# What `BlockCall` takes the time of, in its order.
PARTS = (
    "position embedding",
    "norm and qkv",
    "routing",
    "attention",
    "LePE",
    "projection and residual",
    "norm, MLP and residual",
)
_PANEL = 16

# Weights as the kernels read them, and float32 biases: `pack_linear`'s, `block.pack_depthwise`'s, a norm's.
Linear = tuple[Tensor, Tensor | None]
Strips = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Norm:
    """LayerNorm: ``[C]`` float32 each, and what is added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of.

    Attributes:
        position: The 3x3 convolution that is added to the map; None for none.
        adds_input: The convolution's kernel does not add the map itself.
        norm1: Before the projection.
        project: To queries, keys and values, ``[qk_dim + qk_dim + C, C]``.
        heads: Heads of attention.
        qk_dim: Channels of queries, as many as values have.
        scale: Factor of the logits.
        region: Tokens of a region; None where every token attends to every other.
        topk: Key regions of a query region.
        local: The convolution of the values that is added to what attention gives; None for none.
        enhances_input: It is one of the projection's input, not of the values.
        merge: The output projection.
        norm2: Before the MLP.
        widen: To its hidden channels.
        narrow: Back from them.
    """

    position: Strips | None
    adds_input: bool
    norm1: Norm
    project: Linear
    heads: int
    qk_dim: int
    scale: float
    region: tuple[int, int] | None
    topk: int
    local: Strips | None
    enhances_input: bool
    merge: Linear
    norm2: Norm
    widen: Linear
    narrow: Linear


def can_multiply(weight: Tensor) -> bool:
    """Whether there are kernels for products with a matrix ``[out, in]`` that are worth a call.

    In float32 with AVX-512, in bfloat16 with matrix tiles; elsewhere oneDNN is asked.
    """
    if weight.dtype == torch.bfloat16:
        return loaded().default == "amx" and weight.shape[0] % _PANEL == 0 and weight.shape[1] % 32 == 0
    fits = weight.shape[0] % _PANEL == 0 and weight.shape[1] % _PANEL == 0
    return weight.dtype == torch.float32 and loaded().default in ("amx", "avx512") and fits


def pack_linear(weight: Tensor) -> Tensor:
    """A matrix ``[out, in]`` in panels: ``[out / 16, in, 16]``, in bfloat16 ``[out / 16, in / 2, 16, 2]``."""
    outputs, inputs = weight.shape
    if weight.dtype == torch.bfloat16:
        return weight.detach().view(outputs // _PANEL, _PANEL, inputs // 2, 2).transpose(1, 2).contiguous()
    return weight.detach().view(outputs // _PANEL, _PANEL, inputs).transpose(1, 2).contiguous()


class BlockCall:
    """The call of a block for maps of one size.

    Args:
        parts: The block.
        size: ``(B, H, W, C)``.
        dtype: Of maps and matrices.
        threads: How many compute.
    """

    def __init__(self, parts: BlockParts, size: Sequence[int], dtype: torch.dtype, threads: int) -> None:
        self.parts = parts  # their memory is what the call reads
        self.variant = variant_number("")
        self.function = loaded().functions.bratune_block
        self.everywhere = torch.zeros(size[0], 1, 1, dtype=torch.int64)
        self._size, self._end = tuple(size), (DTYPES[dtype], threads)
        b, p = size[0], parts
        rows = b * size[1] * size[2]
        wide = p.project[0].shape[0] * _PANEL
        step = p.qk_dim * dtype.itemsize
        whole = self._map(0, size[3])
        q, k, v = (self._map(i * step, wide) for i in range(3))
        self.arguments = b"".join(
            (
                self._depthwise(p.position, whole, NOWHERE, whole),
                self._norm(p.norm1, rows) if p.enhances_input else bytes(_NORM.size),
                self._linear(rows, p.project, norm=None if p.enhances_input else p.norm1),
                self._routing(q, k),
                self._attention(q, k, v, whole),
                self._depthwise(p.local, whole if p.enhances_input else v, whole, whole),
                self._linear(rows, p.merge),
                self._linear(rows, p.widen, p.narrow, norm=p.norm2),
                struct.pack("q", p.adds_input),
            )
        )

    def __call__(self, x: Tensor, seconds: ctypes.Array[ctypes.c_double] | None = None) -> Tensor:
        """The block of a contiguous map; ``seconds`` grow by what its parts took, in the order of `PARTS`."""
        out = torch.empty_like(x)
        shout(self.function(self.variant, self.arguments, x.data_ptr(), out.data_ptr(), seconds))
        return out

    def _map(self, offset: int, channels: int) -> tuple[int, ...]:
        _, height, width, _ = self._size
        return offset, height * width * channels, width * channels, channels, 1

    def _depthwise(
        self, strips: Strips | None, x: tuple[int, ...], add: tuple[int, ...], out: tuple[int, ...]
    ) -> bytes:
        if strips is None:
            return bytes(_DEPTHWISE.size)
        weight, bias = strips
        side = round(weight.shape[0] ** 0.5)
        return _DEPTHWISE.pack(*x, *add, *out, weight.data_ptr(), _at(bias), *self._size, side, *self._end)

    def _norm(self, norm: Norm, rows: int) -> bytes:
        vectors = (_at(norm.weight), _at(norm.bias))
        return _NORM.pack(0, *vectors, 0, 0, rows, self._size[3], *self._end, norm.eps)

    def _linear(
        self, rows: int, first: Linear, second: Linear | None = None, norm: Norm | None = None
    ) -> bytes:
        (outputs, channels), last = _sides(first[0]), None if second is None else _sides(second[0])[0]
        before = (0,) * 9 + (0.0,)
        if norm is not None:
            before = (0, _at(norm.weight), _at(norm.bias), 0, 0, 0, channels, self._end[0], 0, norm.eps)
        weights = (_at(first[0]), 0, _at(first[1]), 0)
        if second is not None:
            weights = (_at(first[0]), _at(second[0]), _at(first[1]), _at(second[1]))
        sizes = (rows, channels, 0, outputs) if last is None else (rows, channels, outputs, last)
        return _LINEAR.pack(*before, 0, 0, 0, *weights, *sizes, *self._end)

    def _routing(self, q: tuple[int, ...], k: tuple[int, ...]) -> bytes:
        p, (b, height, width, _) = self.parts, self._size
        if p.region is None:
            return bytes(_ROUTING.size)
        grid = (height, width, *p.region)
        return _ROUTING.pack(*q, *k, 0, b, p.qk_dim, *grid, *grid, p.topk, *self._end)

    def _attention(
        self, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], out: tuple[int, ...]
    ) -> bytes:
        p, (b, height, width, _) = self.parts, self._size
        region, topk = p.region or (height, width), p.topk if p.region else 1
        regions = ceil_div(height, region[0]) * ceil_div(width, region[1])
        routes = (0 if p.region else self.everywhere.data_ptr(), regions * topk, 0, topk, 1, 8)
        grid = (height, width, *region)
        sizes = (b, p.heads, p.qk_dim // p.heads, *grid, *grid, topk, 0, *self._end)
        return ATTENTION.pack(*q, *k, *v, *out, 0, *NOWHERE * 4, *routes, *sizes, p.scale)


class AtOnce:
    """The calls of a block of the runtime, by the size of its map.

    They are made anew wherever a part, a weight or the number of threads is another one. No copy takes them
    along.

    Args:
        make: What gives the parts of a block for a map; None where the block must go part by part.

    Attributes:
        seconds: Where calls add up what their parts took; None where nobody asks.
    """

    def __init__(self, make: Callable[[nn.Module, Tensor], BlockParts | None]) -> None:
        self.make = make
        self.seconds: ctypes.Array[ctypes.c_double] | None = None
        self._stamp: list[int] = []
        self._held: list[Any] = []  # what the stamp names, so that nothing new gets its place in memory
        self._calls: dict[tuple[Any, ...], BlockCall | None] = {}

    def __reduce__(self) -> tuple[type[AtOnce], tuple[Any, ...]]:
        return AtOnce, (self.make,)

    def call(self, block: nn.Module, attn: nn.Module, x: Tensor) -> BlockCall | None:
        """The call for a map like this one; None where the block must go part by part.

        Args:
            block: The block.
            attn: The module in it that has parts of its own.
            x: The map.
        """
        if x.device.type != "cpu" or is_observed(x) or not x.is_contiguous() or not x.numel():
            return None
        stamp: list[int] = []
        for module in (*block._modules.values(), *attn._modules.values()):
            stamp.append(id(module))
            if module is None:
                continue
            if module._forward_hooks or module._forward_pre_hooks:
                return None  # somebody waits for its call
            for tensor in module._buffers.values():
                stamp.append(id(tensor))
                if tensor is not None:
                    stamp.append(0 if tensor.is_inference() else tensor._version)
        if stamp != self._stamp:
            modules = [module for module in block.modules() if module is not block]
            self._held = [*modules, *(tensor for module in modules for tensor in module._buffers.values())]
            self._stamp, self._calls = stamp, {}
        key = x.shape, x.dtype, torch.get_num_threads()
        if key not in self._calls:
            parts = self.make(block, x)
            self._calls[key] = None if parts is None else BlockCall(parts, x.shape, x.dtype, key[2])
        return self._calls[key]


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _sides(packed: Tensor) -> tuple[int, int]:
    """Outputs and inputs of a matrix from `pack_linear`."""
    return packed.shape[0] * _PANEL, packed.shape[1] * (2 if packed.ndim == 4 else 1)
