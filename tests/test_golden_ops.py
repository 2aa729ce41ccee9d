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

from bratune.errors import UnsupportedError
from bratune.kernels import registry
from bratune.kernels.api import routed_attention

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

    def attend(self, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in self.inputs)
        kv_region = self.meta["kv_region_size"]
        out = routed_attention(
            q,
            k,
            v,
            self.routes,
            heads=self.meta["heads"],
            region=tuple(self.meta["region_size"]),
            kv_region=tuple(kv_region) if kv_region else None,
            scale=self.meta["scale"],
            backend=backend,
        )
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), self.cotangent.to(dtype))
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_backend_repeats_the_official_result(backend: str, path: Path, dtype: torch.dtype) -> None:
    case = golden(path)
    try:
        found = case.attend(backend, dtype)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    for name, expected in case.expected.items():
        error = ((found[name] - expected).abs().max() / expected.abs().max()).item()
        tolerance = OUTPUT_TOLERANCE if name == "out" else GRADIENT_TOLERANCE.get(path.stem, 1e-5)
        assert error <= tolerance, f"{name} differs by {error:.1e} of its largest value"


def test_all_cases_are_here() -> None:
    assert len(FILES) == 20
