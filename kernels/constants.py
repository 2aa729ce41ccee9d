"""Small constant tensors, made once per shape and device; answers that are constants of a compiled graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["constant_in_graphs", "kept"]

Arguments = ParamSpec("Arguments")
Function = TypeVar("Function", bound=Callable[..., object])


def kept(make: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """A function whose last 64 results are kept; in a compiled or recorded graph they are made by the graph.

    What is kept belongs to every later call: nobody writes into it. It is made outside of inference mode, so
    that a call that is differentiated may use what one that was not has made.
    """

    @functools.lru_cache(maxsize=64)
    def cached(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        with torch.inference_mode(False):
            return make(*args, **kwargs)

    @functools.wraps(make)
    def get(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        if torch.compiler.is_compiling() or _recording() or type(torch.empty(0)) is not Tensor:
            # Part of a graph, or among tensors that only pretend: theirs alone.
            return make(*args, **kwargs)
        return cached(*args, **kwargs)  # type: ignore[arg-type]  # they are hashable, which is not said

    return get


def constant_in_graphs(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, without importing the compiler.

    The import takes as long as that of torch itself, in every process, and few processes compile anything.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _recording() -> bool:
    """Whether a CUDA graph is recorded: it must not read what could be dropped before it is replayed."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return False
    return torch.cuda.is_current_stream_capturing()
