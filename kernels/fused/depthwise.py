"""Depthwise convolution in strips of output rows: Triton kernels, and the operators made of them.

The strips load every input row once per column of the filter, and can add the result to another map in the
same pass. The gradient of the input is the same kernel with the filter turned by 180 degrees, that of the
weights a reduction in fixed order: the same bits every time. Chosen by `bratune.kernels.depthwise`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code=assignment
# The language of kernels has no types for its tensors, and its tuples grow.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from bratune.kernels.depthwise import settings_of
from bratune.kernels.dispatch import on_device_of
from bratune.kernels.fused.direct import launch_kernel
from bratune.kernels.fused.tiles import SIZES
from bratune.problem import ceil_div

__all__ = ["depthwise_op", "launch_depthwise", "launch_wgrad"]

# The sum over tokens is cut into this many partial sums at most, the same on every GPU, of at least so
# many rows each.
_PARTIAL_SUMS = 128
_ROWS_PER_SUM = 8


# --- kernels ----------------------------------------------------------------------------------
# Tuples grow by `+` (RUF005): Triton's language has no starred expressions.


@triton.jit(do_not_specialize=SIZES)
def depthwise_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, add_ptr, out_ptr,
    x_b, x_y, x_x, x_c, w_c, w_t, a_b, a_y, a_x, a_c, o_b, o_y, o_x, height, width,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: images x strips of rows x blocks of columns x blocks of channels, all on the first axis.

    For one column of the filter at a time, its taps stay in registers while every input row of the strip
    is loaded once and feeds the output rows that it reaches. ``REVERSE`` turns the filter by 180 degrees.
    """
    HALF: tl.constexpr = KERNEL // 2
    GROUPS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    strips = (height + ROWS - 1) // ROWS
    columns = (width + BLOCK_X - 1) // BLOCK_X
    pid = tl.program_id(0)
    c = (pid % GROUPS) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // GROUPS
    x = (pid % columns) * BLOCK_X + tl.arange(0, BLOCK_X)
    pid = pid // columns
    first = (pid % strips) * ROWS
    b = (pid // strips).to(tl.int64)
    lane = (c < CHANNELS)[None, :]
    wide_c = c.to(tl.int64)  # channels of NCHW maps are far apart
    x_rows = x_ptr + b * x_b + (x.to(tl.int64) * x_x)[:, None] + (wide_c * x_c)[None, :]  # [X, C]

    start = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]
    sums = (start,) * ROWS
    for dx in tl.static_range(KERNEL):
        column = x + dx - HALF
        taps = ()
        for dy in tl.static_range(KERNEL):
            tap = dy * KERNEL + dx
            if REVERSE:
                tap = KERNEL * KERNEL - 1 - tap
            weight = tl.load(weight_ptr + c * w_c + tap * w_t, mask=c < CHANNELS, other=0.0)
            taps = taps + (weight.to(tl.float32)[None, :],)  # noqa: RUF005
        for i in tl.static_range(ROWS + KERNEL - 1):
            y = first + i - HALF
            # A row beside the map has no columns: a mask of tensors alone, which every interpreter takes.
            columns_here = tl.where((y >= 0) & (y < height), width, 0)
            ok = (column >= 0) & (column < columns_here)
            tile = tl.load(
                x_rows + y.to(tl.int64) * x_y + (dx - HALF) * x_x, mask=ok[:, None] & lane, other=0.0
            ).to(tl.float32)
            updated = ()
            for row in tl.static_range(ROWS):
                total = sums[row]
                if (i >= row) and (i < row + KERNEL):
                    total += tile * taps[i - row]
                updated = updated + (total,)  # noqa: RUF005
            sums = updated

    for row in tl.static_range(ROWS):
        y = (first + row).to(tl.int64)
        total = sums[row]
        ok = (x < tl.where(y < height, width, 0))[:, None] & lane
        if ADD:
            a_rows = add_ptr + b * a_b + y * a_y + (x.to(tl.int64) * a_x)[:, None] + (wide_c * a_c)[None, :]
            total += tl.load(a_rows, mask=ok, other=0.0).to(tl.float32)
        o_rows = out_ptr + b * o_b + y * o_y + (x.to(tl.int64) * o_x)[:, None] + c[None, :]
        tl.store(o_rows, total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def depthwise_wgrad_kernel(
    x_ptr, grad_ptr, sums_ptr,
    x_b, x_y, x_x, x_c, g_b, g_y, g_x, g_c, height, width, rows, rows_per_sum,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: partial sums x rows of the filter x blocks of channels, all on the first axis.

    A program goes through its share of the rows of all images and keeps the sums of one row of the
    filter; those of the first row also sum the gradient itself, for the bias. Every partial sum is
    ``[KERNEL * KERNEL + 1, CHANNELS]``, the bias last.
    """
    HALF: tl.constexpr = KERNEL // 2
    GROUPS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = (pid % GROUPS) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // GROUPS
    dy = pid % KERNEL
    part = pid // KERNEL
    lane = (c < CHANNELS)[None, :]
    wide_c = c.to(tl.int64)  # channels of NCHW maps are far apart

    zeros = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    sums = (zeros,) * KERNEL
    bias = zeros
    for row in range(part * rows_per_sum, tl.minimum((part + 1) * rows_per_sum, rows)):
        b = (row // height).to(tl.int64)
        y = (row % height).to(tl.int64)
        source = y + dy - HALF
        columns_here = tl.where((source >= 0) & (source < height), width, 0)
        for first in range(0, width, BLOCK_X):
            x = first + tl.arange(0, BLOCK_X)
            g_rows = grad_ptr + b * g_b + y * g_y + (x.to(tl.int64) * g_x)[:, None] + (wide_c * g_c)[None, :]
            grad = tl.load(g_rows, mask=(x < width)[:, None] & lane, other=0.0).to(tl.float32)
            bias += grad
            x_rows = (
                x_ptr + b * x_b + source * x_y + (x.to(tl.int64) * x_x)[:, None] + (wide_c * x_c)[None, :]
            )
            updated = ()
            for dx in tl.static_range(KERNEL):
                ok = (x + dx - HALF >= 0) & (x + dx - HALF < columns_here)
                tile = tl.load(x_rows + (dx - HALF) * x_x, mask=ok[:, None] & lane, other=0.0)
                updated = updated + (sums[dx] + grad * tile.to(tl.float32),)  # noqa: RUF005
            sums = updated

    out = sums_ptr + part.to(tl.int64) * (KERNEL * KERNEL + 1) * CHANNELS + c
    for dx in tl.static_range(KERNEL):
        tl.store(out + (dy * KERNEL + dx) * CHANNELS, tl.sum(sums[dx], 0), mask=c < CHANNELS)
    bias_channels = tl.where(dy == 0, CHANNELS, 0)
    tl.store(out + KERNEL * KERNEL * CHANNELS, tl.sum(bias, 0), mask=c < bias_channels)


# --- launchers --------------------------------------------------------------------------------


def launch_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, *, reverse: bool
) -> Tensor:
    """Launch `depthwise_fwd_kernel`; ``reverse`` gives the gradient of the input from that of the output."""
    batch, height, width, channels = x.shape
    kernel = weight.shape[-1]
    out = torch.empty((batch, height, width, channels), dtype=x.dtype, device=x.device)
    found = settings_of("depthwise_fwd", x, kernel)
    rows, block_x, block_c = found["rows"], found["block_x"], found["block_c"]
    grid = (batch * ceil_div(height, rows) * ceil_div(width, block_x) * ceil_div(channels, block_c),)
    # Taps side by side would be one memory line each: their channels are put side by side instead.
    taps = weight.reshape(channels, -1).t().contiguous()
    with on_device_of(x):
        sizes = {
            "CHANNELS": channels, "KERNEL": kernel, "REVERSE": reverse, "HAS_BIAS": bias is not None,
            "ADD": add is not None, "ROWS": rows, "BLOCK_X": block_x, "BLOCK_C": block_c,
            "num_warps": found["num_warps"], "num_stages": 1,
        }  # fmt: skip
        added = out if add is None else add
        launch_kernel(
            depthwise_fwd_kernel, grid, (x, taps, taps if bias is None else bias, added, out),
            (*x.stride(), 1, channels, *added.stride(), *out.stride()[:3], height, width),
            lambda: sizes, *sizes.values(),
        )  # fmt: skip
    return out


def launch_wgrad(x: Tensor, grad: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Launch `depthwise_wgrad_kernel` and add its partial sums: the gradients of weight and bias, float32."""
    batch, height, width, channels = x.shape
    found = settings_of("depthwise_wgrad", x, kernel)
    per_sum = max(_ROWS_PER_SUM, ceil_div(batch * height, _PARTIAL_SUMS))
    parts = ceil_div(batch * height, per_sum)
    sums = torch.empty((parts, kernel * kernel + 1, channels), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        sizes = {
            "CHANNELS": channels, "KERNEL": kernel, "BLOCK_X": found["block_x"], "BLOCK_C": found["block_c"],
            "num_warps": found["num_warps"], "num_stages": 1,
        }  # fmt: skip
        launch_kernel(
            depthwise_wgrad_kernel, (parts * kernel * ceil_div(channels, found["block_c"]),), (x, grad, sums),
            (*x.stride(), *grad.stride(), height, width, batch * height, per_sum),
            lambda: sizes, *sizes.values(),
        )  # fmt: skip
    total = sums.sum(0)
    return total[:-1].t().contiguous().view(channels, 1, kernel, kernel), total[-1].clone()


# --- operators --------------------------------------------------------------------------------


@library.custom_op("bratune::depthwise", mutates_args=())
def depthwise_op(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    """`bratune.kernels.depthwise.depthwise` in strips, as an operator."""
    return launch_depthwise(x, weight, bias, add, reverse=False)


@library.custom_op("bratune::depthwise_backward", mutates_args=())
def _depthwise_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = weight.shape[-1]
    d_x = launch_depthwise(grad, weight, None, None, reverse=True) if wants_x else grad.new_empty(0)
    if wants_weight:
        d_weight, d_bias = launch_wgrad(x, grad, kernel)
    else:
        d_weight, d_bias = grad.new_empty(0, dtype=torch.float32), grad.new_empty(0, dtype=torch.float32)
    return d_x, d_weight, d_bias


@depthwise_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_depthwise_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape if wants_x else 0),
        grad.new_empty(weight.shape if wants_weight else 0, dtype=torch.float32),
        grad.new_empty(weight.shape[0] if wants_weight else 0, dtype=torch.float32),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, add = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.add_dtype = None if add is None else add.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_add = ctx.needs_input_grad
    d_x, d_weight, d_bias = _depthwise_backward_op(grad, x, weight, wants_x, wants_weight or wants_bias)
    return (
        d_x.to(x.dtype) if wants_x else None,
        d_weight.to(weight.dtype) if wants_weight else None,
        d_bias.to(ctx.bias_dtype) if wants_bias else None,
        grad.to(ctx.add_dtype) if wants_add else None,
    )


depthwise_op.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.bratune.depthwise)
def _forward_flops(x: torch.Size, weight: torch.Size, *args: object, **kwargs: object) -> int:
    """Operations as PyTorch counts them for a convolution."""
    return 2 * x.numel() * weight[-1] * weight[-2]


@register_flop_formula(torch.ops.bratune.depthwise_backward)
def _backward_flops(
    grad: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    wants_x: bool,
    wants_weight: bool,
    *args: object,
    **kwargs: object,
) -> int:
    """Operations of the gradients that are asked for."""
    return _forward_flops(grad, weight) * (wants_x + wants_weight)
