"""Fewer operations with the same result: norms and factors folded into the layer beside them.

All folds are exact in real numbers; in floating point they round differently by about one unit of the
data type. They are for inference: batch statistics are taken as constants. Sums are held in float64.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["conv_then_norm", "norm_then_conv", "norm_then_linear", "scale_shift"]

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def scale_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm in evaluation as ``scale * x + shift`` per channel, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.detach(), shift.detach()


def conv_then_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that does what the convolution and the batch norm after it do."""
    scale, shift = scale_shift(norm)
    weight = conv.weight.double() * scale[:, None, None, None]
    return _with(conv, weight, _bias(conv) * scale + shift)


def norm_then_conv(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """One convolution that does what the batch norm and the convolution after it do.

    Exact without padding alone: padding is added after the norm, and zero is not what the norm makes of zero.
    """
    assert not any(conv.padding)
    assert conv.groups == 1
    scale, shift = scale_shift(norm)
    weight = conv.weight.double()
    bias = _bias(conv) + (weight * shift[None, :, None, None]).sum((1, 2, 3))
    return _with(conv, weight * scale[None, :, None, None], bias)


def norm_then_linear(norm: nn.BatchNorm2d, linear: nn.Linear) -> nn.Linear:
    """One linear layer on pooled channels that does what the batch norm before pooling and the layer do.

    The mean over a map commutes with the norm, which treats every token alike.
    """
    scale, shift = scale_shift(norm)
    weight = linear.weight.double()
    return _with(linear, weight * scale, _bias(linear) + weight @ shift)


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    rows = layer.weight.shape[0]
    return (
        torch.zeros(rows, device=layer.weight.device).double() if layer.bias is None else layer.bias.double()
    )


def _with(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    """A copy of a layer with other numbers, in the data type that it had."""
    folded = copy.deepcopy(layer)
    folded.weight = nn.Parameter(weight.to(layer.weight.dtype).detach(), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(layer.weight.dtype).detach(), requires_grad=False)
    return folded
