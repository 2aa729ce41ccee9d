"""LayerNorm of several tokens per program, as one operator; chosen by `bratune.kernels.norm`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# The language of kernels has no types for its tensors.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from bratune.kernels.dispatch import on_device_of
from bratune.kernels.fused.call import is_compiled_in
from bratune.kernels.fused.direct import launch_kernel
from bratune.kernels.fused.tiles import SIZES, known
from bratune.problem import ceil_div

__all__ = ["launch_layer_norm", "layer_norm_op"]

# Numbers that a program holds at a time: sixteen for each thread of four warps.
_TILE = 2048


@triton.jit
def _normalized(
    rows, real, weight_ptr, bias_ptr, shift_ptr, c, lane, eps,
    CHANNELS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """LayerNorm of the tokens at ``rows`` [T], [T, C] in float32; zero where there is no token."""
    inside = real[:, None] & lane[None, :]
    x = tl.load(rows[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        x += tl.load(shift_ptr + c, mask=lane, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(x, 1) / CHANNELS
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / CHANNELS
    y = centred * (1.0 / tl.sqrt(variance + eps))[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + c, mask=lane, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=lane, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside, y, 0.0), inside


@triton.jit(do_not_specialize=SIZES)
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, tokens, eps,
    CHANNELS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of tokens."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    y, inside = _normalized(
        x_ptr + token * CHANNELS, token < tokens, weight_ptr, bias_ptr, shift_ptr, c, c < CHANNELS, eps,
        CHANNELS, HAS_WEIGHT, HAS_BIAS, HAS_SHIFT,
    )  # fmt: skip
    out = y_ptr + (token * CHANNELS)[:, None] + c[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def layer_norm_means_kernel(
    x_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, means_ptr, height, width, rh, rw, eps,
    RH: tl.constexpr, RW: tl.constexpr,
    CHANNELS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: images x regions, on the first axis. A program goes through the tokens of its region."""
    rh, rw = known(rh, RH), known(rw, RW)
    columns = (width + rw - 1) // rw
    regions = columns * ((height + rh - 1) // rh)
    pid = tl.program_id(0)
    region = pid % regions
    b = (pid // regions).to(tl.int64)
    first_y, first_x = (region // columns) * rh, (region % columns) * rw
    c = tl.arange(0, BLOCK_C)
    lane = c < CHANNELS
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rh * rw, BLOCK_T):
        place = start + tl.arange(0, BLOCK_T)
        row, column = first_y + place // rw, first_x + place % rw
        token = (b * height + row) * width + column
        y, inside = _normalized(
            x_ptr + token * CHANNELS, (place < rh * rw) & (row < height) & (column < width),
            weight_ptr, bias_ptr, shift_ptr, c, lane, eps,
            CHANNELS, HAS_WEIGHT, HAS_BIAS, HAS_SHIFT,
        )  # fmt: skip
        total += tl.sum(y, 0)
        out = y_ptr + (token * CHANNELS)[:, None] + c[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside)
    count = tl.minimum(height - first_y, rh) * tl.minimum(width - first_x, rw)
    tl.store(means_ptr + pid.to(tl.int64) * CHANNELS + c, total / count.to(tl.float32), mask=lane)


def launch_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float, region: list[int]
) -> tuple[Tensor, Tensor]:
    """Launch one of the two kernels; see `bratune.kernels.norm.layer_norm`. x is contiguous."""
    y, means = _results(x, region)
    batch, height, width, channels = x.shape
    block_c = triton.next_power_of_2(channels)
    block_t = max(1, _TILE // block_c)
    sizes = {
        "CHANNELS": channels,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SHIFT": shift is not None,
        "BLOCK_C": block_c,
        "num_warps": 4 if block_c <= _TILE else 8,
        "num_stages": 1,
    }
    vectors = tuple(x if tensor is None else tensor for tensor in (weight, bias, shift))
    with on_device_of(x):
        if region:
            block_t = min(block_t, triton.next_power_of_2(region[0] * region[1]))
            rh, rw = region if is_compiled_in((height, width), region) else (0, 0)
            sizes |= {"RH": rh, "RW": rw, "BLOCK_T": block_t}
            launch_kernel(
                layer_norm_means_kernel, (batch * means.shape[1],), (x, *vectors, y, means),
                (height, width, *region, eps), lambda: sizes, *sizes.values(),
            )  # fmt: skip
        else:
            tokens = batch * height * width
            sizes["BLOCK_T"] = block_t
            launch_kernel(
                layer_norm_kernel, (ceil_div(tokens, block_t),), (x, *vectors, y), (tokens, eps),
                lambda: sizes, *sizes.values(),
            )  # fmt: skip
    return y, means


def _results(x: Tensor, region: list[int]) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = x.shape
    regions = ceil_div(height, region[0]) * ceil_div(width, region[1]) if region else 0
    return torch.empty_like(x), x.new_empty((batch, regions, channels), dtype=torch.float32)


@library.custom_op("bratune::layer_norm", mutates_args=())
def layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float, region: list[int]
) -> tuple[Tensor, Tensor]:
    """`bratune.kernels.norm.layer_norm` as an operator; without a region its means are empty."""
    return launch_layer_norm(x, weight, bias, shift, eps, region)


@layer_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float, region: list[int]
) -> tuple[Tensor, Tensor]:
    return _results(x, region)
