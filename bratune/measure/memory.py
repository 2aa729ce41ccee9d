"""Memory of one call: what the allocator hands out, from a pass that is not timed.

On CUDA the caching allocator keeps the peak. The CPU's allocator keeps no peak, but reports each allocation
to torch's profiler; their running sum has one. It sees everything that torch allocates, temporaries inside
operators included, and nothing that a library takes from the operating system by itself.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor

from bratune.measure.device import Call, Memory

__all__ = ["cpu_memory", "cuda_memory", "live_mb", "peak_of", "release"]

MB = 1e6


def cuda_memory(call: Call, device: torch.device, *, ignore_bytes: int = 0) -> Memory:
    """Peak allocated and reserved memory of one call on a CUDA device.

    Args:
        call: What is run, twice: what its first time leaves behind is not its own.
        device: Where.
        ignore_bytes: Bytes of the meter's own buffers, left out.
    """
    call()  # libraries keep a workspace of tens of MB per stream from their first call on
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    live = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    del result
    return Memory((peak - ignore_bytes) / MB, (reserved - ignore_bytes) / MB, (peak - live) / MB)


def cpu_memory(call: Call, *, ignore_bytes: int = 0) -> Memory:
    """Peak of what one call allocates on the CPU, alone and on top of the tensors that are alive.

    Live memory is that of the distinct tensor storages that Python can reach. There is no caching
    allocator, so nothing is reserved.

    Args:
        call: What is run, once.
        ignore_bytes: Bytes of the meter's own buffers, left out.
    """
    # The tracing library behind the profiler logs its start and stop to stderr by default.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    live = _live_bytes() - ignore_bytes
    # Not `torch.profiler`, which imports the compiler: that takes as long as importing torch.
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True, acc_events=True) as profile:
        result = call()
    del result
    if profile.kineto_results is None:
        return Memory()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = peak_of(event.nbytes() for event in events)
    return Memory((live + peak) / MB, None, peak / MB)


def peak_of(changes: Iterable[int]) -> int:
    """The highest running sum of allocations (positive) and releases (negative), in bytes; at least 0."""
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _live_bytes() -> int:
    sizes: dict[int, int] = {}
    for item in gc.get_objects():
        # `type`, not `isinstance`: some lazy modules answer the latter by importing themselves.
        if not issubclass(type(item), torch.Tensor) or item.device.type != "cpu":
            continue
        if issubclass(type(item), FakeTensor):  # what a compiler traced with
            continue
        try:
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):  # sparse tensors have none
            continue
    return sum(sizes.values())


def live_mb(device: str) -> float:
    """What tensors hold on a device now, in MB."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device) / MB
    return _live_bytes() / MB


def release() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.cuda.empty_cache()
