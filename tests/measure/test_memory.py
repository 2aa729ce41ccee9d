"""Memory of a call on the CPU: what counts and what does not."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bratune.measure.memory import cpu_memory, cuda_memory, peak_of


def test_the_peak_is_the_highest_running_sum() -> None:
    assert peak_of([]) == 0
    assert peak_of([-5, 3]) == 0
    assert peak_of([4, 6, -10, 8]) == 10


def test_live_tensors_count_once_and_workspace_is_what_the_call_adds() -> None:
    before = cpu_memory(lambda: torch.empty(1)).peak_alloc_mb
    held = torch.empty(2_000_000)
    views = [held[:10], held.view(2, -1)]
    memory = cpu_memory(lambda: torch.empty(500_000))
    assert before is not None
    assert memory.peak_alloc_mb is not None
    assert memory.workspace_mb == 2.0
    assert 9.9 < memory.peak_alloc_mb - before < 10.1, len(views)


def test_tensors_that_only_pretend_take_no_memory() -> None:
    with FakeTensorMode():
        pretended = torch.empty(10**9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peak = cpu_memory(lambda: torch.empty(1)).peak_alloc_mb
    assert peak is not None
    assert peak < pretended.nbytes / 1e6


def test_what_a_library_keeps_from_its_first_call_on_is_not_the_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a stand-in for the allocator of a GPU; a call takes 3 MB, the first one 32 MB for good."""
    now = {"live": 100_000_000, "peak": 0}

    def call() -> None:
        kept = 0 if now["peak"] else 32_000_000
        now["live"] += kept
        now["peak"] = max(now["peak"], now["live"] + 3_000_000)

    monkeypatch.setattr(
        "torch.cuda",
        SimpleNamespace(
            synchronize=lambda device: None,
            reset_peak_memory_stats=lambda device: now.update(peak=now["live"]),
            memory_allocated=lambda device: now["live"],
            max_memory_allocated=lambda device: now["peak"],
            max_memory_reserved=lambda device: 200_000_000,
        ),
    )
    memory = cuda_memory(call, torch.device("cuda"), ignore_bytes=10_000_000)
    assert memory.workspace_mb == 3.0
    assert memory.peak_alloc_mb == 125.0
    assert memory.peak_reserved_mb == 190.0
