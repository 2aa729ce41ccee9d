"""The kernels as operators of PyTorch: ``torch.ops.bratune.native_attention`` and its backward.

As operators they can be traced (`torch.compile`, `torch.export`), transformed (`torch.func`), recomputed
under activation checkpointing and counted by `torch.utils.flop_counter`. Where nothing watches, the library
is called without the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from bratune.errors import UnsupportedError
from bratune.kernels.dispatch import is_observed, is_recorded, is_transformed, refuse_second_derivative
from bratune.kernels.native.run import NativeCall, lse_shape, run_backward, run_forward
from bratune.kernels.packed import (
    count_attention,
    differentiate_attention,
    empty_gradients,
    is_packed,
    mark_packed,
    origin_of,
)
from bratune.problem import Problem

__all__ = ["attend", "infer"]

_ARGUMENTS = "int heads, int[] region, int[] kv_region, float scale, bool masked, str variant"
library.define(
    "bratune::native_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor routes, {_ARGUMENTS}, bool keep_lse) -> (Tensor, Tensor)",
)
library.define(
    "bratune::native_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor routes, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}, bool packed) -> Tensor[]",
)


def attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, problem: Problem, variant: str) -> Tensor:
    """Routed attention by the library, differentiable once in q, k and v.

    Args:
        q: ``[B, Hq, Wq, heads * head_dim]``, any strides.
        k: ``[B, Hk, Wk, heads * head_dim]``, any strides.
        v: ``[B, Hk, Wk, heads * head_dim]``, any strides.
        routes: ``[B, R, topk]`` or ``[B, heads, R, topk]``, int32 or int64.
        problem: The call in numbers.
        variant: A name of `bratune.kernels.native.library.Library.variants`; empty for the fastest.

    Returns:
        ``[B, Hq, Wq, heads * head_dim]``, contiguous.

    Raises:
        ProblemError: a route names no key region.
    """
    p = problem
    call = NativeCall(p.heads, p.region, p.kv_region, p.scale, p.padding == "masked", variant)
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if is_transformed() and not is_recorded():
        return _Transformed.apply(q, k, v, routes, call)[0]  # type: ignore[no-any-return, no-untyped-call]
    if is_observed(q):
        out, _ = torch.ops.bratune.native_attention(q, k, v, routes, *call, differentiable)
        return out  # type: ignore[no-any-return]
    if differentiable:
        return _Attend.apply(q, k, v, routes, call)  # type: ignore[no-any-return, no-untyped-call]
    return run_forward(q, k, v, routes, call, keep_lse=False)[0]


def infer(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, call: NativeCall) -> Tensor:
    """`attend` where nobody wants a gradient."""
    if is_observed(q):
        out, _ = torch.ops.bratune.native_attention(q, k, v, routes, *call, False)
        return out  # type: ignore[no-any-return]
    return run_forward(q, k, v, routes, call, keep_lse=False)[0]


class _Attend(torch.autograd.Function):
    """What the registered operators do, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, call: NativeCall) -> Tensor:
        out, lse = run_forward(q, k, v, routes, call, keep_lse=True)
        ctx.save_for_backward(q, k, v, routes, lse)
        ctx.call, ctx.origin = call, origin_of(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("native", "the backend gather has one")
        q, k, v, routes, lse = ctx.saved_tensors
        packed = is_packed(q, k, v)
        found = run_backward(grad, q, k, v, routes, lse, ctx.call, packed=packed)
        dq, dk, dv = mark_packed(found[0], [q.shape[-1]] * 3, ctx.origin) if packed else found
        return dq, dk, dv, None, None


class _Transformed(torch.autograd.Function):
    """The operators as `torch.func` can see through them; without a jvp it refuses forward AD."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, call: NativeCall) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.bratune.native_attention(q, k, v, routes, *call, True)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, routes, ctx.call = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, routes, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, routes, out, lse = ctx.saved_tensors
        dq, dk, dv = _Gradients.apply(grad, q, k, v, routes, out, lse, ctx.call)  # type: ignore[no-untyped-call]
        return dq, dk, dv, None, None


class _Gradients(torch.autograd.Function):
    """The backward operator as a function that refuses to be differentiated once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        out: Tensor,
        lse: Tensor,
        call: NativeCall,
    ) -> tuple[Tensor, ...]:
        found = torch.ops.bratune.native_attention_backward(grad, q, k, v, routes, out, lse, *call, False)
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise UnsupportedError("native", ("its backward pass has no derivative; the backend gather has one",))


# --- what runs ----------------------------------------------------------------------------------------


def _call(
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, variant: str
) -> NativeCall:
    return NativeCall(heads, (region[0], region[1]), (kv_region[0], kv_region[1]), scale, masked, variant)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor,
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, variant: str,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _call(heads, region, kv_region, scale, masked, variant)
    out, lse = run_forward(q, k, v, routes, call, keep_lse=keep_lse)
    return out, lse if keep_lse else q.new_empty(0, dtype=torch.float32)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, variant: str,
    packed: bool,
) -> list[Tensor]:  # fmt: skip
    call = _call(heads, region, kv_region, scale, masked, variant)
    return run_backward(grad, q, k, v, routes, lse, call, packed=packed)


library.impl("bratune::native_attention", "CPU", _forward)
library.impl("bratune::native_attention_backward", "CPU", _backward)


# --- what PyTorch must know about them ----------------------------------------------------------------


@library.register_fake("bratune::native_attention")
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor,
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, variant: str,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _call(heads, region, kv_region, scale, masked, variant)
    return q.new_empty(q.shape), q.new_empty(lse_shape(q, call) if keep_lse else (0,), dtype=torch.float32)


@library.register_fake("bratune::native_attention_backward")
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, variant: str,
    packed: bool,
) -> list[Tensor]:  # fmt: skip
    return empty_gradients(q, k, v, packed=packed)


differentiate_attention("native_attention")
count_attention("native_attention")


def _folded(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors whose mapped dimension, or a copy for every place of it, became part of the batch."""
    found = []
    for x, dim in zip(tensors, dims, strict=True):
        first = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        found.append(first.flatten(0, 1))
    return found


@library.register_vmap("bratune::native_attention")
def _forward_mapped(
    info: Any, dims: Sequence[int | None], q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *rest: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    out, lse = torch.ops.bratune.native_attention(*_folded(size, dims[:4], (q, k, v, routes)), *rest)
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


@library.register_vmap("bratune::native_attention_backward")
def _backward_mapped(info: Any, dims: Sequence[int | None], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    size, tensors, rest = info.batch_size, inputs[:7], inputs[7:]
    found = torch.ops.bratune.native_attention_backward(*_folded(size, dims[:7], tensors), *rest)
    return [x.unflatten(0, (size, -1)) for x in found], [0] * len(found)
