"""Linear layers and convolutions for inference, with what follows them fused where torch itself can.

On a CPU with oneDNN (float32; bfloat16 where the CPU has it), weights are packed once and GELU or the
residual are part of the product. Elsewhere the product is one operation and what follows is done in
place in its fresh output; on CUDA in bfloat16, GELU is part of the product (cuBLASLt's epilogue, which is
the tanh form: it differs from the exact one by less than bfloat16 resolves).

On CUDA a product can be added to the map in its epilogue, but not together with its bias. So the biases of
the products that a block adds are added where the map is written before (see `FrozenLinear.accumulate` and
`FrozenConv.raise_by`), and the norms between take them away again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bratune.kernels.native import block as native_block
from bratune.kernels.nhwc import to_nchw, to_nhwc
from bratune.kernels.norm import layer_norm

__all__ = ["FrozenConv", "FrozenLinear", "FrozenNorm", "accumulates", "packs"]


def accumulates(weight: Tensor) -> bool:
    """Whether products with weights like this one are best added to a map in their epilogue."""
    return weight.is_cuda


def packs(weight: Tensor) -> bool:
    """Whether oneDNN runs layers of this device and data type, with packed weights."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class FrozenLinear(nn.Module):
    """``x @ weight.T + bias`` over the last dimension, without gradients.

    Args:
        weight: ``[out, in]``, or that of a 1x1 convolution.
        bias: ``[out]`` or None.
        pack: Pack the weight for oneDNN where `packs`; off for a model that is compiled or moved later.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, pack: bool = True) -> None:
        super().__init__()
        weight = weight.detach().flatten(1).contiguous()
        self.packed: Tensor | None = None
        if pack and packs(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.accumulating = False
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def accumulate(self) -> Tensor:
        """Let `add` write into its second argument from now on, and leave the bias to the caller.

        Returns:
            The bias, ``[out]`` in float64.
        """
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        self.accumulating, self.bias = True, None
        return bias.double()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "none")
        return out

    def gelu(self, x: Tensor) -> Tensor:
        """`forward`, then GELU."""
        if self.packed is not None:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "gelu", [], "none")
            return out
        if x.is_cuda and x.dtype == torch.bfloat16 and self.bias is not None:
            flat = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
            return flat.view(*x.shape[:-1], -1)
        return torch.ops.aten.gelu_(self(x))  # type: ignore[no-any-return]

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """`forward` plus another tensor of the output's shape, which `accumulate` lets be overwritten."""
        if self.accumulating:
            other.view(-1, other.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), self.weight.t())
            return other
        if self.packed is not None:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "add")
            return out
        return self(x).add_(other)  # type: ignore[no-any-return]


class FrozenConv(nn.Module):
    """A convolution of NHWC maps, without gradients.

    Args:
        conv: Where numbers and geometry come from.
        residual: Add the convolution's input to its output (stride 1, as many channels out as in). In
            float32 and float64 on a CPU the centre of the kernel does it. Half precision would round the
            small weight there beside the 1, and TF32 on a GPU the input: those add instead.
        pack: See `FrozenLinear`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, *, residual: bool = False, pack: bool = True) -> None:
        super().__init__()
        weight = conv.weight.detach().clone(memory_format=torch.channels_last)
        exact = weight.dtype in (torch.float32, torch.float64) and weight.device.type == "cpu"
        self.adds_input = residual and not exact
        if residual and exact:
            assert conv.groups == conv.in_channels == conv.out_channels
            weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] += 1.0
        self.is_depthwise = conv.groups == conv.in_channels and conv.stride == (1, 1)
        self.geometry: dict[str, Any] = {
            "padding": conv.padding,
            "stride": conv.stride,
            "dilation": conv.dilation,
            "groups": conv.groups,
        }
        self.packed: Tensor | None = None
        if pack and packs(weight):
            # Otherwise oneDNN orders the weight at every call: at 3x3x256x512, longer than it convolves.
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry.values())
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self.strips: Tensor | None = None
        self.strips_bias: Tensor | None = None

    def use_native(self) -> None:
        """Convolve by the C kernels for CPUs, where this convolution is one of theirs."""
        side = self.weight.shape[-1]
        same = self.geometry["padding"] == (side // 2, side // 2) and self.geometry["dilation"] == (1, 1)
        if (
            self.is_depthwise
            and same
            and self.weight.shape[2] == side
            and native_block.can_convolve(self.weight)
        ):
            self.strips = native_block.pack_depthwise(self.weight)
            self.strips_bias = None if self.bias is None else self.bias.float()

    def raise_by(self, lead: Tensor) -> None:
        """Add a vector, ``[out]``, to every token of the output, at no cost."""
        bias = 0.0 if self.bias is None else self.bias.double()
        self.bias = (lead.double() + bias).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, in]`` to ``[B, H', W', out]``."""
        if self.strips is not None:
            added = x if self.adds_input else None
            return native_block.depthwise(x, self.strips, self.strips_bias, add=added)
        if x.is_cuda and self.is_depthwise:
            return self._depthwise(x, x if self.adds_input else None)
        out = self._convolve(x)
        return out.add_(x) if self.adds_input else out

    def gelu(self, x: Tensor) -> Tensor:
        """`forward`, then GELU."""
        if self.packed is not None and not self.adds_input:
            return self._convolve(x, "gelu")
        return torch.ops.aten.gelu_(self(x))  # type: ignore[no-any-return]

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution plus another map of the output's shape, in one operation where there is one.

        Args:
            x: The input.
            other: Contiguous, in its own memory, and overwritten: nobody needs it afterwards.
        """
        if self.strips is not None:
            return native_block.depthwise(x, self.strips, self.strips_bias, add=other, out=other)
        if self.packed is not None:
            torch.ops.mkldnn._convolution_pointwise_.binary(
                to_nchw(other),
                to_nchw(x.contiguous()),
                self.packed,
                self.bias,
                *self.geometry.values(),
                "add",
                1.0,
                None,
                [],
                None,
            )
            return other
        if x.is_cuda and self.is_depthwise:
            return self._depthwise(x, other)
        return other.add_(self._convolve(x))

    def _depthwise(self, x: Tensor, add: Tensor | None) -> Tensor:
        """By cuDNN, or in strips where those were measured to be faster."""
        # Triton is no dependency of a CPU.
        from bratune.kernels.depthwise import depthwise

        return depthwise(x, self.weight, self.bias, add=add)

    def _convolve(self, x: Tensor, then: str = "none") -> Tensor:
        """The convolution, and in its packed form what shall follow."""
        if self.packed is None:
            return to_nhwc(F.conv2d(to_nchw(x), self.weight, self.bias, **self.geometry))
        # A slice of channels would be copied inside, where nobody counts it.
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            to_nchw(x.contiguous()), self.packed, self.bias, *self.geometry.values(), then, [], "none"
        )
        return to_nhwc(out)


class FrozenNorm(nn.Module):
    """LayerNorm of an NHWC map that may hold more than it says, without gradients.

    Args:
        norm: Where numbers come from.
        lead: ``[C]``, what every token of the map has too much; None for nothing.
    """

    weight: Tensor | None
    bias: Tensor | None
    shift: Tensor | None

    def __init__(self, norm: nn.LayerNorm, lead: Tensor | None = None) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias"):
            tensor = getattr(norm, name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        wide = torch.float64 if norm.weight.dtype == torch.float64 else torch.float32
        self.register_buffer("shift", None if lead is None else -lead.to(wide))
        self.vectors: tuple[Tensor | None, Tensor | None] | None = None

    def use_native(self) -> None:
        """Normalise by the C kernels for CPUs, where nothing is shifted and no means are wanted."""
        if self.shift is None:
            weight, bias = self.weight, self.bias
            self.vectors = (
                None if weight is None else weight.float(),
                None if bias is None else bias.float(),
            )

    def forward(self, x: Tensor, region: tuple[int, int] | None = None) -> tuple[Tensor, Tensor | None]:
        """``[B, H, W, C]`` to the same, and the means of its regions where a region is given."""
        if self.vectors is not None and region is None:
            return native_block.layer_norm(x, *self.vectors, eps=self.eps), None
        return layer_norm(x, self.weight, self.bias, eps=self.eps, shift=self.shift, region=region)
