"""torch.compile for a measurement: the time that it takes is kept apart, and it must really compile."""

from __future__ import annotations

import time
from typing import cast

import torch

from bratune.errors import MeasureError
from bratune.measure.device import Call

__all__ = ["compile_call"]


def compile_call(call: Call) -> tuple[Call, float]:
    """A compiled call and the seconds from nothing to its first result.

    Raises:
        MeasureError: the call cannot be compiled here, or nothing of it was compiled.
    """
    # Calls of many cells share one code object; without a reset the limit of recompilations is reached
    # and torch runs the rest uncompiled, without a word.
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = cast(Call, torch.compile(call, dynamic=False))
    start = time.perf_counter()
    try:
        compiled()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except torch._dynamo.exc.TorchDynamoException as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MeasureError(f"torch.compile cannot compile this call here: {first}") from error
    seconds = time.perf_counter() - start
    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        raise MeasureError("torch.compile found nothing to compile in this call; regime eager would work")
    return compiled, seconds
