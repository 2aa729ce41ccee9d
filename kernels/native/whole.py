"""A whole block of the runtime as one call of the library: its parts, its linear layers, nothing between.

PyTorch's part of an operator is 10 microseconds and more, of which a block has ten; and products that are
asked for one by one are written to memory one by one. Here the hidden channels of the MLP never leave the
cache of the core that made them, and norms and residuals are part of the products beside them (``linear.h``,
``amx.c``).
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library, nn

from bratune.kernels.constants import constant_in_graphs
from bratune.kernels.dispatch import is_observed
from bratune.kernels.native.library import loaded, variant_number
from bratune.kernels.native.run import ATTENTION, DTYPES, NOWHERE, address_of, shout
from bratune.problem import ceil_div

__all__ = [
    "PARTS",
    "AtOnce",
    "BlockCall",
    "BlockParts",
    "Linear",
    "Named",
    "Norm",
    "Strips",
    "add_mlp",
    "call_by_name",
    "can_multiply",
    "goes_at_once",
    "linear",
    "linear_fields",
    "named",
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
# Modules by the names that graphs know them by.
_NUMBERS = itertools.count()
_NAMED: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

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


def linear(
    x: Tensor,
    layer: Linear,
    *,
    norm: Norm | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A linear layer of the norm of rows, plus a map.

    Args:
        x: ``[..., C]`` in the data type of the matrix.
        layer: Matrix and bias; see `pack_linear`.
        norm: What comes before; None for nothing.
        add: ``[..., outputs]``.
        out: Where the result goes; by default into a new tensor.
    """
    if is_observed(x) and norm is None and out is None:
        found: Tensor = torch.ops.bratune.native_linear(x, *layer, add)
        return found
    return _linear(x, *layer, add, norm, out)


def add_mlp(x: Tensor, norm: Norm, widen: Linear, narrow: Linear) -> Tensor:
    """``x + narrow(gelu(widen(norm(x))))`` of rows ``[..., C]``; see `linear`."""
    run = torch.ops.bratune.native_add_mlp if is_observed(x) else _add_mlp
    out: Tensor = run(x, norm.weight, norm.bias, norm.eps, *widen, *narrow)
    return out


def _multiply(
    x: Tensor, add: Tensor | None, out: Tensor, first: Linear, second: Linear | None, norm: Norm | None
) -> None:
    places = (x.data_ptr(), address_of(add), out.data_ptr())
    end = DTYPES[x.dtype], torch.get_num_threads()
    arguments = linear_fields(places, x.numel() // x.shape[-1], first, second, norm, *end)
    shout(loaded().functions.bratune_linear(variant_number(""), arguments))


def linear_fields(
    places: tuple[int, int, int],
    rows: int,
    first: Linear,
    second: Linear | None,
    norm: Norm | None,
    dtype: int,
    threads: int,
) -> bytes:
    """A ``linear_t``.

    Args:
        places: Where x, what is added, and the result lie.
        rows: Of x.
        first: The first layer.
        second: The second; None for none.
        norm: What comes before; None for nothing.
        dtype: Number of the data type.
        threads: How many compute.
    """
    (outputs, channels), last = _sides(first[0]), None if second is None else _sides(second[0])[0]
    before: tuple[Any, ...] = (0,) * 9 + (0.0,)
    if norm is not None:
        vectors = address_of(norm.weight), address_of(norm.bias)
        before = (0, *vectors, 0, 0, 0, channels, dtype, 0, norm.eps)
    matrix, bias = (None, None) if second is None else second
    weights = (address_of(first[0]), address_of(matrix), address_of(first[1]), address_of(bias))
    sizes = (rows, channels, 0, outputs) if last is None else (rows, channels, outputs, last)
    return _LINEAR.pack(*before, *places, *weights, *sizes, dtype, threads)


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
        return _DEPTHWISE.pack(
            *x, *add, *out, weight.data_ptr(), address_of(bias), *self._size, side, *self._end
        )

    def _norm(self, norm: Norm, rows: int) -> bytes:
        vectors = (address_of(norm.weight), address_of(norm.bias))
        return _NORM.pack(0, *vectors, 0, 0, rows, self._size[3], *self._end, norm.eps)

    def _linear(
        self, rows: int, first: Linear, second: Linear | None = None, norm: Norm | None = None
    ) -> bytes:
        return linear_fields((0, 0, 0), rows, first, second, norm, *self._end)

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


class Named:
    """A module's name in this process, by which operators of a compiled graph know it.

    A graph has no room for what it holds. Copies of the module have names of their own.

    Attributes:
        name: The name.
    """

    def __init__(self) -> None:
        self.name = f"module_{next(_NUMBERS)}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def belong_to(self, module: nn.Module) -> None:
        """Give the name to a module, for as long as it lives."""
        _NAMED[self.name] = module


def named(name: str) -> Any:
    """The module of this name."""
    return _NAMED[name]


class AtOnce(Named):
    """The calls of a block of the runtime, by the size of its map.

    They are made anew wherever a part, a weight or the number of threads is another one. No copy takes them
    along.

    Args:
        make: What gives the parts of a block for a map; None where the block must go part by part.

    Attributes:
        seconds: Where calls add up what their parts took; None where nobody asks.
    """

    def __init__(self, make: Callable[[nn.Module, Tensor], BlockParts | None]) -> None:
        super().__init__()
        self.make = make
        self.seconds: ctypes.Array[ctypes.c_double] | None = None
        self._stamp: list[int] = []
        self._held: list[Any] = []  # what the stamp names, so that nothing new gets its place in memory
        self._calls: dict[tuple[Any, ...], BlockCall | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
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


def _sides(packed: Tensor) -> tuple[int, int]:
    """Outputs and inputs of a matrix from `pack_linear`."""
    return packed.shape[0] * _PANEL, packed.shape[1] * (2 if packed.ndim == 4 else 1)


# --- in graphs ------------------------------------------------------------------------------------------


@constant_in_graphs
def goes_at_once(name: str, size: tuple[int, ...], dtype: str, device: str) -> bool:
    """Whether the block of this name takes maps like this at once; for a graph that is recorded.

    Args:
        name: Of its ``at_once``.
        size: ``(B, H, W, C)``.
        dtype: As PyTorch writes it.
        device: Kind of device.
    """
    block = named(name)
    like = torch.empty(size, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
    return device == "cpu" and block.at_once.make(block, like) is not None


def call_by_name(x: Tensor, name: str) -> Tensor:
    """The block of this name, as an operator of a graph."""
    out: Tensor = torch.ops.bratune.native_block(x, name)
    return out


library.define("bratune::native_block", "(Tensor x, str block) -> Tensor")
library.define("bratune::native_linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor? add) -> Tensor")
library.define(
    "bratune::native_add_mlp",
    "(Tensor x, Tensor? gain, Tensor? shift, float eps, Tensor widen, Tensor? widen_bias, Tensor narrow, "
    "Tensor? narrow_bias) -> Tensor",
)


def _block(x: Tensor, name: str) -> Tensor:
    block = named(name)
    x = x.contiguous()
    call = block.at_once.call(block, block.attn, x)
    if call is None:  # since the graph was made, something came that must be called
        out: Tensor = block.by_parts(x.clone())
        return out
    return call(x, block.at_once.seconds)  # type: ignore[no-any-return]


library.impl("bratune::native_block", "CPU", _block)


@library.register_fake("bratune::native_block")
def _block_fake(x: Tensor, name: str) -> Tensor:
    return x.new_empty(x.shape)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, norm: Norm | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x, add = x.contiguous(), None if add is None else add.contiguous()
    out = x.new_empty(*x.shape[:-1], _sides(weight)[0]) if out is None else out
    _multiply(x, add, out, (weight, bias), None, norm)
    return out


library.impl("bratune::native_linear", "CPU", _linear)


@library.register_fake("bratune::native_linear")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], _sides(weight)[0])


def _add_mlp(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, widen: Tensor,
    widen_bias: Tensor | None, narrow: Tensor, narrow_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    x = x.contiguous()
    out = torch.empty_like(x)
    _multiply(x, x, out, (widen, widen_bias), (narrow, narrow_bias), Norm(gain, shift, eps))
    return out


library.impl("bratune::native_add_mlp", "CPU", _add_mlp)


@library.register_fake("bratune::native_add_mlp")
def _add_mlp_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
