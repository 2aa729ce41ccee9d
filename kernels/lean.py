"""Parts of a block that keep less for the backward pass, with the gradients of the plain ones.

Autograd keeps whatever an operation might need again. Two results of a block are cheap to compute once
more: the output of a norm, from its input and two numbers per token, and that of GELU, from its input. The
functions here keep neither, and add residuals and their gradients in place.
`bratune.kernels.backbone.Backbone.set_lean` switches a model to them, and in float32 on a CPU to whole
blocks in C (`bratune.kernels.native.training`).

Under autocast they compute what the plain operations do: norms in the data type of their weights, products in
that of autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.kernels.constants import kept
from bratune.kernels.depthwise import depthwise
from bratune.kernels.dispatch import refuse_second_derivative
from bratune.kernels.nhwc import to_nchw, to_nhwc

__all__ = ["add_conv", "add_mlp", "norm_linear"]


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear | nn.Conv2d) -> Tensor:
    """``linear(norm(x))`` over the last dimension; keeps x alone.

    Args:
        x: ``[B, H, W, C]``.
        norm: Over the last dimension.
        linear: A linear layer or a 1x1 convolution.
    """
    arguments = (x, norm.weight, norm.bias, linear.weight.flatten(1), linear.bias, norm.eps, _lower(x))
    out: Tensor = _NormLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def add_mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    widen: nn.Linear | nn.Conv2d,
    narrow: nn.Linear | nn.Conv2d,
    mask: Tensor | None = None,
) -> Tensor:
    """``x + mask * narrow(gelu(widen(norm(x))))``; keeps x and the hidden channels before GELU.

    Args:
        x: ``[B, H, W, C]``.
        norm: Over the last dimension.
        widen: To the hidden channels: a linear layer or a 1x1 convolution.
        narrow: Back from them.
        mask: A factor per image ``[B, 1, 1, 1]``, without gradient; None is 1.
    """
    out: Tensor = _AddMLP.apply(  # type: ignore[no-untyped-call]
        x,
        norm.weight,
        norm.bias,
        widen.weight.flatten(1),
        widen.bias,
        narrow.weight.flatten(1),
        narrow.bias,
        mask,
        norm.eps,
        _lower(x),
    )
    return out


def add_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``x + conv(x)`` on an NHWC map, for a depthwise convolution with an odd side that keeps the map's size.

    In float32 and float64 on a CPU the centre of the kernel adds x, forward and backward, instead of two
    passes over the map. Half precision would round the small weight there beside the 1, and TF32 on a GPU the
    map: those add, in the same kernel where the strips convolve.
    """
    exact = x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu" and _lower(x) is None
    if not exact:
        return depthwise(x, conv.weight, conv.bias, add=x)
    nchw = to_nchw(x)
    weight = conv.weight + _identity(conv.weight.shape[-1], x.dtype, x.device)
    return to_nhwc(F.conv2d(nchw, weight, conv.bias, padding=conv.padding, groups=conv.groups))


@kept
def _identity(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The kernel that changes nothing, ``[1, 1, side, side]``."""
    kernel = torch.zeros(1, 1, side, side, dtype=dtype, device=device)
    kernel[..., side // 2, side // 2] = 1.0
    return kernel


def _lower(x: Tensor) -> torch.dtype | None:
    """The data type in which autocast multiplies; None without autocast."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _cast(tensor: Tensor | None, lower: torch.dtype | None) -> Any:
    return tensor if tensor is None or lower is None else tensor.to(lower)


def _normed(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised map, and mean and inverse deviation per token."""
    found: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
        x.to(gain.dtype), gain.shape, gain, shift, eps
    )
    return found


def _norm_grads(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, shift: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad.to(gain.dtype), x.to(gain.dtype), gain.shape, mean, rstd, gain, shift, needs
    )
    return found


def _linear_grads(
    grad: Tensor, x: Tensor, weight: Tensor, lower: torch.dtype | None, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of a linear layer's input, weight and bias."""
    rows = grad.flatten(0, -2)
    of_weight = (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if needs[0] else None
    of_bias = rows.sum(0).to(weight.dtype) if needs[1] else None
    return grad @ _cast(weight, lower), of_weight, of_bias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        lower: torch.dtype | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, mean, rstd = _normed(x, gain, shift, eps)
            out = F.linear(_cast(y, lower), _cast(weight, lower), _cast(bias, lower))
        ctx.save_for_backward(x, mean, rstd, gain, shift, weight)
        ctx.eps, ctx.lower = eps, lower
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("lean", "set_lean(False) has one")
        x, mean, rstd, gain, shift, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            y = _cast(_normed(x, gain, shift, ctx.eps)[0], ctx.lower)
            of_y, of_weight, of_bias = _linear_grads(grad, y, weight, ctx.lower, needs[3:5])
            of_x, of_gain, of_shift = _norm_grads(of_y, x, mean, rstd, gain, shift, list(needs[:3]))
        return _as(of_x, x), of_gain, of_shift, of_weight, of_bias, None, None


class _AddMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        mask: Tensor | None,
        eps: float,
        lower: torch.dtype | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, mean, rstd = _normed(x, gain, shift, eps)
            hidden = F.linear(_cast(y, lower), _cast(w1, lower), _cast(b1, lower))
            out = F.linear(F.gelu(hidden), _cast(w2, lower), _cast(b2, lower))
            if mask is not None:
                out.mul_(mask)
            out = out.add_(x) if torch.promote_types(out.dtype, x.dtype) == out.dtype else x + out
        ctx.save_for_backward(x, mean, rstd, hidden, gain, shift, w1, w2, mask)
        ctx.eps, ctx.lower = eps, lower
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("lean", "set_lean(False) has one")
        x, mean, rstd, hidden, gain, shift, w1, w2, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            branch = (grad if mask is None else grad * mask).to(hidden.dtype)
            of_hidden, of_w2, of_b2 = _linear_grads(branch, F.gelu(hidden), w2, ctx.lower, needs[5:7])
            of_hidden = torch.ops.aten.gelu_backward(of_hidden, hidden)
            y = _cast(_normed(x, gain, shift, ctx.eps)[0], ctx.lower)
            of_y, of_w1, of_b1 = _linear_grads(of_hidden, y, w1, ctx.lower, needs[3:5])
            of_x, of_gain, of_shift = _norm_grads(of_y, x, mean, rstd, gain, shift, list(needs[:3]))
            if needs[0]:
                of_x = _as(of_x, x).add_(grad)
        return of_x, of_gain, of_shift, of_w1, of_b1, of_w2, of_b2, None, None, None


def _as(grad: Tensor | None, x: Tensor) -> Any:
    return None if grad is None else grad.to(x.dtype)
