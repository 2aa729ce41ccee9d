"""Every backend against results of the official implementation (tests/golden/README.md)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bratune.backend import Config
from bratune.kernels import registry
from bratune.kernels.api import routed_attention
from bratune.machine import detect
from bratune.measure.gate import max_rel_err
from bratune.problem import Problem

FILES = sorted((Path(__file__).parent / "golden").glob("op_*.npz"))
OUTPUT_TOLERANCE = 3e-6
GRADIENT_TOLERANCE = {"op_big_logits": 1e-4}


@dataclass(frozen=True)
class Golden:
    meta: dict[str, Any]
    inputs: tuple[Tensor, Tensor, Tensor]
    routes: Tensor
    cotangent: Tensor
    expected: dict[str, Tensor]

    @property
    def problem(self) -> Problem:
        batch, height, width, channels = self.inputs[0].shape
        meta = self.meta
        return Problem(
            batch=batch,
            height=height,
            width=width,
            heads=meta["heads"],
            head_dim=channels // meta["heads"],
            region=tuple(meta["region_size"]),
            topk=self.routes.shape[-1],
            kv_height=self.inputs[1].shape[1],
            kv_width=self.inputs[1].shape[2],
            kv_region=tuple(meta["kv_region_size"] or meta["region_size"]),
            per_head=self.routes.ndim == 4,
            scale=meta["scale"],
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: str, config: Config | None = None) -> Tensor:
        problem = self.problem
        return routed_attention(
            q,
            k,
            v,
            self.routes,
            heads=problem.heads,
            region=problem.region,
            kv_region=problem.kv_region,
            scale=problem.scale,
            backend=backend,
            config=config,
        )


@functools.cache
def golden(path: Path) -> Golden:
    with np.load(path) as arrays:
        data = {name: arrays[name] for name in arrays.files}

    def nhwc(name: str) -> Tensor:
        return torch.from_numpy(data[name]).permute(0, 2, 3, 1)

    graph = torch.from_numpy(data["region_graph"])
    shared = bool((graph == graph[:, :1]).all())
    return Golden(
        meta=json.loads(str(data["meta"])),
        inputs=(nhwc("q"), nhwc("k"), nhwc("v")),
        routes=graph[:, 0] if shared else graph,
        cotangent=nhwc("gout"),
        expected={name: nhwc(name) for name in ("out", "dq", "dk", "dv")},
    )


def refusals(backend: str, case: Golden, direction: str) -> tuple[str, ...]:
    problem = case.problem.replace(direction=direction)
    return registry.get(backend).why_not(problem, detect("cpu"))


# `flex` has no gradients on a CPU and a test of its own.
BACKENDS = [name for name in registry.BACKENDS if name != "flex"]


def assert_close(found: Tensor, path: Path, name: str) -> None:
    tolerance = OUTPUT_TOLERANCE if name == "out" else GRADIENT_TOLERANCE.get(path.stem, 1e-5)
    error = max_rel_err(found, golden(path).expected[name])
    assert error <= tolerance, f"{name} differs by {error:.1e} of its largest value"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_repeats_the_official_result(backend: str, path: Path, dtype: torch.dtype) -> None:
    case = golden(path)
    if reasons := refusals(backend, case, "fwd-bwd"):
        pytest.skip("; ".join(reasons))
    q, k, v = (x.to(dtype).requires_grad_() for x in case.inputs)
    out = case.attend(q, k, v, backend)
    assert_close(out, path, "out")
    gradients = torch.autograd.grad(out, (q, k, v), case.cotangent.to(dtype))
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert_close(gradient, path, name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_flex_repeats_the_official_output(path: Path) -> None:
    case = golden(path)
    q, k, v = (x.float() for x in case.inputs)
    assert_close(case.attend(q, k, v, "flex", {"compiled": False}), path, "out")


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_backend_accepts_every_case_with_the_same_regions_and_shared_routes(backend: str) -> None:
    refused = {
        (path.stem, direction, reason)
        for path in FILES
        for direction in ("fwd", "fwd-bwd")
        for reason in refusals(backend, golden(path), direction)
        if golden(path).problem.same_regions and not golden(path).problem.per_head
    }
    if backend == "flex":
        assert {(direction, reason) for _, direction, reason in refused} == {
            ("fwd-bwd", "FlexAttention has no backward pass on a CPU; the direction fwd would work")
        }
    else:
        assert not refused


def test_all_cases_are_here() -> None:
    assert len(FILES) == 20
