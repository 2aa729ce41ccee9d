"""Depthwise convolution of a token map: LePE (5x5) and the position embedding (3x3), on NHWC tensors.

Two ways to compute it stand behind one function: ``torch``, PyTorch's own convolution on the channels-last
view of the map, and ``triton``, the strips of `bratune.kernels.fused.depthwise`. ``auto`` is ``torch``
wherever no measured entry of the launch table says otherwise.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bratune.errors import ProblemError, UnknownNameError, UnsupportedError
from bratune.kernels import layout
from bratune.kernels.constants import constant_in_graphs
from bratune.kernels.dispatch import is_observed
from bratune.kernels.fused import launch

__all__ = ["DEPTHWISE", "KERNEL_SIZES", "depthwise", "depthwise_class", "settings_of", "why_not"]

# Ways to compute `depthwise`; ``auto`` is the first unless a measured entry names the second.
DEPTHWISE = ("torch", "triton")
# Sides of the filter that the strips are unrolled for.
KERNEL_SIZES = (3, 5, 7)


def why_not(x: Tensor, weight: Tensor) -> tuple[str, ...]:
    """Every reason for which the strips cannot convolve these tensors; empty: they can."""
    reasons: tuple[str, ...] = _reasons(str(x.device), x.dtype, weight.dtype, tuple(weight.shape[2:]))
    return reasons


@constant_in_graphs
def _reasons(
    device: str, x_dtype: torch.dtype, weight_dtype: torch.dtype, sides: tuple[int, ...]
) -> tuple[str, ...]:
    reasons = launch.not_here(device)
    known = (torch.float16, torch.bfloat16, torch.float32)
    if x_dtype not in known or weight_dtype not in known:
        reasons.append(
            f"x is {x_dtype} and weight is {weight_dtype}; float16, bfloat16 and float32 are computed"
        )
    if sides[-1] not in KERNEL_SIZES:
        sizes = ", ".join(f"{size}x{size}" for size in KERNEL_SIZES)
        reasons.append(f"the filter is {sides[0]}x{sides[1]}; {sizes} are computed")
    return tuple(reasons)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The depthwise convolution of a map with stride 1 and zeros around it, differentiable.

    Plain PyTorch::

        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=K // 2, groups=C).permute(0, 2, 3, 1)
        return y if add is None else add + y

    Args:
        x: ``[B, H, W, C]``, any strides.
        weight: ``[C, 1, K, K]`` with an odd K, as ``nn.Conv2d`` holds it.
        bias: ``[C]``.
        add: ``[B, H, W, C]``, a map that the result is added to.
        backend: One of `DEPTHWISE`, or ``auto``.

    Returns:
        ``[B, H, W, C]`` in the dtype of x; ``triton`` sums in float32 and rounds once.

    Raises:
        ProblemError: the shapes do not fit.
        UnknownNameError: no backend has this name.
        UnsupportedError: ``triton`` was asked for and cannot convolve these tensors.
    """
    if backend not in ("auto", *DEPTHWISE):
        raise UnknownNameError("depthwise backend", backend, ("auto", *DEPTHWISE))
    (channels,), filters = layout.settled(x.shape[-1:]), layout.settled(weight.shape)
    kernel = filters[-1]
    if x.ndim != 4 or filters != (channels, 1, kernel, kernel) or kernel % 2 == 0:
        raise ProblemError(
            f"depthwise needs x [B, H, W, C] and weight [C, 1, K, K] with an odd K, "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if backend == "triton" and (reasons := why_not(x, weight)):
        raise UnsupportedError("triton", reasons, f"a {kernel}x{kernel} depthwise convolution")
    if backend == "auto" and x.is_cuda and not why_not(x, weight):
        shape = (layout.batch_to_choose_by(x.shape[0]), *layout.settled(x.shape[1:]))
        backend = _measured_choice(shape, kernel, x.element_size(), x.device.index or 0)
    if backend == "triton":
        from bratune.kernels.fused.depthwise import depthwise_op, launch_depthwise

        if torch.is_grad_enabled() or is_observed(x):
            out: Tensor = depthwise_op(x, weight, bias, add)
            return out
        return launch_depthwise(x, weight, bias, add, reverse=False)
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        padding=kernel // 2,
        groups=channels,
    ).permute(0, 2, 3, 1)
    return y if add is None else add + y


# --- settings of the strips ---------------------------------------------------------------------


def depthwise_class(
    batch: int, height: int, width: int, channels: int, kernel: int, item_bytes: int
) -> dict[str, int]:
    """What the best settings depend on; the counterpart of `bratune.kernels.fused.launch.problem_class`."""
    return {
        "kernel_size": kernel,
        "item_bytes": item_bytes,
        "tile_channels": min(64, launch.next_power_of_2(channels)),
        "height": height,
        "width": width,
        "channels": channels,
        "programs": launch.next_power_of_2(batch * height * width),
    }


def settings_of(kind: str, x: Tensor, kernel: int) -> dict[str, int]:
    """Launch settings of ``depthwise_fwd`` or ``depthwise_wgrad`` on a map ``[B, H, W, C]``."""
    name = _architecture(x.device.index or 0) if x.is_cuda else ""
    return dict(_settings(kind, tuple(x.shape), kernel, x.element_size(), name))


@constant_in_graphs
def _measured_choice(shape: tuple[int, ...], kernel: int, item_bytes: int, device: int) -> str:
    """The strips where a measured entry of the launch table found them faster, else PyTorch's."""
    found = _settings("depthwise_fwd", shape, kernel, item_bytes, _architecture(device))
    return DEPTHWISE[found.get("faster_than_torch", 0)]


def _architecture(device: int) -> str:
    return launch.architecture(torch.cuda.get_device_capability(device))


@functools.lru_cache(maxsize=1024)
def _settings(
    kind: str, shape: tuple[int, ...], kernel: int, item_bytes: int, architecture: str
) -> dict[str, int]:
    batch, height, width, channels = shape
    what = depthwise_class(batch, height, width, channels, kernel, item_bytes)
    rules = {"block_x": 8, "block_c": max(16, what["tile_channels"]), "num_warps": 4}
    if kind == "depthwise_fwd":
        # Eight rows take a third fewer loads per output than four, and leave 8 to 12 warps on an SM.
        rules["rows"] = 8 if height > 4 else 4
    return rules | dict(launch.lookup(kind, what, architecture) or {})
