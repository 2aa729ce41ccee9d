"""What stands around an operation: who watches it, what transforms it, and on which device it goes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from bratune.errors import UnsupportedError

__all__ = [
    "is_exported",
    "is_observed",
    "is_recorded",
    "is_transformed",
    "on_device_of",
    "refuse_second_derivative",
]


def is_observed(x: Tensor) -> bool:
    """Whether something looks at the operators that run: a tracer, a compiler, a counter, a fake tensor.

    Where nothing does, kernels are launched without the dispatcher: its part of an operator that is written
    in Python costs as much time on the host as everything else in the call together.
    """
    return (
        is_recorded()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_recorded() -> bool:
    """Whether `torch.compile`, `torch.export` or `torch.jit.trace` makes a graph of what runs."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_exported() -> bool:
    """Whether what runs becomes a graph for other tools: `torch.export` or `torch.jit.trace` records it."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_transformed() -> bool:
    """Whether `torch.func` (grad, vmap, jvp) or forward-mode differentiation stands around what runs.

    They differentiate operations themselves: a function with a backward pass of its own would have to say
    how, and its plain form has nothing to say.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def refuse_second_derivative(name: str, instead: str) -> None:
    """Raise in a backward pass whose own gradient is wanted, because it would come out without its part.

    `torch.autograd.function.once_differentiable` raises only where its node is reached, and
    `torch.autograd.grad` leaves out what does not lead to its inputs.

    Args:
        name: What was differentiated.
        instead: What would work, as the end of a sentence.

    Raises:
        UnsupportedError: the backward pass makes a graph (``create_graph=True``).
    """
    if torch.is_grad_enabled():
        reasons = (f"its backward pass has no derivative (create_graph=True was asked for); {instead}",)
        raise UnsupportedError(name, reasons)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
