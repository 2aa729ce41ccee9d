"""Operations and bytes of a forward pass or a training step, counted while it runs, on any device.

What is counted is every operation that torch dispatches and that computes or copies something: views and
mere allocations are free. Each reads its inputs and writes its outputs once, in memory, at the width of
the data type that is asked for. So a count says how many kernels a GPU has to launch at least without
fusion, and how much activation memory they move; it says nothing about time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["ATTENTION", "Account", "Operation", "count"]

# The name of an attention that is counted as one kernel.
ATTENTION = "scaled_dot_product_attention"

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# These read as much as they write, wherever the rest of their first input is.
SELECTIONS = ("gather", "index", "index_select", "embedding")


@dataclass(frozen=True, order=True)
class Operation:
    """One dispatched operation in numbers.

    Attributes:
        name: Torch's name of it.
        read: Bytes that it reads, weights left out.
        written: Bytes that it writes.
        weights: Bytes of weights that it reads.
        macs: Multiply-adds of a matrix product, a convolution or an attention; 0 for everything else.
        shape: Of a product ``(batch, rows, inner, columns)``; of a convolution ``(groups, input channels of
            a group, output channels of a group, taps)``; of an attention ``(batch, queries, keys,
            channels)``, the heads in the batch. Empty for everything else.
    """

    name: str
    read: int
    written: int
    weights: int = 0
    macs: int = 0
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Account:
    """What a forward pass does.

    Attributes:
        operations: Dispatched operations that compute or copy.
        read_bytes: Bytes that they read, weights left out.
        written_bytes: Bytes that they write.
        weight_bytes: Bytes of weights and buffers that they read.
        by_name: Operations by name, and by name the bytes read and written.
        by_operation: How often each operation ran.
    """

    operations: int
    read_bytes: int
    written_bytes: int
    weight_bytes: int
    by_name: dict[str, tuple[int, int]] = field(repr=False)
    by_operation: dict[Operation, int] = field(repr=False)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations that are read and written."""
        return self.read_bytes + self.written_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of activations and weights."""
        return self.activation_bytes + self.weight_bytes

    def table(self) -> str:
        """Operations by traffic, the most first: name, how many, MB."""
        rows = sorted(self.by_name.items(), key=lambda row: -row[1][1])
        return "\n".join(f"{name:44}{number:6}{moved / 1e6:10.1f}" for name, (number, moved) in rows)


def count(
    call: Callable[[], Any],
    *,
    weights: Iterable[Tensor] | nn.Module = (),
    item_bytes: int = 2,
    gradients: bool = False,
    fused_attention: bool = False,
) -> Account:
    """The account of one call.

    Args:
        call: What to run, e.g. ``lambda: model(x)``; it does run.
        weights: Tensors, or the module whose parameters and buffers, do not count as activations.
        item_bytes: Bytes of a floating-point number: 2 counts a float32 run as bfloat16 would move it.
            Integers count as they are.
        gradients: Let the call run a backward pass, whose operations count too. Gradients of weights
            count as activations.
        fused_attention: Count ``scaled_dot_product_attention`` as the one kernel that a GPU runs, and not
            as what it is composed of where there is none (on meta tensors).
    """
    if isinstance(weights, nn.Module):
        weights = [*weights.parameters(), *weights.buffers()]
    mode = _Counting({_storage(w) for w in weights}, item_bytes)
    with torch.set_grad_enabled(gradients), mode, _Fusing(mode) if fused_attention else nullcontext():
        call()
    found = dict(mode.operations)
    names: dict[str, tuple[int, int]] = {}
    for o, times in found.items():
        number, moved = names.get(o.name, (0, 0))
        names[o.name] = number + times, moved + times * (o.read + o.written)
    return Account(
        operations=sum(found.values()),
        read_bytes=sum(times * o.read for o, times in found.items()),
        written_bytes=sum(times * o.written for o, times in found.items()),
        weight_bytes=sum(times * o.weights for o, times in found.items()),
        by_name=names,
        by_operation=found,
    )


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    def __init__(self, weights: set[int], item_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.item_bytes = item_bytes
        self.operations: Counter[Operation] = Counter()
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = str(func.overloadpacket).removeprefix("aten.")
        if name in ALLOCATIONS or not outputs:
            return result
        known = {_storage(tensor) for tensor in inputs}
        if not func._schema.is_mutable and all(_storage(tensor) in known for tensor in outputs):
            derived = {_storage(t) for t in inputs} & self.weights
            self.weights |= {_storage(t) for t in outputs} if derived else set()
            return result
        flops = flop_registry.get(func.overloadpacket)
        macs = flops(*args, **(kwargs or {}), out_val=result) // 2 if flops else 0
        self.add(name, inputs, outputs, macs, _shape(name, args) if macs else ())
        return result

    def add(
        self, name: str, inputs: list[Tensor], outputs: list[Tensor], macs: int, shape: tuple[int, ...]
    ) -> None:
        written = sum(self._bytes(tensor) for tensor in outputs)
        read = weights = 0
        for position, tensor in enumerate(inputs):
            size = self._bytes(tensor)
            if name in SELECTIONS and position == 0:
                size = written
            if tensor.layout != torch.strided or _storage(tensor) in self.weights:  # packed, or a parameter
                weights += size
            else:
                read += size
        self.operations[Operation(name, read, written, weights, macs, shape)] += 1

    def _bytes(self, tensor: Tensor) -> int:
        """Bytes of the distinct numbers of a tensor: those that a broadcast repeats count once."""
        if tensor.layout != torch.strided:
            return tensor.numel() * self.item_bytes
        numbers = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            numbers *= size if stride else min(size, 1)
        return numbers * (self.item_bytes if tensor.is_floating_point() else tensor.element_size())


class _Fusing(TorchFunctionMode):
    """Counts each attention as one kernel of its three inputs, its mask and its output."""

    def __init__(self, counting: _Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        attends = func is torch.nn.functional.scaled_dot_product_attention
        # The fused kernels take four axes; with more, torch composes the attention of products and a softmax.
        if not attends or inputs[0].dim() != 4:
            return func(*args, **(kwargs or {}))
        self.counting.paused = True
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self.counting.paused = False
        q, k, v = inputs[:3]
        batch = q.numel() // (q.shape[-1] * q.shape[-2])
        shape = batch, q.shape[-2], k.shape[-2], q.shape[-1]
        macs = batch * q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self.counting.add(ATTENTION, inputs, [result], macs, shape)
        return result


def _shape(name: str, args: tuple[Any, ...]) -> tuple[int, ...]:
    """See `Operation.shape`."""
    if "convolution" in name:
        shift = int("backward" in name)  # the gradient of the output comes first
        weight, groups = args[1 + shift], args[8 + shift]
        out, inner, *window = weight.shape
        return groups, inner, out // groups, math.prod(window)
    left, right = [a for a in args if isinstance(a, Tensor) and a.dim() >= 2][-2:]
    batch = left.shape[0] if left.dim() == 3 else 1
    return batch, left.shape[-2], left.shape[-1], right.shape[-1]


def _storage(tensor: Tensor) -> int:
    """What tensors of one memory have in common; a packed weight has a memory of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
