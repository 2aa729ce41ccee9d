"""A projection split into queries, keys and values, whose gradients are not copied together once more.

Gradients of q, k and v can be written side by side, as slices of one tensor; a split the usual way would then
copy them into another one, for every layer of a network. `split_packed` recognises gradients of its own
slices and hands their tensor on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from bratune.kernels.dispatch import is_recorded, is_transformed

__all__ = [
    "count_attention",
    "differentiate_attention",
    "empty_gradients",
    "is_packed",
    "mark_packed",
    "origin_of",
    "split_packed",
]

_ORIGIN = "_bratune_origin"
_WHOLE = "_bratune_whole"


def split_packed(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """``x.split(sizes, -1)``, with a backward pass that copies only what does not lie in place yet.

    Where a slice has further gradients (values, from a convolution beside the attention), only that slice is
    copied.
    """
    plain = is_recorded() or is_transformed()
    if plain or not (torch.is_grad_enabled() and x.requires_grad):
        return torch.split(x, list(sizes), -1)
    origin = object()
    parts: tuple[Tensor, ...] = _Split.apply(x, tuple(sizes), origin)  # type: ignore[no-untyped-call]
    for part in parts:
        setattr(part, _ORIGIN, origin)
    return parts


def origin_of(*parts: Tensor) -> object | None:
    """What identifies the one call of `split_packed` that made all of these tensors; else None."""
    first = getattr(parts[0], _ORIGIN, None)
    return first if all(getattr(part, _ORIGIN, None) is first for part in parts) else None


def mark_packed(whole: Tensor, sizes: Sequence[int], origin: object) -> tuple[Tensor, ...]:
    """Slices of a gradient that the split they belong to may hand on together.

    Args:
        whole: The gradient of all parts. The split may write to it: where the gradient of a part became a
            sum on its way, the sum takes the place of its first term.
        sizes: Lengths of the parts along the last axis.
        origin: What `origin_of` says of the parts.
    """
    slices = torch.split(whole, list(sizes), -1)
    for part in slices:
        setattr(part, _WHOLE, (whole, origin))
    return slices


def is_packed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v lie side by side, as slices of one projection ``[B, H, W, 3 * C]`` do.

    Their gradients are then written side by side too.
    """
    channels = q.shape[-1]
    return (
        q.shape == k.shape == v.shape
        and q.stride() == k.stride() == v.stride()
        and q.stride(-1) == 1
        and q.stride(-2) == 3 * channels
    )


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> list[Tensor]:
    """Room for the gradients, contiguous: side by side in one tensor, or each in its own."""
    if packed:
        return [q.new_empty((*q.shape[:-1], 3 * q.shape[-1]))]
    return [x.new_empty(x.shape) for x in (q, k, v)]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], origin: object) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.origin = sizes, origin
        return torch.split(x, list(sizes), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        whole = next((w for grad in grads if (w := _whole_of(grad, ctx.origin)) is not None), None)
        if whole is None or torch.is_grad_enabled():
            return torch.cat(grads, -1), None, None
        for grad, place in zip(grads, torch.split(whole, list(ctx.sizes), -1), strict=True):
            if _whole_of(grad, ctx.origin) is not whole:
                place.copy_(grad)
        return whole, None, None


def differentiate_attention(operator: str) -> None:
    """Register the derivative of an operator of attention, which ``operator_backward`` computes.

    Both take q, k, v and routes first. The operator's last argument, whether it keeps the log-sum-exp, means
    nothing to the other, whose last is whether gradients lie side by side in one tensor (`is_packed`).

    Args:
        operator: Name without its namespace, ``bratune``.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, routes, *ctx.arguments, _ = inputs
        ctx.save_for_backward(q, k, v, routes, *output)

    def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, routes, out, lse = ctx.saved_tensors
        packed = is_packed(q, k, v)
        backward = getattr(torch.ops.bratune, f"{operator}_backward")
        found = backward(grad, q, k, v, routes, out, lse, *ctx.arguments, packed)
        dq, dk, dv = found[0].chunk(3, -1) if packed else found
        return (dq, dk, dv, None, *(None,) * (len(ctx.arguments) + 1))

    library.register_autograd(f"bratune::{operator}", differentiate, setup_context=keep)


def count_attention(operator: str) -> None:
    """Tell `torch.utils.flop_counter` what an operator of attention and its backward multiply.

    As PyTorch counts its own attention: two products forward, five backward. Both take region and key region
    after q, k, v, routes and the heads; the backward has a gradient before, and output and log-sum-exp behind
    the routes.

    Args:
        operator: Name without its namespace, ``bratune``.
    """

    def products(q: Sequence[int], routes: Sequence[int], region: Sequence[int], kv: Sequence[int]) -> int:
        rows, cols = -(-q[1] // region[0]) * region[0], -(-q[2] // region[1]) * region[1]
        return 2 * q[0] * rows * cols * routes[-1] * kv[0] * kv[1] * q[3]

    def forward(*shapes: Any, **_: Any) -> int:
        q, _k, _v, routes, _heads, region, kv_region = shapes[:7]
        return 2 * products(q, routes, region, kv_region)

    def backward(*shapes: Any, **_: Any) -> int:
        _grad, q, _k, _v, routes, _out, _lse, _heads, region, kv_region = shapes[:10]
        return 5 * products(q, routes, region, kv_region)

    register_flop_formula(getattr(torch.ops.bratune, operator))(forward)
    register_flop_formula(getattr(torch.ops.bratune, f"{operator}_backward"))(backward)


def _whole_of(grad: Tensor, origin: object) -> Tensor | None:
    whole: Tensor | None
    whole, found = getattr(grad, _WHOLE, (None, None))
    return whole if found is origin else None
