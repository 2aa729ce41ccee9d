"""What stands around the launch of a kernel: who watches, and on which device it goes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_observed", "on_device_of"]


def is_observed(x: Tensor) -> bool:
    """Whether something looks at the operators that run: a tracer, a compiler, a counter, a fake tensor.

    Where nothing does, kernels are launched without the dispatcher: its part of an operator that is written
    in Python costs as much time on the host as everything else in the call together.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
