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

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from bratune.errors import ProblemError
from bratune.kernels import layout
from bratune.kernels.constants import constant_in_graphs
from bratune.kernels.dispatch import is_exported, is_recorded
from bratune.kernels.native import block as native_block
from bratune.kernels.native import whole as native_whole
from bratune.kernels.nhwc import to_nchw, to_nhwc
from bratune.kernels.norm import layer_norm

__all__ = [
    "Frozen",
    "FrozenConv",
    "FrozenLinear",
    "FrozenNorm",
    "accumulates",
    "packs",
    "refuse_another_form",
]


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


class Derived:
    """What is made of tensors: once, and anew wherever one of them has changed. No copy takes it along."""

    def __init__(self) -> None:
        self.stamps: list[tuple[Tensor | None, int]] = []
        self.value: Any = None

    def get(self, make: Callable[[], Any], *sources: Tensor | None) -> Any:
        """What ``make`` makes of these tensors as they are now."""
        stamps = [(x, 0 if x is None or x.is_inference() else x._version) for x in sources]
        known = len(stamps) == len(self.stamps) and all(
            x is held and version == last
            for (x, version), (held, last) in zip(stamps, self.stamps, strict=True)
        )
        if not known:
            self.value, self.stamps = make(), stamps
        return self.value

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


class Frozen(nn.Module):
    """Weights as they were, for one device and data type.

    They may be loaded again; what is packed of them is packed anew wherever they have changed.

    Attributes:
        pack: Pack the weight for oneDNN where `packs`.
        native: Use the C kernels for CPUs.
    """

    weight: Tensor | None

    def __init__(self, *, pack: bool) -> None:
        super().__init__()
        self.pack = pack
        self.native = False
        self._packed = Derived()
        self._native = Derived()

    @property
    def packed(self) -> Tensor | None:
        """The weight in the order of oneDNN; None where that is not used, and in a graph that is recorded."""
        weight = self.weight
        if not self.pack or weight is None or is_recorded():
            return None
        found: Tensor | None = self._packed.get(
            lambda: self._packing(weight) if packs(weight) else None, weight
        )
        return found

    def natively(self, make: Callable[[], Any], *sources: Tensor | None) -> Any:
        """What the C kernels read; None where they are not used, and in a graph for other tools."""
        if not self.native or is_exported():
            return None
        return make() if is_recorded() else self._native.get(make, *sources)

    def _packing(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.weight is not None:
            refuse_another_form(self.weight, fn)
        done: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return done

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if self.weight is not None and given is not None and given.dtype != self.weight.dtype:
            raise ProblemError(
                f"{prefix}weight is {given.dtype} in the file and {self.weight.dtype} here, and an optimized "
                "model of another data type has other weights; load the plain model, then optimize it"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def refuse_another_form(weight: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise where a conversion, as `nn.Module.to` makes them, changes the device or the data type.

    Raises:
        ProblemError: the weights are folded, scaled and ordered for the ones that they have.
    """
    with torch.no_grad():
        there = fn(weight.new_empty(0))
    if (there.device, there.dtype) != (weight.device, weight.dtype):
        raise ProblemError(
            f"an optimized model is made for {weight.dtype} on {weight.device} and cannot go to "
            f"{there.dtype} on {there.device}; move the plain model, then optimize it"
        )


class FrozenLinear(Frozen):
    """``x @ weight.T + bias`` over the last dimension, without gradients.

    Args:
        weight: ``[out, in]``, or that of a 1x1 convolution.
        bias: ``[out]`` or None.
        pack: Pack the weight for oneDNN where `packs`; off for a model that is compiled or moved later.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, pack: bool = True) -> None:
        super().__init__(pack=pack)
        self.accumulating = False
        self.register_buffer(
            "weight", weight.detach().flatten(1).clone(memory_format=torch.contiguous_format)
        )
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.outputs, self.inputs = self.weight.shape

    def use_native(self) -> None:
        """Multiply by the C kernels for CPUs, alone and in a block's call, where they have products for it.

        The weight then lies as they read it, seen as ``[out / 16, 16, ...]``: there is no other copy.
        """
        if native_whole.can_multiply(self.weight):
            self.native, self.pack = True, False
            self.weight = native_whole.pack_linear(self.weight).transpose(1, 2)

    @property
    def matrix(self) -> Tensor:
        """The weight ``[out, in]``; a copy where it lies in panels."""
        return self.weight if self.weight.ndim == 2 else self.weight.reshape(self.outputs, self.inputs)

    def panels(self) -> native_whole.Linear:
        """Weight and bias as the C kernels read them."""

        def make() -> native_whole.Linear:
            bias = None if self.bias is None else self.bias.float()
            return self.weight.transpose(1, 2).contiguous(), bias

        found: native_whole.Linear = (
            make() if is_recorded() else self._native.get(make, self.weight, self.bias)
        )
        return found

    def _products(self, x: Tensor) -> native_whole.Linear | None:
        """What the C kernels multiply this map by; None where they are not asked."""
        here = self.native and x.device.type == "cpu" and x.dtype == self.weight.dtype and not is_exported()
        return self.panels() if here else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.matrix

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if self.native and given is not None and given.shape == (self.outputs, self.inputs):
            state_dict[f"{prefix}weight"] = native_whole.pack_linear(given).transpose(1, 2)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _packing(self, weight: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return found

    def accumulate(self) -> Tensor:
        """Let `add` write into its second argument from now on, and leave the bias to the caller.

        Returns:
            The bias, ``[out]`` in float64.
        """
        bias = self.weight.new_zeros(self.outputs) if self.bias is None else self.bias
        self.accumulating, self.bias = True, None
        return bias.double()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        products = self._products(x)
        if products is not None:
            return native_whole.linear(x, products)
        packed = self.packed
        if packed is None:
            return F.linear(x, self.matrix, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "none")
        return out

    def gelu(self, x: Tensor) -> Tensor:
        """`forward`, then GELU."""
        packed = self.packed
        if packed is not None:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "gelu", [], "none")
            return out
        if x.is_cuda and x.dtype == torch.bfloat16 and self.bias is not None:
            flat = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
            return flat.view(*x.shape[:-1], -1)
        return torch.ops.aten.gelu_(self(x))  # type: ignore[no-any-return]

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """`forward` plus another tensor of the output's shape, which `accumulate` lets be overwritten."""
        products = self._products(x)
        if products is not None:
            return native_whole.linear(x, products, add=other)
        if self.accumulating:
            other.view(-1, other.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), self.matrix.t())
            return other
        packed = self.packed
        if packed is not None:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, self.bias, "add")
            return out
        return self(x).add_(other)  # type: ignore[no-any-return]


class FrozenConv(Frozen):
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
        super().__init__(pack=pack)
        self.named = native_whole.Named()
        self.named.belong_to(self)
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
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.named.belong_to(self)

    def use_native(self) -> None:
        """Convolve by the C kernels for CPUs, where this convolution is one of theirs."""
        side = self.weight.shape[-1]
        same = self.geometry["padding"] == (side // 2, side // 2) and self.geometry["dilation"] == (1, 1)
        self.native = (
            self.is_depthwise
            and same
            and self.weight.shape[2] == side
            and native_block.can_convolve(self.weight)
        )

    @property
    def strips(self) -> native_whole.Strips | None:
        """Weight and bias as the C kernels read them."""
        weight, bias = self.weight, self.bias
        found: native_whole.Strips | None = self.natively(
            lambda: (native_block.pack_depthwise(weight), None if bias is None else bias.float()),
            weight,
            bias,
        )
        return found

    def _packing(self, weight: Tensor) -> Tensor:
        # Otherwise oneDNN orders the weight at every call: at 3x3x256x512, longer than it convolves.
        found: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry.values())
        return found

    def raise_by(self, lead: Tensor) -> None:
        """Add a vector, ``[out]``, to every token of the output, at no cost."""
        bias = 0.0 if self.bias is None else self.bias.double()
        self.bias = (lead.double() + bias).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, in]`` to ``[B, H', W', out]``."""
        strips = self.strips
        if strips is not None:
            return native_block.depthwise(x, *strips, add=x if self.adds_input else None)
        if x.is_cuda and self.is_depthwise:
            return self._depthwise(x, x if self.adds_input else None)
        out = self._convolve(x)
        return out.add_(x) if self.adds_input else out

    def gelu(self, x: Tensor) -> Tensor:
        """`forward`, then GELU."""
        if not self.adds_input and (self.packed is not None or self._is_operator(x)):
            return self._convolve(x, "gelu")
        return torch.ops.aten.gelu_(self(x))  # type: ignore[no-any-return]

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution plus another map of the output's shape, in one operation where there is one.

        Args:
            x: The input.
            other: Contiguous, in its own memory, and overwritten: nobody needs it afterwards.
        """
        strips = self.strips
        if strips is not None:
            return native_block.depthwise(x, *strips, add=other, out=other)
        packed = self.packed
        if packed is not None:
            torch.ops.mkldnn._convolution_pointwise_.binary(
                to_nchw(other),
                to_nchw(x.contiguous()),
                packed,
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
        packed = self.packed
        if self._is_operator(x):
            size = [x.shape[0], *self._sides(*layout.sides(x)), len(self.weight)]
            convolved: Tensor = torch.ops.bratune.packed_convolution(x, self.named.name, then, size)
            return convolved
        if packed is None:
            return to_nhwc(F.conv2d(to_nchw(x), self.weight, self.bias, **self.geometry))
        # A slice of channels would be copied inside, where nobody counts it.
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            to_nchw(x.contiguous()), packed, self.bias, *self.geometry.values(), then, [], "none"
        )
        return to_nhwc(out)

    def _is_operator(self, x: Tensor) -> bool:
        """Whether it is an operator of a compiled graph, which itself cannot hold a packed weight."""
        here = self.pack and is_recorded() and not is_exported()
        return here and _packs_there(x.device.type, str(self.weight.dtype))

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        g, (rows, cols) = self.geometry, self.weight.shape[2:]
        filters = (rows, cols)
        taken = [
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, p, d, k, s in zip(
                (height, width), g["padding"], g["dilation"], filters, g["stride"], strict=True
            )
        ]
        return taken[0], taken[1]


@constant_in_graphs
def _packs_there(device: str, dtype: str) -> bool:
    return packs(torch.empty(0, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device))


library.define("bratune::packed_convolution", "(Tensor x, str conv, str then, SymInt[] size) -> Tensor")


def _packed_convolution(x: Tensor, name: str, then: str, size: Sequence[int]) -> Tensor:
    out: Tensor = native_whole.named(name)._convolve(x, then)
    return out.contiguous()


library.impl("bratune::packed_convolution", "CPU", _packed_convolution)


@library.register_fake("bratune::packed_convolution")
def _packed_convolution_fake(x: Tensor, name: str, then: str, size: Sequence[int]) -> Tensor:
    return x.new_empty(size)


class FrozenNorm(Frozen):
    """LayerNorm of an NHWC map that may hold more than it says, without gradients.

    Args:
        norm: Where numbers come from.
        lead: ``[C]``, what every token of the map has too much; None for nothing.
    """

    weight: Tensor | None
    bias: Tensor | None
    shift: Tensor | None

    def __init__(self, norm: nn.LayerNorm, lead: Tensor | None = None) -> None:
        super().__init__(pack=False)
        self.eps = norm.eps
        for name in ("weight", "bias"):
            tensor = getattr(norm, name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        wide = torch.float64 if norm.weight.dtype == torch.float64 else torch.float32
        self.register_buffer("shift", None if lead is None else -lead.to(wide))

    def use_native(self) -> None:
        """Normalise by the C kernels for CPUs, where nothing is shifted and no means are wanted."""
        self.native = self.shift is None

    def vectors(self) -> native_whole.Norm:
        """Weight, bias and eps as the C kernels read them."""
        weight, bias = (None if v is None else v.float() for v in (self.weight, self.bias))
        return native_whole.Norm(weight, bias, self.eps)

    def forward(self, x: Tensor, region: tuple[int, int] | None = None) -> tuple[Tensor, Tensor | None]:
        """``[B, H, W, C]`` to the same, and the means of its regions where a region is given."""
        held = (self.weight, self.bias)
        vectors = self.natively(lambda: [None if v is None else v.float() for v in held], *held)
        if vectors is not None and region is None:
            return native_block.layer_norm(x, *vectors, eps=self.eps), None
        return layer_norm(x, self.weight, self.bias, eps=self.eps, shift=self.shift, region=region)
