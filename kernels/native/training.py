"""A block in training: forward, keeping little, and all its gradients, by the C kernels and a few products.

PyTorch multiplies what becomes gradients of weights, which are products over all tokens. All else is C: on
the way back a stretch of tokens goes through both products of the MLP, GELU and LayerNorm while it is in a
core's cache (``gradients.h``), residuals are added where a map is written anyway, and attention and
convolutions write into the gradients that they belong to. What is kept for the way back is the input of every
residual part, the projection, the statistics of attention and the hidden channels before GELU.

It is what a lean block (`bratune.kernels.backbone.Backbone.set_lean`) does in float32 on a CPU, where
`is_taken`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bratune.kernels.dispatch import is_observed, refuse_second_derivative
from bratune.kernels.native import block
from bratune.kernels.native.library import loaded, variant_number
from bratune.kernels.native.run import (
    DTYPES,
    NativeCall,
    address_of,
    map_of,
    run_backward,
    run_forward,
    shout,
)
from bratune.kernels.native.whole import Norm, can_multiply, linear, linear_fields

__all__ = [
    "AttentionParts",
    "Shape",
    "Weights",
    "depthwise_grads",
    "is_taken",
    "panels",
    "train_block",
]

# linear_grad_t, depthwise_grad_t and panels_t of call.h; kept_mlp_t is a linear_t and a pointer.
_LINEAR_GRAD = struct.Struct("14q5qd")
_DEPTHWISE_GRAD = struct.Struct("10q7q")
_PANELS = struct.Struct("6q")
# The largest filter whose sums of a row fit where gradients.h keeps them.
MOST_SIDE = 9


class AttentionParts(NamedTuple):
    """An attention layer of which all weights may be read.

    Attributes:
        project: To queries, keys and values, as many channels each.
        local: The depthwise convolution whose result is added to that of attention; None for none.
        merge: The output projection.
        heads: Heads of attention.
        scale: Factor of the logits.
        region: Tokens of a region; None where every token attends to every other.
        topk: Key regions of a query region.
        enhances_input: The convolution is one of the projection's input, not of the values.
    """

    project: nn.Module
    local: nn.Module | None
    merge: nn.Module
    heads: int
    scale: float
    region: tuple[int, int] | None
    topk: int
    enhances_input: bool


class Weights(NamedTuple):
    """The parameters of a block, in the order of its parts; None for what it has not.

    Convolutions are ``[C, 1, K, K]``, matrices ``[out, in]``, everything else ``[channels]``.
    """

    position: Tensor | None
    position_bias: Tensor | None
    gain1: Tensor | None
    shift1: Tensor | None
    project: Tensor
    project_bias: Tensor | None
    local: Tensor | None
    local_bias: Tensor | None
    merge: Tensor
    merge_bias: Tensor | None
    gain2: Tensor | None
    shift2: Tensor | None
    widen: Tensor
    widen_bias: Tensor | None
    narrow: Tensor
    narrow_bias: Tensor | None


class Shape(NamedTuple):
    """What a block is beside its parameters; see `AttentionParts`."""

    heads: int
    scale: float
    region: tuple[int, int] | None
    topk: int
    enhances_input: bool
    eps1: float
    eps2: float


def is_taken(x: Tensor, weights: Weights, shape: Shape) -> bool:
    """Whether `train_block` takes a map: float32 on a CPU that has the products, and nobody watching."""
    channels = x.shape[-1]
    convs = [w for w in (weights.position, weights.local) if w is not None]
    matrices = (weights.project, weights.merge, weights.widen, weights.narrow)
    return (
        x.device.type == "cpu"
        and all(w is None or w.dtype == torch.float32 for w in (x, *weights))
        and x.numel() > 0
        and not is_observed(x)
        and not torch.is_autocast_enabled("cpu")
        and block.can_run(weights.project)
        and all(map(can_multiply, matrices))
        and all(block.can_convolve(w) and w.shape[-1] <= MOST_SIDE for w in convs)
        and block.can_attend(channels // shape.heads)
        and weights.project.shape[0] == 3 * channels
    )


def train_block(
    x: Tensor, weights: Weights, shape: Shape, masks: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """A block of a map ``[B, H, W, C]`` that `is_taken`, differentiable once in the map and the weights.

    Args:
        x: The map.
        weights: The block's parameters.
        shape: What it is beside them.
        masks: What the attention's and the MLP's branch of every image are multiplied by, ``[B, 1, 1, 1]``
            without gradient; None is 1.
    """
    out: Tensor = _Block.apply(x, shape, *masks, *weights)  # type: ignore[no-untyped-call]
    return out


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Shape, mask1: Tensor | None, mask2: Tensor | None, *weights: Tensor | None
    ) -> Tensor:
        w = Weights(*weights)  # type: ignore[arg-type]
        x, wide = x.contiguous(), (*x.shape[:-1], len(w.project))
        empty = (0,) if w.position is None else x.shape
        placed, qkv, merged, attended, kept = _side_by_side(
            x, empty, wide, x.shape, x.shape, (*x.shape[:-1], len(w.widen))
        )
        if w.position is not None:
            block.depthwise(x, block.pack_depthwise(w.position), w.position_bias, add=x, out=placed)
        else:
            placed = x
        norm1, norm2 = Norm(w.gain1, w.shift1, shape.eps1), Norm(w.gain2, w.shift2, shape.eps2)
        normed = None
        if shape.enhances_input and w.local is not None:
            normed = block.layer_norm(placed, w.gain1, w.shift1, eps=shape.eps1)
            _linear(normed, w.project, w.project_bias, out=qkv)
        else:
            _linear(placed, w.project, w.project_bias, norm=norm1, out=qkv)
        q, k, v = qkv.chunk(3, -1)
        call, routes = _call(x, shape), _routes(q, k, shape)
        _, lse = run_forward(q, k, v, routes, call, keep_lse=True, out=merged)
        if w.local is not None:
            local = v if normed is None else normed
            block.depthwise(local, block.pack_depthwise(w.local), w.local_bias, add=merged, out=merged)
        _linear(merged, w.merge, w.merge_bias, add=_if(mask1, placed), out=attended)
        if mask1 is not None:
            attended.mul_(mask1).add_(placed)
        out = _mlp(attended, w, norm2, add=_if(mask2, attended), kept=kept)
        if mask2 is not None:
            out.mul_(mask2).add_(attended)
        ctx.save_for_backward(x, placed, qkv, routes, lse, merged, attended, kept, mask1, mask2, *weights)
        ctx.shape, ctx.call = shape, call
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("lean", "set_lean(False) has one")
        x, placed, qkv, routes, lse, merged, attended, kept, mask1, mask2, *weights = ctx.saved_tensors
        w, shape, needs = Weights(*weights), ctx.shape, Weights(*ctx.needs_input_grad[4:])
        grad = grad.contiguous()

        norm1, norm2 = Norm(w.gain1, w.shift1, shape.eps1), Norm(w.gain2, w.shift2, shape.eps2)
        fed = grad if mask2 is None else grad * mask2
        mlp = _linear_grads(fed, w.widen, w.narrow, kept, normed=(attended, norm2), add=grad)
        given = mlp.dx if mask1 is None else mlp.dx * mask1
        merge = _linear_grads(given, w.merge)
        q, k, v = qkv.chunk(3, -1)
        dqkv = run_backward(merge.dx, q, k, v, routes, lse, ctx.call, packed=True)[0]
        beside = None
        if w.local is not None:
            turned = block.pack_depthwise(w.local.flip(2, 3))
            if shape.enhances_input:
                beside = block.depthwise(merge.dx, turned, None)
            else:
                dv = dqkv.chunk(3, -1)[2]
                block.depthwise(merge.dx, turned, None, add=dv, out=dv)
        project = _linear_grads(dqkv, w.project, normed=(placed, norm1), add=mlp.dx, beside=beside)
        of_local = depthwise_grads(project.y if shape.enhances_input else v, merge.dx, w.local)
        of_position = depthwise_grads(x, project.dx, w.position)
        dx: Tensor | None = project.dx
        if not ctx.needs_input_grad[0]:
            dx = None
        elif w.position is not None:
            turned = block.pack_depthwise(w.position.flip(2, 3))
            dx = block.depthwise(project.dx, turned, None, add=project.dx)
        found = (  # in the order of `Weights`
            *of_position,
            *project.of_norm,
            _product(needs.project, dqkv, project.y),
            project.of_bias,
            *of_local,
            _product(needs.merge, given, merged),
            merge.of_bias,
            *mlp.of_norm,
            _product(needs.widen, mlp.dhidden, mlp.y),
            mlp.of_hidden_bias,
            _product(needs.narrow, fed, mlp.activated),
            mlp.of_bias,
        )
        wanted = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        return dx, None, None, None, *wanted


def _if(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The map that a product adds by itself: one with a mask is added after it."""
    return x if mask is None else None


def _call(x: Tensor, shape: Shape) -> NativeCall:
    region = shape.region or (x.shape[1], x.shape[2])
    return NativeCall(shape.heads, region, region, shape.scale, False, "")


def _routes(q: Tensor, k: Tensor, shape: Shape) -> Tensor:
    if shape.region is None:
        return torch.zeros(q.shape[0], 1, 1, dtype=torch.int64)
    return block.route(q, k, region=shape.region, topk=shape.topk)


# --- calls of the library -------------------------------------------------------------------------------


def panels(weight: Tensor, *, by_columns: bool) -> Tensor:
    """A matrix ``[out, in]`` as products read it: ``[out / 16, in, 16]``, backward ``[in / 16, out, 16]``."""
    weight = weight.contiguous()
    outputs, inputs = weight.shape
    shape = (inputs // 16, outputs, 16) if by_columns else (outputs // 16, inputs, 16)
    packed = weight.new_empty(shape)
    arguments = _PANELS.pack(
        weight.data_ptr(), packed.data_ptr(), outputs, inputs, by_columns, torch.get_num_threads()
    )
    shout(loaded().functions.bratune_panels(variant_number(""), arguments))
    return packed


def _side_by_side(like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """New tensors in one stretch of memory: what is let go together is had together, in large pages."""
    sizes = [math.prod(shape) for shape in shapes]
    memory = like.new_empty(sum(sizes))
    loaded().functions.bratune_large_pages(memory.data_ptr(), memory.nbytes)
    return [part.view(shape) for part, shape in zip(torch.split(memory, sizes), shapes, strict=True)]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor, **more: Any) -> None:
    """`linear` with a matrix ``[out, in]``, into a tensor."""
    linear(x, (panels(weight, by_columns=False), bias), out=out, **more)


def _mlp(x: Tensor, w: Weights, norm: Norm, *, add: Tensor | None, kept: Tensor) -> Tensor:
    """``narrow(gelu(widen(norm(x)))) + add``; what GELU gets goes into ``kept``."""
    first = panels(w.widen, by_columns=False), w.widen_bias
    second = panels(w.narrow, by_columns=False), w.narrow_bias
    out = torch.empty_like(x)
    places = (x.data_ptr(), address_of(add), out.data_ptr())
    end = DTYPES[x.dtype], torch.get_num_threads()
    arguments = linear_fields(places, x.numel() // x.shape[-1], first, second, norm, *end)
    arguments += struct.pack("q", kept.data_ptr())
    shout(loaded().functions.bratune_kept_mlp(variant_number(""), arguments))
    return out


class _LinearGrads(NamedTuple):
    """Gradients of the input and of vectors, and what those of matrices are made of.

    Attributes:
        dx: Of the input of the norm, or of the layer where there is none.
        y: What the norm gave.
        activated: What GELU gave.
        dhidden: The gradient of what GELU got.
        of_bias: Of the last layer's bias.
        of_hidden_bias: Of the first layer's, where there are two.
        of_norm: Of gain and shift of the norm.
    """

    dx: Tensor
    y: Tensor
    activated: Tensor
    dhidden: Tensor
    of_bias: Tensor
    of_hidden_bias: Tensor
    of_norm: tuple[Tensor | None, Tensor | None]


def _linear_grads(
    grad: Tensor,
    first: Tensor,
    second: Tensor | None = None,
    kept: Tensor | None = None,
    *,
    normed: tuple[Tensor, Norm] | None = None,
    beside: Tensor | None = None,
    add: Tensor | None = None,
) -> _LinearGrads:
    """Back through a linear layer, or the two of an MLP, and the norm before.

    Args:
        grad: ``[..., outputs]``, contiguous: of what the last layer gave.
        first: The first matrix ``[out, in]``.
        second: The second.
        kept: The hidden channels before GELU.
        normed: The norm's input, and the norm; None for no norm.
        beside: A further gradient of the norm's output.
        add: What is added to the gradient of the norm's input.
    """
    channels, outputs = first.shape[1], grad.shape[-1]
    hidden = 0 if second is None else len(first)
    x, norm = normed or (None, Norm(None, None, 0.0))
    widths = [outputs, hidden] + [channels] * (0 if x is None else 2)
    sums = grad.new_empty(sum(widths))
    rows = grad.shape[:-1]
    dx, y, activated, dhidden = _side_by_side(
        grad, (*rows, channels), (*rows, 0 if x is None else channels), (*rows, hidden), (*rows, hidden)
    )
    packed = panels(first, by_columns=True)
    last = None if second is None else panels(second, by_columns=True)
    arguments = _LINEAR_GRAD.pack(
        grad.data_ptr(), address_of(last), packed.data_ptr(), address_of(kept), address_of(x),
        address_of(norm.weight), address_of(norm.bias), address_of(beside), address_of(add),
        activated.data_ptr(), dhidden.data_ptr(), y.data_ptr(), dx.data_ptr(), sums.data_ptr(),
        grad.numel() // outputs, outputs, hidden, channels, torch.get_num_threads(), norm.eps,
    )  # fmt: skip
    shout(loaded().functions.bratune_linear_grad(variant_number(""), arguments))
    of_bias, of_hidden_bias, *of_norm = torch.split(sums, widths)
    of_gain, of_shift = of_norm or (None, None)
    return _LinearGrads(dx, y, activated, dhidden, of_bias, of_hidden_bias, (of_gain, of_shift))


def depthwise_grads(x: Tensor, grad: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a depthwise convolution's weight ``[C, 1, K, K]`` and bias; None without a convolution."""
    if weight is None:
        return None, None
    batch, height, width, channels = x.shape
    side = weight.shape[-1]
    sums = x.new_empty(side * side + 1, channels)
    arguments = _DEPTHWISE_GRAD.pack(
        *map_of(x), *map_of(grad), sums.data_ptr(), batch, height, width, channels, side,
        torch.get_num_threads(),
    )  # fmt: skip
    shout(loaded().functions.bratune_depthwise_grad(variant_number(""), arguments))
    return sums[:-1].t().reshape(weight.shape), sums[-1]


def _product(wanted: Any, grad: Tensor, x: Tensor) -> Tensor | None:
    """The gradient of a matrix ``[out, in]``, where it is wanted."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2) if wanted else None
