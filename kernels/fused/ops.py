"""The fused kernels as operators of PyTorch: ``torch.ops.bratune.routed_attention`` and its backward.

As operators they can be traced (`torch.compile`, `torch.export`), captured in a CUDA graph, recomputed under
activation checkpointing and counted by `torch.utils.flop_counter`. They allocate their results and nothing
that depends on the contents of a tensor, and never wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from bratune import machine as machines
from bratune.errors import UnsupportedError
from bratune.kernels.dispatch import is_observed, is_recorded, is_transformed
from bratune.kernels.fused.call import Call, call_for, statistics_planes
from bratune.kernels.fused.run import run_backward, run_forward
from bratune.kernels.packed import (
    count_attention,
    differentiate_attention,
    empty_gradients,
    is_packed,
    mark_packed,
    origin_of,
)
from bratune.machine import Machine
from bratune.problem import Problem

__all__ = ["attend"]

_ARGUMENTS = "int heads, int[] region, int[] kv_region, float scale, bool masked, str config"
library.define(
    "bratune::routed_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor routes, {_ARGUMENTS}, bool keep_lse) -> (Tensor, Tensor)",
)
library.define(
    "bratune::routed_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor routes, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}, bool packed) -> Tensor[]",
)


def attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, problem: Problem, config: str) -> Tensor:
    """Routed attention by the fused kernels, differentiable in q, k and v.

    Args:
        q: ``[B, Hq, Wq, heads * head_dim]``, any strides.
        k: ``[B, Hk, Wk, heads * head_dim]``, any strides.
        v: ``[B, Hk, Wk, heads * head_dim]``, any strides.
        routes: ``[B, R, topk]`` or ``[B, heads, R, topk]``, int32 or int64.
        problem: The call in numbers.
        config: Settings that are not left to the table, as `fused_call.as_text` writes them.

    Returns:
        ``[B, Hq, Wq, heads * head_dim]``, contiguous.
    """
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    transformed = is_transformed() and not is_recorded()
    if is_observed(q) and not transformed:
        out, _ = torch.ops.bratune.routed_attention(
            q, k, v, routes, problem.heads, problem.region, problem.kv_region, problem.scale,
            problem.padding == "masked", config, differentiable,
        )  # fmt: skip
        return out  # type: ignore[no-any-return]
    kept = _directed(problem, differentiable or transformed)
    call = call_for(kept, config, _machine(q.device))
    if differentiable or transformed:
        return _Attend.apply(q, k, v, routes, call, kept, config)[0]  # type: ignore[no-any-return, no-untyped-call]
    return run_forward(q, k, v, routes, call, keep_lse=False)[0]


@functools.lru_cache(maxsize=4096)
def _directed(problem: Problem, backward: bool) -> Problem:
    return problem.replace(direction="fwd-bwd" if backward else "fwd")


# --- without the dispatcher, and under torch.func -----------------------------------------------------


class _Attend(torch.autograd.Function):
    """What the registered operators do, without the dispatcher; `torch.func` transforms it.

    The problem and the configuration are there for `vmap` alone, which makes one larger batch of many.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, routes: Tensor, call: Call, problem: Problem, config: str
    ) -> tuple[Tensor, Tensor]:
        return run_forward(q, k, v, routes, call, keep_lse=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, routes, *ctx.launch = inputs
        ctx.save_for_backward(q, k, v, routes, *output)
        ctx.origin = origin_of(q, k, v)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, routes, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of this pass is wanted, or torch.func is at work
            return (*_Gradient.apply(grad, q, k, v, routes, out, lse, *ctx.launch), *_NONE)  # type: ignore[no-untyped-call]
        packed = is_packed(q, k, v)
        found = run_backward(grad, q, k, v, routes, out, lse, ctx.launch[0], packed=packed)
        dq, dk, dv = mark_packed(found[0], [q.shape[-1]] * 3, ctx.origin) if packed else found
        return dq, dk, dv, *_NONE

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise _no_derivative("it has no forward-mode derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _as_one_batch(_Attend, 4, info.batch_size, in_dims, args)


_NONE = (None,) * 4


class _Gradient(torch.autograd.Function):
    """The backward pass of `_Attend` as a node of a graph: it can be batched, but not differentiated."""

    @staticmethod
    def forward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
        call: Call, problem: Problem, config: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        packed = is_packed(q, k, v)
        out, lse = out.contiguous(), lse.contiguous()  # as the forward pass made them, before any batching
        found = run_backward(grad, q, k, v, routes, out, lse, call, packed=packed)
        return found[0].chunk(3, -1) if packed else tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise _no_derivative("its backward pass has no derivative")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise _no_derivative("its backward pass has no derivative")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _as_one_batch(_Gradient, 7, info.batch_size, in_dims, args)


def _no_derivative(what: str) -> UnsupportedError:
    return UnsupportedError("triton", (f"{what}; the backend gather has one",))


def _as_one_batch(
    function: Any, tensors: int, count: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run a function on ``count`` batches at a time: they are one batch of so many times the images."""
    folded = []
    for x, dim in zip(args[:tensors], in_dims, strict=False):
        folded.append((x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1))
    _, problem, config = args[tensors:]
    larger = problem.replace(batch=count * problem.batch)
    found = function.apply(*folded, call_for(larger, config, _machine(folded[0].device)), larger, config)
    return tuple(x.unflatten(0, (count, problem.batch)) for x in found), (0,) * len(found)


# --- what runs on the device ------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _call(
    q: tuple[int, ...], k: tuple[int, ...], routes: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    heads: int, region: tuple[int, int], kv_region: tuple[int, int], scale: float, masked: bool, config: str,
    backward: bool,
) -> Call:  # fmt: skip
    problem = Problem(
        batch=q[0],
        height=q[1],
        width=q[2],
        heads=heads,
        head_dim=q[3] // heads,
        region=region,
        topk=routes[-1],
        dtype=str(dtype).removeprefix("torch."),
        direction="fwd-bwd" if backward else "fwd",
        padding="masked" if masked else "zeros",
        kv_height=k[1],
        kv_width=k[2],
        kv_region=kv_region,
        per_head=len(routes) == 4,
        scale=scale,
    )
    return call_for(problem, config, _machine(device))


@functools.cache
def _machine(device: torch.device) -> Machine:
    return machines.detect(str(device))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor,
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, config: str,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if torch.autograd.forward_ad._current_level >= 0:  # an operator would leave its derivative out
        raise _no_derivative("as an operator it has no forward-mode derivative")
    call = _call(
        q.shape, k.shape, routes.shape, q.dtype, q.device,
        heads, tuple(region), tuple(kv_region), scale, masked, config, keep_lse,
    )  # fmt: skip
    return run_forward(q, k, v, routes, call, keep_lse=keep_lse)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, config: str,
    packed: bool,
) -> list[Tensor]:  # fmt: skip
    call = _call(
        q.shape, k.shape, routes.shape, q.dtype, q.device,
        heads, tuple(region), tuple(kv_region), scale, masked, config, True,
    )  # fmt: skip
    return run_backward(grad, q, k, v, routes, out, lse, call, packed=packed)


library.impl("bratune::routed_attention", ("CUDA", "CPU"), _forward)
library.impl("bratune::routed_attention_backward", ("CUDA", "CPU"), _backward)


# --- what PyTorch must know about them --------------------------------------------------------------


@library.register_fake("bratune::routed_attention")
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor,
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, config: str,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, height, width, _ = q.shape
    rows, cols = (height + region[0] - 1) // region[0], (width + region[1] - 1) // region[1]
    planes = statistics_planes(str(q.dtype).removeprefix("torch."))
    shape = (batch, heads, planes, rows * cols * region[0] * region[1]) if keep_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@library.register_fake("bratune::routed_attention_backward")
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
    heads: int, region: Sequence[int], kv_region: Sequence[int], scale: float, masked: bool, config: str,
    packed: bool,
) -> list[Tensor]:  # fmt: skip
    return empty_gradients(q, k, v, packed=packed)


differentiate_attention("routed_attention")
count_attention("routed_attention")


def _refuse(ctx: Any, grads: Sequence[Tensor]) -> None:
    raise _no_derivative("its backward pass has no derivative")


library.register_autograd("bratune::routed_attention_backward", _refuse)
