"""torch.compile for a measurement: the time that it takes is kept apart, and it must really compile."""

from __future__ import annotations

import sys
import time
from typing import cast

import torch

from bratune.errors import MeasureError
from bratune.measure.device import Call

__all__ = ["compile_call", "forget_compiled"]


def compile_call(call: Call) -> tuple[Call, float]:
    """A compiled call and the seconds from nothing to its first result.

    Calls that were compiled before stay compiled: they may be taking turns with this one.

    Raises:
        MeasureError: the call cannot be compiled here, or nothing of it was compiled.
    """
    torch._dynamo.utils.counters.clear()
    compiled = cast(Call, torch.compile(_with_code_of_its_own(call), dynamic=False))
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


def forget_compiled() -> None:
    """Let go of what was compiled for calls that are over.

    Code that is compiled again and again reaches a limit, beyond which torch runs it uncompiled, silently.
    """
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes seconds
        torch._dynamo.reset()


def _with_code_of_its_own(call: Call) -> Call:
    """The same call in code that the compiler has not seen: calls of many cells share one code object."""

    def own() -> object:
        return call()

    own.__code__ = own.__code__.replace()
    return own
