"""Every backend against results of the official implementation (tests/golden/README.md)."""

from __future__ import annotations

import dataclasses
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
from bratune.kernels.native.library import find
from bratune.machine import Machine, detect
from bratune.measure.gate import max_rel_err
from bratune.problem import Problem

FILES = sorted((Path(__file__).resolve().parents[1] / "golden").glob("op_*.npz"))
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


# `flex` has no gradients on a CPU and a test of its own.
BACKENDS = [name for name in registry.BACKENDS if name != "flex"]


def assert_close(found: Tensor, path: Path, name: str) -> None:
    tolerance = OUTPUT_TOLERANCE if name == "out" else GRADIENT_TOLERANCE.get(path.stem, 1e-5)
    error = max_rel_err(found, golden(path).expected[name])
    assert error <= tolerance, f"{name} of {path.stem} differs by {error:.1e} of its largest value"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_repeats_the_official_result(backend: str, path: Path, dtype: torch.dtype) -> None:
    case = golden(path)
    problem = case.problem.replace(direction="fwd-bwd", dtype=str(dtype).removeprefix("torch."))
    if reasons := registry.get(backend).why_not(problem, detect("cpu")):
        pytest.skip("; ".join(reasons))
    q, k, v = (x.to(dtype).requires_grad_() for x in case.inputs)
    out = case.attend(q, k, v, backend)
    assert_close(out, path, "out")
    gradients = torch.autograd.grad(out, (q, k, v), case.cotangent.to(dtype))
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert_close(gradient, path, name)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_backend_repeats_the_official_results_on_a_gpu(backend: str) -> None:
    for path in FILES:
        case = golden(path)
        if registry.get(backend).why_not(case.problem.replace(direction="fwd-bwd"), detect("cuda")):
            continue
        q, k, v = (x.float().cuda().requires_grad_() for x in case.inputs)
        out = dataclasses.replace(case, routes=case.routes.cuda()).attend(q, k, v, backend)
        gradients = torch.autograd.grad(out, (q, k, v), case.cotangent.float().cuda())
        for name, found in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
            assert_close(found.cpu(), path, name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_flex_repeats_the_official_output(path: Path) -> None:
    case = golden(path)
    q, k, v = (x.float() for x in case.inputs)
    assert_close(case.attend(q, k, v, "flex", {"compiled": False}), path, "out")


# Whom a CPU refuses, and why; on a GPU only the backend for CPUs is.
CPU_REFUSALS = {
    "flex": {"FlexAttention has no backward pass on a CPU; the direction fwd would work"},
    "triton": {
        "needs a CUDA device (or TRITON_INTERPRET=1 in the environment, which is very slow), found a CPU"
    },
}
GPU_REFUSALS = {"native": {"runs on CPUs, found a GPU"}}
CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="a CPU", memory_gib=16.0)
GPU = Machine(
    kind="cuda",
    device="cuda:0",
    gpu_key="h100",
    gpu_name="a GPU",
    compute_capability="9.0",
    sm_count=132,
    memory_gib=80.0,
    smem_per_block_kib=227,
    triton="3.7.1",
)


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "cuda"])
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_backend_accepts_every_case_with_the_same_regions_and_shared_routes(
    backend: str, machine: Machine
) -> None:
    problems = [golden(path).problem for path in FILES]
    reasons = {
        reason
        for problem in problems
        for direction in ("fwd", "fwd-bwd")
        for reason in registry.get(backend).why_not(problem.replace(direction=direction), machine)
        if problem.same_regions and not problem.per_head
    }
    if backend == "native" and isinstance(missing := find(), str):
        reasons -= {missing}  # no compiler here
    assert reasons == (GPU_REFUSALS if machine.is_cuda else CPU_REFUSALS).get(backend, set())


def test_all_cases_are_here() -> None:
    assert len(FILES) == 20
