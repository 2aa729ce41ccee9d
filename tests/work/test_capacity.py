"""The largest batch that a memory holds, predicted, and the prediction against what torch allocates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bratune import machine as machines
from bratune.errors import ProblemError, UsageError
from bratune.kernels import registry
from bratune.kernels.biformer import build
from bratune.measure.memory import cpu_memory
from bratune.variant import VARIANTS, Stage, stages
from bratune.work.capacity import RESERVED, fit_backends, needed_bytes, parse_memory

TINY = VARIANTS["biformer_tiny"]


def tiny_stages(**arguments: Any) -> tuple[Stage, ...]:
    return stages(TINY, 224, 224, **arguments)


def workspaces(found: tuple[Stage, ...], backend: str) -> dict[int, int]:
    return {
        s.index: registry.get(backend).workspace_bytes(s.problem)
        for s in found
        if s.kind == "routed" and s.problem
    }


SHORT = dataclasses.replace(TINY, depths=(1, 1, 2, 1), dims=(32, 64, 128, 256))


@pytest.mark.parametrize("direction", ["fwd", "fwd-bwd"])
@pytest.mark.parametrize("backend", ["gather", "gather-sdpa", "dense"])
def test_prediction_is_an_upper_bound_that_is_not_far(backend: str, direction: str) -> None:
    model = build(
        "biformer_tiny", backend=backend, depth=SHORT.depths, embed_dim=SHORT.dims, qk_dims=SHORT.dims
    )

    def call(batch: int) -> None:
        with torch.set_grad_enabled(direction == "fwd-bwd"):
            scores = model(torch.zeros(batch, 3, 112, 112))
        if direction == "fwd-bwd":
            torch.autograd.backward(scores.sum())
            model.zero_grad()

    def measured(batch: int) -> float:
        call(batch)
        peak = cpu_memory(lambda: call(batch)).workspace_mb
        assert peak is not None
        return peak * 1e6

    found = stages(SHORT, 112, 112, direction=direction)
    _, predicted, _ = needed_bytes(SHORT, found, workspaces(found, backend))
    per_image = (measured(4) - measured(2)) / 2
    assert 1.0 <= predicted / per_image <= 1.5


def test_batch_is_the_largest_that_fits() -> None:
    machine, memory = machines.detect("cpu"), 2 * 10**9
    for fit in fit_backends(TINY, tiny_stages(), machine, memory, ("gather", "gather-sdpa", "dense")):
        room = memory * (1 - RESERVED)
        assert fit.fixed_bytes + fit.batch * fit.image_bytes <= room
        assert fit.fixed_bytes + (fit.batch + 1) * fit.image_bytes > room


def test_fewer_images_fit_where_more_is_kept() -> None:
    machine = machines.detect("cpu")

    def batch(memory: int, direction: str = "fwd", backend: str = "gather") -> int:
        return fit_backends(TINY, tiny_stages(direction=direction), machine, memory, (backend,))[0].batch

    assert batch(4 * 10**9) > batch(2 * 10**9) > 0
    assert batch(2 * 10**9) > batch(2 * 10**9, "fwd-bwd")
    assert batch(2 * 10**9, backend="gather-sdpa") > batch(2 * 10**9, backend="gather")
    assert batch(10**6) == 0


def test_backend_that_cannot_run_here_has_no_batch_and_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("the fused backend runs here")
    (fit,) = fit_backends(TINY, tiny_stages(), machines.detect("cpu"), 10**10, ("triton",))
    assert fit.batch == 0
    assert "CUDA device" in fit.reasons[0]


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("1.5gb", 1.5e9), ("512mb", 512e6)]
)
def test_memory_is_read_with_its_unit(text: str, expected: float) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "24 apples", "0GB"])
def test_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="24GB, 80GiB or 512MB would be"):
        parse_memory(text)


def test_stages_of_several_images_are_refused() -> None:
    with pytest.raises(ProblemError, match="of batch 1"):
        needed_bytes(TINY, tiny_stages(batch=2), {})
