"""Operations and bytes of a forward pass or a training step, counted while it runs, on any device.

What is counted is every operation that torch dispatches and that computes or copies something: views and
mere allocations are free. Each reads its inputs and writes its outputs once, in memory, at the width of
the data type that is asked for. So a count says how many kernels a GPU has to launch at least without
fusion, and how much activation memory they move; it says nothing about time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Account", "count"]

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# These read as much as they write, wherever the rest of their first input is.
SELECTIONS = ("gather", "index", "index_select", "embedding")


@dataclass(frozen=True)
class Account:
    """What a forward pass does.

    Attributes:
        operations: Dispatched operations that compute or copy.
        read_bytes: Bytes that they read, weights left out.
        written_bytes: Bytes that they write.
        weight_bytes: Bytes of weights and buffers that they read.
        by_name: Operations by name, and by name the bytes read and written.
    """

    operations: int
    read_bytes: int
    written_bytes: int
    weight_bytes: int
    by_name: dict[str, tuple[int, int]] = field(repr=False)

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
) -> Account:
    """The account of one call.

    Args:
        call: What to run, e.g. ``lambda: model(x)``; it does run.
        weights: Tensors, or the module whose parameters and buffers, do not count as activations.
        item_bytes: Bytes of a floating-point number: 2 counts a float32 run as bfloat16 would move it.
            Integers count as they are.
        gradients: Let the call run a backward pass, whose operations count too. Gradients of weights
            count as activations.
    """
    if isinstance(weights, nn.Module):
        weights = [*weights.parameters(), *weights.buffers()]
    mode = _Counting({_storage(w) for w in weights}, item_bytes)
    with torch.set_grad_enabled(gradients), mode:
        call()
    return Account(
        operations=sum(mode.operations.values()),
        read_bytes=mode.read,
        written_bytes=mode.written,
        weight_bytes=mode.weights_read,
        by_name={name: (number, mode.moved[name]) for name, number in mode.operations.items()},
    )


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    def __init__(self, weights: set[int], item_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.item_bytes = item_bytes
        self.operations: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.read = self.written = self.weights_read = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
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
        self._add(name, inputs, outputs)
        return result

    def _add(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        written = sum(self._bytes(tensor) for tensor in outputs)
        read = 0
        for position, tensor in enumerate(inputs):
            size = self._bytes(tensor)
            if name in SELECTIONS and position == 0:
                size = written
            if tensor.layout != torch.strided or _storage(tensor) in self.weights:  # packed, or a parameter
                self.weights_read += size
            else:
                read += size
        self.operations[name] += 1
        self.moved[name] += read + written
        self.read += read
        self.written += written

    def _bytes(self, tensor: Tensor) -> int:
        """Bytes of the distinct numbers of a tensor: those that a broadcast repeats count once."""
        if tensor.layout != torch.strided:
            return tensor.numel() * self.item_bytes
        numbers = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            numbers *= size if stride else min(size, 1)
        return numbers * (self.item_bytes if tensor.is_floating_point() else tensor.element_size())


def _storage(tensor: Tensor) -> int:
    """What tensors of one memory have in common; a packed weight has a memory of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
