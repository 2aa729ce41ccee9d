"""Small constant tensors, made once per shape and device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

__all__ = ["kept"]

Arguments = ParamSpec("Arguments")


def kept(make: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """A function whose last 64 results are kept; a compiler makes them part of its graph instead."""
    cached = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def get(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        return cached(*args, **kwargs)  # type: ignore[arg-type]  # they are hashable, which is not said

    return get
