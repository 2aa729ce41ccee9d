"""Delayed: backends that compute, and then wait a share of the time that it took; for the study of coverage.

A process that imports this module while ``BRATUNE_STUDY_DELAY`` is set has them among the backends of this
package, so that they take turns with the others. The wait is inside the backend, where a slower
implementation would spend it; no sample is multiplied.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from bratune.kernels import registry
from bratune.kernels.gather import GatherSDPABackend
from bratune.kernels.native.backend import NativeBackend

__all__ = ["DELAYED", "DELAY_VARIABLE", "DelayedGatherSDPA", "DelayedNative"]

# How long they wait, in percent of the time that the backend took.
DELAY_VARIABLE = "BRATUNE_STUDY_DELAY"

P = ParamSpec("P")
T = TypeVar("T")


def _and_wait(call: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(call)
    def slower(*args: P.args, **kwargs: P.kwargs) -> T:
        factor = 1 + float(os.environ[DELAY_VARIABLE]) / 100
        begin = time.perf_counter()
        out = call(*args, **kwargs)
        end = begin + (time.perf_counter() - begin) * factor
        while time.perf_counter() < end:
            pass
        return out

    return slower


class DelayedGatherSDPA(GatherSDPABackend):
    """`gather-sdpa`, and then a wait."""

    name = "delayed-gather-sdpa"
    forward = _and_wait(GatherSDPABackend.forward)


class DelayedNative(NativeBackend):
    """`native`, and then a wait."""

    name = "delayed-native"
    forward = _and_wait(NativeBackend.forward)


_ALL = (DelayedGatherSDPA, DelayedNative)
# Name of each, and the backend that it is but for the wait.
DELAYED = {one.name: one.name.removeprefix("delayed-") for one in _ALL}

if DELAY_VARIABLE in os.environ:
    registry._BUILT_IN.update({one.name: f"{__name__}:{one.__name__}" for one in _ALL})
    registry.BACKENDS = tuple(registry._BUILT_IN)
